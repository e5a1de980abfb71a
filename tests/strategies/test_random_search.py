import numpy as np
import pytest

from autocompress.budget import Constraints
from autocompress.errors import InfeasibleBudgetError, RecipeError
from autocompress.strategy import Strategy
from autocompress.testing.strategy import StrategyContract
from autocompress.testing.toys import every_network, toy_constraints
from strategies.random_search import RandomSearch


class TestRandomSearch(StrategyContract):
    def make(self, constraints: Constraints, seed: int) -> Strategy:
        return RandomSearch(constraints, seed=seed)


def test_the_sequence_does_not_depend_on_the_sizes_of_the_asks() -> None:
    constraints = toy_constraints()
    whole = RandomSearch(constraints, seed=1).ask(600)
    pieces = RandomSearch(constraints, seed=1)
    np.testing.assert_array_equal(np.vstack([pieces.ask(n) for n in (1, 2, 297, 0, 300)]), whole)


def test_it_finds_exactly_the_feasible_networks_and_then_ends() -> None:
    constraints = toy_constraints(blocks=3)
    networks = every_network(constraints.space)
    feasible = networks[constraints.feasible(networks)]
    strategy = RandomSearch(constraints, seed=2)
    rows = strategy.ask(10_000)
    np.testing.assert_array_equal(np.unique(rows, axis=0), np.unique(feasible, axis=0))
    assert len(rows) == len(feasible)
    assert strategy.ask(1).shape == (0, len(constraints.space.choices))


def test_without_a_budget_every_gene_is_uniform() -> None:
    space = toy_constraints(blocks=2).space
    rows = RandomSearch(Constraints(space, {}, {}), seed=3).ask(1)
    assert rows.shape == (1, 4)
    wide = Constraints(toy_constraints(blocks=12).space, {}, {})
    # 2,000 of 1.6 million networks; a count's standard deviation is 0.5 * sqrt(2000) = 22; 112 is five.
    assert abs(int(RandomSearch(wide, seed=4).ask(2000)[:, 0].sum()) - 1000) < 112


def test_at_least_asks_only_for_networks_near_the_limit() -> None:
    constraints = toy_constraints()
    rows = RandomSearch(constraints, seed=5, at_least=0.9).ask(100)
    macs = constraints.costs["macs"].of(rows)
    assert (macs <= constraints.limits["macs"]).all()
    assert (macs >= 0.9 * constraints.limits["macs"]).all()


def test_a_budget_that_nothing_fits_is_refused_when_the_search_is_made() -> None:
    constraints = toy_constraints()
    impossible = Constraints(constraints.space, constraints.costs, {"macs": 1.0})
    with pytest.raises(InfeasibleBudgetError, match="reachable minimum is macs 1024"):
        RandomSearch(impossible, seed=0)


@pytest.mark.parametrize("seed", [None, -1, 1.5, True])
def test_the_seed_is_an_integer_from_zero(seed: object) -> None:
    with pytest.raises(RecipeError, match="seed must be an integer >= 0, got"):
        RandomSearch(toy_constraints(), seed=seed)  # type: ignore[arg-type]


def test_at_least_is_a_share() -> None:
    with pytest.raises(RecipeError, match=r"at_least must be in 0\.\.1, got 90"):
        RandomSearch(toy_constraints(), seed=0, at_least=90)
