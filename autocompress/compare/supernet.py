"""The search of a trained supernet as a problem to compare strategies on."""

from pathlib import Path

from autocompress import stages
from autocompress.budget import Budget
from autocompress.compare.problem import Problem
from autocompress.errors import RecipeError
from autocompress.run import Run, Shown
from autocompress.training.checkpoint import weights_fingerprint


def supernet_problem(folder: str, budget: str = "") -> Problem:
    """Return the search of a trained run: its supernet, scored on the held-out images.

    Args:
        folder: Of the run.
        budget: Such as `latency_ms=60%`; that of its recipe by default.

    Raises:
        RecipeError: There is no run, or its supernet is not trained.
        InfeasibleBudgetError: Nothing fits.
    """
    run = Run(Path(folder))
    if not run.path(stages.TRAINING).exists():
        raise RecipeError(f"the supernet of {folder} is not trained; run `autocompress train --run {folder}`")
    limits = Budget.parse(budget) if budget else Budget.of(run.recipe.search.budget)
    constraints = stages.resolve(run, Shown(), limits)
    stages.set_threads(run)
    supernet = stages.train(run, Shown())
    return Problem(
        name=f"supernet of {folder}, {limits}",
        constraints=constraints,
        evaluator=stages.evaluator(run, supernet),
        objective=run.task.metric,
        identity={"weights": weights_fingerprint(supernet), "data": run.data.fingerprint},
    )
