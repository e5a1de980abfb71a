"""Cosine distillation of features: the loss by hand, and nothing left in the network."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distill.test_finetune import DATA, SIDE, TASK, gradients_of_first_step, settings, teacher_network
from small_networks import assert_equal, small_network
from torch import Tensor, nn

from autocompress.distill.features import WithFeatures, last_linear
from autocompress.distill.finetune import finetune
from autocompress.errors import RecipeError
from autocompress.training.loop import training_batches

pytestmark = pytest.mark.usefixtures("one_thread")


def features(network: nn.Module, images: Tensor) -> Tensor:
    """What enters the last layer of `small_network`."""
    found: Tensor = network[:-1](images)  # type: ignore[index]
    return found


def test_the_gradient_is_that_of_labels_predictions_and_features_of_one_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = settings(alpha=0.4, temperature=1.0, cosine=3.0)
    teacher = small_network(seed=4)
    network, plain, known = small_network(), small_network().train(), small_network(seed=4).eval()
    found = gradients_of_first_step(
        monkeypatch, network, DATA, TASK, chosen, resolution=SIDE, teacher=teacher
    )
    images, labels = next(training_batches(DATA, chosen, epoch=0, seed=chosen.seed))
    own, other = features(plain, images), features(known, images).detach()
    outputs, target = plain[-1](own), known(images).detach().softmax(1)  # type: ignore[index]
    distilled = (target * (target.log() - outputs.log_softmax(1))).sum(1).mean()
    cosine = (own * other).sum(1) / (own.norm(dim=1) * other.norm(dim=1))
    loss = 0.6 * F.cross_entropy(outputs, labels) + 0.4 * distilled + 3.0 * (1 - cosine).mean()
    loss.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_features_of_other_widths_go_through_a_map_that_is_dropped() -> None:
    network, teacher = small_network().eval(), teacher_network().eval()
    names, before = set(network.state_dict()), teacher.state_dict()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    watched = WithFeatures(
        network, network, teacher, (torch.zeros(1, 3, *SIDE), torch.zeros(1, 3, *SIDE)), seed=0
    )
    assert isinstance(watched.projector, nn.Linear)
    assert watched.projector.weight.shape == (9, 6)
    images = torch.randn(4, 3, *SIDE)
    watched(images), teacher(images)
    own, other = features(network, images), features(teacher, images)
    expected = 1 - F.cosine_similarity(own @ watched.projector.weight.T, other).mean()
    torch.testing.assert_close(watched.loss(), expected)
    watched.close()
    finetune(network, DATA, TASK, settings(cosine=1.0), resolution=SIDE, teacher=teacher)
    assert set(network.state_dict()) == names
    assert_equal(teacher.state_dict(), kept)
    assert not any(module._forward_pre_hooks for m in (network, teacher) for module in m.modules())


def test_features_become_alike() -> None:
    def distance(cosine: float) -> float:
        network, teacher = small_network(), small_network(seed=4)
        chosen = settings(epochs=12, cosine=cosine, alpha=0.0)
        finetune(network, DATA, TASK, chosen, resolution=SIDE, teacher=teacher, keep_best=False)
        images = torch.stack([DATA.validation[i][0] for i in range(16)])
        with torch.no_grad():
            own, other = features(network, images), features(teacher.eval(), images)
        return float(1 - F.cosine_similarity(own, other).mean())

    assert distance(5.0) < 0.5 * distance(0.0)


def test_the_last_linear_layer_is_the_one_that_runs_last() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first, self.idle = nn.Linear(4, 2), nn.Linear(3, 4), nn.Linear(9, 9)

        def forward(self, x: Tensor) -> Any:
            return self.last(self.first(x))

    network = Backwards().train()
    assert last_linear(network, torch.zeros(1, 3)) is network.last
    assert network.training


def test_what_lacks_a_teacher_or_a_linear_layer_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"finetune.cosine \(1\) compares with a teacher"):
        finetune(small_network(), DATA, TASK, settings(cosine=1.0), resolution=SIDE)
    bare = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(RecipeError, match="last linear layer, and Sequential runs none; set it to 0"):
        finetune(bare, DATA, TASK, settings(cosine=1.0), resolution=SIDE, teacher=small_network())
