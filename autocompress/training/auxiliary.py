"""An auxiliary classifier: a second loss in the middle of a network, in training only.

Sources: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, section 5; Liu et al., DARTS, ICLR 2019,
whose repository has these layers and this place.
"""

from collections.abc import Callable, Sized
from typing import Any, cast

import torch
from torch import Tensor, nn

from autocompress.errors import RecipeError
from autocompress.ops import Shape
from autocompress.recipe import FinetuneSettings
from autocompress.training.data import DataSet

REDUCED, FEATURES = 128, 768
"""Channels of the 1x1 convolution, and of the one that sees the whole map."""


class AuxiliaryHead(nn.Module):
    """A small classifier of a feature map.

    Args:
        shape: Channels, height and width of the map.
        outputs: Numbers an image.
    """

    def __init__(self, shape: Shape, outputs: int) -> None:
        super().__init__()
        channels, height, width = shape
        pool: nn.Module = nn.AvgPool2d(5, stride=3, count_include_pad=False)
        if min(height, width) < 8:  # pooling would leave less than 2x2
            pool = nn.AdaptiveAvgPool2d((min(height, 2), min(width, 2)))
        self.features = nn.Sequential(
            nn.ReLU(),  # not in place: the network goes on with the map
            pool,
            nn.Conv2d(channels, REDUCED, 1, bias=False),
            nn.BatchNorm2d(REDUCED),
            nn.ReLU(),
            nn.Conv2d(REDUCED, FEATURES, (min(height, 2), min(width, 2)), bias=False),
            nn.BatchNorm2d(FEATURES),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(FEATURES, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, channels, height, width)` to `(batch, outputs)`.

        Maps of more than 10 pixels a side leave several positions, whose mean is classified; DARTS has none.
        """
        features: Tensor = self.features(x)
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits


class WithAuxiliary(nn.Module):
    """A network and the auxiliary head on one of its blocks, to be trained together.

    The network is not changed: it is watched while this module runs.

    Args:
        network: Blocks, run one after another.
        block: Position of the block whose output the head sees; the last tensor of a tuple.
        head: The classifier.
    """

    def __init__(self, network: nn.Sequential, block: int, head: nn.Module) -> None:
        super().__init__()
        self.network, self.head = network, head
        self.block = block

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images to the outputs of the network and those of the head, both `(batch, outputs)`."""
        # At once, not after the network: a later block might change the map in place.
        outputs, aside = _watched(self.network, self.block, lambda output: self.head(_last(output)), x)
        return outputs, aside


def with_auxiliary(
    network: nn.Module, data: DataSet, settings: FinetuneSettings, resolution: tuple[int, int]
) -> WithAuxiliary:
    """Put an auxiliary head on the output of the block after two thirds of a network's blocks.

    With a stem and a classifier as first and last block this is where DARTS has it: cell 13 of 20, from 0.

    Args:
        network: Left in evaluation mode, not changed otherwise.
        data: What it is trained on.
        settings: The seed decides the head's first weights.
        resolution: Height and width of the network's input.

    Raises:
        RecipeError: The labels are no classes or the outputs not one number a class; the network is no
            sequence of at least 3 blocks, or has no feature map there; or a step has one image, of which
            batch norm has no variance.
    """
    way_out = f"; set finetune.auxiliary ({settings.auxiliary:g}) to 0"
    if data.classes == 0:
        raise RecipeError(
            f"an auxiliary classifier needs labels that are classes, not those of {data.name}{way_out}"
        )
    if min(settings.batch_size, len(cast(Sized, data.train))) < 2:
        raise RecipeError(f"an auxiliary classifier needs at least 2 images a step, got 1{way_out}")
    count = len(network) if isinstance(network, nn.Sequential) else 0
    if not isinstance(network, nn.Sequential) or count < 3:
        got = f"{count} in a row" if count else f"a {type(network).__name__}"
        raise RecipeError(f"an auxiliary classifier needs a network of at least 3 blocks, got {got}{way_out}")
    # Never on the last block, which is the classifier itself.
    block = min(2 * count // 3, count - 2)
    with torch.no_grad():
        images = torch.zeros(1, data.in_shape[0], *resolution)
        outputs, seen = _watched(network.eval(), block, _last, images)
    if outputs.dim() != 2:
        shape = tuple(outputs.shape)
        raise RecipeError(f"an auxiliary classifier needs outputs (batch, classes), got {shape}{way_out}")
    if not isinstance(seen, Tensor) or seen.dim() != 4:
        got = str(tuple(seen.shape)) if isinstance(seen, Tensor) else type(seen).__name__
        raise RecipeError(
            "an auxiliary classifier needs a map (batch, channels, height, width) after two thirds of the "
            f"blocks, got {got} from block {block + 1} of {count}{way_out}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        # What takes the outputs of the network takes these: they have the same shape.
        head = AuxiliaryHead((seen.shape[1], seen.shape[2], seen.shape[3]), outputs.shape[1])
    return WithAuxiliary(network, block, head)


def _last(output: Any) -> Any:
    """Return the last tensor of what a block passes on: a cell may pass on the output before its own, too."""
    return output[-1] if isinstance(output, tuple) else output


def _watched(network: nn.Sequential, block: int, look: Callable[[Any], Any], x: Tensor) -> tuple[Tensor, Any]:
    """Run a network; return its outputs, and what `look` makes of the output of one block."""
    seen: list[Any] = []
    hook = network[block].register_forward_hook(lambda _, __, output: seen.append(look(output)))
    try:
        outputs: Tensor = network(x)
    finally:
        hook.remove()
    return outputs, seen[0]
