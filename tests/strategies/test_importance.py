"""Widths from importance: the threshold and the optimum against looking at every network."""

import numpy as np
import pytest
from chain_space import chain, limited, random_scores
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.budget import Constraints
from autocompress.errors import InfeasibleBudgetError, RecipeError, SpaceError
from autocompress.testing.toys import every_network, toy_constraints
from strategies.importance import Importance, gains_of, worth_of


def values_of(constraints: Constraints, codes: np.ndarray) -> np.ndarray:
    worth = worth_of(constraints.space)
    return np.sum([worth[position][codes[:, position]] for position in range(codes.shape[1])], axis=0)


@given(st.integers(0, 10_000), st.integers(20, 100))
@settings(max_examples=30, deadline=None)
def test_the_exact_method_keeps_as_much_as_any_network_that_fits(seed: int, percent: int) -> None:
    constraints = limited(chain(random_scores(seed)), f"macs={percent}%")
    networks = every_network(constraints.space)
    fitting = networks[constraints.feasible(networks)]
    found = Importance(constraints, seed=0, method="exact").ask(1)
    assert constraints.feasible(found).all()
    assert values_of(constraints, found)[0] == pytest.approx(values_of(constraints, fitting).max())


@given(st.integers(0, 10_000), st.integers(20, 100))
@settings(max_examples=30, deadline=None)
def test_the_threshold_keeps_what_is_above_it_and_nothing_more_fits(seed: int, percent: int) -> None:
    constraints = limited(chain(random_scores(seed)), f"macs={percent}%")
    found = Importance(constraints, seed=0).ask(5)
    assert found.shape == (1, 4)
    assert constraints.feasible(found).all()
    gains = gains_of(constraints.space, worth_of(constraints.space))
    left = [gains[p][found[0, p]] for p in range(4) if found[0, p] < 3]
    for position in range(4):
        if found[0, position] < 3:
            more = found.copy()
            more[0, position] += 1
            assert not constraints.feasible(more)[0]
    # The step of the greatest gain that was left out did not fit on top of all that gain more.
    if left:
        first = max(left)
        codes = np.array([[int(np.sum(gains[p] >= first)) for p in range(4)]])
        assert not constraints.feasible(codes)[0]


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_nonzero_keeps_what_is_worth_something_and_is_the_cheapest_that_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Units are in the order of their worth: those above zero come first.
    scores = [[*units[: rng.integers(1, 17)], *[0.0] * 16][:16] for units in random_scores(seed)]
    constraints = limited(chain(scores), "macs=100%")
    networks = every_network(constraints.space)
    values = values_of(constraints, networks)
    whole = networks[values >= values.max() * (1 - 1e-12)]
    found = Importance(constraints, seed=0, method="nonzero").ask(1)
    assert (found == whole.min(axis=0)).all()


def test_nonzero_refuses_a_budget_that_cannot_hold_it() -> None:
    constraints = limited(chain(random_scores(0)), "macs=60%")
    with pytest.raises(
        InfeasibleBudgetError, match="worth more than zero does not fit the budget: it needs"
    ) as e:
        Importance(constraints, seed=0, method="nonzero")
    whole = float(constraints.costs["macs"].of(constraints.space.largest())[0])
    assert e.value.nearest == {"macs": whole}


def test_it_asks_once() -> None:
    strategy = Importance(limited(chain(random_scores(0))), seed=0)
    assert len(strategy.ask(0)) == 0
    assert len(strategy.ask(3)) == 1
    assert len(strategy.ask(3)) == 0


def test_bad_options_are_refused() -> None:
    constraints = limited(chain(random_scores(0)))
    with pytest.raises(RecipeError, match="method must be one of threshold, exact, nonzero, got 'best'"):
        Importance(constraints, seed=0, method="best")  # type: ignore[arg-type]
    with pytest.raises(SpaceError, match="have no worth"):
        Importance(toy_constraints(), seed=0)
    impossible = Constraints(constraints.space, constraints.costs, {"macs": 1.0})
    with pytest.raises(InfeasibleBudgetError):
        Importance(impossible, seed=0)
