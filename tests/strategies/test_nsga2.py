import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.budget import Constraints
from autocompress.cost import Values
from autocompress.errors import EvaluationError, InfeasibleBudgetError, RecipeError
from autocompress.hypervolume import hypervolume
from autocompress.result import pareto_front
from autocompress.space import Codes
from autocompress.strategy import Strategy, WarmStart
from autocompress.testing.strategy import StrategyContract
from autocompress.testing.toys import every_network, toy_batch, toy_constraints, toy_score
from autocompress.trial import Batch, Outcome
from strategies.nsga2 import NSGA2, crowded_order, crowding_distance, front_ranks
from strategies.random_search import RandomSearch


class TestNSGA2(StrategyContract):
    def make(self, constraints: Constraints, seed: int) -> Strategy:
        return NSGA2(constraints, seed=seed, population=8)


class TestNSGA2OfThreeObjectives(StrategyContract):
    def make(self, constraints: Constraints, seed: int) -> Strategy:
        return NSGA2(constraints, seed=seed, costs=("macs", "params"), population=5, mutation_rate=0.3)


@st.composite
def members(draw: st.DrawFn) -> tuple[Values, Values]:
    """Values of few small integers, `(n, d)`, and violations, `(n,)`, most of them 0."""
    n, dimensions = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    numbers = st.lists(st.integers(0, 3), min_size=n * dimensions, max_size=n * dimensions)
    violation = draw(st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=n, max_size=n))
    values = np.array(draw(numbers), dtype=np.float64).reshape(n, dimensions)
    return values, np.array(violation, dtype=np.float64)


@given(members())
def test_ranks_are_fronts_peeled_off_one_after_the_other(given_members: tuple[Values, Values]) -> None:
    values, violation = given_members
    expected = np.full(len(values), -1)
    rank = 0
    left = np.flatnonzero(violation == 0)
    while len(left):
        front = pareto_front(values[left])
        expected[left[front]] = rank
        left, rank = left[~front], rank + 1
    # What breaks the limits comes after all that fits, the least violation first.
    for excess in np.unique(violation[violation > 0]):
        expected[violation == excess] = rank
        rank += 1
    np.testing.assert_array_equal(front_ranks(values, violation), expected)


def test_crowding_is_the_half_perimeter_between_the_neighbours() -> None:
    # Ranges are 10 and 100. By hand: (4 - 0) / 10 + (100 - 20) / 100, (10 - 1) / 10 + (90 - 0) / 100.
    front = np.array([[4.0, 20.0], [0.0, 100.0], [10.0, 0.0], [1.0, 90.0]])
    np.testing.assert_allclose(crowding_distance(front), [0.9 + 0.9, np.inf, np.inf, 0.4 + 0.8])


