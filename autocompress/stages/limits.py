"""The budget of a run, made absolute, and the strategy that searches within it."""

from collections.abc import Container
from dataclasses import replace
from pathlib import Path

from autocompress.budget import Budget, Constraints
from autocompress.errors import BudgetError, InfeasibleBudgetError, RecipeError, TableError
from autocompress.latency.target import Target
from autocompress.machine import cores
from autocompress.recipe import Recipe
from autocompress.run import Run, Shown, digests, refuse_other, strategy_factory
from autocompress.space import SearchSpace
from autocompress.stages.pricing import LATENCY, costs, given_table, profile, target, untimed_costs
from autocompress.strategy import Strategy


def constraints(run: Run, shown: Shown) -> Constraints:
    """Return the budget of the run, made absolute.

    Raises:
        InfeasibleBudgetError: Nothing fits it.
    """
    return resolve(run, shown, Budget.of(run.recipe.search.budget))


def resolve(run: Run, shown: Shown, budget: Budget) -> Constraints:
    """Make a budget absolute; limits on latency are tightened for the recipe's confidence.

    Raises:
        InfeasibleBudgetError: Nothing fits it.
        TableError: The table was checked on too few networks for the confidence, or on none.
    """
    limits = budget.resolve(run.space, costs(run, shown))
    factor = latency_margin(run, shown, limits.limits)
    if factor == 1.0:
        return limits
    tighter = replace(limits, limits={**limits.limits, LATENCY: limits.limits[LATENCY] / factor})
    try:
        tighter.check_feasible()
    except InfeasibleBudgetError as error:
        nearest = {m: value * factor if m == LATENCY else value for m, value in error.nearest.items()}
        raise InfeasibleBudgetError(
            f"{error} (predicted latencies; the limit was divided by {factor:.4g} for search.confidence "
            f"{run.recipe.search.confidence:g})",
            nearest,
        ) from None
    return tighter


def latency_margin(run: Run, shown: Shown, limited: Container[str]) -> float:
    """Return by what predictions of latency are multiplied before they are compared with limits on it."""
    confidence = run.recipe.search.confidence
    if confidence is None or LATENCY not in limited:
        return 1.0
    table_report = profile(run, shown).error_report
    if table_report is None:
        raise TableError("search.confidence needs a table that was checked on whole networks; profile anew")
    return table_report.upper_factor(confidence)


def check_untimed(recipe: Recipe, space: SearchSpace, where: Target) -> None:
    """Refuse limits that nothing fits as far as they need no measuring, before anything is measured.

    Raises:
        InfeasibleBudgetError: Nothing fits.
        BudgetError: A limit is on a cost that the space does not have.
        BudgetError: A limit is on latency, and nothing is known of it.
        TableError: The table from elsewhere cannot be read, or lacks rows.
    """
    if LATENCY in recipe.search.budget and recipe.profile.measured == "nowhere":
        raise BudgetError(
            f"nothing is known of the latency of target {where.name!r}, which is not measured here: give a "
            "table of it (profile.table, or --table), or limit size_bytes, bops, energy_mj, macs or params"
        )
    known = untimed_costs(space, where)
    if recipe.profile.measured == "elsewhere":
        known.append(given_table(recipe, space).cost(space))
    metrics = {cost.metric for cost in known}
    if limits := {m: value for m, value in recipe.search.budget.items() if m in metrics or m != LATENCY}:
        Budget.of(limits).resolve(space, known).check_feasible()


def try_out(recipe: Recipe, space: SearchSpace, where: Target, metric: str) -> Strategy:
    """Make the strategy without limits: wrong options are refused before anything is measured or trained.

    Raises:
        RecipeError: An option is wrong, or a budget is on a cost that the space does not have.
    """
    costs = {cost.metric: cost for cost in untimed_costs(space, where)}
    if limits := {m: value for m, value in recipe.search.budget.items() if m != LATENCY}:
        Budget.of(limits).resolve(space, costs.values())
    free = Constraints(space, costs, {})
    settings = recipe.search
    return strategy_factory(recipe)(free, seed=settings.seed, objective=metric, **settings.options)


def proposer(run: Run, shown: Shown) -> tuple[Constraints, Strategy]:
    """Return the budget, made absolute, and the strategy of a recipe; both can be wrong.

    Raises:
        InfeasibleBudgetError: Nothing fits.
        RecipeError: An option of the strategy is wrong, or there are more workers than cores.
    """
    settings = run.recipe.search
    taken = settings.workers * (settings.worker_threads or 1)
    if settings.address is None and taken > cores():
        raise RecipeError(
            f"search.workers (times search.worker_threads) must be at most the cores of this process, "
            f"{cores()}, got {taken}; search.address names a cluster that has more"
        )
    limits = constraints(run, shown)
    strategy = strategy_factory(run.recipe)
    return limits, strategy(limits, seed=settings.seed, objective=run.task.metric, **settings.options)


def check_change(folder: Path, recipe: Recipe) -> None:
    """Refuse other settings of a search that cannot work, before the search that is there is put aside.

    Raises:
        InfeasibleBudgetError: Nothing fits.
        RecipeError: An option of the strategy is wrong, or the directory holds a run of another problem.
    """
    run = Run(folder)
    refuse_other(folder, run.recipe, recipe)
    former, wanted = digests(run.recipe), digests(recipe)
    if former["search"] == wanted["search"]:
        return
    run.recipe = recipe
    if former["profile"] == wanted["profile"]:
        proposer(run, Shown())
    else:
        try_out(recipe, run.space, target(run), run.task.metric)
