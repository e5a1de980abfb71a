"""Policies tuned by Ray Tune: several at a time, the poor ones stopped early, whatever is killed goes on.

Ray is imported when a tuning starts. A policy that has its report is not tried again, whoever asks for it: so
a tuning that was killed goes on, in Ray's own records or without them. Those records are pickles: of a run
directory that somebody else wrote, leave `tune/` out.
"""

import itertools
import logging
import math
import pickle
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from autocompress.budget import Constraints
from autocompress.distributed.connect import connected
from autocompress.plugins import load_strategy_for
from autocompress.policy.mildest import mildest_policies
from autocompress.policy.passes import settings_of
from autocompress.policy.recipe import PolicyRecipe
from autocompress.policy.trial import (
    Job,
    attempt,
    limits_of,
    original_costs,
    policy_of,
)
from autocompress.progress import Progress, silent
from autocompress.space import Codes, SearchSpace
from autocompress.strategy import Strategy, WarmStart

EXPERIMENT = "tune"
MEASURED = 10
"""Policies that are measured at most, for each that is to be finetuned."""
WORTH, EPOCH = "worth", "epoch"
WORST = -1.0
"""What is worth more was finetuned."""
PROGRESS: ContextVar[Progress] = ContextVar("progress", default=silent)
"""Of the tuning that runs: Ray pickles what it is given, and bars on a screen cannot be pickled."""


def tune(job: Job, space: SearchSpace, progress: Progress = silent) -> None:
    """Try policies until as many were finetuned as the recipe says, from where an earlier call stopped.

    Those over the budget are measured only, and do not count; there are at most `MEASURED` times as many, and
    none is tried twice.

    Reports stand in the folders of the trials. What was stopped early has none.

    Args:
        job: What is compressed, and how long is tried.
        space: Of `search_spaces.policy`.
        progress: Told policies.

    Raises:
        AutocompressError: There are too few cores, Ray cannot be started, or no cluster answers.
        RecipeError: The strategy does not take an option.
    """
    settings = job.recipe.tune
    load_strategy_for(settings.strategy, settings.options, key="tune.options.")
    progress(0, settings.trials, "Ray starts")
    with ExitStack() as opened:
        connected(opened, workers=settings.workers, threads=job.recipe.threads, address=settings.address)
        from ray import tune as ray_tune

        trainable = partial(_trial, recipe=job.recipe.model_dump_json(), folder=str(job.folder))
        resources = ray_tune.with_resources(trainable, {"cpu": job.recipe.threads})
        experiment = job.folder / EXPERIMENT
        shown = PROGRESS.set(progress)
        try:
            (_restored(experiment, resources) or _tuner(job, space, resources, progress)).fit()
        finally:
            PROGRESS.reset(shown)


def _restored(experiment: Path, trainable: Any) -> Any:
    """Return the tuner of Ray's records; `None` where there are none, or were none yet when it was killed."""
    from ray import tune as ray_tune

    if not ray_tune.Tuner.can_restore(str(experiment)):
        return None
    try:
        return ray_tune.Tuner.restore(str(experiment), trainable, resume_errored=True)
    except (EOFError, pickle.UnpicklingError, ValueError, RuntimeError):
        # Policies have reports of their own: what is lost is the order in which they were asked for.
        aside = next(p for n in itertools.count(1) if not (p := experiment.with_name(f"tune.{n}")).exists())
        experiment.rename(aside)
        return None


def _tuner(job: Job, space: SearchSpace, trainable: Any, progress: Progress) -> Any:
    from ray import tune as ray_tune
    from ray.tune.schedulers import ASHAScheduler

    from autocompress.optuna_bridge import StrategySampler, distributions

    logging.getLogger("optuna").setLevel(logging.ERROR)  # its import has set another level
    settings = job.recipe.tune
    strategy = load_strategy_for(settings.strategy, settings.options, key="tune.options.")
    sampler = StrategySampler(
        Constraints(space, {}, {}),
        partial(_warm, strategy, _first(job, space, progress)),
        seed=settings.seed,
        objective=WORTH,
        options=settings.options,
    )
    longest = _longest(job.recipe)
    scheduler = None
    if longest > settings.grace_epochs:
        scheduler = ASHAScheduler(
            time_attr=EPOCH,
            max_t=longest + 1,
            grace_period=settings.grace_epochs,
            reduction_factor=settings.reduction,
        )
    return ray_tune.Tuner(
        trainable,
        tune_config=ray_tune.TuneConfig(
            search_alg=_fitting(
                distributions(space),
                sampler=sampler,
                metric=WORTH,
                mode="max",
                wanted=settings.trials,
                most=min(MEASURED * settings.trials, space.size),
            ),
            scheduler=scheduler,
            metric=WORTH,
            mode="max",
            num_samples=-1,  # as many as the search says
            max_concurrent_trials=settings.workers,
            reuse_actors=True,
        ),
        run_config=ray_tune.RunConfig(
            name=EXPERIMENT,
            storage_path=str(job.folder),
            failure_config=ray_tune.FailureConfig(max_failures=settings.retries),
            callbacks=[_told(settings.trials)],
            verbose=0,
        ),
    )


