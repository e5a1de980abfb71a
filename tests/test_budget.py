"""Budgets: how they are read, refused and sampled, against all rows of small spaces."""

import math
import pickle
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from small_spaces import all_codes, costs_over, maxima_over

from autocompress.budget import Budget, Constraints, Limit, not_below, parse_limit
from autocompress.cost import AdditiveCost, Cost, Factor, MaximumCost, operation_cost
from autocompress.errors import BudgetError, InfeasibleBudgetError
from autocompress.milp import least_excess
from autocompress.peak_memory import peak_activation_bytes, peak_activation_cost
from autocompress.space import Choice, SearchSpace
from search_spaces.mobilenet_v3 import mobilenet_v3

SEEDS = st.integers(0, 2**32 - 1)


def plain_space(counts: tuple[int, ...]) -> SearchSpace:
    """A space without conditions and blocks: its costs are given, not compiled."""
    return SearchSpace("plain", tuple(Choice(f"c{i}", tuple(range(n))) for i, n in enumerate(counts)), ())


@st.composite
def problems(draw: st.DrawFn, metrics: int = 2) -> tuple[SearchSpace, list[Cost]]:
    counts = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=5)))
    names = ("latency_ms", "params")[:metrics]
    # Budgets do not ask whether a metric adds up or is a maximum.
    return plain_space(counts), [
        draw(st.one_of(costs_over(counts, name), maxima_over(counts, name))) for name in names
    ]


# Two choices of three options. Cheap in one metric is dear in the other, and no row is at both minima.
OPPOSED = plain_space((3, 3))
LATENCY = AdditiveCost("latency_ms", (3, 3), 1.0, (Factor((0,), np.array([0.0, 1.0, 3.0])),))
PARAMS = AdditiveCost(
    "params",
    (3, 3),
    10.0,
    (Factor((0, 1), np.array([[90.0, 95.0, 99.0], [40.0, 45.0, 49.0], [0.0, 5.0, 9.0]])),),
)


# Reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "text", "limit"),
    [
        ("latency_ms", "2.5", Limit("latency_ms", 2.5)),
        ("latency_ms", "2.5ms", Limit("latency_ms", 2.5)),
        ("latency_ms", " 2.5 ms ", Limit("latency_ms", 2.5)),
        ("latency_ms", "250us", Limit("latency_ms", 0.25)),
        ("latency_ms", "1.5s", Limit("latency_ms", 1500.0)),
        ("latency_ms", "60%", Limit("latency_ms", 60.0, percent=True)),
        ("latency_ms", ".5", Limit("latency_ms", 0.5)),
        ("latency_ms", 3, Limit("latency_ms", 3.0)),
        ("macs", "300M", Limit("macs", 300e6)),
        ("flops", "300M", Limit("macs", 300e6)),
        ("flops", 3e8, Limit("macs", 300e6)),
        ("flops", "0.3G", Limit("macs", 300e6)),
        ("macs", "3e8", Limit("macs", 300e6)),
        ("params", "5.4M", Limit("params", 5.4e6)),
        ("params", "800K", Limit("params", 800e3)),
        ("size_bytes", "4MiB", Limit("size_bytes", 4 * 2**20)),
        ("size_bytes", "4MB", Limit("size_bytes", 4e6)),
        ("size_bytes", "512kB", Limit("size_bytes", 512e3)),
        ("size_bytes", "7B", Limit("size_bytes", 7.0)),
        ("size_bytes", "120%", Limit("size_bytes", 120.0, percent=True)),
        ("peak_activation_bytes", "256KiB", Limit("peak_activation_bytes", 256 * 2**10)),
        ("peak_activation_bytes", "60%", Limit("peak_activation_bytes", 60.0, percent=True)),
    ],
)
def test_a_limit_is_read_in_the_metric_s_own_unit(metric: str, text: Any, limit: Limit) -> None:
    assert parse_limit(metric, text) == limit


