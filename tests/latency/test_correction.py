"""Corrections recover known coefficients, and the report says what it says by hand."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from autocompress.errors import TableError
from autocompress.latency.correction import (
    CheckedNetwork,
    Checks,
    Correction,
    ErrorReport,
    Form,
    assess,
    figures,
    fit,
    learning_curve,
    leave_one_out,
    repeat_noise_percent,
)


def networks(
    scale: float,
    per_block: float,
    constant: float,
    *,
    count: int = 30,
    noise: float = 0.0,
    least: float = 1.0,
) -> Checks:
    """Networks of 5 to 20 blocks of 1 to 3 ms with known coefficients."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(5, 21, size=count).astype(float)
    sums = blocks * rng.uniform(1, 3, size=count)
    measured = scale * sums + per_block * blocks + constant
    return Checks(sums, blocks, measured * np.exp(noise * rng.standard_normal(count)), least)


def bordered(checks: Checks, per_element_ms: float = 0.0) -> Checks:
    """The same networks with elements at the borders of their rows, and what these cost."""
    elements = checks.rows * np.random.default_rng(1).uniform(1e4, 9e4, size=len(checks.rows))
    return replace(checks, elements=elements, measured_ms=checks.measured_ms + per_element_ms * elements)


@given(st.floats(0.2, 2), st.floats(-0.15, 0.5), st.floats(0, 1e-5))
def test_what_borders_cost_is_recovered(scale: float, per_block: float, per_element: float) -> None:
    correction = fit("affine_boundary", bordered(networks(scale, per_block, 2.0), per_element))
    assert correction.scale == pytest.approx(scale, abs=1e-5)
    assert correction.per_row_ms == pytest.approx(per_block, abs=1e-5)
    assert correction.per_element_ms == pytest.approx(per_element, abs=1e-10)


def test_layouts_that_only_lone_blocks_change_are_taken_out_of_their_sums() -> None:
    checks = bordered(networks(1.0, -0.2, 1.0), -1e-6)
    correction, report = assess(checks, samples_of(checks))
    assert report.chosen == "affine_boundary"
    assert correction.per_element_ms == pytest.approx(-1e-6, abs=1e-10)
    assert report.figures.mape_percent == pytest.approx(0, abs=1e-4)
    assert report.forms["affine_per_row"].mape_percent > 0.05


@given(st.integers(0, 10_000))
def test_no_row_gets_a_negative_price_by_its_borders(seed: int) -> None:
    """Optimal among all that do not, by a second implementation: SLSQP from its own start."""
    rng = np.random.default_rng(seed)
    row_ms, row_elements = rng.uniform(0.1, 2, size=20), rng.uniform(1e4, 2e6, size=20)
    counts = rng.integers(0, 3, size=(14, 20))
    checks = Checks(
        counts @ row_ms,
        counts.sum(axis=1).astype(float),
        0.9 * (counts @ row_ms) - counts @ row_elements * 4e-7 + 5 + rng.standard_normal(14),
        row_ms.min(),
        elements=counts @ row_elements,
        row_ms=row_ms,
        row_elements=row_elements,
    )
    found = fit("affine_boundary", checks)
    prices = found.scale * row_ms + found.per_row_ms + found.per_element_ms * row_elements
    assert prices.min() >= -1e-9
    assert found.scale >= 0

    def loss(x: np.ndarray) -> float:
        predicted = x[0] * checks.sums_ms + x[1] * checks.rows + x[2] * checks.elements / 1e6 + x[3]
        return float(((predicted / checks.measured_ms - 1) ** 2).sum())

    rows = np.column_stack([row_ms, np.ones(20), row_elements / 1e6, np.zeros(20)])
    other = minimize(
        loss,
        [1.0, 0.0, 0.0, 0.0],
        method="SLSQP",
        constraints=[{"type": "ineq", "fun": lambda x: rows @ x}],
        bounds=[(0, None), (None, None), (None, None), (None, None)],
        options={"maxiter": 500, "ftol": 1e-12},
    )
    mine = loss(np.array([found.scale, found.per_row_ms, 1e6 * found.per_element_ms, found.constant_ms]))
    assert mine <= loss(other.x) + 1e-5


def samples_of(checks: Checks) -> list[list[float]]:
    return [[value, value] for value in checks.measured_ms.tolist()]


