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
        storage: For paid evaluations, see `search`.
        history: For scored candidates, see `search`.
        identity: What the stored outcomes depend on, see `search`.
        show: Told the predictor's quality.
        progress: Told paid evaluations.

    Returns:
        All paid trials, first the random ones; `notes` has the predictor's Kendall tau.

    Raises:
        AutocompressError: Fewer than two networks fit, or could be evaluated.
    """
    from autocompress.evaluation.predictor import fit

    def paid(done: int, total: int, note: str = "") -> None:
        progress(done, evaluations, note)

    rng = np.random.default_rng((seed, 2))
    sample = _distinct_sample(constraints, evaluations - finalists, rng)
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
    # A space (or what fits of it) so small that it was paid for entirely, or scores that do not differ, leave
    # a predictor nothing to do.
    if len(sample) < evaluations - finalists or len(known) < 10 or np.ptp(values) == 0:
        return replace(sampled, notes={**notes, "predictor": "none: too few or equal scores"})
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
    predicted_identity = {**(identity or {}), "predictor": predictor, "rows": len(rows), "seed": seed}
    scored = search(
        strategy(constraints, seed=seed, objective=objective, **(options or {})),
        constraints, fitted, evaluations=candidates, objective=objective,
        history=history, identity=predicted_identity,
    )  # fmt: skip
    paid_for = {row.tobytes() for row in sample}
    best: list[Any] = []
    if scored.candidates is not None:
        codes, scores = scored.candidates.codes, scored.candidates.metrics[objective]
        order = np.argsort(-scores, kind="stable")
        best = [codes[i] for i in order if codes[i].tobytes() not in paid_for][:finalists]

    def finals(done: int, total: int, note: str = "") -> None:
        progress(len(sample) + done, evaluations, note)

    if not best:
        return replace(sampled, scored=scored.scored, asked=scored.asked, notes=notes)
    final = search(
        _Listed(np.array(best)), constraints, evaluator, evaluations=len(best), objective=objective,
        storage=storage, identity=identity, progress=finals,
    )  # fmt: skip
    offset = len(sampled.trials)
    trials = [*sampled.trials, *(replace(trial, number=trial.number + offset) for trial in final.trials)]
    return replace(final, trials=trials, scored=scored.scored, asked=scored.asked + len(sample), notes=notes)


def _distinct_sample(constraints: Constraints, n: int, rng: np.random.Generator) -> Codes:
    """Draw up to `n` distinct feasible rows, uniform over genes; fewer if draws find no more."""
    found: dict[bytes, Any] = {}
    for _ in range(20):
        for row in constraints.sample(n, rng):
            found.setdefault(row.tobytes(), row)
        if len(found) >= n:
            break
    return np.array(list(found.values())[:n])