@pytest.mark.parametrize(
    ("metric", "value", "message"),
    [
        (
            "energy",
            "3",
            "a budget limits latency_ms, macs, .*, peak_activation_bytes, energy_mj or flops .*'energy'",
        ),
        ("latency", "3ms", "not 'latency'"),
        ("latency_ms", "3M", "latency_ms takes no unit, 'ms', 'us', 's' or '%', got 'M' in '3M'"),
        ("latency_ms", "3 MS", "got 'MS' in '3 MS'"),
        ("macs", "3ms", "macs takes no unit, 'k', 'K', 'M', 'G' or '%', got 'ms'"),
        ("macs", "300m", "got 'm' in '300m'"),
        ("size_bytes", "4mib", "got 'mib' in '4mib'"),
        ("peak_activation_bytes", "4ms", "peak_activation_bytes takes no unit, .*, got 'ms'"),
        ("peak_memory_bytes", "4MB", "peak_activation_bytes, energy_mj or flops .*, not 'peak_memory_bytes'"),
        ("macs", "", "macs must be a number such as 300, '60%' or '300M', got ''"),
        ("macs", "M", "must be a number such as .*, got 'M'"),
        ("macs", "-300M", "must be a number such as .*, got '-300M'"),
        ("macs", "3,000", "must be a number such as .*, got '3,000'"),
        ("macs", "nan", "must be a number such as .*, got 'nan'"),
        ("macs", "0x10", "macs takes no unit, .*, got 'x'|must be a number such as .*, got '0x10'"),
        ("macs", "٣", "must be a number such as .*, got '٣'"),
        ("macs", "0", "macs must be positive and finite, got '0'"),
        ("macs", 0, "macs must be positive and finite, got 0"),
        ("macs", -1.0, r"macs must be positive and finite, got -1\.0"),
        ("macs", float("nan"), "macs must be positive and finite, got nan"),
        ("macs", float("inf"), "macs must be positive and finite, got inf"),
        ("macs", "1e400", "macs must be positive and finite, got '1e400'"),
        ("macs", "1e308G", "macs must be positive and finite, got '1e308G'"),
        ("latency_ms", "1e-322us", "latency_ms must be positive and finite, got '1e-322us'"),
        ("macs", 10**400, "macs must be positive and finite, got 1000"),
        ("macs", True, "macs must be a number or text, got True"),
        ("macs", None, "macs must be a number or text, got None"),
        ("macs", ["3"], r"macs must be a number or text, got \['3'\]"),
    ],
)
def test_a_limit_that_cannot_be_meant_is_refused_with_what_is_allowed(
    metric: str, value: Any, message: str
) -> None:
    with pytest.raises(BudgetError, match=message):
        parse_limit(metric, value)