@given(st.floats(0.2, 2), st.floats(-0.15, 0.5), st.floats(-0.5, 3))
def test_known_coefficients_are_recovered(scale: float, per_block: float, constant: float) -> None:
    correction = fit("affine_per_row", networks(scale, per_block, constant))
    assert correction.scale == pytest.approx(scale, abs=1e-6)
    assert correction.per_row_ms == pytest.approx(per_block, abs=1e-6)
    assert correction.constant_ms == pytest.approx(constant, abs=1e-5)


@pytest.mark.parametrize(
    ("form", "coefficients"),
    [
        ("raw", (1.0, 0.0, 0.0)),
        ("scale", (0.7, 0.0, 0.0)),
        ("affine", (0.7, 0.0, 2.0)),
        ("affine_per_row", (1.2, -0.4, 2.0)),
    ],
)
def test_the_simplest_form_that_is_right_is_chosen(
    form: Form, coefficients: tuple[float, float, float]
) -> None:
    checks = networks(*coefficients)
    correction, report = assess(checks, samples_of(checks))
    best = report.forms[form].mape_percent
    assert best == pytest.approx(0, abs=1e-6)
    assert all(
        report.forms[other].mape_percent > 0.1 for other in get_args(Form)[: get_args(Form).index(form)]
    )
    predicted = correction(checks.sums_ms, checks.rows)
    np.testing.assert_allclose(predicted, checks.measured_ms, rtol=1e-6)


def test_sums_that_are_right_are_left_alone() -> None:
    checks = networks(1.0, 0.0, 0.0)
    correction, report = assess(checks, samples_of(checks))
    assert (correction, report.chosen) == (Correction(), "raw")


def test_scale_is_the_least_squares_solution_of_relative_errors() -> None:
    checks = networks(0.7, 0.1, 1.0, noise=0.1)
    ratio = checks.sums_ms / checks.measured_ms
    scales = np.linspace(0.5, 1.5, 100_001)
    losses = (scales**2) * (ratio @ ratio) - 2 * scales * ratio.sum()
    assert fit("scale", checks).scale == pytest.approx(scales[losses.argmin()], abs=2e-5)


@given(st.integers(0, 10_000))
def test_no_block_gets_a_negative_price(seed: int) -> None:
    # Measured times that have nothing to do with the sums push every coefficient about.
    rng = np.random.default_rng(seed)
    blocks = rng.integers(1, 20, size=12).astype(float)
    sums = blocks * rng.uniform(1, 3, size=12)
    checks = Checks(sums, blocks, rng.uniform(0.1, 30, size=12), least_ms=1.0)
    # The one with a term for borders has a test of its own.
    for form in get_args(Form)[:-1]:
        correction = fit(form, checks)
        assert correction.scale >= 0
        assert correction.scale * 1.0 + correction.per_row_ms >= -1e-9


def test_each_network_is_predicted_without_having_been_seen() -> None:
    checks = bordered(networks(0.7, 0.1, 1.0, noise=0.1, count=8))
    for form in get_args(Form):
        predicted = leave_one_out(form, checks)
        for index in range(8):
            # However wrong this one measurement is, its own prediction must not notice.
            wrong = checks.measured_ms.copy()
            wrong[index] *= 50
            others = replace(checks, measured_ms=wrong)
            assert leave_one_out(form, others)[index] == pytest.approx(predicted[index])


