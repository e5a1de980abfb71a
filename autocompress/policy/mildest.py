"""The mildest policies that fit the budget, each pass alone if that is enough: what a tuning starts from."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from autocompress.policy.passes import PASSES, Policy, Setting, is_off
from autocompress.policy.recipe import PolicyRecipe
from autocompress.policy.trial import Job, costs_of, policy_of, use_of
from autocompress.progress import Progress, silent

Chosen = dict[str, Setting]
"""Options of the choices of `search_spaces.policy`, by their names."""


def mildest_policies(job: Job, progress: Progress = silent) -> list[Chosen]:
    """Return for each pass the mildest setting by which it fits the budget alone; nothing is trained.

    Where none fits alone, the one that comes nearest is kept, and each of the others is added to it; and so
    on. Of a pass of several kinds (`factorize.method`) it is the kind that comes nearest to the budget;
    settings that are neither kind nor strength have their first option. Networks are built and measured, a
    few for each kind: by bisection, for what is stronger should cost less. What cannot be turned off stays.

    Args:
        job: What is compressed.
        progress: Told which pass is measured.

    Returns:
        Empty if all passes together do not fit either.
    """
    kept, left, together = _at_rest(job.recipe), _ladders(job.recipe), ""
    while left:
        ends = {}
        for name, ladders in left.items():
            progress(0, job.recipe.tune.trials, f"measures {together}{name.split('.')[1]}")
            ends[name] = [_mildest(job, [kept | step for step in ladder]) for ladder in ladders]
        inside = [[end for end in found if end[0] <= 1] for found in ends.values()]
        if any(inside):
            return [max(found, key=lambda end: end[0])[1] for found in inside if found]
        (use, chosen), name = min(
            ((end, name) for name, found in ends.items() for end in found), key=lambda pair: pair[0][0]
        )
        if use == math.inf:
            return []
        kept, together = chosen, f"{together}{name.split('.')[1]} > "
        del left[name]
    return []


def is_single(policy: Policy) -> bool:
    """Whether one pass is on, besides distillation."""
    return sum(name != "distill" and not is_off(name, settings) for name, settings in policy) == 1


def _at_rest(recipe: PolicyRecipe) -> Chosen:
    """Return a policy with every pass off that can be, but distillation."""
    return {
        prefix + key: _resting(prefix.split(".")[1], key, options)
        for prefix, given in _passes(recipe)
        for key, options in _lists(given).items()
    }


def _resting(name: str, setting: str, options: Sequence[Setting]) -> Setting:
    off = PASSES[name].off.get(setting)
    if name == "distill":
        return next((option for option in options if option != off), options[0])
    return options[0] if off is None or off not in options else off


def _ladders(recipe: PolicyRecipe) -> dict[str, list[list[Chosen]]]:
    """Return what may be chosen of each pass that can be on: for each kind, from mild to strong."""
    found = {}
    for prefix, given in _passes(recipe):
        name, chosen = prefix.split(".")[1], _lists(given)
        ((switch, off),), strength = PASSES[name].off.items(), PASSES[name].strength
        if strength is None or not chosen:
            continue
        setting, descending = strength
        on = {key: [o for o in options if (key, o) != (switch, off)] for key, options in chosen.items()}
        kinds, steps = on.get(switch, []), on.get(setting, [])
        ladder = [{prefix + setting: step} for step in sorted(steps, reverse=descending)] or [{}]
        if switch == setting or not kinds:
            found[prefix] = [ladder]
        else:
            found[prefix] = [[{prefix + switch: kind, **step} for step in ladder] for kind in kinds]
    return found


def _passes(recipe: PolicyRecipe) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the passes with what the names of their choices begin with: number and name."""
    entries = enumerate(recipe.passes)
    return [(f"{number}.{name}.", given) for number, entry in entries for name, given in entry.items()]


def _lists(given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the settings of a pass that may be chosen."""
    return {key: list(value) for key, value in given.items() if isinstance(value, list | tuple)}


def _mildest(job: Job, ladder: Sequence[Chosen]) -> tuple[float, Chosen]:
    """Return the first that fits, or else the strongest that can be, with its share of the budget."""
    # What is too strong to be made is beyond what fits, too.
    index = bisect_left(ladder, True, key=lambda chosen: not 1 < _use(job, chosen) < math.inf)
    for chosen in ladder[index:]:
        if (use := _use(job, chosen)) <= 1:
            return use, chosen
    return (_use(job, ladder[index - 1]), ladder[index - 1]) if index else (math.inf, ladder[0])


def _use(job: Job, chosen: Chosen) -> float:
    """Return the share of the budget; infinite where the policy cannot be."""
    try:
        costs = costs_of(job, policy_of(job.recipe, chosen))
    except (OSError, MemoryError):
        raise
    except Exception:  # noqa: BLE001  (exporters raise anything; as a trial it would say why)
        return math.inf
    return use_of(job, costs)
