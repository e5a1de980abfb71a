"""A warm start: the given rows come first, the other strategy learns from them, and the engine pays once."""

import pickle

import numpy as np
import pytest

from autocompress.baselines import uniform_candidates
from autocompress.budget import Constraints
from autocompress.cost import Values
from autocompress.engine import search
from autocompress.space import Codes, SearchSpace
from autocompress.strategy import Strategy, WarmStart
from autocompress.testing.toys import toy_batch, toy_constraints, toy_score
from strategies.evolution import AgingEvolution, ElitistEvolution
from strategies.random_search import RandomSearch


class Paid:
    """Scores as `toy_score` does, and remembers every row it was asked for."""

    paid = True

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.rows: list[bytes] = []

    def __call__(self, codes: Codes) -> dict[str, Values]:
        self.rows += [row.tobytes() for row in codes]
        return {"accuracy": toy_score(self.space, codes)}


def best_rows(constraints: Constraints, n: int) -> Codes:
    """The best of a thousand random feasible rows."""
    codes = np.unique(constraints.sample(1000, np.random.default_rng(0)), axis=0)
    return codes[np.argsort(-toy_score(constraints.space, codes), kind="stable")[:n]]


def test_given_rows_are_asked_first_in_pieces_and_the_other_strategy_waits_until_all_were_told() -> None:
    constraints = toy_constraints()
    first = best_rows(constraints, 5)
    strategy = WarmStart(RandomSearch(constraints, seed=1), first)
    one, two = strategy.ask(3), strategy.ask(9)
    np.testing.assert_array_equal(np.vstack([one, two]), first)
    assert len(strategy.ask(9)) == 0
    strategy.tell(toy_batch(constraints, one))
    assert len(strategy.ask(9)) == 0
    strategy.tell(toy_batch(constraints, two))
    np.testing.assert_array_equal(strategy.ask(9), RandomSearch(constraints, seed=1).ask(9))


def test_without_rows_it_is_the_other_strategy() -> None:
    constraints = toy_constraints()
    strategy = WarmStart(RandomSearch(constraints, seed=1), best_rows(constraints, 0))
    np.testing.assert_array_equal(strategy.ask(9), RandomSearch(constraints, seed=1).ask(9))


@pytest.mark.parametrize("kind", [AgingEvolution, ElitistEvolution])
def test_evolution_breeds_from_the_given_rows(kind: type[AgingEvolution] | type[ElitistEvolution]) -> None:
    """Founders apart, a search that starts at the best of a thousand ends better than one that does not."""
    constraints = toy_constraints()

    def end(strategy: Strategy) -> float:
        return (
            search(strategy, constraints, Paid(constraints.space), evaluations=40).best().metrics["accuracy"]
        )

    better = [
        end(WarmStart(kind(constraints, seed=seed, population=8), best_rows(constraints, 8)))
        - end(kind(constraints, seed=seed, population=8))
        for seed in range(5)
    ]
    assert np.mean(better) > 0


def test_a_search_from_the_uniform_networks_never_returns_less_and_pays_once() -> None:
    constraints = toy_constraints()
    uniform = uniform_candidates(constraints)
    assert len(uniform)
    evaluator = Paid(constraints.space)
    strategy = WarmStart(RandomSearch(constraints, seed=1), uniform)
    result = search(strategy, constraints, evaluator, evaluations=len(uniform) + 1)
    assert evaluator.rows[: len(uniform)] == [row.tobytes() for row in uniform]
    assert len(set(evaluator.rows)) == len(evaluator.rows) == len(uniform) + 1
    assert result.best().metrics["accuracy"] >= toy_score(constraints.space, uniform).max()


def test_it_is_pickled_in_the_middle() -> None:
    constraints = toy_constraints()
    strategy = WarmStart(AgingEvolution(constraints, seed=1, population=8), best_rows(constraints, 4))
    rows = strategy.ask(3)
    twin = pickle.loads(pickle.dumps(strategy))
    for one in (strategy, twin):
        one.tell(toy_batch(constraints, rows))
        one.tell(toy_batch(constraints, one.ask(7)))
    np.testing.assert_array_equal(strategy.ask(7), twin.ask(7))
