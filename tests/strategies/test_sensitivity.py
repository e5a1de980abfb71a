"""Sensitivity against enumeration: where effects add up, one evaluation an option finds the optimum."""

import itertools
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from chain_space import LAYERS, WIDTHS, chain, limited, random_scores
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.budget import Constraints
from autocompress.engine import search
from autocompress.errors import EvaluationError, InfeasibleBudgetError, RecipeError
from autocompress.space import Codes
from autocompress.strategy import DISTANCE, WarmStart, at_most, beyond_budget, compares
from strategies.importance import worth_of
from strategies.sensitivity import Sensitivity, greedy


class Additive:
    """Scores that are sums over choices; a distance is what is lost from the largest network."""

    paid = True

    def __init__(
        self, constraints: Constraints, *, distance: bool = False, fails: Any = lambda row: False
    ) -> None:
        self.worth = worth_of(constraints.space)
        self.asked: list[tuple[int, ...]] = []
        self.distance, self.fails = distance, fails

    def of(self, codes: Codes) -> np.ndarray:
        found: np.ndarray = np.sum([self.worth[p][codes[:, p]] for p in range(codes.shape[1])], axis=0)
        return found

    def __call__(self, codes: Codes) -> Mapping[str, np.ndarray]:
        for row in codes.tolist():
            self.asked.append(tuple(row))
            if self.fails(tuple(row)):
                raise EvaluationError("this network fails")
        score = self.of(codes)
        if not self.distance:
            return {"accuracy": score}
        # A score that says nothing: the distance alone has to lead.
        return {"accuracy": 0 * score, DISTANCE: sum(values.max() for values in self.worth) - score}


def all_networks() -> Codes:
    return np.array(list(itertools.product(range(len(WIDTHS)), repeat=LAYERS)))


def optimum(constraints: Constraints, evaluator: Additive) -> float:
    """By enumeration."""
    codes = all_networks()
    return float(evaluator.of(codes[constraints.feasible(codes)]).max())


@given(seed=st.integers(0, 10_000), share=st.integers(20, 90), distance=st.booleans(), warm=st.booleans())
@settings(max_examples=25, deadline=None)
def test_where_effects_add_up_the_optimum_is_found(seed: int, share: int, distance: bool, warm: bool) -> None:
    constraints = limited(chain(random_scores(seed)), f"macs={share}%")
    evaluator = Additive(constraints, distance=distance)
    strategy = Sensitivity(constraints, seed=0)
    first = WarmStart(strategy, constraints.sample(1, np.random.default_rng(0))) if warm else strategy
    result = search(first, constraints, evaluator, evaluations=500)
    # One evaluation an option but for the largest, the largest, the found one, and what a search starts from.
    assert len(evaluator.asked) == len(set(evaluator.asked))
    assert len(evaluator.asked) <= LAYERS * (len(WIDTHS) - 1) + 2 + warm
    found = constraints.space.encode([result.trials[-1].architecture])
    if not warm:
        assert constraints.feasible(found)[0]
        np.testing.assert_allclose(evaluator.of(found)[0], optimum(constraints, evaluator))
    (round_,) = result.notes["sensitivity"]
    assert round_["proven"]
    assert round_["measure"] == (DISTANCE if distance else "accuracy")
    np.testing.assert_allclose(round_["sum"], round_["measured"], atol=1e-9)


def test_points_between_are_interpolated() -> None:
    """On scores that rise evenly two points a choice say everything."""
    constraints = limited(chain([[float(layer + 1)] * 16 for layer in range(LAYERS)]))
    evaluator = Additive(constraints)
    result = search(Sensitivity(constraints, seed=0, points=2), constraints, evaluator, evaluations=500)
    assert len(evaluator.asked) == 1 + LAYERS + 1
    best = constraints.space.encode([result.best().architecture])
    np.testing.assert_allclose(evaluator.of(best)[0], optimum(constraints, evaluator))


def test_a_second_round_starts_from_what_was_found() -> None:
    constraints = limited(chain(random_scores(3)))
    evaluator = Additive(constraints)
    strategy = Sensitivity(constraints, seed=0, rounds=2)
    result = search(strategy, constraints, evaluator, evaluations=500)
    assert len(result.notes["sensitivity"]) == 2
    found = constraints.space.encode([result.best().architecture])[0]
    near = [row for row in evaluator.asked if (np.array(row) != found).sum() == 1]
    assert len(near) >= LAYERS * (len(WIDTHS) - 1)
    assert len(evaluator.asked) <= strategy.evaluations