def test_a_budget_is_read_from_text_and_from_a_mapping_alike() -> None:
    budget = Budget.parse("latency_ms=60%, flops = 300M")
    assert budget == Budget.of({"latency_ms": "60%", "macs": 300e6})
    assert str(budget) == "latency_ms <= 60%, macs <= 3e+08"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a budget reads metric=limit"),
        ("300M", r"a budget reads metric=limit\[,metric=limit\], got '300M' in '300M'"),
        ("macs=300M,", "a budget reads metric=limit.*got ''"),
        ("macs=1,macs=2", "a budget limits each metric once, got 'macs' twice"),
        ("macs=1,flops=2", r"a budget limits each metric once, got \['macs', 'macs'\]"),
        ("macs=1=2", "macs must be a number"),
    ],
)
def test_text_that_is_not_a_budget_is_refused(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget.parse(text)


def test_an_empty_budget_is_refused() -> None:
    with pytest.raises(BudgetError, match="a budget needs at least one limit on latency_ms, macs"):
        Budget.of({})


# Resolving ---------------------------------------------------------------------------------------------


def test_percent_is_of_the_network_with_the_last_option_of_every_choice() -> None:
    # Largest: 1 + 3 ms; 10 + 9 parameters, though another network has 109.
    constraints = Budget.parse("latency_ms=50%,params=600%").resolve(OPPOSED, [LATENCY, PARAMS])
    assert constraints.limits == pytest.approx({"latency_ms": 2.0, "params": 114.0}, rel=1e-11)


@given(problems(), st.floats(0.01, 3), st.floats(0.01, 3))
def test_feasible_violation_and_prices_say_the_same_of_every_row(
    problem: tuple[SearchSpace, list[Cost]], first: float, second: float
) -> None:
    space, costs = problem
    limits = {"latency_ms": first, "params": second}
    constraints = Constraints(space, {cost.metric: cost for cost in costs}, limits)
    rows = all_codes(costs[0].counts)
    prices = constraints.price(rows)
    fits = (prices["latency_ms"] <= first) & (prices["params"] <= second)
    assert np.array_equal(constraints.feasible(rows), fits)
    worst = np.maximum(prices["latency_ms"] / first, prices["params"] / second) - 1
    np.testing.assert_allclose(constraints.violation(rows), worst, rtol=1e-12, atol=1e-15)


def test_a_row_at_its_limit_is_feasible_and_one_above_it_is_not() -> None:
    constraints = Constraints(OPPOSED, {"latency_ms": LATENCY}, {"latency_ms": 2.0})
    assert constraints.feasible(np.array([[0, 0], [1, 0], [2, 0]])).tolist() == [True, True, False]
    assert constraints.violation(np.array([[1, 0], [2, 0]])).tolist() == [0.0, 1.0]


def test_a_metric_without_a_cost_is_refused_and_latency_asks_for_its_table() -> None:
    with pytest.raises(BudgetError, match=r"limits macs, but there is no such cost.*priced are latency_ms"):
        Budget.parse("macs=1").resolve(OPPOSED, [LATENCY])
    with pytest.raises(BudgetError, match=r"priced are params \(latency needs a latency table\)"):
        Budget.parse("latency_ms=1").resolve(OPPOSED, [PARAMS])


# Infeasible budgets ------------------------------------------------------------------------------------


@given(st.floats(1e-9, 1e15))
def test_a_number_written_for_typing_back_is_never_below_itself_and_close(value: float) -> None:
    assert value <= float(not_below(value)) <= value * (1 + 1.1e-5)


@pytest.mark.parametrize("value", [0.123456, 123456.0, 14.44, 1e9, 0.001, 99999.95, 999999.5, 300774272.0])
def test_a_number_just_above_a_round_one_is_written_above_itself(value: float) -> None:
    for near in (math.nextafter(value, 0), value, math.nextafter(value, math.inf)):
        assert near <= float(not_below(near)) <= near * (1 + 1.1e-5)


def test_an_impossible_limit_is_refused_with_the_reachable_minimum_and_the_nearest_budget() -> None:
    with pytest.raises(
        InfeasibleBudgetError,
        match=r"no network of space 'plain' fits latency_ms <= 0\.5; the reachable minimum is latency_ms 1; "
        r"the nearest feasible budget is latency_ms <= 1$",
    ) as raised:
        Budget.parse("latency_ms=0.5").resolve(OPPOSED, [LATENCY, PARAMS])
    assert raised.value.nearest == {"latency_ms": 1.0}


def test_limits_that_can_be_met_one_by_one_only_are_refused_with_the_nearest_that_can_jointly() -> None:
    # Rows (latency, least params): (1, 100), (2, 50), (4, 10). Excess over (1.5, 25): 3.0, 1.0, 5/3.
    with pytest.raises(
        InfeasibleBudgetError,
        match=r"the reachable minimum one by one is latency_ms 1, params 10; "
        r"the nearest feasible budget is latency_ms <= 2, params <= 50$",
    ) as raised:
        Budget.parse("latency_ms=1.5,params=25").resolve(OPPOSED, [LATENCY, PARAMS])
    assert raised.value.nearest == {"latency_ms": 2.0, "params": 50.0}


@given(problems(), st.floats(0.01, 20), st.floats(0.01, 20))
def test_the_least_joint_excess_is_that_of_all_rows(
    problem: tuple[SearchSpace, list[Cost]], first: float, second: float
) -> None:
    _, costs = problem
    by_metric = {cost.metric: cost for cost in costs}
    excess, row = least_excess(by_metric, {"latency_ms": first, "params": second})
    rows = all_codes(costs[0].counts)
    all_excess = np.maximum(costs[0].of(rows) / first, costs[1].of(rows) / second) - 1
    # The solver's own tolerance is 1e-6.
    assert excess == pytest.approx(all_excess.min(), abs=2e-6)
    reached = max(costs[0].of(row)[0] / first, costs[1].of(row)[0] / second) - 1
    assert excess == pytest.approx(reached, rel=1e-12, abs=1e-15)


@given(problems(), st.floats(0.2, 1.5), st.floats(0.2, 1.5))
def test_a_budget_is_refused_exactly_if_no_row_fits_and_the_nearest_one_is_then_accepted(
    problem: tuple[SearchSpace, list[Cost]], first: float, second: float
) -> None:
    space, costs = problem
    # Around the minima, where feasibility is decided.
    limits = {"latency_ms": first * costs[0].minimum, "params": second * costs[1].minimum}
    rows = all_codes(costs[0].counts)
    fits = (costs[0].of(rows) <= limits["latency_ms"]) & (costs[1].of(rows) <= limits["params"])
    if fits.any():
        Budget.of(limits).resolve(space, costs)
        return
    with pytest.raises(InfeasibleBudgetError) as raised:
        Budget.of(limits).resolve(space, costs)
    nearest = raised.value.nearest
    assert all(nearest[metric] >= limit for metric, limit in limits.items())
    constraints = Budget.of(nearest).resolve(space, costs)
    assert constraints.feasible(rows).any()
    # What the message says can be typed back.
    typed = re.search(r"nearest feasible budget is (.*)$", str(raised.value))
    assert typed is not None
    Budget.parse(typed[1].replace(" <= ", "=")).resolve(space, costs)


@pytest.mark.parametrize("gap", [1e-5, 1e-7, 1e-9])
def test_joint_feasibility_is_decided_also_between_rows_closer_than_the_solver_s_tolerance(
    gap: float,
) -> None:
    # Rows (cost, cost): the first and third miss by a gap, only the second fits, at its limits exactly.
    counts = (3, 2)
    latency = AdditiveCost("latency_ms", counts, 0.0, (Factor((0,), np.array([2.0 + gap, 2.0, 1.0])),))
    params = AdditiveCost("params", counts, 0.0, (Factor((0,), np.array([1.0, 2.0, 2.0 + gap])),))
    constraints = Budget.of({"latency_ms": 2.0, "params": 2.0}).resolve(
        plain_space(counts), [latency, params]
    )
    assert constraints.sample(5, np.random.default_rng(0))[:, 0].tolist() == [1] * 5


def test_the_error_reaches_another_process_with_its_nearest_budget() -> None:
    error = InfeasibleBudgetError("no network fits", {"macs": 1.0})
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.nearest) == (str(error), error.nearest)


