"""The exact optimum: published assignments, and enumeration of small spaces with everything at once."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_spaces import costs_over, maxima_over, spaces

from autocompress import knapsack, multi_knapsack
from autocompress.budget import Constraints
from autocompress.cost import AdditiveCost, Cost, Factor, MaximumCost
from autocompress.errors import BudgetError, CostError, InfeasibleBudgetError, SpaceError
from autocompress.exact import separable, solve
from autocompress.program import make_program, thinned
from autocompress.space import Choice, Codes, SearchSpace
from autocompress.testing.toys import every_network, toy_constraints

GOLDEN = json.loads((Path(__file__).parent / "golden" / "hawq_v3_resnet18.json").read_text(encoding="utf-8"))
SEEDS = st.integers(0, 2**32 - 1)

Forbidden = Sequence[Mapping[str, Any]]


def plain_space(counts: Sequence[int]) -> SearchSpace:
    """A space without conditions and blocks: its costs are given, not compiled."""
    return SearchSpace("plain", tuple(Choice(f"c{i}", tuple(range(n))) for i, n in enumerate(counts)), ())


def allowed(space: SearchSpace, ties: Sequence[Sequence[str]], forbidden: Forbidden) -> Codes:
    """The definition, one network after the other."""
    rows = []
    for row in every_network(space):
        active = space.active(row[None])[0]
        given = {c.name: c.options[k] for c, k, a in zip(space.choices, row, active, strict=True) if a}
        tied = all(len({given[name] for name in group if name in given}) <= 1 for group in ties)
        if tied and not any(combination.items() <= given.items() for combination in forbidden):
            rows.append(row)
    return np.array(rows, dtype=np.int64).reshape(-1, len(space.choices))


def best_of(values: Any, sense: str) -> float:
    return float(values.max() if sense == "maximize" else values.min())


# Published assignments ---------------------------------------------------------------------------------

HAWQ = SearchSpace("resnet18", tuple(Choice(f"layer{i}", (4, 8)) for i in range(19)), ())
HAWQ_TIES = [[f"layer{a}", f"layer{b}"] for a, b in GOLDEN["ties"]]


def hawq_problem(metric: str, fraction: float) -> tuple[AdditiveCost, Constraints]:
    """Sensitivity and one limit, a fraction of the way from all 4 bits to all 8, as in ILP.ipynb."""
    trace = np.array(GOLDEN["hutchinson_trace"])
    sensitivity = [trace * GOLDEN["delta_weights_sq_4"], trace * GOLDEN["delta_weights_sq_8"]]
    parameters, bops = np.array(GOLDEN["parameters_m"]), np.array(GOLDEN["bops_m_32x32"])
    four, eight = {
        "modelsize": (parameters / 2, parameters),
        "bops": (bops / 64, bops / 16),
        "latency": (np.array(GOLDEN["latency_int4"]), np.array(GOLDEN["latency_int8"])),
    }[metric]
    limit = four.sum() + fraction * (eight.sum() - four.sum())
    cost = separable(HAWQ, np.stack([four, eight], axis=1), metric)
    value = separable(HAWQ, np.stack(sensitivity, axis=1), "sensitivity")
    return value, Constraints(HAWQ, {metric: cost}, {metric: float(limit)})


@pytest.mark.parametrize("method", ["dp", "milp"])
@pytest.mark.parametrize("name", GOLDEN["published_bits"])
def test_the_nine_published_bit_assignments_of_resnet_18_are_reproduced(name: str, method: Any) -> None:
    metric, fraction = name.split("_")
    value, constraints = hawq_problem(metric, float(fraction))
    optimum = solve(value, constraints, sense="minimize", ties=HAWQ_TIES, method=method)
    assert "".join("48"[code] for code in optimum.codes[0]) == GOLDEN["published_bits"][name]
    assert (optimum.proven, optimum.gap, optimum.bound) == (True, 0.0, optimum.value)
    resolved = GOLDEN["resolved"].get(name, {})
    assert optimum.value == pytest.approx(resolved.get("sensitivity", optimum.value), abs=5e-7)
    cost = float(constraints.costs[metric].of(optimum.codes)[0])
    assert cost == pytest.approx(resolved.get("cost", cost), rel=1e-5)
    assert constraints.limits[metric] == pytest.approx(
        resolved.get("limit", constraints.limits[metric]), abs=5e-4
    )


def test_without_the_ties_a_published_problem_has_a_better_answer() -> None:
    value, constraints = hawq_problem("latency", 0.5)
    tied = solve(value, constraints, sense="minimize", ties=HAWQ_TIES)
    assert solve(value, constraints, sense="minimize").value < tied.value


# Enumeration -------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[AdditiveCost, Constraints, list[list[str]], list[dict[str, Any]]]:
    """A space with conditions, tables over several choices, one sum and one maximum to limit, rules."""
    space = draw(spaces())
    counts = tuple(space.counts.tolist())
    value = draw(costs_over(counts, "value"))
    costs: dict[str, Cost] = {
        "latency_ms": draw(costs_over(counts, "latency_ms")),
        "peak_activation_bytes": draw(maxima_over(counts, "peak_activation_bytes")),
    }
    rows = every_network(space)
    limits = {}
    for metric in draw(st.sets(st.sampled_from(sorted(costs)))):
        prices = np.sort(costs[metric].of(rows))
        # Exactly at a network's price, where rounding decides.
        limits[metric] = float(prices[draw(st.integers(0, len(prices) - 1))])
    same = [c.name for c in space.choices if c.options == space.choices[0].options]
    ties = [same[:2]] if len(same) > 1 and draw(st.booleans()) else []
    some = st.lists(st.sampled_from(space.choices), min_size=1, max_size=2, unique_by=lambda c: c.name)
    forbidden = [
        {choice.name: draw(st.sampled_from(choice.options)) for choice in draw(some)}
        for _ in range(draw(st.integers(0, 2)))
    ]
    return value, Constraints(space, costs, limits), ties, forbidden


@given(problems(), st.sampled_from(["maximize", "minimize"]))
def test_no_network_of_a_small_space_is_better_and_every_rule_holds(problem: Any, sense: Any) -> None:
    value, constraints, ties, forbidden = problem
    space = constraints.space
    rows = allowed(space, ties, forbidden)
    fitting = rows[constraints.feasible(rows)]
    if not len(fitting):
        with pytest.raises(BudgetError):
            solve(value, constraints, sense=sense, ties=ties, forbidden=forbidden)
        return
    optimum = solve(value, constraints, sense=sense, ties=ties, forbidden=forbidden)
    assert (fitting == optimum.codes).all(axis=1).any()
    assert optimum.value == value.of(optimum.codes)[0]
    assert optimum.value == pytest.approx(best_of(value.of(fitting), sense), rel=1e-9, abs=1e-9)
    assert optimum.proven
    assert optimum.bound == optimum.value


@settings(max_examples=50)
@given(problems())
def test_what_nothing_fits_names_a_budget_that_something_does(problem: Any) -> None:
    value, constraints, ties, forbidden = problem
    assume(constraints.limits)
    tight = Constraints(
        constraints.space, constraints.costs, {m: 0.9 * limit for m, limit in constraints.limits.items()}
    )
    rows = allowed(constraints.space, ties, forbidden)
    assume(len(rows) and not tight.feasible(rows).any())
    # Budgets take the minimum over all rows, and so costs in which genes without effect are free.
    networks = every_network(constraints.space)
    assume(all(cost.minimum == cost.of(networks).min() for cost in constraints.costs.values()))
    with pytest.raises(InfeasibleBudgetError, match="the nearest feasible budget is") as raised:
        solve(value, tight, sense="minimize", ties=ties, forbidden=forbidden)
    nearest = raised.value.nearest
    assert all(nearest[metric] >= limit for metric, limit in tight.limits.items())
    near = Constraints(tight.space, tight.costs, nearest)
    assert near.feasible(rows).any()
    solve(value, near, sense="minimize", ties=ties, forbidden=forbidden)


@st.composite
def knapsacks(draw: st.DrawFn) -> tuple[AdditiveCost, Constraints]:
    """One table a choice, in whole numbers or in fractions, often at the price of a row exactly."""
    counts = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    rng = np.random.default_rng(draw(SEEDS))
    draws = [rng.integers(0, 9, 2 * n).astype(float) for n in counts]
    if draw(st.booleans()):
        draws = [rng.normal(size=2 * n) for n in counts]
    space = plain_space(counts)
    value = separable(space, [d[::2] for d in draws], "value")
    cost = separable(space, [d[1::2] for d in draws], "latency_ms")
    prices = np.sort(cost.of(every_network(space)))
    limit = float(prices[draw(st.integers(0, len(prices) - 1))])
    return value, Constraints(space, {"latency_ms": cost}, {"latency_ms": limit})


@given(knapsacks(), st.sampled_from(["maximize", "minimize"]))
def test_labels_and_integer_programming_find_the_optimum_of_all_rows(problem: Any, sense: Any) -> None:
    value, constraints = problem
    rows = every_network(constraints.space)
    best = best_of(value.of(rows[constraints.feasible(rows)]), sense)
    for method in ("dp", "milp"):
        optimum = solve(value, constraints, sense=sense, method=method)
        assert optimum.value == pytest.approx(best, rel=1e-9, abs=1e-9)
        assert constraints.feasible(optimum.codes)[0]
        assert (optimum.method, optimum.proven) == (method, True)


@pytest.mark.parametrize(
    "vectors",
    [
        {"c0": [1.0, 2.0], "c1": [1.0, 2.0]},
        [["low", "high"], [1.0, 2.0]],
        [{"a": 1.0}, [1.0, 2.0]],
        [[None, "x"], [1.0, 2.0]],
        [[[1.0], [1.0, 2.0]], [1.0, 2.0]],
        None,
    ],
)
def test_scores_that_are_no_vectors_of_numbers_are_refused(vectors: Any) -> None:
    wanted = rf"one a choice in the order of \['c0', 'c1'\], got {type(vectors).__name__}: "
    with pytest.raises(CostError, match=wanted):
        separable(plain_space([2, 2]), vectors, "value")


@st.composite
def several_limits(draw: st.DrawFn) -> tuple[AdditiveCost, Constraints]:
    """One table a choice for a value and up to four limits, in whole numbers or in fractions."""
    counts = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    rng = np.random.default_rng(draw(SEEDS))
    whole, space = draw(st.booleans()), plain_space(counts)

    def table(metric: str) -> AdditiveCost:
        entries = [rng.integers(1, 9, n) if whole else rng.exponential(size=n) for n in counts]
        return separable(space, entries, metric)

    costs = {metric: table(metric) for metric in ("a", "b", "c", "d")[: draw(st.integers(2, 4))]}
    rows = every_network(space)
    # Between least and greatest, at the price of a network: some together, some not.
    limits = {
        m: float(np.quantile(c.of(rows), draw(st.floats(0, 1)), method="nearest")) for m, c in costs.items()
    }
    return table("value"), Constraints(space, costs, limits)


@settings(max_examples=50)
@given(several_limits(), st.sampled_from(["maximize", "minimize"]))
def test_labels_under_several_limits_find_the_optimum_of_all_rows(problem: Any, sense: Any) -> None:
    value, constraints = problem
    rows = every_network(constraints.space)
    fitting = rows[constraints.feasible(rows)]
    if not len(fitting):
        with pytest.raises(InfeasibleBudgetError):
            solve(value, constraints, sense=sense, method="dp")
        return
    optimum = solve(value, constraints, sense=sense, method="dp")
    assert optimum.value == pytest.approx(best_of(value.of(fitting), sense), rel=1e-9, abs=1e-9)
    assert constraints.feasible(optimum.codes)[0]
    assert (optimum.method, optimum.proven) == ("dp", True)


@pytest.mark.parametrize("seed", range(3))
def test_labels_and_integer_programming_agree_where_nobody_can_enumerate(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    # Many labels, so that prices are sampled: 12 choices of 12 options, three limits.
    monkeypatch.setattr(multi_knapsack, "ENOUGH_LABELS", 50)
    monkeypatch.setattr(multi_knapsack, "CHUNK", 500)
    space, rng = plain_space((12,) * 12), np.random.default_rng(seed)
    shared = rng.random((12, 12))
    tables = [0.7 * shared + 0.3 * rng.random((12, 12)) for _ in range(4)]
    value = separable(space, tables[0], "value")
    costs = {str(number): separable(space, table, str(number)) for number, table in enumerate(tables[1:])}
    limits = {m: cost.minimum + 0.4 * (cost.maximum - cost.minimum) for m, cost in costs.items()}
    constraints = Constraints(space, costs, limits)
    by_labels, by_milp = (solve(value, constraints, sense="maximize", method=m) for m in ("dp", "milp"))
    assert by_labels.proven
    assert by_milp.proven
    assert by_labels.value == pytest.approx(by_milp.value, rel=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_a_round_with_a_cutoff_just_above_the_optimum_finds_it(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    # Any bound that is a little too high loses it; prices are sampled at every stage.
    monkeypatch.setattr(multi_knapsack, "ENOUGH_LABELS", 0)
    rng = np.random.default_rng(seed)
    values, costs = rng.random((6, 5)), rng.random((6, 3, 5))
    rows = np.array(list(itertools.product(range(5), repeat=6)))
    sums = costs[np.arange(6), :, rows].sum(axis=1)
    room = np.quantile(sums, 0.3, axis=0)
    optimum = values[np.arange(6), rows].sum(axis=1)[(sums <= room).all(axis=1)].min()
    choices = [multi_knapsack._Choice(np.arange(5), *tables) for tables in zip(costs, values, strict=True)]
    free = np.zeros((1, 3))
    attempt = multi_knapsack._Round(choices, room, optimum + 1e-9, free, math.inf)
    found = attempt.run()
    assert found is not None
    assert found[0] == pytest.approx(optimum, rel=1e-12)
    assert found[1] is not None
    assert values[np.arange(6), found[1]].sum() == pytest.approx(optimum, rel=1e-12)
    assert len(attempt.prices) > len(free)
    below = multi_knapsack._Round(choices, room, optimum - 1e-9, free, math.inf).run()
    assert below is not None
    assert below[0] >= optimum - 1e-9


@pytest.mark.parametrize("budget", ["macs=50%", "macs=30%,params=40%", "macs=50%,params=70%,size_bytes=60%"])
@pytest.mark.parametrize("sense", ["maximize", "minimize"])
def test_no_network_of_the_toy_space_is_better(budget: str, sense: Any) -> None:
    constraints = toy_constraints(budget)
    space, rng = constraints.space, np.random.default_rng(0)
    counts = tuple(space.counts.tolist())
    # Every pair of choices, so that neither cost nor value follows the blocks.
    pairs = itertools.combinations(range(len(counts)), 2)
    value = AdditiveCost(
        "value", counts, 1.0, tuple(Factor(p, rng.normal(size=[counts[i] for i in p])) for p in pairs)
    )
    rows = every_network(space)
    optimum = solve(value, constraints, sense=sense)
    best = best_of(value.of(rows[constraints.feasible(rows)]), sense)
    assert optimum.value == pytest.approx(best, rel=1e-10)
    assert constraints.feasible(optimum.codes)[0]


# Exactness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("excess", [1e-6, 1e-9, 1e-11, 1e-13])
@pytest.mark.parametrize("method", ["auto", "milp"])
def test_what_exceeds_a_limit_by_less_than_any_solver_sees_is_not_taken(excess: float, method: Any) -> None:
    space = plain_space((4, 2))
    value = separable(space, [[9.0, 8.0, 7.0, 0.0], [0.0, 0.0]], "value")
    cost = separable(space, [[1 + 2 * excess, 1 + excess, 1.0, 0.5], [0.0, 1.0]], "latency_ms")
    constraints = Constraints(space, {"latency_ms": cost}, {"latency_ms": 1.0})
    optimum = solve(value, constraints, sense="maximize", method=method)
    assert (optimum.codes.tolist(), optimum.value, optimum.proven) == ([[2, 0]], 7.0, True)


@pytest.mark.parametrize("seed", range(3))
def test_the_solver_does_not_stop_where_one_choice_outweighs_all_others(seed: int) -> None:
    # HiGHS is content with a ten-thousandth unless told otherwise: here 100, and all the rest is worth 7.
    space, rng = plain_space((5,) * 15), np.random.default_rng(seed + 1)
    scores = rng.random((15, 5))
    prices = scores + 0.3 * rng.random((15, 5))
    scores[:2], prices[:2] = 1e6 * np.arange(5), 10.0 * np.arange(5)
    value, cost = separable(space, list(scores), "value"), separable(space, list(prices), "latency_ms")
    constraints = Constraints(space, {"latency_ms": cost}, {"latency_ms": 47.0})
    by_labels, by_milp = (solve(value, constraints, sense="maximize", method=m) for m in ("dp", "milp"))
    assert by_milp.value == pytest.approx(by_labels.value, abs=1e-3)


def hard_problem() -> tuple[AdditiveCost, Constraints]:
    """A subset sum of 60 numbers in both directions: no solver proves that."""
    space = plain_space((2,) * 60)
    rng = np.random.default_rng(0)
    weights = rng.uniform(1, 2, 60)
    value = separable(space, np.stack([np.zeros(60), weights], axis=1), "value")
    costs = {
        metric: separable(space, np.stack([np.zeros(60), weights + noise], axis=1), metric)
        for metric, noise in (("a", rng.normal(0, 0.01, 60)), ("b", rng.normal(0, 0.01, 60)))
    }
    limits = {metric: 0.3 * cost.maximum for metric, cost in costs.items()}
    return value, Constraints(space, costs, limits)


def test_when_time_runs_out_the_best_so_far_comes_with_its_gap_and_is_not_called_proven() -> None:
    value, constraints = hard_problem()
    optimum = solve(value, constraints, sense="maximize", time_limit_s=0.3)
    assert not optimum.proven
    assert constraints.feasible(optimum.codes)[0]
    assert optimum.value < optimum.bound < 92  # the sum of all weights is 91.3
    assert optimum.gap == pytest.approx((optimum.bound - optimum.value) / optimum.value)


# With 30 labels the first rounds of the search under three limits are completed, and the last is not.
@pytest.mark.parametrize(("limited", "labels"), [(1, 1), (3, 1), (3, 30)])
@pytest.mark.parametrize("sense", ["maximize", "minimize"])
def test_labels_that_run_out_leave_a_valid_bound_and_integer_programming_goes_on(
    monkeypatch: pytest.MonkeyPatch, sense: Any, limited: int, labels: int
) -> None:
    space = plain_space((5,) * 12)
    rng = np.random.default_rng(3)
    sign = 1.0 if sense == "maximize" else -1.0
    value = separable(space, sign * np.sort(rng.random((12, 5))), "value")
    costs = {m: separable(space, np.sort(rng.random((12, 5))), m) for m in ("a", "b", "c")[:limited]}
    constraints = Constraints(space, costs, {m: 0.4 * cost.maximum for m, cost in costs.items()})
    best = solve(value, constraints, sense=sense, method="dp")
    assert best.proven
    monkeypatch.setattr(knapsack, "MAX_LABELS", labels)
    monkeypatch.setattr(multi_knapsack, "MAX_LABELS", labels)
    given_up = solve(value, constraints, sense=sense, method="dp")
    assert not given_up.proven
    assert given_up.gap > 0
    assert sign * given_up.value <= sign * best.value <= sign * given_up.bound
    assert constraints.feasible(given_up.codes)[0]
    again = solve(value, constraints, sense=sense)
    assert (again.method, again.proven) == ("milp", True)
    assert again.value == pytest.approx(best.value, rel=1e-9)


def test_the_same_question_gets_the_same_answer() -> None:
    # Every network of two or more is an optimum.
    space = plain_space((3,) * 6)
    value = separable(space, [[0.0, 1.0, 1.0]] * 6, "value")
    costs = {m: separable(space, [[0.0, 1.0, 1.0]] * 6, m) for m in ("latency_ms", "params")}
    constraints = Constraints(space, costs, {"latency_ms": 3.0, "params": 3.0})
    codes = [solve(value, constraints, sense="maximize").codes.tolist() for _ in range(3)]
    assert codes[0] == codes[1] == codes[2]


# Options that no optimum needs ---------------------------------------------------------------------------


def test_options_over_a_limit_in_any_company_and_dominated_ones_are_left_out_before_solving() -> None:
    space = plain_space((5, 2))
    # Option 1 is no better than 0; 3 equals 2; 4 is over the limit with the cheapest of the other choice.
    value = separable(space, [[3.0, 4.0, 2.0, 2.0, 0.0], [1.0, 0.0]], "value")
    cost = separable(space, [[1.0, 1.0, 2.0, 2.0, 3.5], [1.0, 1.5]], "latency_ms")
    program = thinned(make_program(space, value, [(cost, 4.0)]))
    assert program is not None
    assert [options.tolist() for options in program.options] == [[0, 2], [0, 1]]
    assert program.expand(np.array([[1, 1], [0, 0]])).tolist() == [[2, 1], [0, 0]]
    assert thinned(make_program(space, value, [(cost, 1.9)])) is None


@pytest.mark.parametrize("method", ["dp", "milp"])
def test_a_limit_on_a_maximum_is_exact_in_every_method(method: Any) -> None:
    space = plain_space((3, 3))
    entries = (np.array([1.0, 2.0, 2.0 + 1e-12]), np.array([2.0, 1.0, 3.0]))
    peak = MaximumCost(
        "peak_activation_bytes", (3, 3), 1.0, tuple(Factor((i,), table) for i, table in enumerate(entries))
    )
    value = separable(space, [[0.0, 1.0, 2.0], [0.0, 1.5, 3.0]], "value")
    constraints = Constraints(space, {peak.metric: peak}, {peak.metric: 2.0})
    optimum = solve(value, constraints, sense="maximize", method=method)
    assert (optimum.codes.tolist(), optimum.value) == ([[1, 1]], 2.5)


def test_a_limit_on_a_maximum_over_two_choices_forbids_pairs_exactly() -> None:
    space = plain_space((3, 3))
    entries = np.array([[1.0, 2.0, 3.0], [2.0, 2.0 + 1e-12, 3.0], [3.0, 3.0, 3.0]])
    peak = MaximumCost("peak_activation_bytes", (3, 3), 1.0, (Factor((0, 1), entries),))
    value = separable(space, [[0.0, 1.0, 2.0], [0.0, 1.5, 3.0]], "value")
    constraints = Constraints(space, {peak.metric: peak}, {peak.metric: 2.0})
    optimum = solve(value, constraints, sense="maximize")
    assert (optimum.codes.tolist(), optimum.value) == ([[0, 1]], 1.5)


# Values, ties, forbidden combinations ----------------------------------------------------------------------


@given(spaces(), SEEDS)
def test_scores_add_up_over_the_choices_that_have_an_effect(space: SearchSpace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = [rng.normal(size=count) for count in space.counts]
    value = separable(space, vectors, "log_probability")
    rows = every_network(space)
    scores = np.stack([vector[column] for vector, column in zip(vectors, rows.T, strict=True)], axis=1)
    np.testing.assert_allclose(value.of(rows), (scores * space.active(rows)).sum(axis=1), atol=1e-12)


def test_the_most_probable_network_under_no_limit_takes_the_likeliest_option_of_every_choice() -> None:
    constraints = Constraints(toy_constraints().space, {}, {})
    space, rng = constraints.space, np.random.default_rng(0)
    logits = [rng.normal(size=count) for count in space.counts]
    value = separable(space, [v - np.log(np.exp(v).sum()) for v in logits], "log_probability")
    probabilities = np.exp(value.of(every_network(space)))
    assert probabilities.sum() == pytest.approx(1.0)
    optimum = solve(value, constraints, sense="maximize")
    assert math.exp(optimum.value) == pytest.approx(probabilities.max())


CONDITIONAL = SearchSpace(
    "conditional",
    (
        Choice("depth", (1, 2)),
        Choice("kernel1", (3, 5)),
        Choice("kernel2", (3, 5), active_when=(("depth", (2,)),)),
    ),
    (),
)


def test_a_tie_binds_only_where_both_choices_have_an_effect() -> None:
    free = Constraints(CONDITIONAL, {}, {})
    ties = [["kernel1", "kernel2"]]
    shallow = separable(CONDITIONAL, [[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]], "value")
    # Shallow: 1 + 1; deep and tied: 0 + 2 or 1 + 0; deep and free: 1 + 2.
    assert solve(shallow, free, sense="maximize").codes.tolist() == [[1, 1, 0]]
    assert solve(shallow, free, sense="maximize", ties=ties).value == 2.0
    dearer = separable(CONDITIONAL, [[1.1, 0.0], [0.0, 1.0], [2.0, 0.0]], "value")
    assert solve(dearer, free, sense="maximize", ties=ties).codes.tolist() == [[0, 1, 0]]


def test_a_forbidden_option_does_not_occur_where_its_choice_has_no_effect() -> None:
    free = Constraints(CONDITIONAL, {}, {})
    value = separable(CONDITIONAL, [[1.0, 0.0], [0.0, 1.0], [2.0, 1.5]], "value")
    # The row of the shallow network has the first option of kernel2, but not a second kernel of 3.
    optimum = solve(value, free, sense="maximize", forbidden=[{"kernel2": 3}, {"depth": 2, "kernel2": 5}])
    assert optimum.codes.tolist() == [[0, 1, 0]]


def test_ties_that_share_a_choice_are_one_tie() -> None:
    space = plain_space((2, 2, 2, 2))
    value = separable(space, [[0.0, 3.0], [2.0, 0.0], [0.0, 0.5], [0.0, 1.0]], "value")
    free = Constraints(space, {}, {})
    optimum = solve(value, free, sense="maximize", ties=[["c0", "c1"], ["c2", "c1"]])
    assert optimum.codes.tolist() == [[1, 1, 1, 1]]
    assert optimum.value == 4.5


# Refusals ----------------------------------------------------------------------------------------------


def test_a_budget_that_only_the_ties_break_is_refused_with_the_nearest_that_is_not() -> None:
    space = plain_space((2, 2))
    value = separable(space, [[0.0, 1.0]] * 2, "value")
    # Tied, the networks cost 5 and 4; free, 1 + 2.
    cost = separable(space, [[1.0, 2.0], [4.0, 2.0]], "latency_ms")
    constraints = Constraints(space, {"latency_ms": cost}, {"latency_ms": 3.0})
    assert solve(value, constraints, sense="minimize", method="milp").codes.tolist() == [[0, 1]]
    for method in ("dp", "milp"):
        with pytest.raises(
            InfeasibleBudgetError,
            match=r"no network of space 'plain' fits latency_ms <= 3 with these ties and forbidden "
            r"combinations; the nearest feasible budget is latency_ms <= 4$",
        ) as raised:
            solve(value, constraints, sense="minimize", ties=[["c0", "c1"]], method=method)  # type: ignore[arg-type]
        assert raised.value.nearest == {"latency_ms": 4.0}


def test_a_budget_that_nothing_fits_is_refused_as_everywhere() -> None:
    space = plain_space((2, 2))
    value = separable(space, [[0.0, 1.0]] * 2, "value")
    cost = separable(space, [[1.0, 2.0], [4.0, 2.0]], "latency_ms")
    constraints = Constraints(space, {"latency_ms": cost}, {"latency_ms": 2.9})
    with pytest.raises(InfeasibleBudgetError, match="the reachable minimum is latency_ms 3; the nearest"):
        solve(value, constraints, sense="maximize")


@pytest.mark.parametrize("limits", [{}, {"latency_ms": 9.0}])
def test_rules_that_leave_nothing_are_refused_whatever_the_budget(limits: dict[str, float]) -> None:
    space = plain_space((2, 2))
    cost = separable(space, [[1.0, 2.0]] * 2, "latency_ms")
    constraints = Constraints(space, {"latency_ms": cost}, limits)
    with pytest.raises(BudgetError, match="no network at all is left by the ties and what is forbidden"):
        solve(cost, constraints, sense="minimize", forbidden=[{"c0": 0}, {"c0": 1}])


PLAIN = plain_space((2, 3))
VALUE = AdditiveCost("value", (2, 3), 0.0, (Factor((0, 1), np.arange(6.0).reshape(2, 3)),))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sense": "max"}, CostError, "sense must be 'maximize' or 'minimize', got 'max'"),
        ({"method": "ilp"}, CostError, "method must be 'auto', 'milp' or 'dp', got 'ilp'"),
        ({"time_limit_s": 0.0}, CostError, r"time_limit_s must be positive and finite, got 0\.0"),
        ({"time_limit_s": math.nan}, CostError, "time_limit_s must be positive and finite, got nan"),
        (
            {"method": "dp"},
            CostError,
            "'dp' needs a value and limited costs that are sums over single choices",
        ),
        ({"ties": [["c0", "c9"]]}, SpaceError, r"no choice 'c9'; it has \['c0', 'c1'\]"),
        (
            {"ties": [["c0", "c1"]]},
            SpaceError,
            r"same options, got .* with options \[\[0, 1\], \[0, 1, 2\]\]",
        ),
        (
            {"ties": [["c0"]]},
            SpaceError,
            r"a tie joins two or more choices of the same options, got \['c0'\]",
        ),
        ({"forbidden": [{}]}, SpaceError, "a forbidden combination names at least one choice"),
        ({"forbidden": [{"c9": 0}]}, SpaceError, "no choice 'c9'"),
        ({"forbidden": [{"c0": 7}]}, SpaceError, "choice 'c0' has no option 7"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        solve(VALUE, Constraints(PLAIN, {}, {}), **{"sense": "minimize", **arguments})


def test_a_value_of_another_space_is_refused() -> None:
    other = AdditiveCost("value", (2, 2), 0.0, ())
    with pytest.raises(CostError, match=r"value must be over the choices of space 'plain', with \[2, 3\]"):
        solve(other, Constraints(PLAIN, {}, {}), sense="minimize")


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[0.0, 1.0]], r"one score an option, shapes \[\(2,\), \(3,\)\], got \[\(2,\)\]"),
        ([[0.0, 1.0], [0.0, 1.0]], r"got \[\(2,\), \(2,\)\]"),
        (
            [[0.0, -np.inf], [0.0] * 3],
            r"value of choice 'c0' must be finite, got \[0\.0, -inf\]; .*`forbidden`",
        ),
    ],
)
def test_scores_that_are_missing_or_not_finite_are_refused(vectors: Any, message: str) -> None:
    with pytest.raises(CostError, match=message):
        separable(PLAIN, vectors, "value")


def test_an_optimum_that_was_not_found_in_time_is_no_infeasible_budget() -> None:
    value, constraints = hard_problem()
    with pytest.raises(
        CostError, match=r"milp found no network that fits in 1e-09 s, nor that there is none"
    ):
        solve(value, constraints, sense="maximize", time_limit_s=1e-9, method="milp")
