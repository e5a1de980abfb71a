"""Network slimming against the derivative of its penalty, and what it does to scales."""

import copy

import pytest
import torch
from sparsify.works import small, trained, training, work_on
from torch import nn

from autocompress.sparse.slimming import SlimmingOptions, reach, slimming
from autocompress.training.loop import learning_rate


def test_the_gradient_is_that_of_the_penalty_on_every_scale() -> None:
    work = work_on(small())
    hooks = slimming(work, SlimmingOptions(strength=0.3))
    network, other = work.network, copy.deepcopy(work.network)
    names = [f"bn{n}.weight" for n in (1, 2, 3)]
    with torch.no_grad():
        for each in (network, other):
            each.get_parameter("bn1.weight")[:3] = torch.tensor([0.0, -0.7, 2.0])
    x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    network(x).square().sum().backward()
    hooks.gradients()
    penalty = sum(other.get_parameter(name).abs().sum() for name in names)
    (other(x).square().sum() + 0.3 * penalty).backward()
    for (name, one), two in zip(network.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)


def test_scales_of_channels_that_stay_get_no_penalty() -> None:
    work = work_on(small(), ignore=("conv1",))
    hooks = slimming(work, SlimmingOptions(strength=0.3))
    for parameter in work.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    hooks.gradients()
    pushed = {name for name, p in work.network.named_parameters() if p.grad is not None and p.grad.any()}
    assert pushed == {"bn3.weight"}


def test_of_a_norm_over_several_layers_only_the_channels_that_can_go_get_it() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3)
            self.norm, self.fc = nn.BatchNorm2d(9), nn.Linear(9, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.norm(torch.cat([self.one(x), self.two(x)], 1)).relu().mean((2, 3)))

    work = work_on(Joined(), ignore=("two",))
    hooks = slimming(work, SlimmingOptions(strength=0.5))
    scale = work.network.get_parameter("norm.weight")
    scale.grad = torch.zeros_like(scale)
    hooks.gradients()
    assert scale.grad.tolist() == [0.5] * 4 + [0.0] * 5


def test_scales_shrink_by_more_with_the_penalty_and_by_no_more_than_its_reach() -> None:
    plain = trained("slimming", options={"strength": 1e-9})
    found = trained("slimming", options={"strength": 0.02})
    reached = found.account["reach"]
    for one, other in zip(found.account["scales"], plain.account["scales"], strict=True):
        assert one["mean"] < other["mean"] - 0.3 * reached
    assert found.account["notes"] == ["not made sparse, for lack of batch norm: conv4"]


def test_the_reach_is_the_way_of_a_scale_that_only_the_penalty_moves() -> None:
    settings = training(epochs=2, momentum=0.5, learning_rate=0.1)
    work = work_on(small(), settings=settings)
    rates = [learning_rate(settings, step, 4, 2) for step in range(8)]
    assert reach(work, 0.3, 0.5) == pytest.approx(0.3 * sum(rates) / 0.5)
    scale = torch.nn.Parameter(torch.tensor(10.0))
    optimizer = torch.optim.SGD([scale], lr=0.1, momentum=0.5, nesterov=True)
    for rate in [*rates, *[0.0] * 20]:
        optimizer.param_groups[0]["lr"] = rate
        scale.grad = torch.tensor(0.3)
        optimizer.step()
    assert 0.6 * reach(work, 0.3, 0.5) < 10 - float(scale.detach()) <= reach(work, 0.3, 0.5)
