"""Losses of dense tasks against loops over regions, pixels and boxes."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from autocompress.distill.dense_losses import (
    bounded_regression,
    channelwise,
    inter_region_affinity,
    weighted_cross_entropy,
)
from autocompress.errors import DistillationError

seeds = st.integers(0, 15)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Regions ---------------------------------------------------------------------------------------------------


def affinities(features: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[tuple[int, int, int], float]:
    """Cosines by moment and classes, of one image."""
    step = labels.shape[0] // features.shape[1]
    nodes: dict[int, list[list[float]]] = {}
    for k in sorted({int(c) for c in labels.ravel() if 0 <= c < 4}):
        inside = [
            features[:, i, j]
            for i, j in product(*map(range, features.shape[1:]))
            if k in labels[step * i : step * (i + 1), step * j : step * (j + 1)]
        ]
        moments: list[list[float]] = [[], [], []]
        for values in np.array(inside).T:
            mean = sum(values) / len(values)
            variance = sum((v - mean) ** 2 for v in values) / len(values)
            third = sum((v - mean) ** 3 for v in values) / len(values)
            for moment, value in zip(
                moments, (mean, variance, third / (variance + 1e-6) ** 1.5), strict=True
            ):
                moment.append(value)
        nodes[k] = moments

    def cosine(one: list[float], other: list[float]) -> float:
        lengths = math.hypot(*one) * math.hypot(*other)
        return sum(a * b for a, b in zip(one, other, strict=True)) / lengths if lengths else 0.0

    return {(m, a, b): cosine(nodes[a][m], nodes[b][m]) for m in range(3) for a in nodes for b in nodes}


@given(seeds)
def test_regions_are_compared_by_the_cosines_of_their_moments(seed: int) -> None:
    own, other = random(3, 3, 4, 4, seed=seed), random(3, 5, 8, 8, seed=seed + 1)
    # Class 3 is in no image, class 2 not in the first; 255 and -1 are nothing.
    labels = torch.randint(0, 3, (3, 8, 8), generator=torch.Generator().manual_seed(seed))
    labels[0] = labels[0].clamp_max(1)
    labels[:, 0, :3], labels[:, 1, :2] = 255, -1
    losses = []
    for n in range(3):
        one, target = (affinities(x[n].numpy(), labels[n].numpy()) for x in (own, other))
        assert len(one) == 3 * (2 if n == 0 else 3) ** 2
        losses.append(np.mean([(one[key] - target[key]) ** 2 for key in one]))
    found = inter_region_affinity(own, other, labels, 4).item()
    assert found == pytest.approx(np.mean(losses))


@given(seeds, st.floats(0.1, 10))
def test_affinities_see_neither_scale_nor_where_the_pixels_of_a_region_are(seed: int, scale: float) -> None:
    own, other = random(2, 3, 4, 4, seed=seed), random(2, 5, 4, 4, seed=seed + 1)
    labels = torch.arange(16).reshape(1, 4, 4).repeat(2, 1, 1) % 3
    loss = inter_region_affinity(own, other, labels, 3)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    moved, shuffled = (x.flatten(-2)[..., order].unflatten(-1, (4, 4)) for x in (own, labels))
    # The regularised variance of the skewness is not scaled.
    torch.testing.assert_close(
        inter_region_affinity(scale * own, other, labels, 3), loss, rtol=1e-3, atol=1e-5
    )
    still = random(2, 5, 4, 4, seed=seed + 1).flatten(-2)[..., order].unflatten(-1, (4, 4))
    torch.testing.assert_close(inter_region_affinity(moved, still, shuffled, 3), loss)


def test_a_region_of_one_pixel_and_an_image_without_any_leave_no_nan() -> None:
    own = random(2, 3, 4, 4).requires_grad_()
    labels = torch.full((2, 4, 4), 255)
    labels[0, 0, 0], labels[0, 1, 1] = 0, 1
    loss = inter_region_affinity(own, random(2, 3, 4, 4, seed=1), labels, 2)
    loss.backward()
    assert loss > 0
    assert own.grad is not None
    assert own.grad.isfinite().all()
    assert (own.grad != 0).any(1).nonzero().tolist() == [[0, 0, 0], [0, 1, 1]]
    alone = inter_region_affinity(own[:1], random(2, 3, 4, 4, seed=1)[:1], labels[:1], 2)
    torch.testing.assert_close(loss, alone / 2)


def test_labels_without_a_class_are_refused() -> None:
    with pytest.raises(DistillationError, match=r"no pixel has a label in 0..2; check labels and classes"):
        inter_region_affinity(random(2, 3, 4, 4), random(2, 3, 4, 4), torch.full((2, 4, 4), 3), 3)
    with pytest.raises(DistillationError, match=r"labels .* of the same images, which are \(2, 4\), got"):
        inter_region_affinity(random(2, 3, 4, 4), random(2, 3, 4, 4), torch.zeros(2, 4), 3)


# Channels --------------------------------------------------------------------------------------------------


@given(seeds, st.floats(0.5, 5))
def test_a_channel_is_a_distribution_over_pixels(seed: int, temperature: float) -> None:
    own, other = random(2, 3, 2, 3, seed=seed), random(2, 3, 2, 3, seed=seed + 1)
    total = 0.0
    for one, target in zip(own.reshape(6, 6).numpy(), other.reshape(6, 6).numpy(), strict=True):
        q, p = (np.exp(x / temperature) / np.exp(x / temperature).sum() for x in (one, target))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert channelwise(own, other, temperature).item() == pytest.approx(temperature**2 * total / 6)
    moved = channelwise(own + 3, other - 1, temperature).item()
    assert moved == pytest.approx(temperature**2 * total / 6)


# Detection -------------------------------------------------------------------------------------------------


@given(seeds, st.floats(-2, 2))
def test_the_student_s_error_counts_until_it_is_better_by_the_margin(seed: int, margin: float) -> None:
    own, other, truth = (random(12, 4, seed=seed + n) for n in range(3))
    losses = []
    for box, bound, target in zip(own.tolist(), other.tolist(), truth.tolist(), strict=True):
        error, allowed = math.dist(box, target) ** 2, math.dist(bound, target) ** 2
        losses.append(error if error + margin > allowed else 0.0)
    assert bounded_regression(own, other, truth, margin=margin).item() == pytest.approx(np.mean(losses))


def test_errors_by_hand() -> None:
    truth, teacher = torch.zeros(3, 2), torch.tensor([[2.0, 0.0]] * 3)  # error 4
    student = torch.tensor([[3.0, 0.0], [0.0, 1.9], [1.0, 0.0]])  # errors 9, 3.61, 1
    assert bounded_regression(student, teacher, truth).item() == pytest.approx(9 / 3)
    assert bounded_regression(student, teacher, truth, margin=1.0).item() == pytest.approx(12.61 / 3)
    assert bounded_regression(student, teacher, truth, margin=-6.0).item() == 0


@given(seeds, st.floats(0.5, 4), st.floats(0.1, 3), st.integers(0, 3))
def test_the_background_has_a_weight_of_its_own(
    seed: int, temperature: float, weight: float, background: int
) -> None:
    own, other = random(3, 4, seed=seed), random(3, 4, seed=seed + 1)
    total = 0.0
    for one, target in zip(own.numpy(), other.numpy(), strict=True):
        q, p = (np.exp(x / temperature) / np.exp(x / temperature).sum() for x in (one, target))
        weights = [weight if c == background else 1.0 for c in range(4)]
        total -= sum(w * a * math.log(b) for w, a, b in zip(weights, p, q, strict=True))
    found = weighted_cross_entropy(own, other, temperature, background=background, weight=weight).item()
    assert found == pytest.approx(total / 3)


def test_the_background_is_class_0_with_weight_1_5_at_temperature_1_unless_said_otherwise() -> None:
    own, other = random(3, 4, 2), random(3, 4, 2, seed=1)
    given_ = weighted_cross_entropy(own, other, 1.0, background=0, weight=1.5)
    torch.testing.assert_close(weighted_cross_entropy(own, other), given_)
    with pytest.raises(DistillationError, match=r"background must be a class, 0..3, got 4"):
        weighted_cross_entropy(own, other, background=4)
