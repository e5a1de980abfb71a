"""Any sampler of Optuna as a strategy: TPE, Gaussian process, NSGA-II and III, CMA-ES, or one's own.

A sampler sees one parameter a choice, the position of the option: an integer where the options have an order
(to CMA-ES all else is random, and to the others neighbours are alike), a category where they have none. All
choices are always sampled, also those without effect: most samplers need parameters that never change.

Budgets are known exactly, so nothing is paid to learn them. What a sampler proposes over the budget is told
to it as a violated constraint, without being evaluated; after a few of those in a row a network on the way
from the last one to a random feasible one takes its place. Asking takes milliseconds, more with every trial.
"""

import importlib.util
import pkgutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, final

import numpy as np

from autocompress.budget import Constraints
from autocompress.errors import PluginError, RecipeError
from autocompress.proposals import Asked, check_count, fresh_sample, random_generator
from autocompress.space import Codes, SearchSpace
from autocompress.trial import Batch, Outcome
from strategies.breeding import objective_values

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

SAMPLERS = {
    "tpe": "TPESampler",
    "gp": "GPSampler",
    "nsgaii": "NSGAIISampler",
    "nsgaiii": "NSGAIIISampler",
    "cmaes": "CmaEsSampler",
    "random": "RandomSampler",
}
"""The samplers with a name, and their class in `optuna.samplers`."""

ATTEMPTS = 5
# A sampler that is told nothing for so long does no better than a random one, and asking it becomes slow.
MAX_UNTOLD = 64


