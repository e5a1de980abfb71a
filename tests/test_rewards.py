import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.errors import RecipeError
from autocompress.rewards import REWARDS, log_cost, mnas_hard, mnas_soft, mnasnet, plain, tunas

ACCURACIES = st.floats(0.01, 1.0)
RATIOS = st.floats(0.05, 20.0)
WITH_TARGET = [reward for reward in REWARDS.values() if reward is not log_cost]


def one(value: float) -> np.ndarray:
    return np.array([value])


def test_the_soft_form_trades_twice_the_latency_for_five_percent_of_accuracy() -> None:
    # MnasNet, section 3.1: the exponent is chosen so that these two earn the same.
    small = mnas_soft(one(0.70), one(40.0), 80.0)
    large = mnas_soft(one(0.70 * 1.05), one(80.0), 80.0)
    np.testing.assert_allclose(large, small, rtol=3e-4)
    assert large == 0.70 * 1.05


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        # Accuracy 0.8, cost 1, target 0.5, exponent -0.07: google-research/tunas, search_space_utils_test.py,
        # whose expectations are 0.8 * 2^-0.07 (its hard form has that exponent too) and 0.8 - 0.07.
        (lambda *given: mnasnet(*given, alpha=-0.07, beta=-0.07), 0.762110),
        (lambda *given: mnasnet(*given, alpha=0.0, beta=-0.07), 0.762110),
        (lambda *given: tunas(*given, slope=-0.07), 0.73),
        (mnas_soft, 0.762110),
        (mnas_hard, 0.4),
        (tunas, 0.7),
        (plain, 0.8),
    ],
)
def test_at_twice_the_target(reward: object, expected: float) -> None:
    assert callable(reward)
    np.testing.assert_allclose(reward(one(0.8), one(1.0), 0.5), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    # At half the target: 0.8 * 2^0.07; the accuracy; 0.8 - 0.1 * 0.5.
    [("mnas_soft", 0.839773), ("mnas_hard", 0.8), ("tunas", 0.75), ("accuracy", 0.8)],
)
def test_at_half_the_target(name: str, expected: float) -> None:
    np.testing.assert_allclose(REWARDS[name](one(0.8), one(20.0), 40.0), expected, atol=1e-6)


@given(ACCURACIES, RATIOS, st.floats(0.1, 1000.0))
def test_at_the_target_every_reward_is_the_accuracy_and_only_the_ratio_counts(
    accuracy: float, ratio: float, target: float
) -> None:
    for reward in WITH_TARGET:
        np.testing.assert_allclose(reward(one(accuracy), one(target), target), accuracy)
        np.testing.assert_allclose(
            reward(one(accuracy), one(ratio * target), target), reward(one(accuracy), one(ratio), 1.0)
        )


@given(ACCURACIES, RATIOS, RATIOS)
def test_which_of_two_costs_each_reward_prefers(accuracy: float, first: float, second: float) -> None:
    less, more = np.array([accuracy]), np.array([accuracy])
    low, high = one(min(first, second)), one(max(first, second))
    assert mnas_soft(less, low, 1.0) >= mnas_soft(more, high, 1.0)
    hard = mnas_hard(np.array([accuracy] * 2), np.concatenate([low, high]), 1.0)
    assert hard[0] >= hard[1]
    assert hard[1] == accuracy or high > 1
    absolute = tunas(np.array([accuracy] * 2), np.concatenate([low, high]), 1.0)
    nearer = int(np.argmin(np.abs(np.concatenate([low, high]) - 1)))
    assert absolute[nearer] == absolute.max()


def test_rows_are_rewarded_one_by_one() -> None:
    accuracies, costs = np.array([0.5, 0.6, 0.7]), np.array([1.5, 2.0, 4.0])
    for reward in REWARDS.values():
        together = reward(accuracies, costs, 2.0)
        single = [reward(one(a), one(c), 2.0)[0] for a, c in zip(accuracies, costs, strict=True)]
        np.testing.assert_array_equal(together, single)


@pytest.mark.parametrize("reward", [mnas_soft, mnas_hard])
def test_a_product_with_a_negative_accuracy_is_refused(reward: object) -> None:
    assert callable(reward)
    with pytest.raises(RecipeError, match=r"must be 0 or more, got -0\.2; use the reward 'tunas'"):
        reward(np.array([0.3, -0.2]), np.ones(2), 1.0)


def test_the_error_is_weighed_by_the_logarithm_of_the_cost() -> None:
    # AMC, section 3.1: R_FLOPs = -Error * log(FLOPs), R_Param = -Error * log(#Param); 30 % error, e^20 MACs.
    np.testing.assert_allclose(log_cost(one(0.7), one(np.exp(20.0)), 1.0), -6.0)
    # Half the error is worth squaring the cost.
    np.testing.assert_allclose(log_cost(one(0.85), one(np.exp(40.0)), 1.0), -6.0)


@given(ACCURACIES, st.floats(1.1, 1e9), st.floats(1.1, 1e9))
def test_of_two_costs_the_smaller_never_loses(accuracy: float, first: float, second: float) -> None:
    low, high = min(first, second), max(first, second)
    assert log_cost(one(accuracy), one(low), 1.0) >= log_cost(one(accuracy), one(high), 1.0)


@pytest.mark.parametrize(("accuracy", "cost"), [(71.0, 1e6), (0.7, 1.0), (0.7, 0.3)])
def test_percent_and_costs_of_at_most_one_are_refused(accuracy: float, cost: float) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"got accuracy {accuracy:g} and cost {cost:g}")):
        log_cost(one(accuracy), one(cost), 1.0)