def test_figures_are_those_found_by_hand() -> None:
    # Errors: +8 %, -4 %, 0 %, +20 %.
    result = figures(np.array([1.08, 1.92, 3.0, 4.8]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert result.bias_percent == pytest.approx(6)
    assert result.mape_percent == pytest.approx(8)
    assert result.max_error_percent == pytest.approx(20)
    assert (result.within_5_percent, result.within_10_percent) == (50, 75)
    assert result.spearman == pytest.approx(1)


def test_rank_correlation_is_that_of_the_textbook() -> None:
    # 1 - 6 * sum d^2 / (n (n^2 - 1)) with d = (1, -1, 0, 0): 1 - 12 / 60.
    result = figures(np.array([2.0, 1.0, 3.0, 4.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert result.spearman == pytest.approx(0.8)
    # Five of six pairs in order, one not.
    assert result.kendall == pytest.approx(4 / 6)


def test_equal_predictions_have_no_rank_correlation() -> None:
    result = figures(np.array([2.0, 2.0]), np.array([1.0, 3.0]))
    assert (result.spearman, result.kendall) == (None, None)


def test_repeat_noise_compares_the_halves_of_time() -> None:
    # Medians of halves 1 and 1.1, of all 1.05; 2 and 2; 4 and 3, of all 3.5. The median is the first.
    rows = [[1.0, 1.0, 1.1, 1.1], [2.0] * 4, [4.0, 4.0, 3.0, 3.0]]
    assert repeat_noise_percent(rows) == pytest.approx(100 * 0.1 / 1.05)
    assert repeat_noise_percent([]) == 0


def test_the_learning_curve_is_flat_and_zero_where_the_form_is_right() -> None:
    curve = learning_curve("affine", networks(0.7, 0.0, 2.0, count=30))
    assert [size for size, _ in curve] == [5, 10, 15, 20]
    assert [error for _, error in curve] == pytest.approx([0] * 4, abs=1e-6)


def test_a_form_with_too_few_networks_is_not_compared() -> None:
    checks = networks(0.7, 0.0, 0.0, count=3)
    _, report = assess(checks, samples_of(checks))
    assert set(report.forms) == {"raw", "scale"}


def test_one_network_is_no_error_report() -> None:
    with pytest.raises(TableError, match="at least 2 measured networks, got 1"):
        assess(networks(1, 0, 0, count=1), [[1.0]])


def test_a_clock_that_stands_still_is_noticed() -> None:
    checks = Checks(np.ones(3), np.ones(3), np.array([1.0, 0.0, 1.0]), 1.0)
    with pytest.raises(TableError, match="the timer does not work"):
        assess(checks, [[1.0]] * 3)


def test_a_fit_needs_as_many_networks_as_parameters() -> None:
    with pytest.raises(TableError, match="'affine' needs at least 2 measured networks, got 1"):
        fit("affine", networks(1, 0, 0, count=1))


# Confidence ------------------------------------------------------------------------------------------------


def report_of(measured_over_predicted: list[float]) -> ErrorReport:
    networks = tuple(CheckedNetwork("", 3, 1.0, ratio, 1.0) for ratio in measured_over_predicted)
    return ErrorReport(networks, {}, "raw", 0.0, (), None, 0)


def test_the_factor_is_the_ratio_of_the_rank_that_the_confidence_asks_for() -> None:
    """Ranks by hand: ceil(20 * 0.95) = 19 of 19, ceil(20 * 0.9) = 18, ceil(20 * 0.5) = 10."""
    report = report_of([1 + i / 100 for i in range(19)])
    assert report.upper_factor(0.95) == pytest.approx(1.18)
    assert report.upper_factor(0.9) == pytest.approx(1.17)
    assert report.upper_factor(0.5) == pytest.approx(1.09)


def test_a_table_that_predicts_too_much_does_not_widen_the_budget() -> None:
    assert report_of([0.8] * 40).upper_factor(0.95) == 1.0


@pytest.mark.parametrize(("confidence", "needed"), [(0.95, 19), (0.9, 9), (0.99, 99), (0.5, 1)])
def test_a_confidence_needs_so_many_networks(confidence: float, needed: int) -> None:
    assert report_of([1.1] * needed).upper_factor(confidence) == pytest.approx(1.1)
    with pytest.raises(TableError, match=f"needs at least {needed} measured networks, .* has {needed - 1}"):
        report_of([1.1] * (needed - 1)).upper_factor(confidence)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_new_networks_stay_below_as_often_as_asked(confidence: float) -> None:
    """Exchangeable errors, 300 tables of 40 networks, one new network each: within three standard errors."""
    rng = np.random.default_rng(0)
    below = 0
    for _ in range(300):
        ratios = np.exp(0.05 * rng.standard_normal(41))
        below += ratios[40] <= report_of(ratios[:40].tolist()).upper_factor(confidence)
    assert below / 300 >= confidence - 3 * (confidence * (1 - confidence) / 300) ** 0.5


def test_a_correction_that_predicts_no_time_for_a_network_is_not_chosen() -> None:
    """One network that takes far less than its rows say turns the constant negative for the others."""
    sums = np.array([1.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    measured = 1.0 * (sums - 2.0)
    measured[0] = 1e-3
    checks = Checks(sums, np.full(8, 4.0), measured, 0.1)
    assert leave_one_out("affine", checks)[0] < 0
    _, report = assess(checks, samples_of(checks))
    assert report.chosen in ("raw", "scale")
    assert min(network.predicted_ms for network in report.networks) > 0


def test_a_correction_that_cannot_be_used_is_not_chosen() -> None:
    checks = networks(0.7, 0.0, 2.0)
    correction, report = assess(checks, samples_of(checks), usable=lambda found: found.constant_ms == 0)
    assert report.chosen in ("raw", "scale")
    assert correction.constant_ms == 0
