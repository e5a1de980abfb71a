"""The search loop: ask, refuse on cost, look up what is known, evaluate, tell.

Two kinds of evaluators, two memories: what is paid for is remembered, stored and never paid for twice; what
is free (a predictor, a table) is asked again, streamed to a file, and only the best of it is kept.
"""

import math
from collections import deque
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from autocompress.budget import Constraints
from autocompress.cost import Values
from autocompress.deadline import deadline
from autocompress.errors import AutocompressError, EvaluationError, SpaceError, StrategyError
from autocompress.evaluator import (
    Evaluator,
    ParallelEvaluator,
    check_evaluator,
    evaluated,
    metrics_of,
    unless_broken,
)
from autocompress.history import History
from autocompress.progress import Progress, silent
from autocompress.proposals import check_count
from autocompress.result import SearchResult
from autocompress.space import Codes, SearchSpace
from autocompress.storage import TrialStorage, plain_identity
from autocompress.strategy import Noted, Strategy, at_most, beyond_budget, name_of
from autocompress.trial import Batch, Outcome, Trial

DEFAULT_BATCH = 100
# A strategy that proposes nothing new so often in a row has nothing new to propose.
MAX_IDLE_ASKS = 50
MAX_FAILURES = 20
"""If so many evaluations fail, and all from the first on, the evaluator is broken, not a network."""
AHEAD = 2
"""Networks under way for each worker in an asynchronous search."""
KEPT_CANDIDATES = 1000
"""How many of the candidates of a free evaluator are kept, the best ones."""
ASK_TIMEOUT_S = 3600.0


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
    asynchronous: bool = False,
    ask_timeout_s: float = ASK_TIMEOUT_S,
    progress: Progress = silent,
) -> SearchResult:
    """Search with any strategy, from where an earlier call with the same arguments stopped.

    Proposals that break the budget are told as infeasible and cost no evaluation, unless the strategy goes
    beyond the budget on its way (`strategy.beyond_budget`); proposals that were evaluated before are told
    again from memory. A search always ends: with its evaluations, or when the
    strategy has nothing new to propose.

    Args:
        strategy: New, not yet asked: resuming replays it from the start.
        constraints: Space, costs and limits.
        evaluator: Scores architectures. What a paid one returns becomes trials; other scores are streamed
            into `history`.
        evaluations: How many distinct architectures are evaluated, those found in storage included.
        objective: The metric that the result ranks by.
        storage: `Path` of a journal file, or URL of an Optuna storage as text, for paid evaluations.
        study: Name of the study in the storage. A second process that searches with it is refused where
            the storage is a file (a journal, SQLite); in a database server nothing keeps it away, and both
            pay.
        history: Path of the stream of candidates that a free evaluator scored; started anew each time.
        identity: What the stored outcomes depend on besides the space and the limits: the evaluator's
            weights, the data, the seed. Plain values, as JSON has them.
        batch: Rows asked at once for a free evaluator. For a paid one, as many as it evaluates at once
            (`workers`, 1 unless it says otherwise): every strategy learns from all there is.
        asynchronous: With an evaluator that has workers: ask for another network as soon as the oldest one
            is told, with twice as many under way as there are workers, so that no worker waits for a slower
            one; the strategy learns later from each. Otherwise it is asked for as many as there are workers,
            and again when all are told. Either way the same search asks the same networks, however fast
            workers are.
        ask_timeout_s: How long the strategy may take for one answer; only kept in the main thread of a
            system with interval timers.
        progress: Told evaluations and the best score.

    Returns:
        The result; its trials are the paid evaluations.

    Raises:
        StorageError: Outcomes cannot be stored, or belong to another search, or another process searches.
        StrategyError: The strategy raised, took too long, proposed what is not in the space, or nothing
            that fits.
        EvaluationError: The first evaluations all failed, or all of them.
        RecipeError: `evaluations` or `batch` is not an integer of at least 1.
        AutocompressError: `identity` is not plain, or the evaluator does not say whether it is paid, or
            does not give the objective with one value a network.
    """
    check_count("evaluations", evaluations)
    check_count("batch", batch)
    if not 0 < ask_timeout_s < math.inf:
        raise AutocompressError(f"ask_timeout_s must be positive and finite, got {ask_timeout_s}")
    check_evaluator(evaluator)
    space = constraints.space
    belongs = {
        "space": space.fingerprint,
        "limits": dict(constraints.limits),
        "objective": objective,
        **plain_identity(identity or {}),
    }
    guarded = _Guarded(strategy, space, ask_timeout_s)
    stored = None
    if evaluator.paid and storage is not None:
        stored = TrialStorage(storage, study=study, identity=belongs)
    with nullcontext() if stored is None else stored.claimed():
        if evaluator.paid:
            beyond = beyond_budget(strategy)
            memory: _Memory = _Paid(
                constraints, evaluator, objective, stored, beyond=beyond, asynchronous=asynchronous
            )
        else:
            kept = None if history is None else History(history, space, tuple(constraints.costs), belongs)
            memory = _Free(constraints, evaluator, objective, kept, batch)
        try:
            asked = _run(guarded, memory, evaluations, objective, progress)
        finally:
            memory.close()
    if evaluator.paid and memory.trials and all(trial.error for trial in memory.trials):
        raise EvaluationError(
            f"not one of {len(memory.trials)} evaluations gave a score, the last one failed with: "
            f"{memory.trials[-1].error}; the evaluator is broken, not a network"
        )
    if asked and not memory.evaluated:
        limits = ", ".join(f"{metric} <= {limit:.6g}" for metric, limit in constraints.limits.items())
        raise StrategyError(
            f"strategy {guarded.name} proposes nothing that fits: all {asked} proposals were refused as "
            f"infeasible ({limits}), none was evaluated; `constraints.sample` draws networks that fit"
        )
    return SearchResult(
        space=space.describe(),
        objective=objective,
        limits=dict(constraints.limits),
        trials=memory.trials,
        scored=0 if evaluator.paid else memory.evaluated,
        asked=asked,
        notes={**(identity or {}), **guarded.notes},
        candidates=memory.candidates(),
    )


