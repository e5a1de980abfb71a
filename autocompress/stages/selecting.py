"""Which network of a search later stages work on."""

import json
from typing import Any

from autocompress.atomic import write_json
from autocompress.budget import Budget
from autocompress.errors import StorageError
from autocompress.run import Run, Shown
from autocompress.space import Architecture
from autocompress.stages.limits import resolve
from autocompress.stages.searching import search

SELECTED = "selected.json"


def selected(run: Run, shown: Shown, arch: Architecture | None = None) -> Architecture:
    """Return the network that later stages work on: the given one, the one selected, or the search's best."""
    if arch is not None:
        return arch
    chosen = selection(run)
    return search(run, shown).best().architecture if chosen is None else chosen[0]


def selection(run: Run) -> tuple[Architecture, str] | None:
    """Return the network that was selected, and by which rule; `None` where the search's best stands.

    Raises:
        StorageError: `selected.json` is damaged.
        SpaceError: Its architecture is none of the space.
    """
    if not run.path(SELECTED).exists():
        return None
    content = run.read(SELECTED)
    if not isinstance(content, dict) or not {"architecture", "rule"} <= content.keys():
        raise StorageError(f"{run.path(SELECTED)} is damaged; remove it and select again")
    return run.space.from_json(json.dumps(content["architecture"])), str(content["rule"])


def select(run: Run, shown: Shown, *, budget: Budget | None, cheapest: str, within: float) -> Any:
    """Choose a network from a finished search and make later stages use it.

    Args:
        run: The run.
        shown: Told progress of missing stages.
        budget: The best network within it; `None` for the search's own best, as if nothing was selected.
        cheapest: Instead, the network of least cost in this metric...
        within: ...whose score is at most this much below the best.

    Returns:
        The trial.
    """
    result = search(run, shown)
    if cheapest:
        trial = result.cheapest(cheapest, within)
        rule = f"least {cheapest} of those within {within:g} of the best {run.task.metric} on validation"
    elif budget is not None:
        trial = result.best(resolve(run, shown, budget).limits)
        rule = f"best {run.task.metric} on validation within {budget}"
    else:
        trial = result.best()
        run.path(SELECTED).unlink(missing_ok=True)
        return trial
    write_json(run.path(SELECTED), {"architecture": json.loads(trial.architecture.to_json()), "rule": rule})
    return trial
