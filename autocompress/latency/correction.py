"""From sums of block times to times of whole networks: a correction, and how far it can be trusted.

A block timed alone pays for a call into the runtime and for changes of layout that a whole network does not
pay at every block, so sums of cold single runs come out 30 to 50 % too slow, by nearly the same amount for
each block. Whole networks, measured in the same rounds, say how much.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from autocompress.errors import TableError

Vector = NDArray[np.float64]

Form = Literal["raw", "scale", "affine", "affine_per_row", "affine_boundary"]
"""From fewest to most parameters: 0, 1 (scale), 2 (and a constant), 3 (and a term for each summed row), 4
(and a term for each element at the borders of rows, where a whole network changes no layout)."""

Granularity = Literal["block", "op"]
"""What a row is when a network is priced: a whole block as the runtime fuses it, or one operation."""

PARAMETERS: Final[dict[Form, int]] = {
    "raw": 0,
    "scale": 1,
    "affine": 2,
    "affine_per_row": 3,
    "affine_boundary": 4,
}
CURVE_SIZES: Final = (5, 10, 15, 20, 30, 40, 60, 80)
CURVE_REPEATS: Final = 20


@dataclass(frozen=True)
class Correction:
    """Predicted ms: `scale * sums + per_row_ms * rows + per_element_ms * elements + constant_ms`.

    Sums are of the medians of a network's rows; elements those of the input and output of each row, for one
    image.
    """

    form: Form = "raw"
    scale: float = 1.0
    per_row_ms: float = 0.0
    constant_ms: float = 0.0
    per_element_ms: float = 0.0

    def __call__(self, sums_ms: Vector, rows: Vector, elements: Vector | float = 0.0) -> Vector:
        """Return predictions in ms for sums, numbers of rows, and elements at their borders, each `(n,)`."""
        return (
            self.scale * sums_ms + self.per_row_ms * rows + self.per_element_ms * elements + self.constant_ms
        )


@dataclass(frozen=True, eq=False)
class Checks:
    """Whole networks with what the table says of them.

    Attributes:
        sums_ms: `(n,)`, the sum of the medians of the rows of each network.
        rows: `(n,)`, how many rows that were: blocks, or operations.
        measured_ms: `(n,)`, the median of the whole network, positive.
        least_ms: The least median of any such row of the table: none may get a negative price.
        names: `n` names of networks, for the report.
        elements: `(n,)`, elements of the inputs and outputs of the rows; `None` if they are not known.
        row_ms: `(m,)`, medians of all rows that may be priced...
        row_elements: `(m,)`, ...and the elements of their inputs and outputs.
    """

    sums_ms: Vector
    rows: Vector
    measured_ms: Vector
    least_ms: float
    names: tuple[str, ...] = ()
    elements: Vector | None = None
    row_ms: Vector | None = None
    row_elements: Vector | None = None

    def some(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> "Checks":
        """Return some of the networks."""
        elements = None if self.elements is None else self.elements[which]
        return replace(
            self,
            sums_ms=self.sums_ms[which],
            rows=self.rows[which],
            measured_ms=self.measured_ms[which],
            elements=elements,
        )


@dataclass(frozen=True)
class Figures:
    """How predictions differ from measurements, over networks; `error = predicted / measured - 1`.

    Attributes:
        bias_percent: Mean error; positive predicts too slow.
        mape_percent: Mean absolute error.
        max_error_percent: Greatest absolute error.
        within_5_percent: Share of networks, in %, with an absolute error of at most 5 %.
        within_10_percent: The same for 10 %.
        spearman: Rank correlation; `None` where all predictions or all measurements are equal.
        kendall: Kendall's tau-b, likewise: the share of pairs in the right order, less that in the wrong one.
    """

    bias_percent: float
    mape_percent: float
    max_error_percent: float
    within_5_percent: float
    within_10_percent: float
    spearman: float | None
    kendall: float | None


@dataclass(frozen=True)
class CheckedNetwork:
    """One measured network; its prediction comes from a correction that was fitted without it.

    Attributes:
        name: What it runs, as `autocompress.latency.plan.network_name`.
        rows: How many rows its sum has.
        sum_ms: Sum of the medians of its rows.
        measured_ms: Median of the whole network.
        predicted_ms: By the correction of the others.
    """

    name: str
    rows: int
    sum_ms: float
    measured_ms: float
    predicted_ms: float


@dataclass(frozen=True)
class ErrorReport:
    """How far the table can be trusted; every figure is leave-one-out.

    Attributes:
        method: `"leave-one-out"`: each network is predicted by a correction fitted on the others.
        networks: The measured networks.
        granularity: What was summed.
        forms: Figures of each form of correction.
        other_forms: The same for the other granularity; empty if only one was measured.
        chosen: The form with the least mean absolute error; it is used for prices, fitted on all networks.
        repeat_noise_percent: Median over networks of the difference between the medians of the first and the
            second half of the samples, in % of the median: what no prediction can be expected to beat.
        learning_curve: Number of networks the correction was fitted on, and the mean absolute error in % on
            the others, mean of 20 random splits.
        drift_percent: Greatest difference between quarters of time of the sentinel, a block that ran in every
            round; `None` if it ran fewer than 8 times.
        disturbed_percent: Share of samples that were discarded because the machine was then much slower than
            it typically is.
        unstable_rows: Rows whose median is less certain than the tolerance asked for.
    """

    networks: tuple[CheckedNetwork, ...]
    forms: dict[Form, Figures]
    chosen: Form
    repeat_noise_percent: float
    learning_curve: tuple[tuple[int, float], ...]
    drift_percent: float | None
    unstable_rows: int
    disturbed_percent: float = 0.0
    granularity: Granularity = "block"
    other_forms: dict[Form, Figures] = field(default_factory=dict)
    method: Literal["leave-one-out"] = "leave-one-out"

    @property
    def figures(self) -> Figures:
        """The figures of the form that is used."""
        return self.forms[self.chosen]

    def upper_factor(self, confidence: float) -> float:
        """Return by what a prediction is multiplied so that a measurement stays below it with a probability.

        It is the quantile of `measured / predicted` over the n networks of this report with rank
        `ceil((n + 1) * confidence)`, each predicted by a correction that was fitted without it; never below
        1. For networks like these, measured at the same speed of the machine. The jackknife reaches about
        the confidence asked for; its guarantee is weaker (twice the share of failures).

        Source: Barber et al., Predictive inference with the jackknife+, Annals of Statistics 49 (2021), 1.2.

        Args:
            confidence: Probability, above 0 and below 1.

        Raises:
            TableError: The report has too few networks for it.
        """
        ratios = sorted(net.measured_ms / net.predicted_ms for net in self.networks)
        rank = math.ceil((len(ratios) + 1) * confidence)
        if rank > len(ratios):
            needed = next(n for n in itertools.count(rank) if math.ceil((n + 1) * confidence) <= n)
            raise TableError(
                f"a confidence of {confidence:g} needs at least {needed} measured networks, the error report "
                f"has {len(ratios)}; profile more (profile.networks) or ask for less"
            )
        return max(1.0, ratios[max(rank, 1) - 1])


def fit(form: Form, checks: Checks) -> Correction:
    """Fit a correction by least squares of relative errors; no row gets a negative price.

    With `base = least_ms * rows` the prediction is `scale * (sum - base) + floor * rows + constant`,
    scale and floor at least 0: `floor` is the price of the cheapest row.

    Raises:
        TableError: Fewer networks than parameters.
    """
    wanted = PARAMETERS[form]
    count = len(checks.measured_ms)
    if count < wanted:
        raise TableError(f"correction {form!r} needs at least {wanted} measured networks, got {count}")
    if form == "raw":
        return Correction()
    from scipy.optimize import lsq_linear

    weight = 1 / checks.measured_ms
    constant = np.ones(count)
    target = np.ones(count)
    if form == "affine_per_row":
        base = checks.least_ms * checks.rows
        design = np.column_stack([checks.sums_ms - base, checks.rows, constant]) * weight[:, None]
        solution = lsq_linear(design, target, bounds=([0, 0, -np.inf], np.inf), method="bvls")
        scale, floor, offset = solution.x.tolist()
        return Correction(form, scale, floor - scale * checks.least_ms, offset)
    if form == "affine_boundary":
        if checks.elements is None:
            raise TableError("correction 'affine_boundary' needs the elements of the networks' rows")
        # In millions, for a well-conditioned design.
        terms = [checks.sums_ms, checks.rows, checks.elements / 1e6, constant]
        scale, row, million, offset = _nonnegative_prices(
            np.column_stack(terms) * weight[:, None], target, checks
        )
        return Correction(form, scale, row, offset, million / 1e6)
    if form == "affine":
        design = np.column_stack([checks.sums_ms, constant]) * weight[:, None]
        solution = lsq_linear(design, target, bounds=([0, -np.inf], np.inf), method="bvls")
        scale, offset = solution.x.tolist()
        return Correction(form, scale, 0.0, offset)
    relative = checks.sums_ms * weight
    return Correction(form, float(relative.sum() / (relative @ relative)))


def _nonnegative_prices(design: Vector, target: Vector, checks: Checks) -> list[float]:
    """Fit scale, term of a row, term of a million elements and constant so that no row gets a negative price.

    Least squares with linear inequalities is turned into a least distance problem, and that into non-negative
    least squares.

    Source: Lawson & Hanson, Solving Least Squares Problems, 1974, chapter 23, sections 4 and 5.
    """
    from scipy.optimize import nnls

    # Rows of nearly nothing keep the design of full rank where elements go with the number of rows.
    lengths = np.linalg.norm(design, axis=0)
    ridge = np.diag(1e-7 * np.where(lengths > 0, lengths, 1.0))
    q, r = np.linalg.qr(np.vstack([design, ridge]))
    wanted = q.T @ np.concatenate([target, np.zeros(len(ridge))])
    # Scale and prices of rows are at least 0; a constant has no part in either.
    least = [np.array([[1.0, 0.0, 0.0, 0.0]])]
    if checks.row_ms is not None and checks.row_elements is not None:
        count = len(checks.row_ms)
        prices = [checks.row_ms, np.ones(count), checks.row_elements / 1e6, np.zeros(count)]
        least.append(np.column_stack(prices))
    inverse = np.linalg.inv(r)
    sides = np.vstack(least) @ inverse
    system = np.vstack([sides.T, -(sides @ wanted)])
    goal = np.zeros(len(system))
    goal[-1] = 1.0
    multipliers, _ = nnls(system, goal)
    residual = system @ multipliers - goal
    solution: list[float] = (inverse @ (wanted - residual[:-1] / residual[-1])).tolist()
    return [max(0.0, solution[0]), *solution[1:]]


def figures(predicted_ms: Vector, measured_ms: Vector) -> Figures:
    """Compare predictions with measurements, each `(n,)`, n at least 1."""
    from scipy.stats import kendalltau, rankdata

    errors = 100 * (predicted_ms / measured_ms - 1)
    size = np.abs(errors)
    varies = np.ptp(predicted_ms) > 0 and np.ptp(measured_ms) > 0
    ranks = [rankdata(values) for values in (predicted_ms, measured_ms)]
    return Figures(
        bias_percent=float(errors.mean()),
        mape_percent=float(size.mean()),
        max_error_percent=float(size.max()),
        within_5_percent=float(100 * (size <= 5).mean()),
        within_10_percent=float(100 * (size <= 10).mean()),
        spearman=float(np.corrcoef(*ranks)[0, 1]) if varies else None,
        kendall=float(kendalltau(predicted_ms, measured_ms).statistic) if varies else None,
    )


def leave_one_out(form: Form, checks: Checks) -> Vector:
    """Predict each network by the correction fitted on the others; shape `(n,)`, in ms."""
    count = len(checks.measured_ms)
    predicted = np.empty(count)
    for index in range(count):
        correction = fit(form, checks.some(np.arange(count) != index))
        one = checks.some(np.array([index]))
        predicted[index] = correction(one.sums_ms, one.rows, _elements(one))[0]
    return predicted


def _elements(checks: Checks) -> Vector | float:
    return 0.0 if checks.elements is None else checks.elements


def repeat_noise_percent(samples_ms: Sequence[Sequence[float]]) -> float:
    """Return the median over networks of the difference between both halves of time, in % of the median."""
    differences = []
    for samples in samples_ms:
        first, second = np.array_split(np.asarray(samples), 2)
        if len(second):
            difference = abs(np.median(first) - np.median(second)) / np.median(samples)
            differences.append(100 * float(difference))
    return float(np.median(differences)) if differences else 0.0


def learning_curve(form: Form, checks: Checks, *, seed: int = 0) -> tuple[tuple[int, float], ...]:
    """Return how the error on other networks falls with the number of networks fitted on.

    Returns:
        Number of networks and mean absolute error in %, mean of 20 random splits; at least 4 are held out.
    """
    count = len(checks.measured_ms)
    rng = np.random.default_rng(seed)
    result = []
    for size in CURVE_SIZES:
        if size < PARAMETERS[form] or size > count - 4:
            continue
        errors = []
        for _ in range(CURVE_REPEATS):
            order = rng.permutation(count)
            correction = fit(form, checks.some(order[:size]))
            rest = checks.some(order[size:])
            predicted = correction(rest.sums_ms, rest.rows, _elements(rest))
            errors.append(figures(predicted, rest.measured_ms).mape_percent)
        result.append((size, float(np.mean(errors))))
    return tuple(result)


def assess(
    checks: Checks,
    samples_ms: Sequence[Sequence[float]],
    *,
    drift_percent: float | None = None,
    unstable_rows: int = 0,
    disturbed_percent: float = 0.0,
    usable: Callable[[Correction], bool] = lambda _: True,
) -> tuple[Correction, ErrorReport]:
    """Choose the form of correction with the least leave-one-out error, fit it, and report.

    A form needs two networks more than it has parameters. One that prices all networks alike, or predicts
    that a network takes no time, is not chosen; the plain sum and its multiples never do.

    Args:
        checks: The measured networks, at least 2.
        samples_ms: All samples of each network, in the order of time.
        drift_percent: Of the sentinel.
        unstable_rows: How many rows of the table are less certain than asked for.
        disturbed_percent: Share of samples that were discarded.
        usable: Whether a fitted correction can be chosen, for other reasons.

    Raises:
        TableError: Fewer than 2 networks, or a time that is not positive.
    """
    count = len(checks.measured_ms)
    if count < 2:
        raise TableError(f"an error report needs at least 2 measured networks, got {count}")
    if not (checks.measured_ms > 0).all():
        raise TableError(f"a measured network took {checks.measured_ms.min()} ms: the timer does not work")
    forms: list[Form] = [
        form
        for form in get_args(Form)
        if count >= PARAMETERS[form] + 2 and (form != "affine_boundary" or checks.elements is not None)
    ]
    predicted = {form: leave_one_out(form, checks) for form in forms}
    compared = {form: figures(predicted[form], checks.measured_ms) for form in forms}
    # A scale of 0 would price all networks alike; noise can make that the form of least error.
    fitted = {form: fit(form, checks) for form in forms}
    allowed = [
        form
        for form in forms
        if fitted[form].scale > 0 and (predicted[form] > 0).all() and usable(fitted[form])
    ]
    # Of equals the first, which has the fewest parameters.
    chosen = min(allowed, key=lambda form: round(compared[form].mape_percent, 6))
    networks = tuple(
        CheckedNetwork(name, int(rows), float(total), float(measured), float(prediction))
        for name, rows, total, measured, prediction in zip(
            checks.names or [""] * count,
            checks.rows,
            checks.sums_ms,
            checks.measured_ms,
            predicted[chosen],
            strict=True,
        )
    )
    report = ErrorReport(
        networks=networks,
        forms=compared,
        chosen=chosen,
        repeat_noise_percent=repeat_noise_percent(samples_ms),
        learning_curve=learning_curve(chosen, checks),
        drift_percent=drift_percent,
        unstable_rows=unstable_rows,
        disturbed_percent=disturbed_percent,
    )
    return fitted[chosen], report


Assessed = tuple[Correction, ErrorReport]


def choose(assessed: Mapping[Granularity, Assessed]) -> Assessed:
    """Return the granularity with the least mean absolute error; its report has the other one's figures.

    Args:
        assessed: Of at least one granularity; of equals the first is taken.
    """
    best = min(assessed, key=lambda name: round(assessed[name][1].figures.mape_percent, 6))
    correction, report = assessed[best]
    others = [found.forms for name, (_, found) in assessed.items() if name != best]
    return correction, replace(report, granularity=best, other_forms=others[0] if others else {})