def _first(job: Job, space: SearchSpace, progress: Progress) -> Codes:
    """Return what is tried first."""
    # The first options may be the network as it was brought: a waste where that does not fit.
    brought = {choice.name: choice.options[0] for choice in space.choices}
    whole = original_costs(job)
    found = [brought] if all(whole[m] <= limit for m, limit in limits_of(job).items()) else []
    if job.recipe.tune.warm_start == "mildest":
        found += mildest_policies(job, progress)
    architectures = {arch.key: arch for arch in map(space.architecture, found)}
    return space.encode(list(architectures.values()))


def _warm(
    strategy: Callable[..., Strategy], first: Codes, constraints: Constraints, **given: Any
) -> Strategy:
    return WarmStart(strategy(constraints, **given), first)


def _fitting(*arguments: Any, wanted: int, most: int, **named: Any) -> Any:
    """Return a search that ends when as many policies were finetuned as are wanted: others cost little."""
    from ray.tune.search import Searcher
    from ray.tune.search.optuna import OptunaSearch

    class Fitting(OptunaSearch):  # type: ignore[misc]
        """Counts what was begun, runs, and fits; part of what Ray stores of a search."""

        begun = running = fit = 0

        def suggest(self, trial_id: str) -> Any:
            """Return another policy; nothing as long as those that run may be enough."""
            if self.fit >= wanted or self.begun >= most:
                return Searcher.FINISHED
            if self.fit + self.running >= wanted:
                return None
            found = super().suggest(trial_id)
            if found not in (None, Searcher.FINISHED):
                self.begun, self.running = self.begun + 1, self.running + 1
            return found

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            """Count a policy that ended, was stopped, or whose process died for good."""
            self.running -= 1
            self.fit += int(fits(result))
            super().on_trial_complete(trial_id, result, error)

    return Fitting(*arguments, **named)


def fits(result: Mapping[str, Any] | None) -> bool:
    """Whether a policy was finetuned, by the last thing that its trial reported."""
    return result is not None and float(result.get(WORTH, WORST)) > WORST


def _longest(recipe: PolicyRecipe) -> int:
    """Return the most epochs that a policy may be finetuned for."""
    found = [0]
    for entry in recipe.passes:
        epochs = {**settings_of("distill"), **entry["distill"]}["epochs"] if "distill" in entry else 0
        found += [int(epoch) for epoch in (epochs if isinstance(epochs, list | tuple) else [epochs])]
    return max(found)


@lru_cache(maxsize=1)
def _job(recipe: str, folder: str) -> Job:
    """Data and model are loaded once in a process, however many policies it tries."""
    return Job(PolicyRecipe.model_validate_json(recipe), Path(folder))


def _trial(config: Mapping[str, Any], *, recipe: str, folder: str) -> None:
    """Try one policy in a process of Ray."""
    from ray import tune as ray_tune

    job = _job(recipe, folder)
    job.load()  # what fails here is no fault of the policy
    policy = policy_of(job.recipe, config)

    def told(epoch: int, score: float) -> None:
        ray_tune.report({WORTH: worth({"fits": True, "score": score}), EPOCH: epoch})

    found = attempt(job, policy, told)
    ray_tune.report({WORTH: worth(found), EPOCH: _longest(job.recipe) + 1})


def worth(report: Mapping[str, Any]) -> float:
    """Return what a strategy is told of a policy, the more the better.

    Of what fits it is the score; scores below 0, such as negative errors, are brought above -1 in their
    order. What does not fit is worth -1 and less, by how much it exceeds the budget; least, what cannot be.
    """
    if report.get("fits"):
        score = float(report["score"])
        return score if score >= 0 else max(score / (1 - score), WORST + 1e-9)
    return WORST - min(float(report.get("excess", math.inf)), 10.0)


def _told(total: int) -> Any:
    from ray import tune as ray_tune

    class Told(ray_tune.Callback):  # type: ignore[misc]
        """Tells the progress of this process how many policies were finetuned."""

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            """Tell progress."""
            ended = (one for one in trials if one.is_finished() or one.trial_id == trial.trial_id)
            done = sum(fits(one.last_result) for one in ended)
            PROGRESS.get()(min(done, total), total, "")

        def __reduce__(self) -> Any:
            return _told, (total,)

    return Told()