# Drawing -----------------------------------------------------------------------------------------------


@given(problems(), st.floats(1, 2), st.floats(1, 2), SEEDS)
def test_samples_are_feasible_canonical_and_depend_on_the_seed_alone(
    problem: tuple[SearchSpace, list[Cost]], first: float, second: float, seed: int
) -> None:
    space, costs = problem
    limits = {"latency_ms": first * costs[0].minimum, "params": second * costs[1].minimum}
    try:
        constraints = Budget.of(limits).resolve(space, costs)
    except InfeasibleBudgetError:
        assume(False)
    rows = constraints.sample(7, np.random.default_rng(seed))
    space.validate(rows)
    assert rows.shape == (7, len(space.choices))
    assert constraints.feasible(rows).all()
    assert np.array_equal(rows, constraints.sample(7, np.random.default_rng(seed)))


def test_a_joint_limit_on_a_maximum_forbids_settings_one_by_one() -> None:
    # The peak is over 2 wherever one is the third option, and there latency is least.
    peak = MaximumCost(
        "peak_activation_bytes",
        (3, 3),
        1.0,
        (Factor((0,), np.array([1.0, 2.0, 3.0])), Factor((1,), np.array([1.0, 2.0, 4.0]))),
    )
    latency = AdditiveCost(
        "latency_ms",
        (3, 3),
        1.0,
        (Factor((0,), np.array([9.0, 6.0, 0.0])), Factor((1,), np.array([13.0, 7.0, 0.0]))),
    )
    space, both = plain_space((3, 3)), [peak, latency]
    constraints = Budget.parse("peak_activation_bytes=2,latency_ms=14").resolve(space, both)
    assert constraints.sample(5, np.random.default_rng(0)).tolist() == [[1, 1]] * 5
    with pytest.raises(InfeasibleBudgetError) as raised:
        Budget.parse("peak_activation_bytes=2,latency_ms=8").resolve(space, both)
    # Row (2, 1) has a peak of 3, half more, and 8 ms; row (1, 1) has 14 ms, three quarters more.
    assert raised.value.nearest == pytest.approx({"peak_activation_bytes": 3.0, "latency_ms": 8.0})


def test_peak_activations_macs_and_parameters_can_be_limited_jointly_on_a_space_of_ten_to_the_nineteen() -> (
    None
):
    space = mobilenet_v3(resolutions=(128, 160, 192, 224))
    costs = [peak_activation_cost(space), *(operation_cost(space, metric) for metric in ("macs", "params"))]
    text = "peak_activation_bytes=60%,macs=40%,params=70%"
    constraints = Budget.parse(text).resolve(space, costs)
    rows = constraints.sample(20, np.random.default_rng(0))
    largest = peak_activation_bytes(space.operations(space.largest()))
    peaks = [peak_activation_bytes(space.operations(row)) for row in rows]
    assert max(peaks) <= 0.6 * largest * (1 + 1e-9)
    # Fewer MACs than any network has: the solver says what fits jointly.
    least = {"peak_activation_bytes": costs[0].minimum, "macs": costs[1].minimum * 0.9}
    with pytest.raises(InfeasibleBudgetError) as raised:
        Budget.of(least).resolve(space, costs)
    Budget.of(raised.value.nearest).resolve(space, costs)


