"""The methods of sparse training by name, and their options out of what a user wrote."""

import difflib
from collections.abc import Mapping
from typing import Any, Final

from pydantic import ValidationError

from autocompress.errors import RecipeError
from autocompress.sparse.magnitude import MagnitudeOptions, magnitude
from autocompress.sparse.method import Method, Options
from autocompress.sparse.play_and_prune import PlayAndPruneOptions, play_and_prune
from autocompress.sparse.slimming import SlimmingOptions, slimming
from autocompress.sparse.soft import SoftOptions, soft
from autocompress.sparse.structure import StructureOptions, structure

METHODS: Final[dict[str, Method]] = {
    "slimming": Method(slimming, SlimmingOptions),
    "magnitude": Method(magnitude, MagnitudeOptions, channels=False),
    "soft": Method(soft, SoftOptions),
    "play-and-prune": Method(play_and_prune, PlayAndPruneOptions, trained=True),
    "structure": Method(structure, StructureOptions),
}
"""Name of each method."""


def method_of(name: str) -> Method:
    """Return a method.

    Raises:
        RecipeError: There is none of that name; the message has the nearest.
    """
    if name not in METHODS:
        (nearest,) = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)
        raise RecipeError(
            f"there is no method {name!r}; did you mean {nearest!r}? There are {', '.join(METHODS)}"
        )
    return METHODS[name]


def options_of(name: str, given: Mapping[str, Any]) -> Options:
    """Check the options of a method and fill up those that are not given.

    Raises:
        RecipeError: There is no such method or option, or a value is out of its range.
    """
    kind = method_of(name).options
    allowed = ", ".join(kind.model_fields)
    for key in given:
        if key not in kind.model_fields:
            raise RecipeError(f"options.{key}: method {name!r} takes {allowed}, not {key!r}")
    for key, value in given.items():
        if isinstance(value, bool):
            raise RecipeError(f"options.{key}: must not be true or false, got {value!r}")
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        lines = [
            f"options.{'.'.join(map(str, one['loc'])) or '(all)'}: {one['msg']}, got {one['input']!r}"
            for one in error.errors()
        ]
        raise RecipeError(f"method {name!r}: " + "; ".join(lines)) from None