def _run(guarded: "_Guarded", memory: "_Memory", evaluations: int, objective: str, progress: Progress) -> int:
    """Ask, evaluate and tell until all is evaluated or nothing new comes; return how many were asked."""
    idle = asked = 0
    expected = guarded.at_most(evaluations)
    while True:
        wanted = min(memory.room, evaluations - memory.evaluated - memory.begun)
        # Nothing at all may also mean that it waits to be told.
        codes = guarded.ask(wanted) if wanted > 0 and idle < MAX_IDLE_ASKS else None
        if codes is not None and len(codes):
            asked += len(codes)
            idle = 0 if memory.begin(codes) else idle + 1
        if not memory.pending:
            return asked
        guarded.tell(memory.finish())
        best = "" if memory.best is None else f"best {objective} {memory.best:.4f}"
        progress(memory.evaluated, max(memory.evaluated, expected), best)


class _Guarded:
    """A strategy whose faults become errors that name it."""

    def __init__(self, strategy: Strategy, space: SearchSpace, timeout_s: float) -> None:
        self._strategy, self._space, self._timeout_s = strategy, space, timeout_s
        self.name = name_of(strategy)

    @property
    def notes(self) -> Mapping[str, Any]:
        """What the strategy says of its search, such as the quality of its predictor; plain values."""
        return dict(self._strategy.notes) if isinstance(self._strategy, Noted) else {}

    def at_most(self, evaluations: int) -> int:
        """Return how many evaluations are to be expected."""
        return at_most(self._strategy, evaluations)

    def ask(self, n: int) -> Codes:
        codes = self._call("ask", n)
        # None at all has any shape: `np.array([])` says that nothing is left.
        if not isinstance(codes, np.ndarray) or (codes.size and codes.ndim != 2):
            wanted = f"an integer array of shape (m, {len(self._space.choices)}), m <= {n}"
            shown = f"shape {codes.shape}" if isinstance(codes, np.ndarray) else type(codes).__name__
            raise StrategyError(f"strategy {self.name} must propose {wanted}, got {shown}")
        if len(codes) > n:
            raise StrategyError(f"strategy {self.name} proposed {len(codes)} networks where {n} were asked")
        if len(codes):
            try:
                self._space.validate(codes)
            except SpaceError as error:
                raise StrategyError(
                    f"strategy {self.name} proposed what is not in space {self._space.name!r}: {error}"
                ) from error
        return np.ascontiguousarray(codes, dtype=np.int64)

    def tell(self, batch: Batch) -> None:
        self._call("tell", batch)

    def _call(self, what: str, argument: Any) -> Any:
        try:
            with deadline(self._timeout_s):
                return getattr(self._strategy, what)(argument)
        except AutocompressError:
            raise
        except TimeoutError:
            raise StrategyError(
                f"strategy {self.name} took more than {self._timeout_s:g} s to {what}; every evaluation so "
                "far is stored, if the search has a storage"
            ) from None
        except Exception as error:
            raise StrategyError(
                f"strategy {self.name} failed to {what}: {type(error).__name__}: {error}"
            ) from error