def test_where_all_are_equal_nobody_stands_at_an_end() -> None:
    front = np.array([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    np.testing.assert_allclose(crowding_distance(front), [np.inf, 1.0, np.inf])
    np.testing.assert_array_equal(crowding_distance(front[:, 1:]), [0, 0, 0])


def test_the_order_is_by_front_then_by_room() -> None:
    # A front of five, in which (2, 8) has its neighbours close, and one point behind it.
    values = np.array([[1.0, 1.0], [2.0, 8.0], [0.0, 10.0], [3.0, 7.0], [10.0, 0.0], [1.5, 8.5]])
    order = crowded_order(values, np.zeros(6))
    assert set(order[:2].tolist()) == {2, 4}
    # By hand: 3 has (10 - 2) / 10 * 2 = 1.6, 1 has .3 (1.5 to 3, twice), 5 has .4 (0 to 2, twice).
    np.testing.assert_array_equal(order[2:], [3, 5, 1, 0])
    # Infeasible points come last, in the order of their violation, whatever their values.
    order = crowded_order(values, np.array([0.0, 0.0, 0.3, 0.0, 0.2, 0.0]))
    np.testing.assert_array_equal(order[-2:], [4, 2])


def objectives(constraints: Constraints, codes: Codes) -> Values:
    return np.stack([toy_score(constraints.space, codes), -constraints.costs["macs"].of(codes)], axis=1)


def volume_after(strategy: Strategy, constraints: Constraints, evaluations: int, n: int) -> float:
    """Dominated hypervolume under the budget; the reference is no accuracy at the limit."""
    asked = []
    while evaluations > 0:
        asked.append(strategy.ask(min(n, evaluations)))
        evaluations -= len(asked[-1])
        strategy.tell(toy_batch(constraints, asked[-1]))
    return hypervolume(objectives(constraints, np.vstack(asked)), (0.0, -constraints.limits["macs"]))


def test_it_covers_more_than_random_search() -> None:
    constraints = toy_constraints(blocks=10)
    wins = 0
    for seed in range(12):
        found = volume_after(NSGA2(constraints, seed=seed, population=20), constraints, 200, 20)
        wins += found > volume_after(RandomSearch(constraints, seed=seed), constraints, 200, 20)
    # If it were no better, P(>= 10 of 12) <= 0.019; ties count as losses.
    assert wins >= 10


@pytest.mark.parametrize("n", [1, 30])
def test_it_finds_nearly_the_whole_true_front_of_a_space_that_can_be_enumerated(n: int) -> None:
    constraints = toy_constraints()
    networks = every_network(constraints.space)
    feasible = objectives(constraints, networks[constraints.feasible(networks)])
    reference = (0.0, -constraints.limits["macs"])
    whole = hypervolume(feasible[pareto_front(feasible)], reference)
    assert len(feasible) == 1806
    shares = [volume_after(NSGA2(constraints, seed=s, population=20), constraints, 400, n) for s in range(3)]
    assert min(shares) / whole > 0.99
    random = volume_after(RandomSearch(constraints, seed=0), constraints, 400, n)
    assert random / whole < 0.99


def told(constraints: Constraints, codes: Codes, values: list[float], outcome: Outcome) -> Batch:
    outcomes = np.full(len(codes), outcome, dtype=np.int8)
    return Batch(codes, constraints.price(codes), {"accuracy": np.array(values)}, outcomes)


def test_the_ends_of_the_front_survive_and_the_dominated_die() -> None:
    constraints = toy_constraints("macs=100%", blocks=10)
    strategy = NSGA2(constraints, seed=1, population=6, crossover_rate=0.0)
    founders = strategy.ask(6)
    order = np.argsort(constraints.costs["macs"].of(founders), kind="stable")
    # The cheapest and the dearest are good for something; what lies between is worse than the cheapest.
    values = np.zeros(6)
    values[order] = [0.5, 0.1, 0.1, 0.1, 0.1, 0.9]
    strategy.tell(told(constraints, founders, values.tolist(), Outcome.MEASURED))
    families: dict[int, int] = {}
    for _ in range(15):
        children = strategy.ask(6)
        for child in children:
            apart = (constraints.space.active(founders) & constraints.space.active(child[None])) & (
                founders != child
            )
            parent = int(apart.sum(axis=1).argmin())
            families[parent] = families.get(parent, 0) + 1
        # Children are worse than all: they never become parents.
        strategy.tell(told(constraints, children, [-1.0] * 6, Outcome.MEASURED))
    best = families.get(int(order[0]), 0) + families.get(int(order[-1]), 0)
    # The other four are 2nd to 5th front: they win one tournament in (6^2 - 4 * 8) ... fewer than half.
    assert best > 0.5 * sum(families.values())


def test_a_generation_can_be_asked_and_told_in_pieces() -> None:
    constraints = toy_constraints()
    whole = NSGA2(constraints, seed=4, population=10)
    pieces = NSGA2(constraints, seed=4, population=10)
    for _ in range(4):
        codes = whole.ask(1000)
        assert len(codes) == 10
        parts = [pieces.ask(3), pieces.ask(4)]
        pieces.tell(toy_batch(constraints, parts[0]))
        parts.append(pieces.ask(100))
        assert len(pieces.ask(5)) == 0, "nothing more until the generation was told"
        pieces.tell(toy_batch(constraints, parts[1]))
        assert len(pieces.ask(5)) == 0
        pieces.tell(toy_batch(constraints, parts[2]))
        whole.tell(toy_batch(constraints, codes))
        np.testing.assert_array_equal(np.vstack(parts), codes)


def told_infeasible(constraints: Constraints, n: int) -> Codes:
    """Networks over the budget, in which all that is asked must not be."""
    rows = np.unique(constraints.space.sample(2000, np.random.default_rng(0)), axis=0)
    over = rows[~constraints.feasible(rows)][:n]
    assert len(over) == n
    return over


def test_infeasible_rows_of_others_have_feasible_children() -> None:
    constraints = toy_constraints("macs=20%", blocks=10)
    over = told_infeasible(constraints, 30)
    strategy = WarmStart(NSGA2(constraints, seed=2, population=10), over)
    strategy.tell(toy_batch(constraints, strategy.ask(30), Outcome.INFEASIBLE))
    # The founders fail: the parents of the next generation are all over the budget.
    strategy.tell(toy_batch(constraints, strategy.ask(10), Outcome.FAILED))
    children = strategy.ask(10)
    assert len(children) == 10
    assert constraints.feasible(children).all()


def test_of_infeasible_rows_those_that_break_the_budget_least_are_parents_until_one_fits() -> None:
    constraints = toy_constraints("macs=50%", blocks=10)
    over = told_infeasible(constraints, 40)
    strategy = NSGA2(constraints, seed=3, population=5)
    strategy.tell(toy_batch(constraints, over, Outcome.INFEASIBLE))
    founders = strategy.ask(5)
    strategy.tell(toy_batch(constraints, founders, Outcome.FAILED))
    strategy.ask(1)
    least = over[np.argsort(constraints.violation(over), kind="stable")[:5]]
    np.testing.assert_array_equal(strategy._codes, least)
    children = strategy.ask(4)
    strategy.tell(toy_batch(constraints, children))


def test_what_fits_beats_what_was_refused_whatever_its_objective() -> None:
    constraints = toy_constraints("macs=50%", blocks=10)
    strategy = NSGA2(constraints, seed=5, population=4)
    over = told_infeasible(constraints, 4)
    # Measured elsewhere, under another budget: the best of all, but not here.
    strategy.tell(told(constraints, over, [9.0] * 4, Outcome.MEASURED))
    founders = strategy.ask(4)
    strategy.tell(told(constraints, founders, [0.1] * 4, Outcome.MEASURED))
    strategy.ask(1)
    assert {row.tobytes() for row in strategy._codes} == {row.tobytes() for row in founders}


def test_what_was_refused_though_it_fits_is_infeasible_but_better_than_what_does_not() -> None:
    constraints = toy_constraints("macs=50%", blocks=10)
    strategy = NSGA2(constraints, seed=6, population=4)
    strategy.tell(toy_batch(constraints, told_infeasible(constraints, 4), Outcome.INFEASIBLE))
    founders = strategy.ask(4)
    strategy.tell(toy_batch(constraints, founders[:3], Outcome.INFEASIBLE))
    strategy.tell(toy_batch(constraints, founders[3:]))
    strategy.ask(1)
    np.testing.assert_array_equal(strategy._codes[0], founders[3])
    assert {row.tobytes() for row in strategy._codes} == {row.tobytes() for row in founders}


def test_founders_are_random_also_where_rows_were_told_before() -> None:
    constraints = toy_constraints("macs=100%", blocks=10)
    warm, cold = (NSGA2(constraints, seed=9, population=30) for _ in range(2))
    warm.tell(toy_batch(constraints, constraints.space.largest()))
    np.testing.assert_array_equal(warm.ask(30), cold.ask(30))


@pytest.mark.parametrize(("rate", "children"), [(0.0, 0), (1.0, 300)])
def test_crossover_mixes_the_genes_of_two_parents(rate: float, children: int) -> None:
    constraints = toy_constraints("macs=100%", blocks=10)
    strategy = NSGA2(constraints, seed=10, population=600, crossover_rate=rate)
    # Two of equal rank that differ in all genes; their mutants differ from one of them in one.
    pair = np.vstack([constraints.space.largest(), constraints.space.largest()])
    pair[1, 0], pair[1, 2:] = 0, 1
    strategy._codes, strategy._violation = pair, np.zeros(2)
    rows, _ = strategy._propose(600, 0)
    far = [(rows[:, 2:] != parent[2:]).sum(axis=1) for parent in pair]
    # Half of the pairs of parents are twins, which have no other children than mutants.
    mixed = (np.minimum(*far) > 1) & (rows[:, 1] == pair[0, 1])
    assert abs(int(mixed.sum()) - children) <= children / 2


def test_told_rows_are_not_asked_again() -> None:
    constraints = toy_constraints(blocks=2)
    networks = every_network(constraints.space)
    feasible = networks[constraints.feasible(networks)]
    strategy = NSGA2(constraints, seed=7, population=6)
    strategy.tell(toy_batch(constraints, feasible[::2]))
    asked = []
    while len(rows := strategy.ask(6)):
        asked.append(rows)
        strategy.tell(toy_batch(constraints, rows))
    np.testing.assert_array_equal(np.unique(np.vstack(asked), axis=0), np.unique(feasible[1::2], axis=0))


def test_values_that_are_not_finite_have_no_children() -> None:
    constraints = toy_constraints("macs=100%", blocks=10)
    strategy = NSGA2(constraints, seed=8, population=4)
    founders = strategy.ask(4)
    strategy.tell(told(constraints, founders, [np.nan, np.inf, 0.1, -np.inf], Outcome.MEASURED))
    strategy.ask(4)
    np.testing.assert_array_equal(strategy._codes, founders[2:3])


def test_by_default_the_limited_costs_are_minimised_or_else_the_first() -> None:
    constraints = toy_constraints("params=50%,macs=90%")
    assert NSGA2(constraints, seed=0)._costs == ("params", "macs")
    free = Constraints(constraints.space, constraints.costs, {})
    assert NSGA2(free, seed=0)._costs == ("macs",)
    assert NSGA2(free, seed=0, costs=["size_bytes", "flops"])._costs == ("size_bytes", "macs")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"costs": ("latency_ms",)}, "costs must be among macs, params, size_bytes, bops, got latency_ms"),
        ({"costs": "macs"}, r"costs must be a list of metrics, such as \[macs\], got 'macs'"),
        ({"costs": ()}, "minimises at least one cost, got none; priced are macs, params, size_bytes"),
        ({"costs": ("macs", "flops")}, r"each metric once, got \['macs', 'macs'\]"),
        ({"population": 0}, "population must be an integer >= 1, got 0"),
        ({"crossover_rate": 1.5}, r"crossover_rate must be in 0\.\.1, got 1\.5"),
        ({"mutation_rate": -0.1}, r"mutation_rate must be in 0\.\.1, got -0\.1"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)
def test_options_are_checked_when_the_search_is_made(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        NSGA2(toy_constraints(), **{"seed": 0, **options})  # type: ignore[arg-type]


def test_a_space_without_costs_has_nothing_to_trade_off() -> None:
    with pytest.raises(RecipeError, match=r"priced are none; .* use evolution or elitist"):
        NSGA2(Constraints(toy_constraints().space, {}, {}), seed=0)


def test_a_budget_that_nothing_fits_is_refused_when_the_search_is_made() -> None:
    constraints = toy_constraints()
    with pytest.raises(InfeasibleBudgetError, match="nearest feasible budget"):
        NSGA2(Constraints(constraints.space, constraints.costs, {"macs": 1.0}), seed=0)


def test_a_metric_that_the_evaluator_does_not_give_is_an_error() -> None:
    constraints = toy_constraints()
    strategy = NSGA2(constraints, seed=0, objective="f1")
    batch = toy_batch(constraints, strategy.ask(3))
    with pytest.raises(EvaluationError, match="maximises 'f1', but the evaluator gives accuracy"):
        strategy.tell(batch)
