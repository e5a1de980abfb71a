"""The smallest cost within a tolerance: budgets are tried, each by a whole run of its own.

A search answers "the best network within this cost". The other question, "the least cost at which no more
than a point is lost", is answered by bisection: what a budget gives is finetuned and scored on validation
images, and the next budget is smaller or larger. It works with every strategy: a strategy only ever sees
a budget. Scores do not rise evenly with budgets: found is the smallest of those that were tried, not of all.

The goal is that of Singh et al., "Play and Prune: Adaptive Filter Pruning for Deep Model Compression", IJCAI
2019, there for one method that prunes while it trains (`autocompress sparsify --method play-and-prune`).
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from autocompress.atomic import replacing, write_json
from autocompress.budget import parse_limit
from autocompress.errors import InfeasibleBudgetError, ToleranceError
from autocompress.recipe import ToleranceSettings
from autocompress.run import Run, Shown, is_differentiable

PROBES, TOLERANCE = "probes", "tolerance.json"
CLOSE = 0.01
"""Budgets nearer to each other than this share of the largest network's cost are alike."""


@dataclass(frozen=True)
class Probe:
    """What a budget gave.

    Attributes:
        share: The budget, a share of the largest network's cost.
        cost: Of the network that was found, a share likewise; `None` where nothing fits.
        score: Of that network, finetuned, on the validation part; `None` likewise.
        holds: Whether it is within the tolerance.
    """

    share: float
    cost: float | None
    score: float | None
    holds: bool


def bisect(probe: Callable[[float], Probe], low: float, high: float, count: int) -> list[Probe]:
    """Try shares between one that is taken to fail and one that is taken to hold.

    Args:
        probe: Tries a share.
        low: The least cost there is.
        high: The greatest that is allowed.
        count: Shares that are tried at most.

    Returns:
        All of them, in their order.
    """
    tried: list[Probe] = []
    while len(tried) < count and high - low > CLOSE:
        # Whole percents where that leaves something to tell apart: they are read by people.
        middle = (low + high) / 2
        found = probe(round(middle, 2) if low < round(middle, 2) < high else middle)
        tried.append(found)
        if found.holds and found.cost is not None:
            # What was found may be well below its budget.
            high = found.cost
        else:
            low = found.share
    return tried


def smallest(run: Run, shown: Shown) -> Run:
    """Find the smallest cost within the recipe's tolerance; resumes, as runs do.

    Returns:
        The run of the budget that was chosen, in `probes/`: searched and finetuned, not yet exported.

    Raises:
        ToleranceError: No budget that was tried holds the tolerance.
        InfeasibleBudgetError: Nothing fits the limits that hold all the same.
    """
    from autocompress import stages

    settings = settings_of(run)
    metric = settings.metric
    limits = stages.constraints(run, shown)
    if metric not in limits.costs:
        raise ToleranceError(f"tolerance.metric must be one of {', '.join(limits.costs)}, got {metric!r}")
    cost = limits.costs[metric]
    whole = float(cost.of(run.space.largest())[0])
    allowed = min(1.0, limits.limits.get(metric, whole) / whole)
    reference = stages.reference_score(run, shown)
    shown.say(
        f"the whole network: validation {run.task.metric} {reference:.4f}; sought: the least {metric} with "
        f"at least {reference - settings.drop:.4f} after finetuning"
    )
    tried: list[Probe] = []

    def probe(share: float) -> Probe:
        name = f"probe {len(tried) + 1}: {metric} <= {share:.4g} of the whole"
        found = _tried(run, shown, share, whole, reference - settings.drop)
        tried.append(found)
        if found.cost is None or found.score is None:
            shown.say(f"{name}: nothing fits")
        else:
            said = "holds" if found.holds else "is beyond the tolerance"
            lost = reference - found.score
            shown.say(
                f"{name}: {found.cost:.4g}, {run.task.metric} {found.score:.4f}, loses {lost:.4f}: {said}"
            )
        content = {"metric": metric, "reference": reference, "drop": settings.drop, "whole": whole}
        write_json(run.path(TOLERANCE), {**content, "probes": [asdict(one) for one in tried]})
        return found

    bisect(probe, cost.minimum / whole, allowed, settings.probes)
    holding = [one for one in tried if one.holds and one.cost is not None]
    if not holding:
        raise _nothing(settings, reference, tried)
    best = min(holding, key=lambda one: (one.cost, -(one.score or 0.0)))
    return probe_run(run, best.share)