def test_an_option_that_fails_is_not_taken() -> None:
    constraints = limited(chain(random_scores(1)))
    whole = len(WIDTHS) - 1

    def fails(row: tuple[int, ...]) -> bool:
        return row == (whole, 0, whole, whole)

    evaluator = Additive(constraints, fails=fails)
    result = search(Sensitivity(constraints, seed=0), constraints, evaluator, evaluations=500)
    best = constraints.space.encode([result.best().architecture])
    assert best[0, 1] != 0
    codes = all_networks()
    others = codes[constraints.feasible(codes) & (codes[:, 1] != 0)]
    np.testing.assert_allclose(evaluator.of(best)[0], evaluator.of(others).max())


def test_it_is_told_in_any_order_and_can_be_pickled_between() -> None:
    constraints = limited(chain(random_scores(2)))
    evaluator = Additive(constraints)
    straight = search(Sensitivity(constraints, seed=0), constraints, evaluator, evaluations=500).best()

    from autocompress.trial import Batch, Outcome

    def told(rows: Codes) -> Batch:
        values = {name: np.asarray(value) for name, value in evaluator(rows).items()}
        return Batch(
            rows, constraints.price(rows), values, np.full(len(rows), Outcome.MEASURED, dtype=np.int8)
        )

    strategy = Sensitivity(constraints, seed=0)
    rows = strategy.ask(500)
    for position in np.random.default_rng(0).permutation(len(rows)):
        strategy.tell(told(rows[[position]]))
        strategy = pickle.loads(pickle.dumps(strategy))
    found = strategy.ask(5)
    assert len(found) == 1
    assert constraints.space.decode(found)[0] == straight.architecture
    strategy.tell(told(found))
    assert not len(strategy.ask(5))


def test_what_it_says_of_itself() -> None:
    constraints = limited(chain(random_scores(0)))
    strategy = WarmStart(Sensitivity(constraints, seed=0), constraints.space.smallest())
    assert beyond_budget(strategy)
    assert compares(Sensitivity)
    assert at_most(strategy, 10**6) == LAYERS * (len(WIDTHS) - 1) + 2
    assert at_most(strategy, 3) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 0}, "points must be an integer >= 1, got 0"),
        ({"rounds": 0}, "rounds must be an integer >= 1, got 0"),
        ({"measure": "speed"}, "measure must be distance or accuracy, got 'speed'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Sensitivity(limited(chain(random_scores(0))), seed=0, **options)


def test_a_budget_that_nothing_fits_is_refused() -> None:
    with pytest.raises(InfeasibleBudgetError, match="reachable minimum"):
        Sensitivity(limited(chain(random_scores(0)), "macs=1%"), seed=0)


# Greedy --------------------------------------------------------------------------------------------------


def walked_down(constraints: Constraints, evaluator: Additive) -> Codes:
    """The loop: while too large, the smaller option of a choice that loses least for what it takes away."""

    def excess(row: Codes) -> float:
        return max(0.0, float(constraints.violation(row)[0]))

    at = constraints.space.largest()
    while excess(at) > 0:
        ratios = {}
        for position in range(LAYERS):
            for code in range(int(at[0, position])):
                row = at.copy()
                row[0, position] = code
                lost = float(evaluator.of(at)[0] - evaluator.of(row)[0])
                ratios[(position, code)] = lost / (excess(at) - excess(row))
        position, code = min(ratios, key=lambda step: ratios[step])
        at[0, position] = code
    return at


@pytest.mark.parametrize("seed", range(6))
def test_greedy_walks_down_by_what_loses_least_for_what_it_saves(seed: int) -> None:
    constraints = limited(chain(random_scores(seed)))
    evaluator = Additive(constraints)
    result = search(greedy(constraints, seed=0), constraints, evaluator, evaluations=500)
    found = constraints.space.encode([result.trials[-1].architecture])
    np.testing.assert_array_equal(found, walked_down(constraints, evaluator))
    assert len(evaluator.asked) <= LAYERS * (len(WIDTHS) - 1) + 2
    assert constraints.feasible(found)[0]
    (round_,) = result.notes["sensitivity"]
    assert not round_["proven"]
    np.testing.assert_allclose(round_["sum"], round_["measured"], atol=1e-9)


def test_greedy_passes_by_options_whose_evaluation_failed() -> None:
    constraints = limited(chain(random_scores(0)))
    whole = walked_down(constraints, Additive(constraints))[0]
    position = int(np.flatnonzero(whole < len(WIDTHS) - 1)[0])
    failed = tuple(int(whole[position]) if p == position else len(WIDTHS) - 1 for p in range(LAYERS))
    evaluator = Additive(constraints, fails=lambda row: row == failed)
    result = search(greedy(constraints, seed=0), constraints, evaluator, evaluations=500)
    found = constraints.space.encode([result.trials[-1].architecture])[0]
    assert found[position] != whole[position]
    assert constraints.feasible(found[None])[0]


def test_another_solver_is_refused() -> None:
    with pytest.raises(RecipeError, match="solver must be one of exact, greedy, got 'luck'"):
        Sensitivity(limited(chain(random_scores(0))), seed=0, solver="luck")
