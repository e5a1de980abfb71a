"""Compression policies as a search space: one choice for each setting of a pass that may be chosen.

A policy is a list of passes (`autocompress.policy.passes`). Costs of a policy are measured, not summed: the
space has no blocks, and no cost is known before a policy was tried.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from autocompress.errors import PolicyError
from autocompress.space import Choice, Option, SearchSpace


def policy(passes: Sequence[Mapping[str, Mapping[str, Any]]]) -> SearchSpace:
    """Make the space of policies.

    Args:
        passes: In their order, each one name with its settings: a list is what may be chosen, anything else
            is fixed. What a pass that is turned off has besides has no effect.

    Raises:
        PolicyError: There is no such pass or setting, or nothing may be chosen.
    """
    from autocompress.policy.passes import PASSES, check, is_off

    choices: list[Choice] = []
    check([(name, given) for entry in passes for name, given in entry.items()])
    for number, entry in enumerate(passes):
        ((name, given),) = entry.items()
        ((switch, off),) = PASSES[name].off.items()
        if is_off(name, given):
            raise PolicyError(
                f"pass {name!r} is turned off by its {switch}, {off!r}: give it other options, or leave the "
                "pass out"
            )
        on: tuple[tuple[str, tuple[Option, ...]], ...] = ()
        # The setting that turns a pass off is decided first: the others hang on it.
        for setting in sorted(given, key=lambda key: key != switch):
            options = given[setting]
            if not isinstance(options, list | tuple):
                continue
            choice = Choice(f"{number}.{name}.{setting}", tuple(options), active_when=on)
            choices.append(choice)
            if setting == switch and off in choice.options:
                allowed = tuple(option for option in choice.options if option != off)
                on = ((choice.name, allowed),) if allowed else ()
    if not choices:
        raise PolicyError("nothing may be chosen: give a list of options to a setting of a pass")
    return SearchSpace("policy", tuple(choices), (), settings={"passes": [dict(entry) for entry in passes]})
