"""What a search found."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autocompress.atomic import read_json, write_json
from autocompress.budget import Limit
from autocompress.errors import BudgetError, StorageError
from autocompress.space import SearchSpace
from autocompress.trial import Batch, Outcome, Trial

if TYPE_CHECKING:
    import pandas

SCHEMA, VERSION = "autocompress.result", 1


def pareto_front(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which points no other point dominates.

    Args:
        values: `(n, dimensions)`, larger is better. Of equal points all are kept.

    Returns:
        `(n,)`.
    """
    front = np.ones(len(values), dtype=np.bool_)
    for index, point in enumerate(values):
        dominates = (values >= point).all(axis=1) & (values > point).any(axis=1)
        front[index] = not dominates.any()
    return front


@dataclass(frozen=True)
class SearchResult:
    """The trials of a search and the questions asked of them.

    Attributes:
        space: Name, settings and fingerprint of the space.
        objective: The metric that was maximised, on held-out data.
        limits: The budget, metric to absolute limit.
        trials: Paid evaluations in order.
        scored: How many candidates a predictor or table scored besides.
        asked: How many rows the strategy proposed in all, repetitions and infeasible ones included.
        notes: What else is worth knowing: seeds, the predictor's Kendall tau.
        candidates: What a predictor or table scored, with its scores (which are predictions); not saved.
    """

    space: Mapping[str, Any]
    objective: str
    limits: Mapping[str, float]
    trials: Sequence[Trial]
    scored: int = 0
    asked: int = 0
    notes: Mapping[str, Any] | None = None
    candidates: Batch | None = None

    @property
    def measured(self) -> list[Trial]:
        """The trials that have a score."""
        return [trial for trial in self.trials if trial.outcome == Outcome.MEASURED]

    def feasible(self, limits: Mapping[str, float]) -> list[Trial]:
        """Return the measured trials that fit every limit."""
        return [t for t in self.measured if all(t.costs[m] <= limit for m, limit in limits.items())]

    def best(self, limits: Mapping[str, float] | None = None) -> Trial:
        """Return the measured trial of the highest score within limits.

        Of equals it is the one of the least latency, where that is known, and then the earlier one: few
        images often give networks of different cost one score.

        Args:
            limits: Metric to absolute limit; the search's own by default.

        Raises:
            BudgetError: No trial fits; names the smallest costs that were seen.
        """
        limits = self.limits if limits is None else limits
        if not self.measured:
            raise BudgetError("the search has no measured trial yet")
        self._check_priced(limits)
        fitting = self.feasible(limits)
        if not fitting:
            least = {m: min(t.costs[m] for t in self.measured) for m in limits}
            asked = ", ".join(str(Limit(m, value)) for m, value in limits.items())
            seen = ", ".join(f"{m} {value:g}" for m, value in least.items())
            raise BudgetError(
                f"no evaluated network fits {asked}; the smallest seen are {seen}; to find others, "
                "search under this budget in a new run directory (profile.table takes a measured table over)"
            )
        return max(
            fitting,
            key=lambda trial: (
                trial.metrics[self.objective],
                -trial.costs.get("latency_ms", 0.0),
                -trial.number,
            ),
        )

    def cheapest(self, metric: str, tolerance: float) -> Trial:
        """Return the trial of the least cost whose score is within a tolerance of the best one.

        Args:
            metric: Which cost.
            tolerance: Largest loss of score, in the score's own unit (0.01 is one point of accuracy).

        Raises:
            BudgetError: The cost is unknown, or the tolerance negative.
        """
        if not tolerance >= 0:
            raise BudgetError(f"tolerance must be 0 or more, got {tolerance}")
        metric = "macs" if metric == "flops" else metric
        best = self.best({})
        self._check_priced([metric])
        least = best.metrics[self.objective] - tolerance
        good = [trial for trial in self.measured if trial.metrics[self.objective] >= least]
        return min(good, key=lambda t: (t.costs[metric], -t.metrics[self.objective], t.number))

    def pareto(self, metrics: Sequence[str] = ("latency_ms",)) -> list[Trial]:
        """Return the measured trials that no other one beats in the score and all these costs, by cost.

        Raises:
            BudgetError: The search did not price one of these metrics.
        """
        trials = self.measured
        if not trials:
            return []
        self._check_priced(metrics)
        values = np.array([[t.metrics[self.objective], *(-t.costs[m] for m in metrics)] for t in trials])
        front = [trial for trial, keep in zip(trials, pareto_front(values), strict=True) if keep]
        return sorted(front, key=lambda trial: trial.costs[metrics[0]])

    def _check_priced(self, metrics: Iterable[str]) -> None:
        priced = self.measured[0].costs
        unknown = [metric for metric in metrics if metric not in priced]
        if unknown:
            raise BudgetError(f"the search did not price {', '.join(unknown)}; it priced {', '.join(priced)}")

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row a trial: number, key, outcome, costs, metrics and choices."""
        import pandas

        return pandas.DataFrame(
            [
                {
                    "number": trial.number,
                    "key": trial.architecture.key,
                    "outcome": trial.outcome.name.lower(),
                    **trial.costs,
                    **trial.metrics,
                    **dict(trial.architecture.settings),
                }
                for trial in self.trials
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "space": dict(self.space),
            "objective": self.objective,
            "limits": dict(self.limits),
            "scored": self.scored,
            "asked": self.asked,
            "notes": dict(self.notes or {}),
            "trials": [
                {
                    "number": trial.number,
                    "architecture": json.loads(trial.architecture.to_json()),
                    "costs": dict(trial.costs),
                    "metrics": dict(trial.metrics),
                    "outcome": trial.outcome.name,
                    "error": trial.error,
                }
                for trial in self.trials
            ],
        }

    def save(self, path: Path) -> None:
        """Write the result as JSON, whole or not at all."""
        write_json(path, self.to_json())


def _made_again(message: str) -> StorageError:
    return StorageError(f"{message}; remove it, and the search writes it again from its stored trials")


def load_result(path: Path, space: SearchSpace) -> SearchResult:
    """Read a result.

    Raises:
        StorageError: It is absent, damaged, or of another space.
    """
    payload = read_json(path, _made_again, "search result")
    try:
        if payload["schema"] != SCHEMA or payload["version"] != VERSION:
            raise StorageError(f"{path} is no search result of version {VERSION}")
        if payload["space"]["fingerprint"] != space.fingerprint:
            raise StorageError(f"{path} is of another space: {payload['space']}")
        trials = [
            Trial(
                row["number"],
                space.from_json(json.dumps(row["architecture"])),
                row["costs"],
                row["metrics"],
                Outcome[row["outcome"]],
                row["error"],
            )
            for row in payload["trials"]
        ]
        return SearchResult(
            payload["space"], payload["objective"], payload["limits"], trials, payload["scored"],
            payload["asked"], payload["notes"],
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise _made_again(f"search result {path} is damaged ({error!r})") from error
