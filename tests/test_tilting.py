"""Tilted draws, against the weights of all rows of small spaces."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from small_spaces import all_codes, costs_over, maxima_over

from autocompress.budget import Budget, Constraints
from autocompress.cost import AdditiveCost, Cost, Factor, MaximumCost, operation_cost
from autocompress.errors import CostError
from autocompress.space import Choice, Codes, SearchSpace
from autocompress.tilting import Tilted, tilted
from search_spaces.mobilenet_v3 import mobilenet_v3

# False alarms once in so many examples.
ALARM = 1e-9


@st.composite
def tight_problems(draw: st.DrawFn) -> tuple[dict[str, Cost], dict[str, float]]:
    """Costs over up to five choices, sums and maxima, and limits that at least one row fits."""
    counts = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=5)))
    costs = {
        name: draw(st.one_of(costs_over(counts, name), maxima_over(counts, name)))
        for name in ("latency_ms", "params")[: draw(st.integers(1, 2))]
    }
    rows = all_codes(counts)
    row = rows[[draw(st.integers(0, len(rows) - 1))]]
    return costs, {name: float(cost.of(row)[0]) * draw(st.floats(1.0, 1.3)) for name, cost in costs.items()}


def fitting(costs: dict[str, Cost], limits: dict[str, float], rows: Codes) -> Codes:
    """Which rows fit, one by one."""
    return rows[np.all([costs[name].of(rows) <= limit for name, limit in limits.items()], axis=0)]


@given(tight_problems())
def test_what_fits_is_kept_with_the_same_probability_whatever_it_is(
    problem: tuple[dict[str, Cost], dict[str, float]],
) -> None:
    costs, limits = problem
    found = tilted(costs, limits)
    assert found is not None
    rows = all_codes(next(iter(costs.values())).counts)
    weights = weights_of(found, costs, limits, rows)
    genes, keep = found.draw(500, np.random.default_rng(0))
    number = {tuple(row): index for index, row in enumerate(rows.tolist())}
    of = np.array([number[tuple(row)] for row in genes.tolist()])
    fits = np.all([costs[name].of(genes) <= limit for name, limit in limits.items()], axis=0)
    kept = weights[of[fits]] * keep[fits]
    # Weight and probability multiply to the same for all that fit: the kept rows are uniform.
    np.testing.assert_allclose(kept, math.exp(-float(found.tilts.sum())), rtol=1e-9)
    assert (keep <= 1).all()


@given(tight_problems())
def test_the_share_that_fits_is_below_chernoff_s_bound_and_is_it_for_maxima_alone(
    problem: tuple[dict[str, Cost], dict[str, float]],
) -> None:
    costs, limits = problem
    found = tilted(costs, limits)
    assert found is not None
    rows = all_codes(next(iter(costs.values())).counts)
    share = len(fitting(costs, limits, rows)) / len(rows)
    bound = math.exp(found.log_bound)
    assert share <= bound * (1 + 1e-9)
    assert bound <= 1 + 1e-9
    # The definition, of the tilts that were chosen.
    weights = weights_of(found, costs, limits, rows)
    assert bound == pytest.approx(weights.mean() * math.exp(float(found.tilts.sum())))
    if all(isinstance(cost, MaximumCost) for cost in costs.values()):
        assert bound == pytest.approx(share)


@settings(max_examples=50)
@given(tight_problems())
def test_genes_are_drawn_in_proportion_to_their_weights(
    problem: tuple[dict[str, Cost], dict[str, float]],
) -> None:
    costs, limits = problem
    found = tilted(costs, limits)
    assert found is not None
    rows = all_codes(next(iter(costs.values())).counts)
    weights = weights_of(found, costs, limits, rows)
    genes, _ = found.draw(4000, np.random.default_rng(0))
    drawn = Counter(map(tuple, genes.tolist()))
    expected = 4000 * weights / weights.sum()
    seen = np.array([drawn[tuple(row)] for row in rows.tolist()])
    common = expected >= 5
    assume(common.sum() > 1)
    groups = [np.append(values[common], values[~common].sum()) for values in (seen, expected)]
    if groups[1][-1] < 5:
        assert groups[0][-1] <= stats.poisson.isf(ALARM, groups[1][-1])
        groups = [values[:-1] for values in groups]
    statistic = ((groups[0] - groups[1]) ** 2 / groups[1]).sum()
    assert statistic < stats.chi2.isf(ALARM, len(groups[0]) - 1)


def weights_of(
    found: Tilted, costs: dict[str, Cost], limits: dict[str, float], rows: Codes
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The definition: row by row, the exponential of minus the tilted costs; 0 where a maximum is above."""
    exponent = np.zeros(len(rows))
    tilts = iter(found.tilts)
    for name, limit in limits.items():
        if isinstance(costs[name], MaximumCost):
            exponent[costs[name].of(rows) > limit] = -np.inf
        else:
            exponent -= next(tilts) * costs[name].of(rows) / limit
    return np.exp(exponent)


