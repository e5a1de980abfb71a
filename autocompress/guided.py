"""Searching a supernet with few paid evaluations: sample, fit a predictor, search it, pay for the finalists.

Source: Cai et al., Once-for-All, ICLR 2020, section 3.4.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from autocompress.budget import Constraints
from autocompress.engine import StrategyFactory, search
from autocompress.errors import AutocompressError
from autocompress.evaluator import Evaluator
from autocompress.progress import Progress, silent
from autocompress.result import SearchResult
from autocompress.space import Codes
from autocompress.trial import Batch


class _Listed:
    """A strategy that asks a fixed list of rows, once."""

    def __init__(self, codes: Codes) -> None:
        self._codes, self._next = codes, 0

    def ask(self, n: int) -> Codes:
        """Return the next rows of the list."""
        rows = self._codes[self._next : self._next + n]
        self._next += len(rows)
        return rows

    def tell(self, batch: Batch) -> None:
        """Learn nothing."""


def guided_search(
    strategy: StrategyFactory,
    constraints: Constraints,
    evaluator: Evaluator,
    *,
    evaluations: int,
    finalists: int,
    candidates: int,
    predictor: Literal["ridge", "mlp"],
    objective: str,
    seed: int,
    options: Mapping[str, Any] | None = None,
    first: Codes | None = None,
    storage: Path | str | None = None,
    history: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    show: Callable[[str], None] = lambda text: None,
    progress: Progress = silent,
) -> SearchResult:
    """Search with a predictor between paid evaluations, from where an earlier call stopped.

    Args:
        strategy: Makes the strategy that searches the predictor.
        constraints: Space, costs and limits.
        evaluator: A paid one.
        evaluations: Paid evaluations in all.
        finalists: Of them, those paid for the candidates that the predictor likes best.
        candidates: Rows that the predictor may score.
        predictor: Its kind.
        objective: The evaluator's metric.
        seed: Of sample, predictor and strategy.
        options: Of the strategy.
        first: Feasible rows that are paid for before random ones, such as networks one would pick without
            searching: the result is then never worse than these.
        storage: For paid evaluations, see `search`.
        history: For scored candidates, see `search`.
        identity: What the stored outcomes depend on, see `search`.
        show: Told the predictor's quality.
        progress: Told paid evaluations.

    Returns:
        All paid trials, first the given and the random ones; `notes` has the predictor's Kendall tau. Where
        there is nothing to fit (under ten scores, or all equal) the finalists are random too, as `notes` say.

    Raises:
        AutocompressError: `finalists` is not in 1..evaluations - 1, or no sampled network could be evaluated.
    """
    from autocompress.evaluation.predictor import MIN_ROWS, fit

    if not 0 < finalists < evaluations:
        raise AutocompressError(
            f"finalists must be in 1..{evaluations - 1} (evaluations - 1), got {finalists}"
        )

    def paid(done: int, total: int, note: str = "") -> None:
        progress(done, evaluations, note)

    rng = np.random.default_rng((seed, 2))
    sample = _distinct_sample(constraints, evaluations - finalists, rng, first=first)
    sampled = search(
        _Listed(sample), constraints, evaluator, evaluations=len(sample), objective=objective,
        storage=storage, identity=identity, progress=paid,
    )  # fmt: skip
    known = sampled.measured
    if not known:
        raise AutocompressError("none of the sampled networks could be evaluated: " + sampled.trials[0].error)
    notes: dict[str, Any] = dict(sampled.notes or {})
    space = constraints.space
    rows = space.encode([trial.architecture for trial in known])
    values = np.array([trial.metrics[objective] for trial in known])
    scored = asked = 0
    if len(known) < MIN_ROWS or np.ptp(values) == 0:
        # Too few scores, or all the same: there is nothing to learn, so the other evaluations are random too.
        notes["predictor"] = "none: too few or equal scores"
        show(
            f"no predictor: {len(known)} scores, fewer than {MIN_ROWS} or all equal; the finalists are random"
        )
        chosen = _distinct_sample(constraints, finalists, rng, besides=sample)
    else:
        fitted = fit(space, rows, values, kind=predictor, seed=seed, metric=objective)
        show(str(fitted))
        low, high = fitted.kendall_tau_interval
        notes["predictor"] = {
            "kind": predictor,
            "kendall_tau": fitted.kendall_tau,
            "kendall_tau_interval": [low, high],
            "rows": fitted.rows,
            "held_out_rows": fitted.held_out_rows,
        }
        predicted = search(
            strategy(constraints, seed=seed, objective=objective, **(options or {})),
            constraints, fitted, evaluations=candidates, objective=objective, history=history,
            identity={**(identity or {}), "predictor": predictor, "rows": len(rows), "seed": seed},
        )  # fmt: skip
        scored, asked = predicted.scored, predicted.asked
        chosen = _best_candidates(predicted, besides=sample)[:finalists]

    def finals(done: int, total: int, note: str = "") -> None:
        progress(len(sample) + done, evaluations, note)

    asked += len(sample)
    if not len(chosen):
        return replace(sampled, scored=scored, asked=asked, notes=notes)
    final = search(
        _Listed(chosen), constraints, evaluator, evaluations=len(chosen), objective=objective,
        storage=storage, identity=identity, progress=finals,
    )  # fmt: skip
    offset = len(sampled.trials)
    trials = [*sampled.trials, *(replace(trial, number=trial.number + offset) for trial in final.trials)]
    return replace(final, trials=trials, scored=scored, asked=asked, notes=notes)


def _best_candidates(predicted: SearchResult, *, besides: Codes) -> Codes:
    """Return the candidates that were not paid for yet, the best prediction first."""
    if predicted.candidates is None:
        return besides[:0]
    codes, scores = predicted.candidates.codes, predicted.candidates.metrics[predicted.objective]
    ordered = codes[np.argsort(-scores, kind="stable")]
    paid_for = {row.tobytes() for row in besides}
    return ordered[np.array([row.tobytes() not in paid_for for row in ordered], dtype=np.bool_)]


def _distinct_sample(
    constraints: Constraints,
    n: int,
    rng: np.random.Generator,
    *,
    first: Codes | None = None,
    besides: Codes | None = None,
) -> Codes:
    """Return up to `n` distinct feasible rows: the given ones, then random ones, uniform over genes.

    Args:
        constraints: What fits.
        n: How many; fewer are returned if draws find no more.
        rng: Source of randomness.
        first: The rows to start with.
        besides: Rows that are not to be drawn.
    """
    known = set() if besides is None else {row.tobytes() for row in besides}
    found = {} if first is None else {row.tobytes(): row for row in first[:n]}
    for _ in range(20):
        if len(found) >= n:
            break
        for row in constraints.sample(n, rng):
            if row.tobytes() not in known:
                found.setdefault(row.tobytes(), row)
    return np.array(list(found.values())[:n], dtype=np.int64).reshape(-1, len(constraints.space.choices))
