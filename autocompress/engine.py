"""The search loop: ask, refuse on cost, look up what is known, evaluate, tell."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.budget import Constraints
from autocompress.cost import Values
from autocompress.errors import AutocompressError, EvaluationError
from autocompress.evaluator import Evaluator
from autocompress.progress import Progress, silent
from autocompress.result import SearchResult
from autocompress.space import Codes
from autocompress.storage import History, TrialStorage
from autocompress.strategy import Strategy
from autocompress.trial import Batch, Outcome, Trial

DEFAULT_BATCH = 100
# A strategy that proposes nothing new so often in a row has nothing new to propose.
MAX_IDLE_ASKS = 50


def search(
    strategy: Strategy,
    constraints: Constraints,
    evaluator: Evaluator,
    *,
    evaluations: int,
    objective: str = "accuracy",
    storage: Path | str | None = None,
    study: str = "search",
    history: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    batch: int = DEFAULT_BATCH,
    progress: Progress = silent,
) -> SearchResult:
    """Search with any strategy, from where an earlier call with the same arguments stopped.

    Proposals that break the budget are told as infeasible and cost no evaluation; proposals that were
    evaluated before are told again from memory. A search always ends: with its evaluations, or when the
    strategy has nothing new to propose.

    Args:
        strategy: New, not yet asked: resuming replays it from the start.
        constraints: Space, costs and limits.
        evaluator: Scores architectures. What a paid one returns becomes trials; other scores are streamed
            into `history`.
        evaluations: How many distinct architectures are evaluated, those found in storage included.
        objective: The metric that the result ranks by.
        storage: Path of a journal file, or URL of an Optuna storage, for paid evaluations.
        study: Name of the study in the storage.
        history: Path of the stream of scored candidates.
        identity: What the stored outcomes depend on besides the space and the limits: the evaluator's
            weights, the data, the seed.
        batch: Rows asked at once of an evaluator that is not paid; paid ones get what the strategy gives.
        progress: Told evaluations and the best score.

    Returns:
        The result; its trials are the paid evaluations.

    Raises:
        StorageError: Outcomes cannot be stored, or belong to another search.
        AutocompressError: `evaluations` is below 1, or the evaluator does not give the objective.
    """
    if evaluations < 1:
        raise AutocompressError(f"evaluations must be 1 or more, got {evaluations}")
    space = constraints.space
    belongs = {
        "space": space.fingerprint,
        "limits": dict(constraints.limits),
        "objective": objective,
        **(identity or {}),
    }
    memory = _Memory(constraints, evaluator, objective, storage, study, history, belongs)
    idle = asked = 0
    while memory.evaluated < evaluations and idle < MAX_IDLE_ASKS:
        codes = strategy.ask(min(batch, evaluations - memory.evaluated))
        if not len(codes):
            break
        asked += len(codes)
        before = memory.evaluated
        for told in memory.evaluate(codes):
            strategy.tell(told)
            best = "" if memory.best is None else f"best {objective} {memory.best:.4f}"
            progress(memory.evaluated, evaluations, best)
        idle = idle + 1 if memory.evaluated == before else 0
    return SearchResult(
        space=space.describe(),
        objective=objective,
        limits=dict(constraints.limits),
        trials=memory.trials,
        scored=0 if evaluator.paid else memory.evaluated,
        asked=asked,
        notes=dict(identity or {}),
        candidates=memory.candidates(),
    )


class _Memory:
    """What was evaluated, in this run or before; asks the evaluator only for what is new."""

    def __init__(
        self,
        constraints: Constraints,
        evaluator: Evaluator,
        objective: str,
        storage: Path | str | None,
        study: str,
        history: Path | None,
        identity: Mapping[str, Any],
    ) -> None:
        self.constraints, self.evaluator, self.objective = constraints, evaluator, objective
        self.trials: list[Trial] = []
        self.evaluated = 0
        self.best: float | None = None
        self._known: dict[bytes, Mapping[str, float] | None] = {}  # None: the evaluation failed
        self._stored: dict[bytes, Trial] = {}
        self._scores: dict[bytes, float] = {}
        self._storage: TrialStorage | None = None
        self._history: History | None = None
        space = constraints.space
        if evaluator.paid and storage is not None:
            self._storage = TrialStorage(storage, study=study, identity=identity)
            for trial in self._storage.load(space):
                self._stored[space.encode([trial.architecture])[0].tobytes()] = trial
        if not evaluator.paid and history is not None:
            self._history = History(history, space, tuple(constraints.costs), identity)
            codes, scores = self._history.load()
            rows = np.ascontiguousarray(codes, dtype=np.int64)
            self._scores = {row.tobytes(): score for row, score in zip(rows, scores.tolist(), strict=True)}

    def evaluate(self, codes: Codes) -> Iterator[Batch]:
        """Yield the batches to tell: of a paid evaluator row by row, otherwise all at once."""
        codes = np.ascontiguousarray(codes, dtype=np.int64)
        costs = self.constraints.price(codes)
        feasible = np.ones(len(codes), dtype=np.bool_)
        for metric, limit in self.constraints.limits.items():
            feasible &= costs[metric] <= limit
        if not self.evaluator.paid:
            yield self._score_all(codes, costs, feasible)
            return
        for index in range(len(codes)):
            row = codes[index : index + 1]
            its_costs = {metric: values[index : index + 1] for metric, values in costs.items()}
            if not feasible[index]:
                yield self._unscored(row, its_costs, Outcome.INFEASIBLE)
                continue
            key = row.tobytes()
            if key not in self._known:
                self._known[key] = self._pay(key, row, {m: float(v[0]) for m, v in its_costs.items()})
            metrics = self._known[key]
            if metrics is None:
                yield self._unscored(row, its_costs, Outcome.FAILED)
            else:
                values = {name: np.array([value]) for name, value in metrics.items()}
                yield Batch(row, its_costs, values, np.array([Outcome.MEASURED], dtype=np.int8))

    def _unscored(self, row: Codes, costs: Mapping[str, Values], outcome: Outcome) -> Batch:
        return Batch(row, costs, {self.objective: np.full(1, np.nan)}, np.array([outcome], dtype=np.int8))

    def _pay(self, key: bytes, row: Codes, costs: Mapping[str, float]) -> Mapping[str, float] | None:
        space = self.constraints.space
        stored = self._stored.get(key)
        if stored is None:
            metrics: Mapping[str, float] = {}
            outcome, error = Outcome.MEASURED, ""
            try:
                found = self.evaluator(row)
                self._check_objective(found)
                metrics = {name: float(values[0]) for name, values in found.items()}
                if not np.isfinite(metrics[self.objective]):
                    raise EvaluationError(f"{self.objective} is {metrics[self.objective]}")
            except EvaluationError as reason:
                metrics, outcome, error = {}, Outcome.FAILED, str(reason)
        else:
            metrics, outcome, error = stored.metrics, stored.outcome, stored.error
        trial = Trial(len(self.trials), space.decode(row)[0], costs, metrics, outcome, error)
        if stored is None and self._storage is not None:
            self._storage.add(trial, space, self.objective)
        self.trials.append(trial)
        self.evaluated += 1
        if outcome != Outcome.MEASURED:
            return None
        self._note(metrics[self.objective])
        return metrics

    def _score_all(self, codes: Codes, costs: Mapping[str, Values], feasible: Any) -> Batch:
        scores = np.full(len(codes), np.nan)
        keys = [row.tobytes() for row in codes]
        new = [
            index
            for index, key in enumerate(keys)
            if feasible[index] and key not in self._known and key not in self._scores
        ]
        # The same row twice in one batch is scored once.
        new = list({keys[index]: index for index in new}.values())
        if new:
            found = self._scored(codes[new])
            self._scores.update({keys[index]: float(score) for index, score in zip(new, found, strict=True)})
            if self._history is not None:
                columns = np.stack([values[new] for values in costs.values()], axis=1)
                self._history.append(codes[new], found, columns)
        for index, key in enumerate(keys):
            if feasible[index]:
                scores[index] = self._scores[key]
                if key not in self._known:
                    self._known[key] = {}
                    self.evaluated += 1
        finite = np.isfinite(scores)
        if finite.any():
            self._note(float(scores[finite].max()))
        scores[~finite] = np.nan
        outcomes = np.select([~feasible, finite], [Outcome.INFEASIBLE, Outcome.MEASURED], Outcome.FAILED)
        return Batch(codes, costs, {self.objective: scores}, outcomes.astype(np.int8))

    def _scored(self, codes: Codes) -> Values:
        """Ask an evaluator that is not paid; `nan` for all rows if it fails."""
        try:
            found = self.evaluator(codes)
        except EvaluationError:
            return np.full(len(codes), np.nan)
        self._check_objective(found)
        return found[self.objective]

    def _check_objective(self, found: Mapping[str, Values]) -> None:
        if self.objective not in found:
            given = ", ".join(found) or "nothing"
            raise AutocompressError(
                f"the search maximises {self.objective!r}, but the evaluator gives {given}"
            )

    def candidates(self) -> Batch | None:
        """Return what an evaluator that is not paid scored in this search; `None` for paid ones."""
        if self.evaluator.paid or not self._known:
            return None
        codes = np.frombuffer(b"".join(self._known), dtype=np.int64).reshape(len(self._known), -1)
        scores = np.array([self._scores[key] for key in self._known])
        outcomes = np.where(np.isfinite(scores), Outcome.MEASURED, Outcome.FAILED).astype(np.int8)
        return Batch(codes, self.constraints.price(codes), {self.objective: scores}, outcomes)

    def _note(self, score: float) -> None:
        self.best = score if self.best is None else max(self.best, score)


StrategyFactory = Callable[..., Strategy]
"""`factory(constraints, seed=..., objective=..., **options)`."""
