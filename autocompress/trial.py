"""What is known of evaluated architectures: batches between parts, trials for people and storage."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from autocompress.cost import Values
from autocompress.space import Architecture, Codes


class Outcome(IntEnum):
    """How an evaluation ended."""

    MEASURED = 0
    INFEASIBLE = 1
    """Refused on its cost, before any evaluation; uses up none of the evaluations."""
    FAILED = 2
    """The evaluation raised an error."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Architectures with what is known of them; the currency between engine, strategy and predictor.

    Attributes:
        codes: `(n, choices)`, canonical.
        costs: Metric to `(n,)`.
        metrics: Name to `(n,)`, larger is better for the objective; `nan` unless measured.
        outcomes: `(n,)`, values of `Outcome`.
    """

    codes: Codes
    costs: Mapping[str, Values]
    metrics: Mapping[str, Values]
    outcomes: NDArray[np.int8]

    def __len__(self) -> int:
        """Return the number of architectures."""
        return len(self.codes)

    @property
    def measured(self) -> NDArray[np.bool_]:
        """Which rows were measured, `(n,)`."""
        measured: NDArray[np.bool_] = self.outcomes == Outcome.MEASURED
        return measured


@dataclass(frozen=True)
class Trial:
    """One evaluated architecture.

    Attributes:
        number: Position in the search, from 0.
        architecture: What was evaluated.
        costs: Metric to cost, predicted from the tables (latency) or exact (MACs, parameters, bytes).
        metrics: Name to value; empty unless measured.
        outcome: How it ended.
        error: Why it failed; empty unless it did.
    """

    number: int
    architecture: Architecture
    costs: Mapping[str, float]
    metrics: Mapping[str, float]
    outcome: Outcome
    error: str = ""
