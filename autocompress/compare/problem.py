"""What strategies are compared on, in a form that worker processes can make for themselves."""

import importlib
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from autocompress.budget import Constraints
from autocompress.differentiable import Differentiable
from autocompress.errors import AutocompressError, PluginError, RecipeError
from autocompress.evaluator import Evaluator
from autocompress.plugins import STRATEGIES, available, load_strategy_for


class TrainTogether(Protocol):
    """How a problem trains a differentiable strategy together with a supernet of the strategy's own."""

    def __call__(self, strategy: Differentiable, *, seed: int, checkpoint: Path | None) -> float:
        """Train the strategy in place; it is asked afterwards.

        Args:
            strategy: Untrained.
            seed: Of what is random in the training.
            checkpoint: A file from which a killed training goes on; the comparison removes it at the end of
                the search. `None` keeps nothing.

        Returns:
            Seconds of the training, measured or simulated as those of evaluations are; with those before a
            kill.

        Raises:
            TrainingError: It cannot be trained.
        """


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
        train_together: Trains differentiable strategies, which are refused without it.
        prepared: What was done before any search and is in nobody's seconds, in words; shown beside
            the seconds of strategies that were trained.
    """

    name: str
    constraints: Constraints
    evaluator: Evaluator
    objective: str = "accuracy"
    optimum: float | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    simulated: bool = False
    train_together: TrainTogether | None = None
    prepared: str = ""


@dataclass(frozen=True)
class ProblemSource:
    """Where a problem comes from: `module:function` and its arguments, all plain values."""

    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Problem:
        """Make the problem.

        Raises:
            PluginError: It cannot be imported, raises, or is no function that returns a `Problem`.
            RecipeError: The function does not take these arguments.
        """
        path, _, attribute = self.factory.partition(":")
        if not path or not attribute:
            raise PluginError(f"a problem is 'module:function', got {self.factory!r}")
        try:
            factory: Callable[..., Any] = operator.attrgetter(attribute)(importlib.import_module(path))
        except (ImportError, AttributeError) as error:
            raise PluginError(f"problem {self.factory!r} cannot be imported: {error}") from error
        except Exception as error:  # what the user's module does when it is imported
            raise PluginError(
                f"problem {self.factory!r} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        try:
            inspect.signature(factory).bind(**self.arguments)
        except (TypeError, ValueError) as error:
            raise RecipeError(
                f"problem {self.factory!r} does not take {dict(self.arguments)}: {error}"
            ) from error
        try:
            problem = factory(**self.arguments)
        except AutocompressError:
            raise
        except Exception as error:  # the user's function may raise anything
            raise PluginError(
                f"problem {self.factory!r} cannot be made: {type(error).__name__}: {error}"
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
    """A strategy with options, as `evolution:population=20:sample_size=5` or `my_module:MySearch:rate=0.1`.

    Attributes:
        label: The text itself.
        strategy: Name of a strategy, or `module:attribute`.
        options: Its options.
    """

    label: str
    strategy: str
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_contestant(text: str) -> Contestant:
    """Read a strategy with options.

    Raises:
        RecipeError: It reads otherwise, or the strategy does not take an option.
        PluginError: There is no such strategy.
    """
    name, *parts = text.strip().split(":")
    # `elitist:population` lacks a value; it is no module of the name of a strategy.
    if parts and "=" not in parts[0] and name not in available(STRATEGIES):
        name = f"{name}:{parts.pop(0)}"
    options = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise RecipeError(
                "a strategy with options reads name:option=value[:option=value], with module:attribute as "
                f"name of one of your own; got {text!r}"
            )
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"option {key} of {text!r} is no YAML: {error}") from None
    load_strategy_for(name, options, key=f"--strategies {name}:")
    return Contestant(text.strip(), name, options)
