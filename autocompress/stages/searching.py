"""The search of the supernet under the budget."""

from contextlib import AbstractContextManager, nullcontext

import numpy as np

from autocompress.baselines import uniform_candidates
from autocompress.budget import Constraints
from autocompress.describe import describe_costs, describe_error, describe_predictor
from autocompress.elastic.supernet import Supernet
from autocompress.engine import search as run_search
from autocompress.errors import RecipeError
from autocompress.evaluation.distilled import DistilledEvaluator
from autocompress.evaluation.supernet import SupernetEvaluator
from autocompress.evaluation.zero_cost import best_of, zero_cost_proxy
from autocompress.evaluator import Evaluator
from autocompress.latency.check import measure_beside, measured_before
from autocompress.latency.runtime import pinned, prepare
from autocompress.latency.table import LatencyTable
from autocompress.machine import cores
from autocompress.plugins import load_strategy
from autocompress.recipe import Recipe, SearchSettings
from autocompress.result import SearchResult, load_result
from autocompress.run import Run, Shown, is_differentiable, trains_anew
from autocompress.space import Codes
from autocompress.stages.checking import check
from autocompress.stages.limits import proposer
from autocompress.stages.networks import brought_untrained, calibration, teacher_of
from autocompress.stages.pricing import LATENCY, profile
from autocompress.stages.training import chosen_formats, train, train_together, with_formats
from autocompress.strategy import Strategy, WarmStart, compares
from autocompress.training.checkpoint import weights_fingerprint
from autocompress.trial import Trial

RESULT = "result.json"
PROXY_NETWORKS, PROXY_DRAWS, PROXY_IMAGES = 10, 200, 32
"""How many networks a zero-cost proxy adds to a warm start, of how many it scores, on how many images."""
WINNER_RUNS = 60


def evaluator(run: Run, supernet: Supernet) -> SupernetEvaluator | DistilledEvaluator:
    """Return what scores networks on the held-out validation images: as slices, or distilled."""
    recipe = run.recipe
    if recipe.search.reward == "slice":
        compared = compares(load_strategy(recipe.search.strategy))
        return SupernetEvaluator(supernet, run.data, run.task, calibration(run), compared=compared)
    # Without losses of distillation training is on the labels alone.
    teacher, size = teacher_of(run, supernet) if recipe.finetune.distill else (None, None)
    settings = recipe.finetune.model_copy(update={"epochs": recipe.search.reward_epochs})
    return DistilledEvaluator(
        supernet,
        run.data,
        run.task,
        calibration(run),
        with_formats(settings, chosen_formats(run)),
        teacher=teacher,
        teacher_resolution=size,
        brought=brought_untrained(run),
    )


