"""Losses between samples against loops over pairs and triples, and the motions they do not see."""

import math
from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from autocompress.distill.relation_losses import (
    correlation,
    instance_relation_graph,
    probabilistic,
    relational,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)
from autocompress.errors import DistillationError

Array = NDArray[np.float64]
seeds = st.integers(0, 15)
SAMPLES = 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(seed: int) -> tuple[Tensor, Tensor]:
    """Of a student, as a map, and of a wider teacher."""
    return random(SAMPLES, 2, 3, 1, seed=seed), random(SAMPLES, 8, seed=seed + 1)


def rows(x: Tensor) -> Array:
    return x.flatten(1).numpy()


def rotated(x: Tensor) -> Tensor:
    return x @ torch.linalg.qr(random(x.shape[1], x.shape[1], seed=99)).Q


def unit(x: Array) -> Array:
    return np.array([row / math.sqrt((row**2).sum()) for row in x])


def huber(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


# Similarity ------------------------------------------------------------------------------------------------


@given(seeds)
def test_similarity_is_the_gram_matrix_with_rows_of_length_1(seed: int) -> None:
    own, other = features(seed)
    grams = []
    for x in map(rows, (own, other)):
        gram = np.array([[sum(a * b) for b in x] for a in x])
        grams.append(unit(gram))
    expected = ((grams[0] - grams[1]) ** 2).sum() / SAMPLES**2
    assert similarity_preserving(own, other).item() == pytest.approx(expected)


@given(seeds, st.floats(0.1, 10))
def test_similarity_sees_neither_rotation_nor_scale_but_moving(seed: int, scale: float) -> None:
    own, other = random(SAMPLES, 6, seed=seed), random(SAMPLES, 8, seed=seed + 1)
    loss = similarity_preserving(own, other)
    torch.testing.assert_close(similarity_preserving(scale * rotated(own), rotated(other)), loss)
    assert (similarity_preserving(own + 1, other) - loss).abs() > 1e-6


# Correlation -----------------------------------------------------------------------------------------------


@given(seeds, st.floats(0.1, 1), st.integers(1, 4))
def test_correlation_is_the_series_of_a_gaussian_kernel(seed: int, gamma: float, order: int) -> None:
    own, other = features(seed)
    squares = []
    for i, j in product(range(SAMPLES), repeat=2):
        entries = []
        for x in (unit(rows(own)), unit(rows(other))):
            inner = (x[i] * x[j]).sum()
            series = sum((2 * gamma * inner) ** p / math.factorial(p) for p in range(order + 1))
            entries.append(math.exp(-2 * gamma) * series)
        squares.append((entries[0] - entries[1]) ** 2)
    found = correlation(own, other, gamma=gamma, order=order).item()
    assert found == pytest.approx(np.mean(squares), rel=1e-6)


def test_the_series_tends_to_the_gaussian_kernel() -> None:
    own, other = features(0)
    kernels = []
    for x in (unit(rows(own)), unit(rows(other))):
        kernels.append(np.exp(-0.4 * ((x[:, None] - x[None]) ** 2).sum(-1)))
    expected = ((kernels[0] - kernels[1]) ** 2).mean()
    assert correlation(own, other, order=12).item() == pytest.approx(expected, rel=1e-6)


# Relations -------------------------------------------------------------------------------------------------


@given(seeds)
def test_distances_are_compared_in_units_of_their_mean(seed: int) -> None:
    own, other = features(seed)
    relative = []
    for x in map(rows, (3 * own, other)):
        distances = [math.dist(x[i], x[j]) for i, j in permutations(range(SAMPLES), 2)]
        relative.append([d / np.mean(distances) for d in distances])
    expected = np.mean([huber(a - b) for a, b in zip(*relative, strict=True)])
    assert rkd_distance(own, other).item() == pytest.approx(expected)


def test_a_distance_far_from_the_teacher_s_counts_linearly() -> None:
    # Distances 1, 30, 29 with mean 20; 1, 0, 1 with mean 2/3.
    own, other = torch.tensor([[0.0], [1.0], [30.0]]), torch.tensor([[0.0], [1.0], [0.0]])
    relative = [[1 / 20, 30 / 20, 29 / 20], [3 / 2, 0.0, 3 / 2]]
    expected = np.mean([huber(a - b) for a, b in zip(*relative, strict=True)])
    assert abs(relative[0][1] - relative[1][1]) > 1
    assert rkd_distance(own, other).item() == pytest.approx(expected)


@given(seeds)
def test_angles_are_the_cosines_at_the_corners_of_triangles(seed: int) -> None:
    own, other = features(seed)
    values = []
    for i, j, k in permutations(range(SAMPLES), 3):
        cosines = []
        for x in map(rows, (own, other)):
            first, second = x[i] - x[j], x[k] - x[j]
            cosines.append((first * second).sum() / (math.hypot(*first) * math.hypot(*second)))
        values.append(huber(cosines[0] - cosines[1]))
    assert rkd_angle(own, other).item() == pytest.approx(np.mean(values))


@given(seeds, st.floats(0.1, 10), st.floats(-5, 5))
def test_relations_see_neither_scale_nor_moving_nor_rotation(seed: int, scale: float, move: float) -> None:
    own, other = random(SAMPLES, 6, seed=seed), random(SAMPLES, 8, seed=seed + 1)
    for loss in (rkd_distance, rkd_angle):
        found = loss(own, other)
        torch.testing.assert_close(loss(scale * rotated(own) + move, rotated(other) - move), found)
        assert loss(scale * own + move, own).item() == pytest.approx(0, abs=1e-12)


def test_relations_are_weighed_as_in_the_paper_unless_said_otherwise() -> None:
    own, other = features(0)
    distance, angle = rkd_distance(own, other), rkd_angle(own, other)
    torch.testing.assert_close(relational(own, other), 25 * distance + 50 * angle)
    torch.testing.assert_close(relational(own, other, distance=1.0, angle=3.0), distance + 3 * angle)


@pytest.mark.parametrize("loss", [relational, similarity_preserving, probabilistic])
def test_samples_that_are_the_same_leave_no_nan(loss: type) -> None:
    for own in (torch.ones(4, 3), torch.zeros(4, 3), torch.tensor([[1.0, 2.0]] * 2 + [[0.0, 1.0]] * 2)):
        own = own.requires_grad_()
        found = loss(own, random(4, 5).float())
        found.backward()
        assert found.isfinite()
        assert own.grad is not None
        assert own.grad.isfinite().all()


# Neighbours ------------------------------------------------------------------------------------------------


@given(seeds)
def test_neighbours_are_as_probable_as_they_are_near(seed: int) -> None:
    own, other = features(seed)
    terms = []
    for i in range(SAMPLES):
        others = [j for j in range(SAMPLES) if j != i]
        probabilities = []
        for x in (unit(rows(own)), unit(rows(other))):
            near = [(1 + (x[i] * x[j]).sum()) / 2 for j in others]
            probabilities.append([value / sum(near) for value in near])
        terms += [p * math.log(p / q) for q, p in zip(*probabilities, strict=True)]
    assert len(terms) == SAMPLES * (SAMPLES - 1)
    assert probabilistic(own, other).item() == pytest.approx(np.mean(terms), rel=1e-4)


# Graphs ----------------------------------------------------------------------------------------------------


def relative(values: list[float]) -> Array:
    return np.array(values) / np.mean(values)


def edges_of(x: Tensor) -> Array:
    return relative([math.dist(*rows(x)[list(pair)]) ** 2 for pair in combinations(range(SAMPLES), 2)])


def layers(seed: int, channels: int) -> list[Tensor]:
    """Two maps and logits; the second map has half the pixels a side and twice the channels."""
    shapes = (channels, 4, 4), (2 * channels, 2, 2), (2 * channels, 1, 1)
    return [random(SAMPLES, *shape, seed=seed + n) for n, shape in enumerate(shapes)]


def moves_of(first: Tensor, second: Tensor) -> Array:
    """How far samples move to a layer of half or the same size, and twice or as many channels."""
    one, other = first.numpy(), second.numpy()
    moved = []
    for n in range(SAMPLES):
        total = 0.0
        for c, i, j in np.ndindex(one.shape[1], *other.shape[2:]):
            step, group = one.shape[2] // other.shape[2], other.shape[1] // one.shape[1]
            before = one[n, c, step * i : step * (i + 1), step * j : step * (j + 1)].mean()
            total += (before - other[n, group * c : group * (c + 1), i, j].mean()) ** 2
        moved.append(total)
    return relative(moved)


@given(seeds, st.floats(0, 3), st.floats(0, 3), st.floats(0, 3))
def test_a_graph_is_vertices_edges_and_the_steps_between_layers(
    seed: int, vertices: float, edges: float, transformation: float
) -> None:
    own, other = layers(seed, 3), layers(seed + 5, 3)
    of_vertices = ((own[-1] - other[-1]) ** 2).mean().item()
    found = [[edges_of(x) for x in one] for one in (own, other)]
    of_edges = np.mean([((a - b) ** 2).mean() for a, b in zip(*found, strict=True)])
    steps = []
    for n in (0, 1):
        moves = [moves_of(one[n], one[n + 1]) for one in (own, other)]
        changes = [one[n + 1] - one[n] for one in found]
        steps.append(sum(((a - b) ** 2).mean() for a, b in (moves, changes)))
    loss = instance_relation_graph(own, other, vertices=vertices, edges=edges, transformation=transformation)
    expected = vertices * of_vertices + edges * of_edges + transformation * np.mean(steps)
    assert loss.item() == pytest.approx(expected)


def test_the_teacher_s_layers_may_be_wider_but_for_the_last() -> None:
    own, other = layers(0, 3), layers(5, 4)
    with pytest.raises(DistillationError, match=r"needs one shape, got \(5, 6, 1, 1\) .* \(5, 8, 1, 1\)"):
        instance_relation_graph(own, other)
    other[-1] = other[-1][:, :6]
    message = r"a multiple of the other's channels, got \(5, 8, .* and \(5, 6, .*; set transformation to 0"
    with pytest.raises(DistillationError, match=message):
        instance_relation_graph(own, other)
    inputs = [[x.requires_grad_() for x in one] for one in (own, other)]
    instance_relation_graph(*inputs, transformation=0.0).backward()
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in own)
    assert all(x.grad is None for x in other)


def test_the_scale_of_inner_layers_does_not_matter_nor_the_steps_of_one_layer() -> None:
    own, other = layers(0, 3), layers(5, 3)
    scaled = [7 * other[0], 0.2 * other[1], other[2]]
    found = instance_relation_graph(own, other, transformation=0.0)
    torch.testing.assert_close(instance_relation_graph(own, scaled, transformation=0.0), found)
    last = instance_relation_graph(own[-1:], other[-1:])
    torch.testing.assert_close(last, instance_relation_graph(own[-1:], other[-1:], transformation=0.0))


@pytest.mark.parametrize(("own", "other"), [(0, 0), (2, 1)])
def test_graphs_without_as_many_layers_are_refused(own: int, other: int) -> None:
    message = f"one layer or more of the student, and as many of the teacher, got {own} and {other}"
    with pytest.raises(DistillationError, match=message):
        instance_relation_graph([torch.ones(3, 2)] * own, [torch.ones(3, 2)] * other)
