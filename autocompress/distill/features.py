"""Distillation of features: what enters the classifier points the same way in student and teacher."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.errors import RecipeError


class WithFeatures(nn.Module):
    """A network that is watched at its last linear layer, as its teacher is; to be trained in its place.

    Neither is changed: they are watched until `close`. Where the widths differ, a linear map without bias
    takes the student's features to the teacher's; it is trained along and is no part of the network.

    Source: Aghli & Ribeiro, "Combining Weight Pruning and Knowledge Distillation For CNN Compression", CVPR
    Workshops 2021: a cosine loss on deep features. There the widths are equal; the map is ours.

    Args:
        trained: What is run and trained: the network, or a module that runs it.
        network: The student.
        teacher: Its teacher.
        images: A batch for each of the two, to find the layers.
        seed: Of the map's first weights.

    Raises:
        RecipeError: One of them runs no linear layer.
    """

    def __init__(
        self,
        trained: nn.Module,
        network: nn.Module,
        teacher: nn.Module,
        images: tuple[Tensor, Tensor],
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self.trained = trained
        layers = last_linear(network, images[0]), last_linear(teacher, images[1])
        self._seen: dict[int, Tensor] = {}
        self._hooks = [layer.register_forward_pre_hook(self._watch(n)) for n, layer in enumerate(layers)]
        entering, leaving = layers[0].in_features, layers[1].in_features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector: nn.Module = (
                nn.Identity() if entering == leaving else nn.Linear(entering, leaving, bias=False)
            )

    def _watch(self, number: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._seen[number] = inputs[0]

        return hook

    def forward(self, x: Tensor) -> Any:
        """Run what is trained."""
        return self.trained(x)

    def loss(self) -> Tensor:
        """Return 1 - cosine of the features of the last runs of both, the mean over the batch; 0 to 2."""
        student, teacher = self._seen[0].float(), self._seen[1].float().detach()
        return 1 - F.cosine_similarity(self.projector(student), teacher, dim=-1).mean()

    def close(self) -> None:
        """Watch no more."""
        for hook in self._hooks:
            hook.remove()
        self._seen.clear()


def last_linear(network: nn.Module, images: Tensor) -> nn.Linear:
    """Return the linear layer that runs last.

    Raises:
        RecipeError: There is none.
    """
    ran: list[nn.Linear] = []
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(lambda layer, _: ran.append(layer)) for layer in layers]
    training = network.training
    try:
        with torch.no_grad():
            network.eval()(images)
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    if not ran:
        raise RecipeError(
            f"finetune.cosine compares what enters the last linear layer, and {type(network).__name__} runs "
            "none; set it to 0"
        )
    return ran[-1]
