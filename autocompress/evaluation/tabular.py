"""What somebody else evaluated: a table of architectures as evaluator, as cost, with its known optimum."""

from collections.abc import Mapping
from typing import final

import numpy as np
from numpy.typing import NDArray

from autocompress.budget import Constraints
from autocompress.cost import MAX_FACTOR_ENTRIES, AdditiveCost, Factor, Values
from autocompress.errors import CostError, DataError, EvaluationError
from autocompress.space import Codes, SearchSpace

FORWARD_AND_BACKWARD = 3
"""Multiply-accumulates of a training step for each one of a forward pass: the backward pass needs two."""


@final
class TabularEvaluator:
    """Looks architectures up; an `Evaluator`.

    Attributes:
        space: The space of the architectures.
        codes: The architectures of the table, `(n, choices)`, canonical.
        columns: Metric to its values, `(n,)`; `nan` where an entry is missing.
        paid: Whether a look-up counts as an evaluation worth keeping as a trial.
    """

    def __init__(
        self, space: SearchSpace, codes: Codes, columns: Mapping[str, Values], *, paid: bool = True
    ) -> None:
        """Make the evaluator.

        Args:
            space: The space.
            codes: The architectures, `(n, choices)`; each network once.
            columns: Metric to its values, `(n,)`, in any unit; `nan` where an entry is missing.
            paid: Whether a look-up stands for a training: a search then keeps it as a trial and asks for
                one architecture at a time.

        Raises:
            DataError: A column has a wrong shape or infinite values, there is none, or a network stands in
                the table twice.
            SpaceError: Rows are not of the space.
        """
        space.validate(codes)
        if not columns:
            raise DataError("a table needs at least one column of values, got none")
        self.space, self.paid = space, paid
        self.codes = space.canonical(codes)
        self.columns = {name: _column(name, values, len(codes)) for name, values in columns.items()}
        self._rows = {row.tobytes(): index for index, row in enumerate(self.codes)}
        if len(self._rows) < len(codes):
            twice = next(i for i, row in enumerate(self.codes) if self._rows[row.tobytes()] != i)
            other = self._rows[self.codes[twice].tobytes()]
            raise DataError(f"rows {twice} and {other} of the table are the same network")

    def __call__(self, codes: Codes) -> dict[str, Values]:
        """Return every column at these architectures, `(n,)`; `nan` where the table has no entry.

        Raises:
            EvaluationError: The table has none of the architectures.
        """
        rows = self._positions(codes)
        known = rows >= 0
        if len(codes) and not known.any():
            first = self.space.decode(codes[:1])[0].to_json()
            raise EvaluationError(
                f"the table of {len(self.codes)} architectures has no row of {first}"
                + (f", nor of the {len(codes) - 1} others" if len(codes) > 1 else "")
            )
        return {name: np.where(known, values[rows], np.nan) for name, values in self.columns.items()}

    def optimum(self, metric: str, constraints: Constraints | None = None) -> tuple[Codes, float]:
        """Return the architecture of the greatest value among those that fit, `(1, choices)`, and the value.

        Args:
            metric: Which column.
            constraints: Limits that must hold; none by default.

        Raises:
            DataError: There is no such column, or no entry of it that fits.
        """
        if metric not in self.columns:
            raise DataError(f"the table has no column {metric!r}; it has {', '.join(self.columns)}")
        values = self.columns[metric]
        usable = np.isfinite(values)
        if constraints is not None:
            usable &= constraints.feasible(self.codes)
        if not usable.any():
            raise DataError(f"no architecture of the table that fits has a value of {metric!r}")
        best = int(np.where(usable, values, -np.inf).argmax())
        return self.codes[best : best + 1], float(values[best])

    def _positions(self, codes: Codes) -> NDArray[np.int64]:
        """Return the row of each architecture in the table, -1 where it has none."""
        rows = np.ascontiguousarray(codes, dtype=np.int64)
        return np.array([self._rows.get(row.tobytes(), -1) for row in rows], dtype=np.int64)


def _column(name: str, values: Values, rows: int) -> Values:
    column = np.asarray(values, dtype=np.float64)
    if column.shape != (rows,):
        raise DataError(f"column {name!r} must have shape ({rows},), one a row of codes, got {column.shape}")
    if np.isinf(column).any():
        at = int(np.flatnonzero(np.isinf(column))[0])
        raise DataError(f"column {name!r} must be finite, or nan where it is missing, got inf in row {at}")
    return column


def table_cost(space: SearchSpace, codes: Codes, values: Values, metric: str) -> AdditiveCost:
    """Return a cost that a table states for every network: one dense factor over all choices.

    Minimum, `lower_bound` and `expected` are exact, as for any cost.

    Args:
        space: Without conditions between choices, of at most 10^6 networks.
        codes: Every network of the space, once, in any order: `(n, choices)`.
        values: The cost of each, `(n,)`, in the unit of the metric.
        metric: What the values are, with its unit, such as `latency_ms`.

    Raises:
        CostError: The table lacks networks or has one twice, values are not finite, or the space is too large
            or has conditions.
        SpaceError: Rows are not of the space.
    """
    space.validate(codes)
    counts = tuple(space.counts.tolist())
    entries = int(np.prod(space.counts.astype(np.float64)))
    if entries > MAX_FACTOR_ENTRIES:
        raise CostError(
            f"space {space.name!r} has {entries:.3g} rows; a dense table of {metric} has at most "
            f"{MAX_FACTOR_ENTRIES}"
        )
    if space.size != entries:
        raise CostError(
            f"space {space.name!r} has choices without effect; a dense table of {metric} has none"
        )
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(codes),):
        raise CostError(f"{metric} must have shape ({len(codes)},), one a row of codes, got {values.shape}")
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise CostError(f"{metric} must be finite, got {values[wrong[0]]} in row {wrong[0]}")
    positions = np.ravel_multi_index(tuple(codes.T), counts)
    distinct = len(np.unique(positions))
    if distinct != entries or len(codes) != entries:
        raise CostError(
            f"{metric} must be given once for each of the {entries} networks of space {space.name!r}, got "
            f"{len(codes)} rows of {distinct} networks"
        )
    dense = np.empty(entries)
    dense[positions] = values
    return AdditiveCost(metric, counts, 0.0, (Factor(tuple(range(len(counts))), dense.reshape(counts)),))


def assumed_training_seconds(macs: Values, *, images: int, epochs: int, macs_per_second: float) -> Values:
    """Return how long trainings would take at a constant throughput: an assumption, not a measurement.

    `seconds = 3 * macs * images * epochs / macs_per_second`. Nothing but convolutions and matrix products
    takes time in it; real devices run small layers at a fraction of their throughput.

    Args:
        macs: Multiply-accumulates for one image, `(n,)`.
        images: Training images an epoch.
        epochs: Epochs of a training.
        macs_per_second: The assumed throughput.

    Raises:
        CostError: An argument is not positive.
    """
    for name, value in {"images": images, "epochs": epochs, "macs_per_second": macs_per_second}.items():
        if not 0 < value < float("inf"):
            raise CostError(f"{name} must be positive and finite, got {value!r}")
    seconds: Values = (
        FORWARD_AND_BACKWARD * np.asarray(macs, dtype=np.float64) * images * epochs / macs_per_second
    )
    return seconds