@pytest.mark.parametrize("metric", ["macs", "params", "size_bytes"])
def test_sampling_ends_for_a_budget_at_the_minimum_of_a_space_of_ten_to_the_nineteen(metric: str) -> None:
    space = mobilenet_v3()
    cost = operation_cost(space, metric)
    constraints = Budget.of({metric: cost.minimum}).resolve(space, [cost])
    rows = constraints.sample(3, np.random.default_rng(0))
    # A draw at random hits the one smallest network with probability under 10^-13.
    assert np.array_equal(rows, np.repeat(space.smallest(), 3, axis=0))


def test_sampling_ends_for_a_budget_that_two_metrics_limit_to_one_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("autocompress.budget.MAX_REJECTED_DRAWS", 0)
    # Latency falls and parameters grow with every gene, by weights of which no two sums are equal: one row
    # fits. Bounds of each metric alone allow nearly everything. Many genes more, and this is a subset-sum
    # problem that takes the solver minutes.
    counts = (2,) * 10
    weights = np.random.default_rng(1).uniform(1, 2, 10)
    latency = AdditiveCost(
        "latency_ms", counts, 1.0, tuple(Factor((i,), np.array([w, 0.0])) for i, w in enumerate(weights))
    )
    params = AdditiveCost(
        "params", counts, 1.0, tuple(Factor((i,), np.array([0.0, w])) for i, w in enumerate(weights))
    )
    space = plain_space(counts)
    chosen = np.array([[1, 0] * 5])
    limits = {"latency_ms": float(latency.of(chosen)[0]), "params": float(params.of(chosen)[0])}
    constraints = Budget.of(limits).resolve(space, [latency, params])
    assert np.array_equal(constraints.sample(5, np.random.default_rng(0)), np.repeat(chosen, 5, axis=0))


def test_no_rows_and_no_limits_are_no_special_cases() -> None:
    constraints = Budget.parse("latency_ms=2").resolve(OPPOSED, [LATENCY])
    assert constraints.sample(0, np.random.default_rng(0)).shape == (0, 2)
    free = Constraints(OPPOSED, {"latency_ms": LATENCY}, {})
    free.check_feasible()
    assert free.sample(4, np.random.default_rng(0), at_least=0.9).shape == (4, 2)
    assert free.feasible(all_codes((3, 3))).all()
    assert (free.violation(all_codes((3, 3))) <= 0).all()


@pytest.mark.parametrize("rejected", [100_000, 0])
def test_samples_are_uniform_over_the_genes_that_fit(monkeypatch: pytest.MonkeyPatch, rejected: int) -> None:
    # With no rejected draws every row is constructed: here, with independent choices, that is uniform too.
    monkeypatch.setattr("autocompress.budget.MAX_REJECTED_DRAWS", rejected)
    constraints = Budget.parse("latency_ms=2").resolve(OPPOSED, [LATENCY])
    drawn = Counter(map(tuple, constraints.sample(6000, np.random.default_rng(0)).tolist()))
    assert len(drawn) == 6  # two of three options of the first choice, all of the second
    # False alarm once in 10^4 seeds.
    assert sum((count - 1000) ** 2 / 1000 for count in drawn.values()) < stats.chi2.isf(1e-4, 5)


def test_samples_can_be_asked_to_use_most_of_the_budget() -> None:
    constraints = Budget.parse("latency_ms=2").resolve(OPPOSED, [LATENCY])
    rows = constraints.sample(50, np.random.default_rng(0), at_least=0.9)
    assert LATENCY.of(rows).tolist() == [2.0] * 50


def test_what_nothing_fits_cannot_be_sampled_and_does_not_hang() -> None:
    constraints = Constraints(OPPOSED, {"latency_ms": LATENCY}, {"latency_ms": 0.5})
    with pytest.raises(InfeasibleBudgetError, match="the reachable minimum is latency_ms 1"):
        constraints.sample(1, np.random.default_rng(0))