def spread(evaluator: Evaluator, settings: SearchSettings) -> AbstractContextManager[Evaluator]:
    """Return the evaluator, to be entered: as it is, or in several processes, which share the cores."""
    if settings.workers == 1 and settings.address is None:
        return nullcontext(evaluator)
    from autocompress.distributed.ray_evaluator import RayEvaluator

    threads = settings.worker_threads or (1 if settings.address else cores() // settings.workers)
    return RayEvaluator(evaluator, workers=settings.workers, threads=threads, address=settings.address)


def search(run: Run, shown: Shown) -> SearchResult:
    """Search the supernet under the budget, from the stored trials if there are some."""
    # A wrong task, an impossible budget or a wrong option is refused before hours of training.
    check(run)
    if run.recipe.tolerance is not None:
        raise RecipeError(
            f"{run.folder} seeks the least cost within a tolerance: its searches, networks and reports are "
            f"in {run.path('probes')}; `autocompress resume {run.folder}` goes on with it"
        )
    settings = run.recipe.search
    together = is_differentiable(run.recipe)
    strategy: Strategy
    if together:
        supernet, limits, strategy = train_together(run, shown)
    else:
        limits, strategy = proposer(run, shown)
        supernet = train(run, shown)
    path = run.path(RESULT)
    if path.exists():
        return load_result(path, run.space)
    identity = {"weights": weights_fingerprint(supernet), "seed": settings.seed, "data": run.data.fingerprint}
    alone = evaluator(run, supernet)
    if isinstance(alone, DistilledEvaluator):
        identity["reward"] = alone.identity
    with (
        spread(alone, settings) as judge,
        shown.stage(f"search by {settings.strategy}") as progress,
    ):
        result = run_search(
            # Mixtures train the network that is derived, not the uniform-scaled ones.
            strategy if together else WarmStart(strategy, warm_start(run, limits)),
            limits,
            judge,
            evaluations=settings.evaluations,
            asynchronous=settings.asking == "asynchronous",
            objective=run.task.metric,
            storage=run.path("trials.log"),
            identity=identity,
            progress=progress,
        )
    best = result.best()
    score = f"validation {run.task.metric} {best.metrics[run.task.metric]:.4f}{_said_of_reward(run.recipe)}"
    found = f"best {score} of {len(result.trials)} evaluated networks"
    if together:
        next_ = "of the mixture; it is trained anew" if trains_anew(run.recipe) else "that was trained along"
        found = f"derived {best.architecture.key} ({score} as a slice {next_})"
    shown.say(
        f"search: {found}; {describe_costs(best.costs)}"
        f"{describe_error(profile(run, shown))}{describe_predictor(result.notes)}"
    )
    shown.say(_measure_winner(run, profile(run, shown), best))
    result.save(path)
    return result


def warm_start(run: Run, limits: Constraints) -> Codes:
    """Return what a search evaluates first, `(n, choices)`.

    The baseline that a search has to beat is among it, unless the recipe says otherwise: such a search never
    returns less on validation.
    """
    kind = run.recipe.search.warm_start
    if kind == "none":
        return run.space.smallest()[:0]
    uniform = uniform_candidates(limits)
    if kind == "uniform":
        return uniform
    images = calibration(run)[0][:PROXY_IMAGES]
    proxy = zero_cost_proxy(kind, run.space, images=images, seed=run.recipe.search.seed)
    liked = best_of(
        proxy, limits, PROXY_NETWORKS, draws=PROXY_DRAWS, seed=run.recipe.search.seed, metric=proxy.metric
    )
    known = {row.tobytes() for row in uniform}
    return np.vstack([uniform, *(row[None] for row in liked if row.tobytes() not in known)])


def _said_of_reward(recipe: Recipe) -> str:
    """Say after what a score was taken, if not of the slice as it is."""
    if recipe.search.reward == "slice":
        return ""
    epochs = recipe.search.reward_epochs
    training = "distillation" if recipe.finetune.distill else "finetuning"
    return f" (after {epochs} epoch{'s' if epochs > 1 else ''} of {training})"


def _measure_winner(run: Run, table: LatencyTable, best: Trial) -> str:
    """Measure the best network of a search, and say how far its prediction is off."""
    if run.recipe.profile.measured == "nowhere":
        return "its latency is not known: the target is not measured here, and no table of it was given"
    predicted = best.costs[LATENCY]
    if run.recipe.profile.measured == "elsewhere":
        return f"its latency of {predicted:.3f} ms is predicted for another device: nothing was measured"
    net = run.space.operations(run.space.encode([best.architecture]))
    checked = measured_before(table, run.space, run.recipe.profile.seed)
    with pinned(table.target):
        prepared = {"best": prepare(net, table.target)}
        measured, factor = measure_beside(checked, prepared, table.target, count=WINNER_RUNS)
    found = measured["best"]
    said = f"it was measured: {found.median_ms:.3f} ms ({found.low_ms:.3f}-{found.high_ms:.3f}); "
    if factor is None:
        return f"{said}the prediction is {predicted / found.median_ms - 1:+.1%} off"
    return (
        f"{said}networks of the table's error report take {factor:.2f} times what they took in the profile, "
        f"and at that speed the prediction is {predicted * factor / found.median_ms - 1:+.1%} off"
    )