class _Memory(Protocol):
    """What was evaluated, and how to evaluate more: rows begin, and end in the same order.

    Attributes:
        trials: Paid evaluations.
        evaluated: How many architectures were evaluated.
        best: The best score of what fits.
    """

    trials: list[Trial]
    evaluated: int
    best: float | None

    @property
    def begun(self) -> int:
        """How many networks are being evaluated."""

    @property
    def pending(self) -> int:
        """How many batches are to be told."""

    @property
    def room(self) -> int:
        """How many rows may begin now."""

    def begin(self, codes: Codes) -> bool:
        """Begin to evaluate; return whether anything of it is new."""

    def finish(self) -> Batch:
        """Return the next batch to tell, when it is known."""

    def close(self) -> None:
        """Forget what is pending."""

    def candidates(self) -> Batch | None:
        """Return the best of what was scored for free.

        Raises:
            EvaluationError: Nothing has a score.
        """


class _OneByOne:
    """An evaluator without workers: a row is evaluated when its result is taken."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._rows: deque[Codes] = deque()

    def submit(self, row: Codes) -> None:
        self._rows.append(row)

    def result(self) -> Mapping[str, float] | Exception:
        return unless_broken(evaluated(self._evaluator, self._rows.popleft()))

    def cancel(self) -> None:
        self._rows.clear()


class _Paid:
    """Every evaluation is a trial, in storage too; a network is paid for once, now or earlier."""

    def __init__(
        self,
        constraints: Constraints,
        evaluator: Evaluator,
        objective: str,
        storage: TrialStorage | None,
        *,
        beyond: bool,
        asynchronous: bool,
    ) -> None:
        self.constraints, self.objective = constraints, objective
        self._beyond, self._asynchronous = beyond, asynchronous
        self._work: ParallelEvaluator | _OneByOne
        if isinstance(evaluator, ParallelEvaluator):
            self._work, self._at_most = evaluator, evaluator.workers * (AHEAD if asynchronous else 1)
        else:
            self._work, self._at_most = _OneByOne(evaluator), 1
        self.trials: list[Trial] = []
        self.evaluated = 0
        self.best: float | None = None
        # Rows to be told, in order, with their costs and whether they are evaluated.
        self._pending: deque[tuple[Codes, Mapping[str, Values], bool]] = deque()
        self._begun: set[bytes] = set()
        self._known: dict[bytes, Mapping[str, float] | None] = {}  # None: the evaluation failed
        self._storage = storage
        self._stored: dict[bytes, Trial] = {}
        if storage is not None:
            space = constraints.space
            for trial in storage.load(space):
                self._stored[space.encode([trial.architecture])[0].tobytes()] = trial

    @property
    def begun(self) -> int:
        """How many networks are being evaluated."""
        return len(self._begun)

    @property
    def pending(self) -> int:
        """How many rows are to be told."""
        return len(self._pending)

    @property
    def room(self) -> int:
        """How many rows may begin: all at once when all are told, or each as soon as another one is told."""
        if self._pending and not self._asynchronous:
            return 0
        return self._at_most - len(self._pending)

    def begin(self, codes: Codes) -> bool:
        """Have the rows evaluated that are not known yet; return whether there is one."""
        costs = self.constraints.price(codes)
        feasible = self._evaluated(costs, len(codes))
        before = len(self._begun)
        for index in range(len(codes)):
            row = codes[index : index + 1]
            its_costs = {metric: values[index : index + 1] for metric, values in costs.items()}
            self._pending.append((row, its_costs, bool(feasible[index])))
            key = row.tobytes()
            if feasible[index] and key not in self._known and key not in self._begun:
                self._begun.add(key)
                if key not in self._stored:
                    self._work.submit(row)
        return len(self._begun) > before

    def finish(self) -> Batch:
        """Return the outcome of the first row that was not told, when it is known."""
        row, costs, feasible = self._pending.popleft()
        if not feasible:
            return self._unscored(row, costs, Outcome.INFEASIBLE)
        key = row.tobytes()
        if key in self._begun:
            stored = self._stored.get(key)
            found = self._work.result() if stored is None else _outcome_of(stored)
            self._begun.remove(key)
            self._add(key, row, costs, found, store=stored is None)
        metrics = self._known[key]
        if metrics is None:
            return self._unscored(row, costs, Outcome.FAILED)
        values = {name: np.array([value]) for name, value in metrics.items()}
        return Batch(row, costs, values, np.array([Outcome.MEASURED], dtype=np.int8))

    def close(self) -> None:
        """Forget what is pending."""
        self._work.cancel()

    def _evaluated(self, costs: Mapping[str, Values], count: int) -> NDArray[np.bool_]:
        """Return which of some networks are evaluated: those that fit, for most strategies."""
        return np.ones(count, dtype=np.bool_) if self._beyond else _within(self.constraints, costs, count)

    def _add(
        self,
        key: bytes,
        row: Codes,
        costs: Mapping[str, Values],
        found: Mapping[str, float] | Exception,
        *,
        store: bool,
    ) -> None:
        """Make a trial of what was found; all metrics of it, or the reason why there are none."""
        space = self.constraints.space
        error = "" if not isinstance(found, Exception) else str(found)
        metrics = {} if isinstance(found, Exception) else found
        if not error:
            _check_objective(self.objective, metrics)
            if not np.isfinite(metrics[self.objective]):
                error, metrics = f"{self.objective} is {metrics[self.objective]}", {}
        outcome = Outcome.FAILED if error else Outcome.MEASURED
        plain = {metric: float(values[0]) for metric, values in costs.items()}
        trial = Trial(len(self.trials), space.decode(row)[0], plain, metrics, outcome, error)
        if store and self._storage is not None:
            self._storage.add(trial, space, self.objective)
        self.trials.append(trial)
        self.evaluated += 1
        self._known[key] = None if error else metrics
        if not error:
            score = metrics[self.objective]
            if _within(self.constraints, costs, 1)[0]:
                self.best = score if self.best is None else max(self.best, score)
        elif store and not any(self._known.values()) and self.evaluated >= MAX_FAILURES:
            raise EvaluationError(
                f"the first {self.evaluated} evaluations all failed, the last one with: {error}; the "
                "evaluator is broken, not a network"
            )

    def _unscored(self, row: Codes, costs: Mapping[str, Values], outcome: Outcome) -> Batch:
        return Batch(row, costs, {self.objective: np.full(1, np.nan)}, np.array([outcome], dtype=np.int8))

    def candidates(self) -> None:
        """Return none: what is paid for is a trial."""


class _Free:
    """Every proposal is scored, all rows of an ask at once; only the best are kept."""

    def __init__(
        self,
        constraints: Constraints,
        evaluator: Evaluator,
        objective: str,
        history: History | None,
        at_once: int,
    ) -> None:
        self.constraints, self.evaluator, self.objective = constraints, evaluator, objective
        self._at_once = at_once
        self._pending: list[tuple[Codes, Mapping[str, Values], NDArray[np.bool_]]] = []  # one at most
        self.trials: list[Trial] = []
        self.evaluated = self.begun = 0
        self.best: float | None = None
        self._history = history
        self._failure = ""
        self._kept: Codes = np.zeros((0, len(constraints.space.choices)), dtype=np.int64)
        self._scores: Values = np.zeros(0)

    @property
    def pending(self) -> int:
        """Whether a batch is to be told."""
        return len(self._pending)

    @property
    def room(self) -> int:
        """How many rows may begin: as many as are asked for at once, when all are told."""
        return 0 if self._pending else self._at_once

    def begin(self, codes: Codes) -> bool:
        """Take rows to be scored; return whether any fits."""
        costs = self.constraints.price(codes)
        feasible = _within(self.constraints, costs, len(codes))
        self._pending.append((codes, costs, feasible))
        return bool(feasible.any())

    def finish(self) -> Batch:
        """Score all rows that fit, and return all."""
        codes, costs, feasible = self._pending.pop()
        scores = np.full(len(codes), np.nan)
        if feasible.any():
            scores[feasible] = self._scored(codes[feasible])
        finite = np.isfinite(scores)
        scores[~finite] = np.nan
        if self._history is not None and feasible.any():
            columns = [values[feasible] for values in costs.values()]
            priced = np.stack(columns, axis=1) if columns else np.zeros((int(feasible.sum()), 0))
            self._history.append(codes[feasible], scores[feasible], priced)
        self.evaluated += int(feasible.sum())
        self._keep(codes[finite], scores[finite])
        outcomes = np.select([~feasible, finite], [Outcome.INFEASIBLE, Outcome.MEASURED], Outcome.FAILED)
        return Batch(codes, costs, {self.objective: scores}, outcomes.astype(np.int8))

    def close(self) -> None:
        """Do nothing: nobody works at what is pending."""

    def _scored(self, codes: Codes) -> Values:
        """Ask the evaluator; `nan` for all rows if it fails."""
        try:
            found = metrics_of(self.evaluator, codes)
        except EvaluationError as error:
            self._failure = f"; the last of them failed with: {error}"
            return np.full(len(codes), np.nan)
        _check_objective(self.objective, found)
        return np.asarray(found[self.objective], dtype=np.float64)

    def _keep(self, codes: Codes, scores: Values) -> None:
        """Keep the best distinct rows seen so far, the earlier one of equals."""
        if len(self._scores) == KEPT_CANDIDATES:
            better = scores > self._scores[-1]
            codes, scores = codes[better], scores[better]
        if not len(codes):
            return
        rows, values = np.vstack([self._kept, codes]), np.concatenate([self._scores, scores])
        order = np.argsort(-values, kind="stable")
        _, first = np.unique(rows[order], axis=0, return_index=True)
        order = order[np.sort(first)][:KEPT_CANDIDATES]
        self._kept, self._scores = rows[order], values[order]
        self.best = float(self._scores[0])

    def candidates(self) -> Batch:
        """Return the best of what was scored, the best first.

        Raises:
            EvaluationError: Nothing has a score.
        """
        if self.evaluated and self.best is None:
            raise EvaluationError(
                f"not one of {self.evaluated} evaluations gave a finite {self.objective}{self._failure}; the "
                "evaluator is broken, not a network"
            )
        outcomes = np.full(len(self._scores), Outcome.MEASURED, dtype=np.int8)
        return Batch(self._kept, self.constraints.price(self._kept), {self.objective: self._scores}, outcomes)


def _within(constraints: Constraints, costs: Mapping[str, Values], count: int) -> NDArray[np.bool_]:
    """Return which of `count` rows with these costs fit every limit."""
    fits = np.ones(count, dtype=np.bool_)
    for metric, limit in constraints.limits.items():
        fits &= costs[metric] <= limit
    return fits


def _outcome_of(trial: Trial) -> Mapping[str, float] | Exception:
    """Return what an evaluator would have said of a stored trial."""
    return trial.metrics if trial.outcome == Outcome.MEASURED else EvaluationError(trial.error)


def _check_objective(objective: str, found: Mapping[str, Any]) -> None:
    if objective not in found:
        given = ", ".join(found) or "nothing"
        raise AutocompressError(f"the search maximises {objective!r}, but the evaluator gives {given}")