@pytest.mark.parametrize("percent", [30, 25])
def test_networks_are_drawn_and_not_constructed_where_one_in_a_hundred_thousand_fits(
    monkeypatch: pytest.MonkeyPatch, percent: int
) -> None:
    space = mobilenet_v3()
    macs = operation_cost(space, "macs")
    constraints = Budget.parse(f"macs={percent}%").resolve(space, [macs])
    # Of the genes, 1 in 700 and 1 in 150,000 fit.
    monkeypatch.setattr("autocompress.budget.MAX_REJECTED_DRAWS", 20_000)
    monkeypatch.delattr(Constraints, "_construct")
    rows = constraints.sample(500, np.random.default_rng(0))
    assert constraints.feasible(rows).all()
    assert len(np.unique(rows, axis=0)) == 500


def test_what_tilting_draws_is_distributed_as_what_rejection_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    space = mobilenet_v3()
    macs, params = (operation_cost(space, metric) for metric in ("macs", "params"))
    rows = []
    for tight in (1.0, 0.0):
        monkeypatch.setattr("autocompress.budget.TIGHT", tight or 1e-9)
        constraints = Budget.parse("macs=42%,params=80%").resolve(space, [macs, params])
        assert (constraints._tilted is None) == (tight == 0.0)
        rows.append(constraints.sample(3000, np.random.default_rng(1)))
    for cost in (macs, params):
        assert stats.ks_2samp(*(cost.of(drawn) for drawn in rows)).pvalue > 1e-3
    # Depth by depth and option by option, each gene is as often what it is.
    for gene in range(len(space.choices)):
        counts = [np.bincount(drawn[:, gene], minlength=space.counts[gene]) for drawn in rows]
        seen = np.array(counts)[:, np.sum(counts, axis=0) > 0]
        assert seen.shape[1] == 1 or stats.chi2_contingency(seen).pvalue > 1e-5


def test_a_limit_on_a_maximum_that_nothing_fits_has_no_tilt_and_too_large_tables_are_refused() -> None:
    peak = MaximumCost("peak_activation_bytes", (2,), 1.0, (Factor((0,), np.array([3.0, 4.0])),))
    assert tilted({"peak_activation_bytes": peak}, {"peak_activation_bytes": 2.0}) is None
    # Each of 11 choices with every other one: the first step joins 4^11 entries.
    counts = (4,) * 11
    pairs = [(i, 10) for i in range(10)]
    cost = AdditiveCost("latency_ms", counts, 1.0, tuple(Factor(pair, np.ones((4, 4))) for pair in pairs))
    with pytest.raises(CostError, match="bounding the budget joins choices"):
        tilted({"latency_ms": cost}, {"latency_ms": 30.0})
    # Sampling goes on without it.
    space = SearchSpace("star", tuple(Choice(f"c{i}", tuple(range(4))) for i in range(11)), ())
    constraints = Constraints(space, {"latency_ms": cost}, {"latency_ms": 30.0})
    assert constraints.sample(3, np.random.default_rng(0)).shape == (3, 11)
