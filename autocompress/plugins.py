"""Search spaces and strategies by name: entry points of any installed package, or `module:attribute`.

A package offers its own by entry points in its `pyproject.toml`:

```toml
[project.entry-points."autocompress.strategies"]
my_search = "my_package.my_search:MySearch"
```
"""

import difflib
import importlib
import operator
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Literal

from autocompress.errors import PluginError
from autocompress.space import SearchSpace
from autocompress.strategy import Strategy

Group = Literal["autocompress.search_spaces", "autocompress.strategies"]
SPACES: Group = "autocompress.search_spaces"
STRATEGIES: Group = "autocompress.strategies"
_KINDS: dict[Group, str] = {SPACES: "search space", STRATEGIES: "strategy"}


def available(group: Group) -> dict[str, str]:
    """Return the names of a group and what each stands for, `module:attribute`; sorted, nothing imported."""
    found = sorted(entry_points(group=group), key=lambda entry: (entry.name, entry.value))
    return {entry.name: entry.value for entry in found}


def load_space_factory(name: str) -> Callable[..., SearchSpace]:
    """Return the function that makes a search space from keyword arguments.

    Args:
        name: A name of `available(SPACES)`, or `module:attribute`.

    Raises:
        PluginError: There is no such name, or it cannot be imported or called.
    """
    factory: Callable[..., SearchSpace] = _load(name, SPACES)
    return factory


def load_strategy(name: str) -> Callable[..., Strategy]:
    """Return the class of a strategy; it is called as `strategy(constraints, seed=..., objective=..., ...)`.

    Args:
        name: A name of `available(STRATEGIES)`, or `module:attribute`.

    Raises:
        PluginError: There is no such name, or it cannot be imported or called.
    """
    strategy: Callable[..., Strategy] = _load(name, STRATEGIES)
    return strategy


def _load(name: str, group: Group) -> Any:
    kind = _KINDS[group]
    known = available(group)
    if ":" in name:
        target = name
    elif name in known:
        target = known[name]
    else:
        near = difflib.get_close_matches(name, known, n=1)
        raise PluginError(
            f"there is no {kind} {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else ";")
            + f" available are {', '.join(known) or 'none'}, and any 'module:attribute'"
        )
    path, _, attribute = target.partition(":")
    if not path or not attribute or path.startswith("."):
        raise PluginError(f"a {kind} is a name or 'module:attribute', got {name!r}")
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise PluginError(f"{kind} {name!r} cannot be imported from module {path!r}: {error}") from error
    try:
        plugin = operator.attrgetter(attribute)(module)
    except AttributeError:
        raise PluginError(f"module {path!r} has no attribute {attribute!r} ({kind} {name!r})") from None
    if not callable(plugin):
        raise PluginError(f"{kind} {name!r} must be something to call, got {type(plugin).__name__}")
    return plugin
