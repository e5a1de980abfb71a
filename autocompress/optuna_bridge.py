"""Any strategy as a sampler of Optuna: for `study.optimize`, ask and tell, and Ray Tune's `OptunaSearch`.

```python
sampler = StrategySampler(constraints, AgingEvolution, seed=0)
study = optuna.create_study(sampler=sampler, direction="maximize")
study.optimize(lambda trial: accuracy(suggest(trial, constraints.space)), n_trials=100)
```

Parameters are the choices of the space by name, categories of their options; those without effect may be
left out, as `suggest` does. Further parameters of the user's own are drawn at random. The other direction,
samplers of Optuna as strategies, is a plug-in: `strategies/optuna_sampler.py`.
"""

import contextlib
import inspect
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast, final

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from autocompress.budget import Constraints
from autocompress.errors import RecipeError, SpaceError, StrategyError
from autocompress.proposals import Asked, fresh_sample, random_generator
from autocompress.space import Architecture, Codes, Option, SearchSpace
from autocompress.strategy import Strategy
from autocompress.trial import Batch, Outcome

# A strategy that asks only what is known already, so often beyond a full replay, has nothing new to ask.
MAX_IDLE_ASKS = 50


def distributions(space: SearchSpace) -> dict[str, CategoricalDistribution]:
    """Return the parameters of a space, one a choice: what `OptunaSearch` takes as `space`."""
    return {choice.name: CategoricalDistribution(choice.options) for choice in space.choices}


def suggest(trial: BaseTrial, space: SearchSpace) -> Architecture:
    """Return the network of a trial, under any sampler; only choices with an effect become parameters.

    Samplers that know no budget suggest networks over it too.
    """
    settings: dict[str, Option] = {}
    for choice in space.choices:
        if all(settings.get(parent) in allowed for parent, allowed in choice.active_when):
            settings[choice.name] = cast(Option, trial.suggest_categorical(choice.name, choice.options))
    return space.architecture(settings)


