"""What strategies are compared on, in a form that worker processes can make for themselves."""

import importlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from autocompress.budget import Constraints
from autocompress.errors import PluginError, RecipeError
from autocompress.evaluator import Evaluator
from autocompress.plugins import load_strategy


@dataclass(frozen=True, eq=False)
class Problem:
    """A search problem.

    Attributes:
        name: For people.
        constraints: Space, costs and limits.
        evaluator: A paid one.
        objective: The metric to maximise.
        optimum: Its greatest value within the limits, where that is known.
        identity: What outcomes depend on besides space and limits.
        simulated: Whether the evaluator gives a metric `simulated_s`, the seconds that an evaluation is
            assumed to take; otherwise they are measured.
    """

    name: str
    constraints: Constraints
    evaluator: Evaluator
    objective: str = "accuracy"
    optimum: float | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    simulated: bool = False


@dataclass(frozen=True)
class ProblemSource:
    """Where a problem comes from: `module:function` and its arguments, all plain values."""

    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Problem:
        """Make the problem.

        Raises:
            PluginError: It cannot be imported, or is no function that returns a `Problem`.
            RecipeError: The function does not take these arguments.
        """
        path, _, attribute = self.factory.partition(":")
        if not path or not attribute:
            raise PluginError(f"a problem is 'module:function', got {self.factory!r}")
        try:
            factory: Callable[..., Any] = operator.attrgetter(attribute)(importlib.import_module(path))
        except (ImportError, AttributeError) as error:
            raise PluginError(f"problem {self.factory!r} cannot be imported: {error}") from error
        try:
            problem = factory(**self.arguments)
        except TypeError as error:
            raise RecipeError(
                f"problem {self.factory!r} does not take {dict(self.arguments)}: {error}"
            ) from error
        if not isinstance(problem, Problem):
            raise PluginError(
                f"{self.factory!r} must return an autocompress.compare.problem.Problem, got "
                f"{type(problem).__name__}"
            )
        if not problem.evaluator.paid:
            raise PluginError(
                f"the evaluator of problem {problem.name!r} must be paid, so that trials are kept"
            )
        return problem


@dataclass(frozen=True)
class Contestant:
    """A strategy with options, as `evolution` or `evolution:population=20:sample_size=5`.

    Attributes:
        label: The text itself.
        strategy: Name of a strategy, or `module.attribute` after a `@`.
        options: Its options.
    """

    label: str
    strategy: str
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_contestant(text: str) -> Contestant:
    """Read a strategy with options.

    Raises:
        RecipeError: It reads otherwise.
        PluginError: There is no such strategy.
    """
    name, *parts = text.strip().split(":")
    options = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise RecipeError(f"a strategy with options reads name:option=value[:option=value], got {text!r}")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"option {key} of {text!r} is no YAML: {error}") from None
    if name.startswith("@"):
        module, _, attribute = name[1:].rpartition(".")
        name = f"{module}:{attribute}"
    load_strategy(name)
    return Contestant(text.strip(), name, options)
