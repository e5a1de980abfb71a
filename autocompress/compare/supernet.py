"""The search of a trained supernet as a problem to compare strategies on."""

from pathlib import Path

import torch

from autocompress import stages
from autocompress.budget import Budget
from autocompress.compare.problem import Problem
from autocompress.differentiable import Differentiable
from autocompress.errors import RecipeError
from autocompress.run import Run, Shown, is_differentiable
from autocompress.strategy import name_of
from autocompress.training.bilevel import train_relaxed
from autocompress.training.checkpoint import weights_fingerprint


def supernet_problem(folder: str, budget: str = "") -> Problem:
    """Return the search of a trained run: its supernet, scored on the held-out images.

    A differentiable strategy trains a supernet of its own by the settings of the run, and what it derives is
    a slice of the run's supernet like any other network.

    Args:
        folder: Of the run.
        budget: Such as `latency_ms=60%`; that of its recipe by default.

    Raises:
        RecipeError: There is no run, its supernet is not trained, or it was trained as a mixture.
        InfeasibleBudgetError: Nothing fits.
    """
    run = Run(Path(folder))
    if is_differentiable(run.recipe):
        strategy = run.recipe.search.strategy
        raise RecipeError(
            f"the supernet of {folder} is trained together with {strategy!r}, as one mixture: slices of it "
            "say little about networks; train one for all strategies in another directory, `autocompress "
            f"train {folder}/recipe.yaml --run OTHER --set search.strategy=random --set "
            f"'search.options={{}}' --set 'train.proxy={{}}'`, then `autocompress "
            f"compare --run OTHER --strategies random,{strategy}`"
        )
    if not run.path(stages.TRAINING).exists():
        raise RecipeError(f"the supernet of {folder} is not trained; run `autocompress train --run {folder}`")
    limits = Budget.parse(budget) if budget else Budget.of(run.recipe.search.budget)
    constraints = stages.resolve(run, Shown(), limits)
    stages.set_threads(run)
    supernet = stages.train(run, Shown())

    def train_together(strategy: Differentiable, *, seed: int, checkpoint: Path | None) -> float:
        settings = run.recipe.train.model_copy(update={"seed": seed})
        # Dropout draws from the global state: a cell is the same whatever ran before it.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            position = train_relaxed(
                run.space.supernet(),
                strategy,
                run.data,
                run.task,
                settings,
                seed=seed,
                identity={"strategy": name_of(strategy), "limits": dict(constraints.limits)},
                smaller=run.smaller,
                checkpoint=checkpoint,
            )
        return position.seconds

    return Problem(
        name=f"supernet of {folder}, {limits}",
        constraints=constraints,
        evaluator=stages.evaluator(run, supernet),
        objective=run.task.metric,
        identity={"weights": weights_fingerprint(supernet), "data": run.data.fingerprint},
        train_together=train_together,
        prepared=f"all networks are scored as slices of a supernet that was trained before, {_seconds(run)}",
    )


def _seconds(run: Run) -> str:
    """Say how long the supernet of a run was trained; an earlier release did not write it down."""
    seconds = run.read(stages.TRAINING).get("seconds")
    if seconds is None:
        return "in seconds that are not known and are in nobody's figures"
    return f"in {seconds:.1f} s that are in nobody's figures"
