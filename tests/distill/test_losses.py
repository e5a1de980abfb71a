"""Losses between outputs against their definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autocompress.distill.losses import (
    decoupled,
    decoupled_parts,
    dist,
    ensemble,
    hinton,
    selective,
    top_k_targets,
)
from autocompress.errors import DistillationError


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(logits: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp(value / temperature) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


@given(st.floats(0.5, 20), st.integers(0, 100))
def test_it_is_the_divergence_of_softened_probabilities_times_the_squared_temperature(
    temperature: float, seed: int
) -> None:
    outputs, teacher = random(4, 5, seed=seed), random(4, 5, seed=seed + 1)
    total = 0.0
    for one, other in zip(outputs.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(value / temperature) for value in other]
        q = [math.exp(value / temperature) for value in one]
        p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    expected = temperature**2 * total / 4
    assert hinton(outputs, teacher, temperature).item() == pytest.approx(expected, rel=1e-9)


@given(st.floats(0.5, 20))
def test_it_is_zero_with_zero_gradient_at_equality_and_positive_elsewhere(temperature: float) -> None:
    teacher = random(4, 5)
    outputs = (teacher + 3.0).requires_grad_()  # logits are equal up to a constant
    loss = hinton(outputs, teacher, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert outputs.grad is not None
    assert outputs.grad.abs().max() < 1e-12
    assert hinton(random(4, 5, seed=9), teacher, temperature) > 0


@given(st.integers(2, 6))
def test_it_does_not_depend_on_the_batch_size(repeats: int) -> None:
    outputs, teacher = random(3, 5), random(3, 5, seed=1)
    whole = hinton(outputs.repeat(repeats, 1), teacher.repeat(repeats, 1), 4.0)
    torch.testing.assert_close(whole, hinton(outputs, teacher, 4.0))


def test_at_high_temperature_it_tends_to_half_the_squared_distance_of_centred_logits() -> None:
    # Hinton et al., 2015, section 2.1, equation 4, and so its scale does not vanish as T grows.
    outputs, teacher = random(4, 5), random(4, 5, seed=1)
    centred = (outputs - outputs.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = centred.square().mean(1).mean() / 2
    assert hinton(outputs, teacher, 1000.0).item() == pytest.approx(limit.item(), rel=5e-3)


def test_the_gradient_is_the_difference_of_probabilities_times_the_temperature() -> None:
    # Hinton et al., 2015, equation 2, times T^2 and divided by the batch.
    outputs, teacher = random(4, 5).requires_grad_(), random(4, 5, seed=1)
    hinton(outputs, teacher, 3.0).backward()
    expected = 3.0 * ((outputs / 3).softmax(1) - (teacher / 3).softmax(1)) / 4
    torch.testing.assert_close(outputs.grad, expected.detach())


def test_maps_of_classes_are_averaged_over_pixels() -> None:
    outputs, teacher = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    rows = hinton(outputs.movedim(1, -1).reshape(-1, 3), teacher.movedim(1, -1).reshape(-1, 3), 2.0)
    torch.testing.assert_close(hinton(outputs, teacher, 2.0), rows)


# The teacher's largest classes ------------------------------------------------------------------------------


@given(st.integers(1, 5), st.floats(0.5, 10), st.integers(0, 50))
def test_of_the_teacher_s_classes_only_the_k_most_probable_count(
    k: int, temperature: float, seed: int
) -> None:
    outputs, teacher = random(4, 5, seed=seed), random(4, 5, seed=seed + 1)
    targets = top_k_targets(teacher, k, temperature)
    total = 0.0
    for row, (one, other) in enumerate(zip(outputs.tolist(), teacher.tolist(), strict=True)):
        p, q = softmax(other, temperature), softmax(one, temperature)
        chosen = sorted(range(5), key=lambda c: -other[c])[:k]
        share = sum(p[c] for c in chosen)
        expected = [p[c] / share if c in chosen else 0.0 for c in range(5)]
        assert targets[row].tolist() == pytest.approx(expected, abs=1e-12)
        total += sum(expected[c] * math.log(expected[c] / q[c]) for c in chosen)
    found = selective(outputs, teacher, temperature, k).item()
    assert found == pytest.approx(temperature**2 * total / 4, rel=1e-9)


@given(st.floats(0.5, 10))
def test_with_all_classes_it_is_hinton_s_loss(temperature: float) -> None:
    outputs, teacher = random(4, 5), random(4, 5, seed=1)
    found = selective(outputs, teacher, temperature, 5)
    torch.testing.assert_close(found, hinton(outputs, teacher, temperature), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("k", [0, 6])
def test_a_number_of_classes_that_there_is_not_is_refused(k: int) -> None:
    with pytest.raises(DistillationError, match=rf"k must be in 1..classes \(5\), got {k}"):
        selective(random(4, 5), random(4, 5), 1.0, k)


# Decoupled --------------------------------------------------------------------------------------------------


def parts_by_hand(
    one: list[float], other: list[float], label: int, temperature: float
) -> tuple[float, float]:
    q, p = softmax(one, temperature), softmax(other, temperature)
    of_label = sum(a * math.log(a / b) for a, b in ((p[label], q[label]), (1 - p[label], 1 - q[label])))
    rest = [c for c in range(len(p)) if c != label]
    others = [(p[c] / (1 - p[label]), q[c] / (1 - q[label])) for c in rest]
    return of_label, sum(a * math.log(a / b) for a, b in others)


@given(st.floats(0.5, 10), st.floats(0, 3), st.floats(0, 10), st.integers(0, 50))
def test_the_label_and_the_others_are_weighed_on_their_own(
    temperature: float, alpha: float, beta: float, seed: int
) -> None:
    outputs, teacher = random(4, 5, seed=seed), random(4, 5, seed=seed + 1)
    labels = torch.tensor([0, 4, 2, 2])
    total = 0.0
    for one, other, label in zip(outputs.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        of_label, of_others = parts_by_hand(one, other, label, temperature)
        total += alpha * of_label + beta * of_others
    found = decoupled(outputs, teacher, labels, temperature, alpha=alpha, beta=beta).item()
    assert found == pytest.approx(temperature**2 * total / 4, rel=1e-8, abs=1e-10)


@given(st.floats(0.5, 10), st.integers(0, 50))
def test_hinton_s_loss_is_the_label_s_and_the_others_by_the_teacher_s_doubt(
    temperature: float, seed: int
) -> None:
    # Zhao et al., 2022, section 3.1.
    outputs, teacher = random(6, 5, seed=seed), random(6, 5, seed=seed + 1)
    labels = torch.arange(6) % 5
    of_label, of_others = decoupled_parts(outputs, teacher, labels, temperature)
    doubt = 1 - (teacher / temperature).softmax(1)[range(6), labels]
    whole = temperature**2 * (of_label + doubt * of_others).mean()
    torch.testing.assert_close(whole, hinton(outputs, teacher, temperature), rtol=1e-9, atol=1e-11)


def test_a_teacher_without_doubt_leaves_no_nan() -> None:
    teacher = torch.tensor([[200.0, 0.0, 1.0], [0.0, 300.0, 2.0]])
    outputs = torch.tensor([[0.0, 250.0, 1.0], [0.5, 0.0, 2.0]], requires_grad=True)
    loss = decoupled(outputs, teacher, torch.tensor([0, 1]), 1.0)
    loss.backward()
    assert loss.isfinite()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()


def test_labels_of_other_samples_are_refused() -> None:
    with pytest.raises(DistillationError, match=r"labels must be one class a sample \(4,\), got \(3,\)"):
        decoupled(random(4, 5), random(4, 5), torch.zeros(3, dtype=torch.long))


# Correlation ------------------------------------------------------------------------------------------------


@given(st.floats(0.5, 10), st.floats(0, 3), st.floats(0, 3), st.integers(0, 50))
def test_dist_is_one_less_pearson_s_correlation_of_samples_and_of_classes(
    temperature: float, between: float, within: float, seed: int
) -> None:
    outputs, teacher = random(6, 4, seed=seed), random(6, 4, seed=seed + 1)
    q, p = (np.array([softmax(row, temperature) for row in x.tolist()]) for x in (outputs, teacher))
    rows = np.mean([1 - np.corrcoef(q[i], p[i])[0, 1] for i in range(6)])
    columns = np.mean([1 - np.corrcoef(q[:, c], p[:, c])[0, 1] for c in range(4)])
    found = dist(outputs, teacher, temperature, between_classes=between, within_classes=within).item()
    assert found == pytest.approx(temperature**2 * (between * rows + within * columns), rel=1e-6, abs=1e-9)


def test_maps_of_classes_are_correlated_pixel_by_pixel() -> None:
    outputs, teacher = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    rows = (x.movedim(1, -1).reshape(-1, 3) for x in (outputs, teacher))
    torch.testing.assert_close(dist(outputs, teacher, 2.0), dist(*rows, 2.0))


# Several teachers -------------------------------------------------------------------------------------------


@given(st.floats(0.5, 10), st.lists(st.floats(0, 5), min_size=3, max_size=3), st.integers(0, 50))
def test_the_softmax_of_an_ensemble_is_the_weighted_mean_of_its_softmaxes(
    temperature: float, weights: list[float], seed: int
) -> None:
    weights[0] += 1.0
    teachers = [random(4, 5, seed=seed + n) for n in range(3)]
    found = ensemble(teachers, weights, temperature)
    for row in range(4):
        of_each = [softmax(x[row].tolist(), temperature) for x in teachers]
        expected = [
            sum(w * p[c] for w, p in zip(weights, of_each, strict=True)) / sum(weights) for c in range(5)
        ]
        assert softmax(found[row].tolist(), temperature) == pytest.approx(expected, rel=1e-9)


def test_teachers_weigh_the_same_unless_said_otherwise_and_one_is_itself() -> None:
    one, other = random(4, 5), random(4, 5, seed=1)
    torch.testing.assert_close(ensemble([one, other]), ensemble([one, other], [3.0, 3.0]))
    torch.testing.assert_close(ensemble([one], temperature=3.0).softmax(1), one.softmax(1))
    assert not ensemble([one.requires_grad_(), other]).requires_grad


@pytest.mark.parametrize(
    ("shapes", "weights", "message"),
    [
        ([], None, r"needs teachers of one shape, got \[\]"),
        ([(2, 3), (2, 4)], None, r"one shape, got \[\(2, 3\), \(2, 4\)\]; leave some out"),
        ([(2, 3), (2, 3)], [1.0], r"one a teacher \(2\), .* got \[1.0\]"),
        ([(2, 3), (2, 3)], [1.0, -0.5], r"0 or more .* got \[1.0, -0.5\]"),
        ([(2, 3), (2, 3)], [0.0, 0.0], r"not all 0, got \[0.0, 0.0\]"),
    ],
)
def test_an_ensemble_without_a_mean_is_refused(
    shapes: list[tuple[int, ...]], weights: list[float] | None, message: str
) -> None:
    with pytest.raises(DistillationError, match=message):
        ensemble([torch.zeros(shape) for shape in shapes], weights)
