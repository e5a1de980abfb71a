"""Greedy slimming against the loop written down by hand, and what the engine makes of it."""

from collections.abc import Mapping

import numpy as np
import pytest
from chain_space import chain, limited, random_scores

from autocompress.budget import Constraints
from autocompress.engine import search
from autocompress.errors import InfeasibleBudgetError, RecipeError
from autocompress.space import Codes
from autocompress.strategy import WarmStart
from strategies.importance import worth_of
from strategies.slimming import GreedySlimming


class ByWorth:
    """The score is the sum of what options are worth; counts what was asked."""

    paid = True

    def __init__(self, constraints: Constraints) -> None:
        self.worth = worth_of(constraints.space)
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, codes: Codes) -> Mapping[str, np.ndarray]:
        self.asked += [tuple(row) for row in codes.tolist()]
        found = np.sum([self.worth[p][codes[:, p]] for p in range(codes.shape[1])], axis=0)
        return {"accuracy": found}


def by_hand(constraints: Constraints) -> Codes:
    """The text of the paper: while too large, take the step that leaves the highest score."""
    worth, at = worth_of(constraints.space), constraints.space.largest()
    while not constraints.feasible(at)[0]:
        steps = []
        for position in range(at.shape[1]):
            if at[0, position]:
                row = at.copy()
                row[0, position] -= 1
                score = sum(worth[p][row[0, p]] for p in range(row.shape[1]))
                steps.append((score, -position, row))
        at = max(steps, key=lambda step: step[:2])[2]
    return at


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("warm", [False, True])
def test_it_walks_down_as_the_text_says(seed: int, warm: bool) -> None:
    constraints = limited(chain(random_scores(seed)))
    evaluator = ByWorth(constraints)
    strategy = GreedySlimming(constraints, seed=0)
    asked = WarmStart(strategy, constraints.space.smallest()) if warm else strategy
    result = search(asked, constraints, evaluator, evaluations=500)
    expected = by_hand(constraints)
    last = constraints.space.encode([result.trials[-1].architecture])
    assert constraints.feasible(constraints.space.encode([result.best().architecture])).all()
    best = {trial.architecture for trial in result.feasible(constraints.limits)}
    assert constraints.space.decode(expected)[0] in best
    # The search ended by itself, in the round that found it, and paid for none twice.
    assert len(evaluator.asked) == len(set(evaluator.asked)) == len(result.trials)
    assert np.abs(last - expected).sum() <= 2


def test_the_result_fits_though_larger_networks_scored_higher() -> None:
    constraints = limited(chain(random_scores(1)))
    result = search(GreedySlimming(constraints, seed=0), constraints, ByWorth(constraints), evaluations=500)
    assert max(t.metrics["accuracy"] for t in result.trials) > result.best().metrics["accuracy"]
    assert result.best().costs["macs"] <= constraints.limits["macs"]


def test_per_cost_takes_cheap_steps_into_account() -> None:
    """All steps lose as much: by cost, the one that saves most is taken, and the next round starts there."""
    constraints = limited(chain([[1.0] * 16] * 4), "macs=60%")
    strategy = GreedySlimming(constraints, seed=0, per_cost=True)
    result = search(strategy, constraints, ByWorth(constraints), evaluations=9)
    steps = {t.architecture: t.costs["macs"] for t in result.trials[1:5]}
    (cheapest,) = constraints.space.encode([min(steps, key=lambda arch: steps[arch])])
    for trial in result.trials[5:9]:
        (row,) = constraints.space.encode([trial.architecture])
        assert (row <= cheapest).all()


def test_failed_evaluations_do_not_stop_it() -> None:
    constraints = limited(chain(random_scores(2)))
    inner = ByWorth(constraints)

    def sometimes(codes: Codes) -> Mapping[str, np.ndarray]:
        found = inner(codes)
        if len(inner.asked) % 3 == 0:
            raise RuntimeError("out of memory")
        return found

    class Failing(ByWorth):
        def __call__(self, codes: Codes) -> Mapping[str, np.ndarray]:
            return sometimes(codes)

    result = search(GreedySlimming(constraints, seed=0), constraints, Failing(constraints), evaluations=500)
    assert constraints.feasible(constraints.space.encode([result.best().architecture])).all()


def test_bad_options_are_refused() -> None:
    constraints = limited(chain(random_scores(0)))
    with pytest.raises(RecipeError, match="per_cost must be true or false, got 1"):
        GreedySlimming(constraints, seed=0, per_cost=1)  # type: ignore[arg-type]
    with pytest.raises(InfeasibleBudgetError):
        GreedySlimming(Constraints(constraints.space, constraints.costs, {"macs": 1.0}), seed=0)