@final
class OptunaSampler:
    """A study in memory, asked and told; what it proposes is made feasible and new.

    Known networks are told from memory: that choices without effect have none is something to learn too.
    Failed evaluations are trials of state FAIL, which samplers ignore.

    Source: Akiba et al., Optuna, KDD 2019; the samplers' own sources stand in Optuna's documentation.
    """

    def __init__(
        self,
        constraints: Constraints,
        *,
        seed: int,
        objective: str = "accuracy",
        sampler: str = "tpe",
        sampler_options: Mapping[str, Any] | None = None,
        attempts: int = ATTEMPTS,
    ) -> None:
        """Make the search.

        Args:
            constraints: Space, costs and limits.
            seed: Equal seeds and equal calls give equal sequences.
            objective: The metric to maximise.
            sampler: A name of `SAMPLERS`, or `module:attribute`: what returns a sampler when it is called
                with `seed` and the options.
            sampler_options: Keyword arguments of the sampler.
            attempts: How often the sampler is asked for one network that is feasible and new. What else it
                proposes becomes trials, which make it slower; a Gaussian process above all.

        Raises:
            RecipeError: An option is out of its range, or the sampler refuses its options.
            PluginError: There is no such sampler, or a package that it needs is not installed.
            InfeasibleBudgetError: Nothing fits.
        """
        import optuna

        constraints.check_feasible()
        self._constraints, self._objective = constraints, objective
        self._attempts = check_count("attempts", attempts)
        self._rng = random_generator(seed)
        self._distributions = _distributions(constraints.space)
        with _quiet():
            drawn = int(self._rng.integers(2**32))
            made = _make_sampler(sampler, sampler_options or {}, drawn, constraints.space)
            self._study = optuna.create_study(direction="maximize", sampler=made)
        # CMA-ES knows no constraints, and warns of them.
        self._constrained = not isinstance(made, optuna.samplers.CmaEsSampler)
        self._asked = Asked(constraints.space)
        self._exhausted = False
        # By row: trials that wait for their value, and values, `None` for failures.
        self._waiting: dict[bytes, int] = {}
        self._known: dict[bytes, float | None] = {}
        self._values: list[float] = []

    def ask(self, n: int) -> Codes:
        """Propose up to `n` architectures; fewer where 64 wait to be told, or the space is exhausted."""
        rows = [self._constraints.space.smallest()[:0]]
        with _quiet():
            while len(rows) <= n and len(self._waiting) < MAX_UNTOLD and not self._exhausted:
                rows.append(self._propose())
        return np.vstack(rows)

    def tell(self, batch: Batch) -> None:
        """Give the trials of these rows their values; rows not asked for become trials too.

        Raises:
            EvaluationError: Rows were measured, but not on the objective.
        """
        values = objective_values(batch, self._objective)
        with _quiet():
            for index, row in enumerate(batch.codes):
                value = None if np.isnan(values[index]) else float(values[index])
                if value is not None:
                    self._values.append(value)
                self._tell(row[None, :], value, refused=batch.outcomes[index] == Outcome.INFEASIBLE)

    def _tell(self, row: Codes, value: float | None, *, refused: bool) -> None:
        self._known[row.tobytes()] = value
        number = self._waiting.pop(row.tobytes(), None)
        if number is not None:
            self._finish(number, value)
            return
        self._asked.fresh(row)
        excess = self._excess(row)
        if refused and max(excess.values(), default=0.0) > 0:
            value = self._stand_in(excess)
        if value is not None:
            self._add(row, excess, value=value)

    def _propose(self) -> Codes:
        """Return one new feasible row, `(1, choices)`; none where the space is exhausted."""
        space = self._constraints.space
        for attempt in range(1, self._attempts + 1):
            trial = self._study.ask(self._distributions)
            codes = [[trial.params.get(choice.name, 0) for choice in space.choices]]
            row = space.canonical(np.array(codes, dtype=np.int64))
            fits, excess = self._constraints.feasible(row)[0], self._excess(row)
            if fits and len(self._asked.fresh(row)):
                self._constrain(trial, excess)
                self._waiting[row.tobytes()] = trial.number
                return row
            if attempt < self._attempts:
                self._constrain(trial, excess)
                known = self._known.get(row.tobytes())
                self._finish(trial.number, known if fits else self._stand_in(excess))
        refused = self._finish(trial.number, None)
        return self._replacement(row, refused)

    def _replacement(self, row: Codes, refused: "FrozenTrial") -> Codes:
        """Return the first new feasible row on the way from this one to a random feasible one.

        It takes the place of the refused trial in what a sampler notes of its own: its generation.
        """
        constraints, rng = self._constraints, self._rng
        way = np.repeat(row, row.shape[1] + 1, axis=0)
        goal = constraints.sample(1, rng)[0]
        for step, gene in enumerate(rng.permutation(row.shape[1]), start=1):
            way[step:, gene] = goal[gene]
        way = constraints.space.canonical(way)
        new = self._asked.fresh(way[constraints.feasible(way)], at_most=1)
        if not len(new):
            new = fresh_sample(constraints, 1, rng, self._asked)
        if not len(new):
            self._exhausted = True
            return new
        self._waiting[new.tobytes()] = self._add(new, self._excess(new), notes=refused.system_attrs)
        return new

    def _add(
        self,
        row: Codes,
        excess: Mapping[str, float],
        *,
        value: float | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> int:
        """Add a trial that the sampler did not propose, running without a value, and return its number."""
        import optuna

        states = optuna.trial.TrialState
        choices = zip(self._constraints.space.choices, row[0].tolist(), strict=True)
        self._study.add_trial(
            optuna.trial.create_trial(
                state=states.RUNNING if value is None else states.COMPLETE,
                value=value,
                params={choice.name: code for choice, code in choices if choice.name in self._distributions},
                distributions=self._distributions,
                system_attrs=dict(notes or {}),
                constraints=dict(excess) if self._constrained else None,
            )
        )
        return len(self._study.get_trials(deepcopy=False)) - 1

    def _finish(self, number: int, value: float | None) -> "FrozenTrial":
        import optuna

        state = optuna.trial.TrialState.FAIL if value is None else None
        return self._study.tell(number, value, state=state)

    def _constrain(self, trial: "Trial", excess: Mapping[str, float]) -> None:
        if self._constrained:
            for metric, value in excess.items():
                trial.set_constraint(metric, value)

    def _excess(self, row: Codes) -> dict[str, float]:
        """Return by how much a row exceeds each limit, relative to it; at most 0 is feasible."""
        constraints = self._constraints
        return {
            metric: float(constraints.costs[metric].of(row)[0]) / limit - 1.0
            for metric, limit in constraints.limits.items()
        }

    def _stand_in(self, excess: Mapping[str, float]) -> float:
        """Return the value of a network over the budget, which nobody evaluated.

        Samplers with constraints need one, but go by the violation; to a Gaussian process the mean says
        nothing. For the others it is below every measured one, by the greatest excess.

        Source: Deb, An efficient constraint handling method for genetic algorithms, CMAME 186 (2000), eq. 4.
        """
        if not self._values:
            return 0.0 if self._constrained else -max(excess.values())
        if self._constrained:
            return float(np.mean(self._values))
        return min(self._values) - max(excess.values())


def _distributions(space: SearchSpace) -> "dict[str, BaseDistribution]":
    """Return the parameters of a space: codes of every choice that has more than one option."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    return {
        choice.name: IntDistribution(0, len(choice.options) - 1)
        if choice.ordinal
        else CategoricalDistribution(range(len(choice.options)))
        for choice in space.choices
        if len(choice.options) > 1
    }


def _make_sampler(name: str, options: Mapping[str, Any], seed: int, space: SearchSpace) -> "BaseSampler":
    """Return a new sampler; checks what Optuna would only notice in mid-search, or not at all."""
    import optuna

    if ":" in name:
        try:
            factory = pkgutil.resolve_name(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise PluginError(f"sampler {name!r} cannot be imported: {error}") from error
    elif name in SAMPLERS:
        factory = getattr(optuna.samplers, SAMPLERS[name])
    else:
        raise PluginError(
            f"there is no sampler {name!r}; available are {', '.join(SAMPLERS)}, and any 'module:attribute'"
        )
    if name == "cmaes":
        if importlib.util.find_spec("cmaes") is None:
            raise PluginError("sampler 'cmaes' needs the package cmaes: pip install cmaes")
        ordinal = [choice.ordinal for choice in space.choices if len(choice.options) > 1]
        if ordinal and not any(ordinal):
            raise RecipeError(
                f"no choice of space {space.name!r} has ordered options, so that sampler 'cmaes' would draw "
                "everything at random; use 'tpe'"
            )
        # Every parameter is an integer: without the margin the variance of one collapses inside a step.
        # Hamano et al., CMA-ES with Margin, GECCO 2022.
        options = {"with_margin": True, **options}
    try:
        made = factory(seed=seed, **options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"sampler_options: sampler {name!r} refuses {dict(options)}: {error}") from error
    if not isinstance(made, optuna.samplers.BaseSampler):
        raise PluginError(f"{name!r} must return a sampler of Optuna, got {type(made).__name__}")
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from reporting every trial, and from warning that what is used of it is experimental."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


# The ones with a name on the command line; the others are options of `OptunaSampler`.
tpe = partial(OptunaSampler, sampler="tpe")
gp = partial(OptunaSampler, sampler="gp")
cmaes = partial(OptunaSampler, sampler="cmaes")
