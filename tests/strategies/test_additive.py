"""The additive critic keeps the contract, finds optima of sums, and expects no more than it says."""

from typing import Any

import numpy as np
import pytest

from autocompress.budget import Constraints
from autocompress.errors import InfeasibleBudgetError, RecipeError, SpaceError
from autocompress.exact import separable, solve
from autocompress.latency.foreign.bit_table import BitTable
from autocompress.plugins import load_strategy
from autocompress.quantize.tables import bit_cost, bit_space
from autocompress.space import Choice, Codes, SearchSpace
from autocompress.strategy import WarmStart
from autocompress.testing.strategy import StrategyContract
from autocompress.testing.toys import toy_batch, toy_constraints
from autocompress.trial import Batch
from strategies.additive import AdditiveCritic
from strategies.evolution import AgingEvolution
from strategies.random_search import RandomSearch


class TestAdditiveCritic(StrategyContract):
    def make(self, constraints: Constraints, seed: int) -> AdditiveCritic:
        return AdditiveCritic(constraints, seed=seed)


def bits(layers: int = 12) -> tuple[Constraints, Any]:
    """Layers of uneven cost and uneven sensitivity, at 60 %; and the loss, which is a sum."""
    rng = np.random.default_rng(0)
    cost = rng.lognormal(0, 1, layers)
    names = tuple(f"l{i}" for i in range(layers))
    rows = {
        (name, w, a): float(cost[i] * w * a)
        for i, name in enumerate(names)
        for w in range(2, 9)
        for a in range(2, 9)
    }
    space = bit_space(names, weight_bits=range(2, 9), activation_bits=range(2, 9))
    priced = bit_cost(BitTable("made up", "ms", names, rows), space, "latency_ms")
    constraints = Constraints(space, {"latency_ms": priced}, {"latency_ms": 0.6 * priced.maximum})
    # Not of the form that the bits of a quantizer suggest: falls linearly, steeper at few bits.
    tables = [w * np.maximum(0.02, 0.3 - 0.05 * np.arange(7)) for w in rng.lognormal(0, 1.5, 2 * layers)]
    return constraints, separable(space, tables, "loss")


def gap_of(strategy: Any, constraints: Constraints, loss: Any, evaluations: int) -> float:
    best, least = np.inf, solve(loss, constraints, sense="minimize").value
    for _ in range(evaluations):
        rows: Codes = strategy.ask(1)
        lost = loss.of(rows)
        best = min(best, float(lost[0]))
        outcomes = np.zeros(1, dtype=np.int8)
        strategy.tell(Batch(rows, constraints.price(rows), {"accuracy": np.exp(-lost)}, outcomes))
    return best / least - 1


def test_it_finds_the_optimum_of_a_sum_where_random_search_is_far_off() -> None:
    constraints, loss = bits()
    gaps = [gap_of(AdditiveCritic(constraints, seed=seed), constraints, loss, 150) for seed in range(2)]
    assert max(gaps) < 0.03
    assert gap_of(RandomSearch(constraints, seed=0), constraints, loss, 150) > 0.3


@pytest.mark.parametrize("seed", range(2))
def test_exchanges_lead_evolution_closer_to_the_optimum(seed: int) -> None:
    constraints, loss = bits()
    plain, exchanging = (
        gap_of(AgingEvolution(constraints, seed=seed, exchange=share), constraints, loss, 400)
        for share in (0.0, 1.0)
    )
    assert exchanging < 0.5 * plain


def test_it_starts_from_the_uniform_network_or_from_what_it_was_told() -> None:
    constraints, _ = bits()
    row = AdditiveCritic(constraints, seed=0).ask(1)
    assert len(np.unique(row)) == 1
    first = constraints.space.smallest()
    strategy = WarmStart(AdditiveCritic(constraints, seed=0), first)
    rows = strategy.ask(1)
    strategy.tell(toy_batch(constraints, rows))
    following = strategy.ask(1)
    assert following.max() == 1  # within a step of the smallest
    assert constraints.feasible(following)[0]


def test_it_is_found_by_name() -> None:
    assert load_strategy("strategies.additive:AdditiveCritic") is AdditiveCritic


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"exploration": -1.0}, "exploration must be a finite number >= 0"),
        ({"noise": 0}, "noise must be a finite number > 0"),
        ({"reach": 0}, "reach must be an integer >= 1"),
        ({"remember": 0}, "remember must be an integer >= 1"),
    ],
)
def test_options_are_checked_when_the_search_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        AdditiveCritic(toy_constraints(), **{"seed": 0, **options})


def test_what_it_cannot_search_is_refused() -> None:
    constraints = toy_constraints()
    with pytest.raises(InfeasibleBudgetError):
        AdditiveCritic(Constraints(constraints.space, constraints.costs, {"macs": 1.0}), seed=0)
    space = SearchSpace("words", (Choice("kind", ("a", "b"), ordinal=False),), ())
    with pytest.raises(SpaceError, match="have no order; take a strategy for any options"):
        AdditiveCritic(Constraints(space, {}, {}), seed=0)
    strategy = AdditiveCritic(constraints, seed=0)
    rows = strategy.ask(1)
    percent = Batch(rows, constraints.price(rows), {"accuracy": np.array([71.0])}, np.zeros(1, dtype=np.int8))
    with pytest.raises(RecipeError, match=r"up to 1, got 71\.0"):
        strategy.tell(percent)
