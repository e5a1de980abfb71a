"""One strategy with one seed on a problem: what it found after how many evaluations and seconds.

Finished cells are files; a comparison that starts again runs the rest and what failed, and a cell that was
killed goes on from its stored trials.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from autocompress.atomic import read_json, write_json
from autocompress.compare.problem import Contestant, Problem, ProblemSource
from autocompress.compare.workers import each
from autocompress.cost import Values
from autocompress.differentiable import Differentiable
from autocompress.engine import search
from autocompress.errors import (
    AutocompressError,
    CheckpointError,
    EvaluationError,
    PluginError,
    StorageError,
    StrategyError,
)
from autocompress.plugins import load_strategy
from autocompress.progress import Progress, silent
from autocompress.space import Codes
from autocompress.strategy import Strategy
from autocompress.trial import Batch, Outcome

SCHEMA: Final = "autocompress.compare.cell"
VERSION: Final = 1
SECONDS: Final = "evaluation_s"
SIMULATED: Final = "simulated_s"


@dataclass(frozen=True)
class Cell:
    """What one search found.

    Attributes:
        label: Of the contestant.
        seed: Of its strategy.
        scores: The objective of every evaluation, in order; `None` where it failed.
        evaluation_s: Seconds of every evaluation: measured, or simulated where the problem simulates them.
        strategy_s: Seconds that the strategy took in all to be trained, to propose and to learn.
        best: The architecture of the best score, as its JSON; empty if the search failed.
        error: Why it failed; empty unless it did.
        training_s: Of them, those in which it was trained together with a supernet, before any evaluation.
    """

    label: str
    seed: int
    scores: tuple[float | None, ...]
    evaluation_s: tuple[float, ...]
    strategy_s: float
    best: str
    error: str = ""
    training_s: float = 0.0

    def curve(self, evaluations: int) -> Values:
        """Return the best score after 1, 2, ... evaluations, `(evaluations,)`; `nan` before the first.

        A search that ended earlier, with nothing left to propose, stays at its last value.
        """
        scores = np.array([np.nan if score is None else score for score in self.scores])
        best = np.fmax.accumulate(scores) if len(scores) else np.full(1, np.nan)
        return np.concatenate([best, np.full(max(0, evaluations - len(best)), best[-1])])[:evaluations]


class _Timed:
    """A strategy and the seconds it takes."""

    def __init__(self, strategy: Strategy) -> None:
        self.wrapped = strategy
        self.seconds = 0.0

    def ask(self, n: int) -> Codes:
        start = time.perf_counter()
        codes = self.wrapped.ask(n)
        self.seconds += time.perf_counter() - start
        return codes

    def tell(self, batch: Batch) -> None:
        start = time.perf_counter()
        self.wrapped.tell(batch)
        self.seconds += time.perf_counter() - start


class _Clocked:
    """An evaluator that adds the seconds of every evaluation, measured or assumed."""

    paid = True

    def __init__(self, problem: Problem) -> None:
        self._evaluator, self._simulated = problem.evaluator, problem.simulated

    def __call__(self, codes: Codes) -> dict[str, Values]:
        start = time.perf_counter()
        found = dict(self._evaluator(codes))
        taken = np.full(len(codes), time.perf_counter() - start)
        return {**found, SECONDS: found[SIMULATED] if self._simulated else taken}


def make_strategy(problem: Problem, contestant: Contestant, seed: int) -> Strategy:
    """Make the strategy of a cell; also a check that can be made before any search.

    Raises:
        StrategyError: It refuses its options or fails, what it makes cannot be asked and told, or it has to
            be trained together with a supernet and the problem has none.
    """
    factory = load_strategy(contestant.strategy)
    try:
        made: Any = factory(problem.constraints, seed=seed, objective=problem.objective, **contestant.options)
    except AutocompressError as error:
        raise StrategyError(f"strategy {contestant.label!r}: {error}") from error
    except Exception as error:  # a user's strategy may raise anything
        raise StrategyError(
            f"strategy {contestant.label!r} cannot be made: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, Strategy):
        raise StrategyError(
            f"strategy {contestant.label!r} must make something with ask and tell, got {type(made).__name__}"
        )
    if isinstance(made, Differentiable) and problem.train_together is None:
        raise StrategyError(
            f"strategy {contestant.label!r} is trained together with a supernet, and problem "
            f"{problem.name!r} has no train_together to do it; leave the strategy out, or compare on a "
            "trained run (--run)"
        )
    return made


def _train(
    problem: Problem, strategy: Strategy, contestant: Contestant, seed: int, checkpoint: Path | None
) -> float:
    """Train a strategy that is differentiable; return the seconds that took, 0 for any other.

    Raises:
        StrategyError: It cannot be trained.
        PluginError: The problem does not say how long it took.
    """
    if problem.train_together is None or not isinstance(strategy, Differentiable):
        return 0.0
    try:
        seconds: Any = problem.train_together(strategy, seed=seed, checkpoint=checkpoint)
    except (CheckpointError, StorageError):  # no fault of the strategy's
        raise
    except Exception as error:
        raise StrategyError(
            f"strategy {contestant.label!r} cannot be trained: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(seconds, int | float) or not 0 <= seconds < float("inf"):
        raise PluginError(
            f"train_together of problem {problem.name!r} must return its seconds, a number >= 0, got "
            f"{seconds!r}"
        )
    return float(seconds)


def _checkpoint(journal: Path) -> Path:
    """Return where the training of a cell is kept until the cell is finished."""
    return journal.with_suffix(".pt")


def run_cell(
    problem: Problem, contestant: Contestant, seed: int, evaluations: int, storage: Path | None = None
) -> Cell:
    """Search a problem by one strategy under one seed.

    Args:
        problem: What to search.
        contestant: By which strategy.
        seed: Of the strategy.
        evaluations: How many distinct networks.
        storage: A journal from which a killed search goes on; a training that it needs has a checkpoint
            beside it.

    Raises:
        StrategyError: The strategy failed, could not be trained, or proposed nothing that fits.
        EvaluationError: No evaluation succeeded.
        CheckpointError: The checkpoint of its training is damaged.
    """
    made = make_strategy(problem, contestant, seed)
    training_s = _train(
        problem, made, contestant, seed, checkpoint=None if storage is None else _checkpoint(storage)
    )
    strategy = _Timed(made)
    result = search(
        strategy,
        problem.constraints,
        _Clocked(problem),
        evaluations=evaluations,
        objective=problem.objective,
        storage=storage,
        identity={**problem.identity, "contestant": contestant.label, "seed": seed},
    )
    if not result.trials:
        raise StrategyError(f"strategy {contestant.label!r} proposed no network that fits the limits")
    scores = [
        trial.metrics[problem.objective] if trial.outcome == Outcome.MEASURED else None
        for trial in result.trials
    ]
    return Cell(
        label=contestant.label,
        seed=seed,
        scores=tuple(scores),
        evaluation_s=tuple(trial.metrics.get(SECONDS, 0.0) for trial in result.trials),
        strategy_s=training_s + strategy.seconds,
        best=result.best().architecture.to_json(),
        training_s=training_s,
    )


@lru_cache(maxsize=1)
def _problem(source: str) -> Problem:
    """Make the problem of a worker once; it is given as text, which can be a key."""
    payload = json.loads(source)
    return ProblemSource(payload["factory"], payload["arguments"]).make()


def _work(source: str, contestant: Contestant, seed: int, evaluations: int, path: Path, threads: int) -> None:
    """Run one cell in a worker and write it."""
    problem = _problem(source)
    # After the problem is made: that of a run takes as many threads as the run.
    if threads:
        import torch
        from threadpoolctl import threadpool_limits

        torch.set_num_threads(threads)
        # Gaussian processes solve their equations in threads of BLAS.
        threadpool_limits(threads, user_api="blas")
    journal, failure = path.with_suffix(".log"), None
    try:
        cell = run_cell(problem, contestant, seed, evaluations, journal)
    except (StrategyError, EvaluationError) as error:
        failure = error
        cell = Cell(contestant.label, seed, (), (), 0.0, "", error=f"{type(error).__name__}: {error}")
    write_json(path, {"schema": SCHEMA, "version": VERSION, "evaluations": evaluations, **asdict(cell)})
    # What a training came to is its strategy's; mended, it is trained anew.
    _checkpoint(journal).unlink(missing_ok=True)
    # What was evaluated serves a strategy once it is mended; what an evaluator failed on would fail for ever.
    if not isinstance(failure, StrategyError):
        journal.unlink(missing_ok=True)


def cell_path(folder: Path, contestant: Contestant, seed: int) -> Path:
    """Return where a cell is kept."""
    name = contestant.strategy.replace(":", ".")
    digest = hashlib.sha256(contestant.label.encode()).hexdigest()[:8]
    return folder / "cells" / f"{name}-{digest}" / f"{seed}.json"


def read_cell(path: Path, evaluations: int) -> Cell:
    """Read a cell of a search of so many evaluations.

    Raises:
        StorageError: It is absent, damaged, or of another number of evaluations.
    """
    payload = read_json(path, lambda text: StorageError(f"{text}; remove it to run it again"), "cell")
    try:
        if (payload.pop("schema"), payload.pop("version")) != (SCHEMA, VERSION):
            raise StorageError(f"{path} is no cell of version {VERSION}; remove it to run it again")
        if (asked := payload.pop("evaluations")) != evaluations:
            raise StorageError(
                f"{path} is a search of {asked} evaluations, not {evaluations}; use another --output, or "
                "remove it to run it again"
            )
        scores, seconds = tuple(payload.pop("scores")), tuple(payload.pop("evaluation_s"))
        return Cell(scores=scores, evaluation_s=seconds, **payload)
    except (KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{path} is damaged ({error!r}); remove it to run it again") from error


def _is_finished(path: Path, evaluations: int) -> bool:
    """Whether a search need not be run; one that failed is, since its cause may be mended."""
    return path.exists() and bool(read_cell(path, evaluations).best)


def run_cells(
    source: ProblemSource,
    contestants: Sequence[Contestant],
    seeds: Sequence[int],
    evaluations: int,
    folder: Path,
    *,
    jobs: int = 1,
    threads: int = 0,
    progress: Progress = silent,
) -> list[Cell]:
    """Run all cells that are missing or failed, several at a time, and return all.

    Args:
        source: Of the problem; every worker makes it once.
        contestants: The strategies.
        seeds: Of each.
        evaluations: Of each.
        folder: Of the finished cells.
        jobs: Worker processes; 1 runs in this process.
        threads: Of PyTorch and BLAS in each; 0 leaves them.
        progress: Told finished cells.

    Raises:
        StorageError: A cell that is there is damaged or of another number of evaluations.
        EvaluationError: A worker process was killed.
    """
    text = json.dumps({"factory": source.factory, "arguments": dict(source.arguments)}, sort_keys=True)
    # Seeds first: a comparison that is stopped has a few seeds of every strategy.
    wanted = [(contestant, seed) for seed in seeds for contestant in contestants]
    missing = [pair for pair in wanted if not _is_finished(cell_path(folder, *pair), evaluations)]
    done = len(wanted) - len(missing)
    progress(done, len(wanted), "")
    calls = [(text, c, seed, evaluations, cell_path(folder, c, seed), threads) for c, seed in missing]
    for ended in each(_work, calls, jobs):
        done += 1
        progress(done, len(wanted), missing[ended][0].label)
    return [read_cell(cell_path(folder, *pair), evaluations) for pair in wanted]