def settings_of(run: Run) -> ToleranceSettings:
    """Return the tolerance of a run.

    Raises:
        ToleranceError: It has none.
    """
    if run.recipe.tolerance is None:
        raise ToleranceError(
            f"the recipe of {run.folder} has no tolerance; give it one: tolerance: {{drop: 0.01}}"
        )
    return run.recipe.tolerance


def probe_run(run: Run, share: float) -> Run:
    """Return the run of one budget; it shares data, space, and what does not depend on the budget."""
    metric = settings_of(run).metric
    limits = run.recipe.search.budget.items()
    others = {name: value for name, value in limits if parse_limit(name, value).metric != metric}
    search = run.recipe.search.model_copy(update={"budget": {**others, metric: f"{100 * share:.6g}%"}})
    recipe = run.recipe.model_copy(update={"tolerance": None, "search": search})
    made = Run(run.path(PROBES) / f"{100 * share:.6g}", recipe)
    made.data, made.task, made.space = run.data, run.task, run.space
    return made


def _tried(run: Run, shown: Shown, share: float, whole: float, least: float) -> Probe:
    """Search and finetune under one budget."""
    from autocompress import stages

    made = probe_run(run, share)
    _share_files(run, shown, made)
    with made.locked():
        try:
            best = stages.search(made, shown).best()
        except InfeasibleBudgetError:
            # Other limits may leave nothing at so small a cost; that something fits without was seen before.
            return Probe(share, None, None, holds=False)
        _, scored = stages.finetune(made, shown)
    return Probe(share, best.costs[settings_of(run).metric] / whole, scored.mean, scored.mean >= least)


def _share_files(run: Run, shown: Shown, made: Run) -> None:
    """Give a probe what does not depend on its budget: latency table, threads, supernet."""
    from autocompress import stages

    names = [stages.TABLE]
    if not is_differentiable(run.recipe):
        if not run.path(stages.TRAINING).exists():
            stages.train(run, shown)
        names += [stages.THREADS, stages.CHECKPOINT, stages.TRAINING]
    for name in names:
        if run.path(name).exists() and not made.path(name).exists():
            _link(run.path(name), made.path(name))


def _link(source: Path, path: Path) -> None:
    """Let two names have one file where the file system can; files are replaced, never written into."""
    with replacing(path) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def table(run: Run) -> str:
    """Return what was tried, as Markdown.

    Raises:
        StorageError: The file is absent or damaged.
    """
    content = run.read(TOLERANCE)
    metric, reference, drop = (content[key] for key in ("metric", "reference", "drop"))
    lines = [
        f"The whole network: validation {run.task.metric} {reference:.4f}. Sought: the least {metric} that "
        f"loses at most {drop:g} after finetuning. Budgets in the order in which they were tried:",
        "",
        f"| {metric} at most | found | validation {run.task.metric} | loses | within the tolerance |",
        "|---|---|---|---|---|",
    ]
    for one in (Probe(**found) for found in content["probes"]):
        share = f"| {one.share:.1%} of the whole "
        if one.cost is None or one.score is None:
            lines.append(f"{share}| nothing fits | | | no |")
            continue
        holds = "yes" if one.holds else "no"
        lines.append(f"{share}| {one.cost:.1%} | {one.score:.4f} | {reference - one.score:.4f} | {holds} |")
    return "\n".join([*lines, ""])


def _nothing(settings: ToleranceSettings, reference: float, tried: list[Probe]) -> ToleranceError:
    scored = [(one.score, one) for one in tried if one.score is not None]
    if not scored:
        return ToleranceError(
            "no budget was tried that some network fits: search.budget leaves nothing between"
        )
    score, nearest = max(scored, key=lambda pair: pair[0])
    return ToleranceError(
        f"none of {len(tried)} budgets loses at most {settings.drop:g}: the best, {settings.metric} "
        f"<= {nearest.share:.4g} of the whole, loses {reference - score:.4g}; finetune for more epochs, "
        "allow a greater loss, or more probes (tolerance.probes)"
    )
