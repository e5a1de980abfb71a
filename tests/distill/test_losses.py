"""Hinton's loss against its definition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autocompress.distill.losses import hinton


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
