"""Losses between maps against loops over their elements, and what they do not see."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from autocompress.distill.feature_losses import (
    activation_boundary,
    attention_transfer,
    cosine,
    factor_transfer,
    flow,
    hint,
    neuron_selectivity,
    self_attention,
)
from autocompress.errors import DistillationError

Array = NDArray[np.float64]
seeds = st.integers(0, 15)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halved(x: Array) -> Array:
    """Means of 2x2 pixels."""
    found = np.zeros((*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2))
    for i, j in product(range(found.shape[2]), range(found.shape[3])):
        found[:, :, i, j] = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3))
    return found


def rotation(size: int) -> Tensor:
    return torch.linalg.qr(random(size, size, seed=99)).Q


# Hints -----------------------------------------------------------------------------------------------------


@given(seeds)
def test_a_hint_is_the_mean_squared_difference(seed: int) -> None:
    own, other = random(2, 3, 2, 2, seed=seed), random(2, 3, 2, 2, seed=seed + 1)
    squares = [(a - b) ** 2 for a, b in zip(own.flatten().tolist(), other.flatten().tolist(), strict=True)]
    assert hint(own, other).item() == pytest.approx(sum(squares) / 24)


# Attention -------------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from([1.0, 2.0, 4.0]))
def test_attention_is_the_energy_over_channels_scaled_to_length_1(seed: int, power: float) -> None:
    own, other = random(2, 3, 4, 6, seed=seed), random(2, 5, 2, 3, seed=seed + 1)
    total = 0.0
    for one, target in zip(halved(own.numpy()), other.numpy(), strict=True):
        maps = []
        for features in (one, target):
            energy = [
                sum(abs(channel[i, j]) ** power for channel in features)
                for i, j in product(range(2), range(3))
            ]
            maps.append([value / math.hypot(*energy) for value in energy])
        total += sum((a - b) ** 2 for a, b in zip(*maps, strict=True))
    found = attention_transfer(own, other, power=power).item()
    assert found == pytest.approx(total / 12)
    back = attention_transfer(other, own, power=power).item()  # the teacher's is the larger
    assert back == pytest.approx(found)


@given(seeds, st.floats(0.1, 10))
def test_attention_sees_neither_scale_nor_order_nor_copies_of_channels(seed: int, scale: float) -> None:
    own, other = random(2, 3, 4, 4, seed=seed), random(2, 5, 4, 4, seed=seed + 1)
    loss = attention_transfer(own, other)
    torch.testing.assert_close(attention_transfer(own, scale * other), loss)
    torch.testing.assert_close(attention_transfer(scale * own, other), loss)
    torch.testing.assert_close(attention_transfer(own.flip(1), other.repeat(1, 3, 1, 1)), loss)


def test_maps_that_are_each_larger_one_way_meet_at_the_smaller_of_both() -> None:
    own, other = random(2, 3, 4, 2), random(2, 3, 2, 4, seed=1)
    pooled = own.reshape(2, 3, 2, 2, 2).mean(3), other.reshape(2, 3, 2, 2, 2).mean(4)
    torch.testing.assert_close(attention_transfer(own, other), attention_transfer(*pooled))


# Boundaries ------------------------------------------------------------------------------------------------


@given(seeds, st.floats(0, 2))
def test_a_neuron_costs_what_it_lacks_to_the_margin_on_the_teacher_s_side(seed: int, margin: float) -> None:
    own, other = random(3, 8, seed=seed), random(3, 8, seed=seed + 1)
    total = 0.0
    for s, t in zip(own.flatten().tolist(), other.flatten().tolist(), strict=True):
        lacking = margin - s if t > 0 else margin + s
        total += max(0.0, lacking) ** 2
    assert activation_boundary(own, other, margin=margin).item() == pytest.approx(total / 24)


def test_beyond_the_margin_nothing_is_asked_and_a_dead_neuron_is_on_the_negative_side() -> None:
    teacher = torch.tensor([[0.1, -5.0, 0.0, 0.0]])
    assert activation_boundary(torch.tensor([[1.0, -1.0, -3.0, -1.5]]), teacher) == 0
    assert activation_boundary(torch.tensor([[1.0, -1.0, -3.0, 1.0]]), teacher) == 1  # 2 ** 2 / 4


# Factors ---------------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from([1, 2]))
def test_factors_are_compared_at_length_1(seed: int, p: Any) -> None:
    own, other = random(3, 2, 2, 2, seed=seed), random(3, 2, 2, 2, seed=seed + 1)
    total = 0.0
    for one, target in zip(own.flatten(1).tolist(), other.flatten(1).tolist(), strict=True):
        lengths = math.hypot(*one), math.hypot(*target)
        total += sum(abs(a / lengths[0] - b / lengths[1]) ** p for a, b in zip(one, target, strict=True))
    assert factor_transfer(own, other, p=p).item() == pytest.approx(total / 24)
    scaled = factor_transfer(3 * own, other / 7, p=p).item()
    assert scaled == pytest.approx(total / 24)


# Selectivity -----------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from(["polynomial", "linear"]))
def test_selectivity_is_the_discrepancy_of_kernels_over_pairs_of_channels(seed: int, kernel: Any) -> None:
    own, other = random(2, 3, 4, 4, seed=seed), random(2, 5, 2, 2, seed=seed + 1)

    def mean(first: Array, second: Array) -> float:
        values = []
        for x, y in product(first, second):
            inner = float((x * y).sum()) / (math.hypot(*x.ravel()) * math.hypot(*y.ravel()))
            values.append(inner**2 if kernel == "polynomial" else inner)
        return sum(values) / len(values)

    expected = np.mean(
        [
            mean(s, s) + mean(t, t) - 2 * mean(s, t)
            for s, t in zip(halved(own.numpy()), other.numpy(), strict=True)
        ]
    )
    assert neuron_selectivity(own, other, kernel=kernel).item() == pytest.approx(expected)


@given(seeds)
def test_selectivity_sees_neither_order_nor_scales_nor_copies_of_channels_nor_moved_pixels(seed: int) -> None:
    own, other = random(2, 3, 4, 4, seed=seed), random(2, 5, 4, 4, seed=seed + 1)
    loss = neuron_selectivity(own, other)
    scales = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(neuron_selectivity((own * scales).flip(1), other.repeat(1, 2, 1, 1)), loss)
    torch.testing.assert_close(neuron_selectivity(own.flip(3), other.flip(3)), loss)


# Cosine ----------------------------------------------------------------------------------------------------


@given(seeds)
def test_the_cosine_is_that_of_the_means_over_pixels(seed: int) -> None:
    own, other = random(3, 5, 2, 4, seed=seed), random(3, 5, seed=seed + 1)
    total = 0.0
    for features, target in zip(own.tolist(), other.tolist(), strict=True):
        means = [sum(map(sum, channel)) / 8 for channel in features]
        inner = sum(a * b for a, b in zip(means, target, strict=True))
        total += 1 - inner / (math.hypot(*means) * math.hypot(*target))
    assert cosine(own, other).item() == pytest.approx(total / 3)
    pooled = cosine(2 * own.mean((2, 3)), other[:, :, None, None].expand(-1, -1, 3, 3)).item()
    assert pooled == pytest.approx(total / 3)


def test_the_cosine_goes_from_0_to_2() -> None:
    x = random(3, 5)
    assert cosine(3 * x, x).item() == pytest.approx(0, abs=1e-12)
    assert cosine(-x, x).item() == pytest.approx(2)


# Flow ------------------------------------------------------------------------------------------------------


@given(seeds)
def test_flow_is_the_mean_product_of_channels_of_two_layers(seed: int) -> None:
    first, second = random(2, 3, 4, 4, seed=seed), random(2, 4, 2, 2, seed=seed + 1)
    targets = random(2, 3, 2, 2, seed=seed + 2), random(2, 4, 2, 2, seed=seed + 3)
    pairs = (halved(first.numpy()), second.numpy()), tuple(x.numpy() for x in targets)
    squares = []
    for n, i, j in product(range(2), range(3), range(4)):
        own, other = ((one[n, i] * two[n, j]).mean() for one, two in pairs)
        squares.append((own - other) ** 2)
    assert flow(first, second, *targets).item() == pytest.approx(np.mean(squares))


def test_flow_does_not_see_where_pixels_are_and_asks_for_both_layers() -> None:
    first, second = random(2, 3, 4, 4), random(2, 5, 4, 4, seed=1)
    others = random(2, 3, 4, 4, seed=2), random(2, 5, 4, 4, seed=3)
    loss = flow(first, second, *others)
    torch.testing.assert_close(flow(first.flip(2), second.flip(2), *others), loss)
    inputs = [x.requires_grad_() for x in (first, second, *others)]
    flow(*inputs).backward()
    assert [x.grad is not None for x in inputs] == [True, True, False, False]
    message = r"maps of as many channels, got \(2, 5, 4, 4\) of the student and \(2, 3, 4, 4\) of the teacher"
    with pytest.raises(DistillationError, match=message):
        flow(first, second, first, first)


# Self-attention --------------------------------------------------------------------------------------------


def doubled(x: Array) -> Array:
    """A map of twice the height and width by bilinear interpolation between centres of pixels."""
    height, width = x.shape
    found = np.zeros((2 * height, 2 * width))
    for i, j in product(range(2 * height), range(2 * width)):
        row, column = (max(0.0, (place + 0.5) / 2 - 0.5) for place in (i, j))
        top, left = int(row), int(column)
        below, right = min(top + 1, height - 1), min(left + 1, width - 1)
        upper = x[top, left] * (1 - column + left) + x[top, right] * (column - left)
        lower = x[below, left] * (1 - column + left) + x[below, right] * (column - left)
        found[i, j] = upper * (1 - row + top) + lower * (row - top)
    return found


@given(seeds)
def test_each_layer_s_attention_is_compared_with_that_of_the_next(seed: int) -> None:
    maps = [
        random(2, 3, 4, 4, seed=seed),
        random(2, 5, 4, 4, seed=seed + 1),
        random(2, 4, 2, 2, seed=seed + 2),
    ]
    total = 0.0
    for n in range(2):
        energies = [(x[n].numpy() ** 2).sum(0) for x in maps]
        for own, target in ((energies[0], energies[1]), (energies[1], doubled(energies[2]))):
            p, q = (np.exp(x) / np.exp(x).sum() for x in (own, target))
            total += ((p - q) ** 2).sum()
    assert self_attention(maps).item() == pytest.approx(total / 2)


def test_only_the_shallower_layer_of_a_pair_is_moved() -> None:
    maps = [random(2, 3, 4, 4, seed=n).requires_grad_() for n in range(3)]
    torch.autograd.gradcheck(lambda x: self_attention([x, maps[1].detach()]), (maps[0],))
    self_attention(maps).backward()
    assert maps[2].grad is None
    alone = maps[1].detach().requires_grad_()
    self_attention([alone, maps[2]]).backward()
    assert alone.grad is not None
    torch.testing.assert_close(maps[1].grad, alone.grad)


def test_self_attention_is_0_where_layers_look_at_the_same_and_rotations_of_channels_do_not_count() -> None:
    x = random(2, 3, 4, 4)
    rotated = torch.einsum("ij,njhw->nihw", rotation(3), x)
    assert self_attention([x, rotated, x]).item() == pytest.approx(0, abs=1e-20)
    batch = [torch.cat([m, m]) for m in (x, random(2, 3, 4, 4, seed=1))]
    torch.testing.assert_close(self_attention(batch), self_attention([m[:2] for m in batch]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = self_attention([m.bfloat16() for m in batch])
    assert torch.equal(low, self_attention([m.bfloat16().float() for m in batch]))


@pytest.mark.parametrize("shapes", [[], [(2, 3, 4, 4)], [(2, 3, 4, 4), (2, 3)], [(2, 3, 4, 4), (1, 3, 4, 4)]])
def test_self_attention_without_two_maps_is_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(DistillationError, match=r"compares 2 or more maps .* got .*; watch other layers"):
        self_attention([torch.ones(shape) for shape in shapes])
