"""Each pass alone, as mild as the budget allows: what a tuning starts from, and has to beat."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from autocompress.policy.passes import PASSES, Policy, Setting, is_off, settings_of
from autocompress.policy.recipe import PolicyRecipe
from autocompress.policy.trial import Job, costs_of, limits_of, policy_of
from autocompress.progress import Progress, silent

Chosen = dict[str, Setting]
"""Options of the choices of `search_spaces.policy`, by their names."""


def single_passes(job: Job, progress: Progress = silent) -> list[Chosen]:
    """Return for each pass the mildest setting by which it fits the budget alone; nothing is trained.

    Of a pass of several kinds (`factorize.method`) it is the kind that comes nearest to the budget; settings
    that are neither kind nor strength have their first option. Networks are built and measured, a few for
    each kind: by bisection, for what is stronger should cost less. Passes that cannot be turned off stay on.

    Args:
        job: What is compressed.
        progress: Told which pass is measured.
    """
    found = []
    for name, ladders in _alone(job.recipe):
        progress(0, job.recipe.tune.trials, f"{name} alone")
        mildest = [one for ladder in ladders if (one := _mildest(job, ladder)) is not None]
        if mildest:
            found.append(max(mildest, key=lambda one: one[0])[1])
    return found


def is_single(policy: Policy) -> bool:
    """Whether one pass is on, besides distillation."""
    return sum(name != "distill" and not is_off(name, settings) for name, settings in policy) == 1


def _alone(recipe: PolicyRecipe) -> Iterator[tuple[str, list[list[Chosen]]]]:
    """Yield each pass that may be on, with its policies from mild to strong, a list for each kind."""
    passes = [(f"{n}.{name}.", name, given) for n, e in enumerate(recipe.passes) for name, given in e.items()]
    resting: Chosen = {}
    for prefix, name, given in passes:
        resting |= {prefix + key: _at_rest(name, key, options) for key, options in _lists(given).items()}
    for prefix, name, given in passes:
        chosen, ((switch, off),) = _lists(given), PASSES[name].off.items()
        switches = chosen.get(switch, [given.get(switch, settings_of(name)[switch])])
        on = [option for option in switches if option != off]
        if not chosen or not on or (strength := PASSES[name].strength) is None:
            continue
        setting, descending = strength
        steps = [s for s in chosen.get(setting, []) if setting != switch or s != off]
        ladder = [{prefix + setting: s} for s in sorted(steps, reverse=descending)] or [{}]
        kinds = [{prefix + switch: k} for k in on] if switch in chosen and switch != setting else [{}]
        yield name, [[resting | kind | step for step in ladder] for kind in kinds]


def _lists(given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the settings of a pass that may be chosen."""
    return {key: list(value) for key, value in given.items() if isinstance(value, list | tuple)}


def _at_rest(name: str, setting: str, options: Sequence[Setting]) -> Setting:
    """Return off where a pass may be turned off; networks are finetuned where that may be chosen."""
    off = PASSES[name].off.get(setting)
    if name == "distill":
        return next((option for option in options if option != off), options[0])
    return options[0] if off is None or off not in options else off


def _mildest(job: Job, ladder: Sequence[Chosen]) -> tuple[float, Chosen] | None:
    """Return the first that fits, with the share of the budget that it uses; `None` if none does."""
    index = bisect_left(ladder, True, key=lambda chosen: _use(job, chosen) <= 1)
    return (_use(job, ladder[index]), ladder[index]) if index < len(ladder) else None


def _use(job: Job, chosen: Chosen) -> float:
    """Return the share of the budget; above 1 it does not fit, or cannot be."""
    try:
        costs = costs_of(job, policy_of(job.recipe, chosen))
    except (OSError, MemoryError):
        raise
    except Exception:  # noqa: BLE001  (exporters raise anything; as a trial it would say why)
        return math.inf
    return max(costs[metric] / limit for metric, limit in limits_of(job).items())