@final
class StrategySampler(BaseSampler):
    """A strategy that is asked for one network a trial, and told when the trial ends.

    One trial at a time, networks are the very sequence of `autocompress.engine.search`. In a study that has
    trials already the strategy is replayed: what it asks and is known is answered from the storage, so that
    the study goes on as if it had never stopped. If it would not have asked all that is there (trials of
    other origin, or several at a time), it is told them all before its first ask instead.

    With several trials at a time a strategy may have to be told before it can ask (evolution in
    generations). A random feasible network is evaluated then; the strategy learns of it if it asks for it.

    A failed or pruned trial is told as failed: the last value of a pruned one cannot be compared. When the
    strategy is finished, `study.optimize` ends; in ask and tell random networks follow, with a warning.
    """

    def __init__(
        self,
        constraints: Constraints,
        strategy: Callable[..., Strategy],
        *,
        seed: int,
        objective: str = "accuracy",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the sampler of one study.

        Args:
            constraints: Space, costs and limits.
            strategy: Called as `strategy(constraints, seed=..., objective=..., **options)`.
            seed: Of the strategy, and of what is drawn at random. Processes that work on one study at the
                same time need different ones.
            objective: What the strategy calls the value of a trial. Strategies maximise: in a study that
                minimises they are told the negative value.
            options: Of the strategy.

        Raises:
            RecipeError: The seed is not an integer of at least 0, or the strategy does not take an option,
                or it is out of its range.
            InfeasibleBudgetError: Nothing fits.
        """
        self._constraints, self._objective = constraints, objective
        self._rng = random_generator(seed)
        _check_options(strategy, options or {})
        self._others = RandomSampler(seed=int(self._rng.integers(2**32)))
        self._make = partial(strategy, constraints, seed=seed, objective=objective, **(options or {}))
        self._strategy: Strategy = self._make()
        self._lock = threading.RLock()
        self._study: str | None = None
        # Everything by row: value of what was evaluated (`None`: failed), what the strategy waits for, what
        # it waits for and no trial has, and what running trials have, by number.
        self._known: dict[bytes, float | None] = {}
        self._owed: set[bytes] = set()
        self._waiting: list[Codes] = []
        self._running: dict[int, Codes] = {}
        self._seen = Asked(constraints.space)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock, which cannot be pickled."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore everything, with a lock of its own."""
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def reseed_rng(self) -> None:
        """Do nothing: the threads of a study share this object, which gives each of them another network."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the parameters of the space."""
        return dict(distributions(self._constraints.space))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the option of every choice of the next network; the first one for those without effect.

        Raises:
            StrategyError: The study has several objectives, or the sampler serves another one.
        """
        with self._lock:
            self._join(study)
            row = self._next()
            if row is None:
                row = self._filler()
            self._seen.fresh(row)
            self._running[trial.number] = row
        choices = zip(self._constraints.space.choices, row[0].tolist(), strict=True)
        return {choice.name: choice.options[code] for choice, code in choices}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw a parameter that is not of the space."""
        with self._lock:
            return self._others.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Tell the strategy how the network of the trial did, if it asked for it.

        Raises:
            StrategyError: The study has several objectives, or the sampler serves another one.
        """
        with self._lock:
            self._join(study)
            given = self._running.pop(trial.number, None)
            # A trial that failed before it had suggested everything had what it was given.
            row = _row_of(trial, self._constraints.space, otherwise=given)
            if row is None:
                return
            if given is not None and (row != given).any() and given.tobytes() in self._owed:
                # The user had fixed some of its parameters.
                self._waiting.append(given)
            self._known[row.tobytes()] = _value_of(study, state, values)
            self._seen.fresh(row)
            if row.tobytes() in self._owed:
                self._tell(row)
            if self._finished():
                # In ask and tell there is no loop to stop, and Optuna says so.
                with contextlib.suppress(RuntimeError):
                    study.stop()

    def _join(self, study: Study) -> None:
        """Learn the trials that a study has already; once."""
        if self._study == study.study_name:
            return
        if self._study is not None:
            raise StrategyError(
                f"a StrategySampler serves one study, this one {self._study!r}; make another one for "
                f"{study.study_name!r}"
            )
        if len(study.directions) != 1:
            raise StrategyError(
                f"a StrategySampler takes studies of one objective, got {len(study.directions)}; limit the "
                "others by a budget"
            )
        self._study = study.study_name
        rows: dict[bytes, Codes] = {}
        # Not `get_trials`: to a pruner of several brackets the study shows one of them.
        for trial in study._storage.get_all_trials(study._study_id, deepcopy=False):
            row = _row_of(trial, self._constraints.space) if trial.state.is_finished() else None
            if row is not None:
                rows[row.tobytes()] = row
                self._known[row.tobytes()] = _value_of(study, trial.state, trial.values)
                self._seen.fresh(row)
        replayed: set[bytes] = set()
        row = self._next(replayed)
        if len(replayed) < len(rows):
            self._strategy = self._make()
            self._owed.clear()
            for row in rows.values():
                self._tell(row)
        elif row is not None:
            self._waiting.append(row)

    def _next(self, replayed: set[bytes] | None = None) -> Codes | None:
        """Return a row that the strategy waits for and no trial has; none where it asks for none.

        Args:
            replayed: Collects the rows that were answered from memory.
        """
        while self._waiting:
            row = self._waiting.pop(0)
            if row.tobytes() in self._owed:
                return row
        running = {row.tobytes() for row in self._running.values()}
        for _ in range(len(self._known) + MAX_IDLE_ASKS):
            row = self._strategy.ask(1)
            if not len(row):
                return None
            key = row.tobytes()
            self._owed.add(key)
            if key in self._known or not self._constraints.feasible(row)[0]:
                self._tell(row)
                if replayed is not None:
                    replayed.add(key)
            elif key not in running:
                return row
        return None

    def _tell(self, row: Codes) -> None:
        """Tell the strategy what is known of a row."""
        self._owed.discard(row.tobytes())
        value = self._known.get(row.tobytes())
        outcome = Outcome.FAILED if value is None else Outcome.MEASURED
        if not self._constraints.feasible(row)[0]:
            value, outcome = None, Outcome.INFEASIBLE
        metrics = {self._objective: np.array([np.nan if value is None else value])}
        outcomes = np.array([outcome], dtype=np.int8)
        self._strategy.tell(Batch(row, self._constraints.price(row), metrics, outcomes))

    def _filler(self) -> Codes:
        """Return a random feasible row, a new one if there is any."""
        if not self._owed:
            warnings.warn(
                "the strategy has nothing more to ask: random networks follow, some of them again; end the "
                "study here",
                stacklevel=2,
            )
        row = fresh_sample(self._constraints, 1, self._rng, self._seen)
        return row if len(row) else self._constraints.sample(1, self._rng)

    def _finished(self) -> bool:
        """Whether no trial runs and there is nothing to ask; keeps what is asked to find out."""
        if self._running:
            return False
        row = self._next()
        if row is not None:
            self._waiting.append(row)
        return row is None


def _check_options(strategy: Callable[..., Strategy], options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(strategy).parameters
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    taken = [name for name in parameters if name not in ("constraints", "seed", "objective")]
    unknown = [name for name in options if name not in taken]
    if unknown:
        name = getattr(strategy, "__name__", type(strategy).__name__)
        raise RecipeError(
            f"options of strategy {name} are {', '.join(taken) or 'none'}, got {', '.join(unknown)}"
        )


def _row_of(trial: FrozenTrial, space: SearchSpace, *, otherwise: Codes | None = None) -> Codes | None:
    """Return the network of a trial's parameters, `(1, choices)`; another row if they make none."""
    params = trial.params
    settings = {choice.name: params[choice.name] for choice in space.choices if choice.name in params}
    try:
        return space.encode([space.architecture(settings)])
    except SpaceError:
        return otherwise


def _value_of(study: Study, state: TrialState, values: Sequence[float] | None) -> float | None:
    """Return the value of a trial, larger is better; none if it failed, was pruned, or is not finite."""
    if state != TrialState.COMPLETE or not values or not math.isfinite(values[0]):
        return None
    return values[0] if study.direction == StudyDirection.MAXIMIZE else -values[0]
