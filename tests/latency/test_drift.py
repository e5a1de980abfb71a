"""Drift of the machine is taken out; what items cost is not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.latency.drift import drift_percent, group_medians, without_drift


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0.1, 10)), min_size=1, max_size=60),
)
def test_group_medians_are_the_medians_of_the_groups(pairs: list[tuple[int, float]]) -> None:
    # Every group has a value.
    pairs = [*pairs, *((group, 1.0) for group in range(4))]
    groups = np.array([group for group, _ in pairs])
    values = np.array([value for _, value in pairs])
    expected = [np.median(values[groups == group]) for group in range(4)]
    np.testing.assert_allclose(group_medians(values, groups, 4), expected)


def shuffled_rounds(rounds: int, items: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(items) for _ in range(rounds)])


def test_a_machine_of_constant_speed_leaves_samples_as_they_are() -> None:
    items = shuffled_rounds(10, 30, 0)
    cost = np.linspace(0.05, 3, 30)
    np.testing.assert_allclose(without_drift(cost[items], items)[0], cost[items])


def test_a_machine_that_becomes_twice_as_slow_for_a_third_of_the_time_is_seen_through() -> None:
    items = shuffled_rounds(30, 40, 1)
    cost = np.linspace(0.05, 3, 40)
    speed = np.ones(len(items))
    speed[200:600] = 2.0
    steady, slower = without_drift(cost[items] * speed, items)
    # At both edges of the slow time a window sees either speed.
    inside = np.ones(len(items), dtype=bool)
    for edge in (200, 600):
        inside[edge - 10 : edge + 10] = False
    np.testing.assert_allclose(steady[inside], cost[items][inside])
    np.testing.assert_allclose(slower[inside], speed[inside])


def test_a_sample_does_not_vouch_for_itself() -> None:
    # Minus the median of 20 others, noise grows by sqrt(1 + pi / 40) - 1 = 3.9 %; were the sample itself
    # in the window, it would shrink by 1 %. The interquartile range of 40000 samples is known to 0.6 %.
    rng = np.random.default_rng(2)
    noise = 0.05 * rng.standard_normal(40_000)
    steady, _ = without_drift(np.exp(noise), np.zeros(40_000, dtype=int))
    low, high = np.quantile(np.log(steady), [0.25, 0.75])
    assert high - low == pytest.approx(1.349 * 0.05 * 1.039, rel=0.025)


def test_too_few_samples_for_a_window_are_left_alone() -> None:
    samples = np.linspace(1, 2, 20)
    np.testing.assert_allclose(without_drift(samples, list(range(20)))[0], samples)


def test_drift_is_the_range_of_the_medians_of_quarters() -> None:
    reference = [1.0] * 10 + [1.2] * 10 + [1.1] * 10 + [0.9] * 10
    # Medians 1.0, 1.2, 1.1, 0.9; the median of all is 1.05.
    assert drift_percent(reference) == pytest.approx(100 * 0.3 / 1.05)
    assert drift_percent([1.0] * 7) is None
