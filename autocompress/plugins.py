"""Search spaces and strategies by name: entry points of any installed package, or `module:attribute`.

A package offers its own by entry points in its `pyproject.toml`:

```toml
[project.entry-points."autocompress.strategies"]
my_search = "my_package.my_search:MySearch"
```
"""

import difflib
import importlib
import inspect
import operator
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Any, Final, Literal

from autocompress.errors import PluginError, RecipeError
from autocompress.space import SearchSpace
from autocompress.strategy import Strategy

Group = Literal["autocompress.search_spaces", "autocompress.strategies"]
SPACES: Group = "autocompress.search_spaces"
STRATEGIES: Group = "autocompress.strategies"
_KINDS: dict[Group, str] = {SPACES: "search space", STRATEGIES: "strategy"}
GIVEN: Final = ("constraints", "seed", "objective")
"""What every strategy is called with; all else that it takes is an option."""


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


def load_strategy_for(name: str, options: Iterable[str], *, key: str = "") -> Callable[..., Strategy]:
    """Return the class of a strategy, once it takes all that it will be called with.

    Args:
        name: A name of `available(STRATEGIES)`, or `module:attribute`.
        options: Names of the options that it will be given.
        key: What stands before an option where the user wrote it, for the message: `search.options.`.

    Raises:
        PluginError: There is no such strategy, or it does not take constraints, seed and objective.
        RecipeError: It does not take one of the options.
    """
    strategy = load_strategy(name)
    taken, takes_any = _parameters(strategy)
    if not takes_any and not set(GIVEN) <= set(taken):
        raise PluginError(
            f"{name!r} is no strategy: it must take {', '.join(GIVEN)}, but takes "
            f"{', '.join(taken) or 'nothing'}"
        )
    allowed = [parameter for parameter in taken if parameter not in GIVEN]
    for option in options:
        if option in GIVEN or not (takes_any or option in allowed):
            raise RecipeError(f"{key}{option}: strategy {name!r} takes {', '.join(allowed) or 'no options'}")
    return strategy


def _parameters(strategy: Callable[..., Any]) -> tuple[list[str], bool]:
    """Return the names of what a strategy takes, and whether it takes any other name too.

    A class with `**options` hands them to its base class, as a rule: what that takes, it takes.
    """
    makers: list[Any] = [strategy]
    if isinstance(strategy, type):
        makers = [vars(cls)["__init__"] for cls in strategy.__mro__[:-1] if "__init__" in vars(cls)]
    names: list[str] = []
    for maker in makers:
        try:
            parameters = inspect.signature(maker).parameters.values()
        except (TypeError, ValueError):  # of some built-ins Python does not know what they take
            return names, False
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names += [p.name for p in parameters if p.kind in named and p.name not in ("self", *names)]
        if not any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters):
            return names, False
    return names, bool(makers)


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
    except Exception as error:  # what the user's module does when it is imported
        raise PluginError(
            f"{kind} {name!r} cannot be imported: module {path!r} raises {type(error).__name__}: {error}"
        ) from error
    try:
        plugin = operator.attrgetter(attribute)(module)
    except AttributeError:
        raise PluginError(f"module {path!r} has no attribute {attribute!r} ({kind} {name!r})") from None
    if not callable(plugin):
        raise PluginError(f"{kind} {name!r} must be something to call, got {type(plugin).__name__}")
    return plugin
