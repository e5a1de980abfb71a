"""Sparse structure selection: the proximal map, and the accelerated steps against the paper's own form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparsify.works import Small, small, trained, work_on
from torch import nn

from autocompress.errors import ConversionError
from autocompress.sparse.structure import StructureOptions, ruled_units, shrunk, structure


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=8), st.floats(0, 2))
def test_a_label_that_stands_once_is_shrunk_by_the_soft_threshold(values: list[float], by: float) -> None:
    given_ = torch.tensor(values, dtype=torch.float64)
    (found,) = shrunk([given_], [torch.arange(1, len(values) + 1)], by)
    expected = torch.sign(given_) * (given_.abs() - by).clamp(min=0)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_tied_scales_shrink_along_their_common_norm() -> None:
    one, two = shrunk(
        [torch.tensor([3.0, 0.1, 5.0]), torch.tensor([4.0, 0.2, 7.0])],
        [torch.tensor([1, 2, 0]), torch.tensor([1, 2, 0])],
        0.5,
    )
    torch.testing.assert_close(one, torch.tensor([2.7, 0.0, 5.0]))  # the norm 5 becomes 4.5
    torch.testing.assert_close(two, torch.tensor([3.6, 0.0, 7.0]))  # label 0 stays


def stepped(work, options: StructureOptions, steps: int, rate: float, curve: float, goal: float):  # type: ignore[no-untyped-def]
    """Minimise `curve / 2 * (scale - goal)^2` for each scale of a network by the hooks."""
    hooks = structure(work, options)
    hooks.begin()
    scales = [work.network.get_parameter(f"bn{n}.weight") for n in (1, 2, 3)]
    for _ in range(steps):
        for scale in scales:
            scale.grad = curve * (scale.detach() - goal)
        hooks.gradients()
        assert all(scale.grad is None for scale in scales)
        hooks.after_step(rate)
    return hooks, scales


def test_steps_are_those_of_the_paper_with_its_own_variables() -> None:
    """Huang & Wang, equations 9 to 11: extrapolation first, then gradient and proximal step, in floats."""
    rate, strength, momentum, curve, goal = 0.1, 0.3, 0.8, 2.0, 1.7
    work = work_on(small())
    options = StructureOptions(strength=strength, momentum=momentum)
    hooks, scales = stepped(work, options, 7, rate, curve, goal)
    now, before = 1.0, 1.0
    for _ in range(7):
        ahead = now + momentum * (now - before)
        z = ahead - rate * curve * (ahead - goal)
        now, before = math.copysign(max(abs(z) - rate * strength, 0.0), z), now
    # bn3 has no layer tied to its own: each scale stands alone.
    torch.testing.assert_close(work.state["factors"]["bn3.weight"], torch.full((10,), now))
    torch.testing.assert_close(scales[2].detach(), torch.full((10,), now + momentum * (now - before)))
    hooks.finish()  # what looks ahead is put back
    torch.testing.assert_close(scales[2].detach(), torch.full((10,), now))


def test_it_converges_to_the_shrunk_optimum_and_to_exact_zeros() -> None:
    options = StructureOptions(strength=0.3, momentum=0.5)
    work = work_on(small())
    hooks, _ = stepped(work, options, 200, 0.1, 2.0, 1.7)
    hooks.finish()
    assert isinstance(work.network, Small)
    torch.testing.assert_close(work.network.bn3.weight.detach(), torch.full((10,), 1.7 - 0.3 / 2))
    # Two tied scales: the norm sqrt(2) * 1.7 shrinks by 0.15.
    tied = 1.7 - 0.15 / math.sqrt(2)
    torch.testing.assert_close(work.network.bn1.weight.detach(), torch.full((8,), tied))
    work = work_on(small())
    with torch.no_grad():
        work.network.get_parameter("bn3.bias").fill_(0.4)
    hooks, _ = stepped(work, options, 200, 0.1, 2.0, 0.14)
    hooks.finish()
    assert not work.network.get_parameter("bn3.weight").any()
    assert not work.network.get_parameter("bn3.bias").any()  # nor a shift is left
    assert not work.network.get_parameter("conv4.weight").any()
    # sqrt(2) * 0.14 is above 0.15: what is tied has to be small together.
    assert (work.network.get_parameter("bn1.weight") > 0).all()


def test_training_makes_factors_zero_and_the_rest_of_their_units() -> None:
    model = small()
    with torch.no_grad():  # those of a new network, all 1, would fall together
        for norm in (model.bn1, model.bn2, model.bn3):
            norm.weight.copy_(torch.linspace(0.2, 3.0, len(norm.weight)))
    found = trained("structure", model, options={"strength": 2})
    zero = {group["name"]: group["zero"] for group in found.account["groups"]}
    assert 0 < zero["conv3"] < 10
    assert 0 < zero["conv1"] < 8
    (bn3,) = (each for each in found.account["scales"] if each["name"] == "bn3.weight")
    assert bn3["zero"] == zero["conv3"]
    assert found.account["notes"] == ["not made sparse, for lack of batch norm: conv4"]


def test_a_layer_that_is_lost_is_named() -> None:
    found = trained("structure", options={"strength": 100})
    assert found.account["notes"][-1].startswith("no channel is left in conv1, conv3: choose a smaller")


class Bare(Small):
    """The second of the tied layers has no norm: its channels are not ruled by scales."""

    def __init__(self) -> None:
        super().__init__()
        self.bn2 = nn.Identity()  # type: ignore[assignment]


def test_units_that_a_layer_makes_without_a_norm_are_left_alone() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        work = work_on(Bare())
    (last,) = (group for group in work.source.groups if group.name == "conv3")
    assert ruled_units(work).tolist() == sorted(last.units.tolist())
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3))
    with pytest.raises(ConversionError, match="trains scales of batch norm"):
        structure(work_on(plain), StructureOptions())

    class Before(nn.Module):
        """Norms stand before layers, as in pre-activation networks."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.act = nn.Conv2d(3, 6, 3), nn.PReLU(6)
            self.norm, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.norm(self.act(self.one(x))).mean((2, 3)))

    with pytest.raises(ConversionError, match="all of whose layers are followed by batch norm, and Before"):
        structure(work_on(Before()), StructureOptions())
