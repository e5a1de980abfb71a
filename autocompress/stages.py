"""The stages of a run, each a function that does nothing where its result is there already.

profile -> train -> search -> finetune -> export -> report; each calls those before it.
"""

import json
from collections.abc import Container, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autocompress.atomic import read_json, replacing, write_json
from autocompress.baselines import uniform_candidates
from autocompress.budget import Budget, Constraints
from autocompress.cost import OPERATION_METRICS, Cost, Price, compile_cost, operation_cost
from autocompress.describe import (
    describe_costs,
    describe_error,
    describe_predictor,
    describe_relaxation,
    describe_table,
)
from autocompress.differentiable import Differentiable
from autocompress.elastic.extract import extract
from autocompress.elastic.mixture import Mixture
from autocompress.elastic.recalibrate import recalibrate
from autocompress.elastic.supernet import Supernet, resize
from autocompress.engine import search as run_search
from autocompress.errors import (
    BudgetError,
    CheckpointError,
    CostError,
    ExportError,
    InfeasibleBudgetError,
    RecipeError,
    StorageError,
    TableError,
    ToleranceError,
)
from autocompress.evaluation.supernet import SupernetEvaluator
from autocompress.evaluation.zero_cost import best_of, zero_cost_proxy
from autocompress.evaluator import Evaluator
from autocompress.latency import energy
from autocompress.latency.check import measure_beside, measured_before
from autocompress.latency.correction import Correction
from autocompress.latency.energy import EnergyModel
from autocompress.latency.profile import profile as profile_space
from autocompress.latency.runtime import pinned, prepare
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import Target, load_target
from autocompress.machine import cores
from autocompress.network import (
    DropPath,
    build_network,
    model_of,
    unshared,
    user_model,
    whole_network,
)
from autocompress.peak_memory import ELEMENT_BYTES, peak_activation_cost
from autocompress.plugins import load_strategy
from autocompress.prune.beforehand import score_of
from autocompress.quantize.estimate import bitfusion_table
from autocompress.quantize.layer import has_quantizers
from autocompress.quantize.network import QuantizedNetwork
from autocompress.quantize.ptq import improve
from autocompress.quantize.reconstruct import Settings as RoundingSettings
from autocompress.recipe import FinetuneSettings, Recipe
from autocompress.result import SearchResult, load_result
from autocompress.run import Run, Shown, is_differentiable, strategy_factory, trains_anew
from autocompress.space import Architecture, Codes, SearchSpace
from autocompress.strategy import Strategy, WarmStart, compares
from autocompress.training.bilevel import train_relaxed
from autocompress.training.check import check_regularisers, check_task
from autocompress.training.checkpoint import load_checkpoint, weights_fingerprint
from autocompress.training.data import Images, batches
from autocompress.training.evaluate import Scored, calibration_batches, evaluate
from autocompress.training.speed import choose_threads, largest_step
from autocompress.training.supernet import supernet_identity, train_supernet
from autocompress.trial import Trial

LATENCY = "latency_ms"
PROXY_NETWORKS, PROXY_DRAWS, PROXY_IMAGES = 10, 200, 32
"""How many networks a zero-cost proxy adds to a warm start, of how many it scores, on how many images."""
WINNER_RUNS = 60
QUANTIZED_SAMPLE = 500
"""Validation images on which decisions of a network of few bits and its exported form are compared."""
THREADS, SELECTED = "threads.json", "selected.json"
TABLE, CHECKPOINT, TRAINING, RESULT = "latency_table.json", "supernet.pt", "training.json", "result.json"
PUBLISHED = (".csv", ".csv.gz")
IMPROVED = "rounded.safetensors"
FINETUNED, FINETUNE_CHECKPOINT, FINETUNE_REPORT = "finetuned.safetensors", "finetune.pt", "finetune.json"


def set_threads(run: Run) -> None:
    """Use the recipe's threads for training and search; by default what steps of the largest network say.

    The number is kept: sums of floats depend on it, and a resumed run ends as one that was not stopped.
    """
    threads = run.recipe.threads
    if threads is None:
        if not run.path(THREADS).exists():
            step = largest_step(run.space, run.data, run.recipe.train)
            write_json(run.path(THREADS), {"threads": choose_threads(step)})
        threads = int(run.read(THREADS)["threads"])
    torch.set_num_threads(threads)


def target(run: Run) -> Target:
    """Return the target of the run: the recipe's, or that of a table from elsewhere."""
    if run.recipe.profile.measured == "elsewhere":
        return _table_from_elsewhere(run).target
    settings = run.recipe.target
    return load_target(settings.name, threads=settings.threads, batch=settings.batch)


def profile(run: Run, shown: Shown) -> LatencyTable:
    """Measure the space on the target, or read what was measured; a table without rows where nothing is."""
    path = run.path(TABLE)
    if run.recipe.profile.measured == "nowhere":
        return LatencyTable(target(run), {}, Correction(), None, {"device": {}})
    if run.recipe.profile.measured == "elsewhere":
        table = _table_from_elsewhere(run)
        if not path.exists():
            # Before it is taken: a block without a row is an error here, not after training.
            table.cost(run.space)
            table.save(path)
            shown.say(f"{describe_table(table)}; of another device: nothing is measured here")
            if estimated := table.provenance.get("estimated"):
                shown.say(
                    f"{len(estimated)} of its {len(table.rows)} rows are estimates by a model fitted to the "
                    "published ones; its mean error for shapes that were held out: "
                    + ", ".join(f"{k} {v} %" for k, v in table.provenance["error of estimates, %"].items())
                )
        return table
    if path.exists():
        table = LatencyTable.load(path)
        table.check_target(target(run))
        return table
    settings = run.recipe.profile
    given = None if settings.table is None else LatencyTable.load(settings.table)
    with shown.stage(f"profile {target(run).name}") as progress:
        table = profile_space(
            run.space,
            target(run),
            folder=run.folder,
            networks=settings.networks,
            seed=settings.seed,
            granularity=settings.granularity,
            tolerance=settings.tolerance,
            min_rounds=settings.min_rounds,
            max_rounds=settings.max_rounds,
            widths=settings.widths,
            knots=settings.knots,
            table=given,
            progress=lambda done, total: progress(done, total),
        )
    shown.say(describe_table(table))
    return table


def _table_from_elsewhere(run: Run) -> LatencyTable:
    """Read the table of another device: the run's copy, or the file it is taken from."""
    path, given = run.path(TABLE), run.recipe.profile.table
    if given is None:
        raise TableError("profile.measured: elsewhere needs profile.table")
    if not path.exists() and given.name.endswith(PUBLISHED):
        # The tables of an accelerator are of shapes and bits: which rows a space needs is seen here.
        settings = run.recipe.target
        where = load_target(settings.name, threads=settings.threads, batch=settings.batch)
        return bitfusion_table(given, run.space, where)
    return LatencyTable.load(path if path.exists() else given)


def costs(run: Run, shown: Shown) -> list[Cost]:
    """Return every cost of the run: MACs, parameters, bytes, bit operations, activations, energy, latency."""
    table = profile(run, shown)
    timed = [] if run.recipe.profile.measured == "nowhere" else [table.cost(run.space)]
    return [*untimed_costs(run.space, target(run)), *timed]


def untimed_costs(space: SearchSpace, target: Target) -> list[Cost]:
    """Return the costs that need no latency table.

    Activations and energy are those of the target's batch and number format; energy is an analytic estimate
    of 45 nm hardware with 1 MiB of SRAM (`autocompress.latency.energy`), good for comparing networks. Where a
    cell has too many settings to look at all (DARTS), there is no peak of activations: it is no sum of parts.
    """
    element_bytes = ELEMENT_BYTES[target.number_format]
    peak: list[Cost] = []
    with suppress(CostError):
        peak.append(peak_activation_cost(space, element_bytes=element_bytes, batch=target.batch))
    return [
        *(operation_cost(space, metric) for metric in OPERATION_METRICS),
        *peak,
        compile_cost(space, energy_price(target), energy.METRIC),
    ]


def energy_price(target: Target) -> Price:
    """Return what prices the energy of operations, at the target's batch and number format."""
    bits = 8 * ELEMENT_BYTES[target.number_format]
    return partial(EnergyModel().price, batch=target.batch, weight_bits=bits, activation_bits=bits)


def price_of(run: Run, shown: Shown, metric: str) -> Price:
    """Return what prices some operations in a metric, as far as operations have it each for itself.

    Raises:
        CostError: They do not.
    """
    if metric == LATENCY:
        return profile(run, shown).price
    if metric == energy.METRIC:
        return energy_price(target(run))
    if metric not in OPERATION_METRICS:
        raise CostError(f"operations have no {metric} of their own")
    return lambda ops: sum(getattr(op, metric) for op in ops)


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


def check(run: Run) -> None:
    """Refuse a task and regularisers that do not fit data and space, before anything takes long.

    Raises:
        DataError: The task does not.
        RecipeError: A regulariser of finetuning does not.
    """
    check_task(run.data, run.task, run.space)
    if run.supernet_space is not run.space:
        check_task(run.data, run.task, run.supernet_space)
    check_regularisers(run.data, run.recipe.finetune, run.space)


def check_untimed(recipe: Recipe, space: SearchSpace, where: Target) -> None:
    """Refuse limits that nothing fits as far as they need no measuring, before anything is measured.

    Raises:
        InfeasibleBudgetError: Nothing fits.
        BudgetError: A limit is on a cost that the space does not have.
        BudgetError: A limit is on latency, and nothing is known of it.
    """
    if LATENCY in recipe.search.budget and recipe.profile.measured == "nowhere":
        raise BudgetError(
            f"nothing is known of the latency of target {where.name!r}, which is not measured here: give a "
            "table of it (profile.table, or --table), or limit size_bytes, bops, energy_mj, macs or params"
        )
    if limits := {m: value for m, value in recipe.search.budget.items() if m != LATENCY}:
        Budget.of(limits).resolve(space, untimed_costs(space, where)).check_feasible()


def check_trained(recipe: Recipe, space: SearchSpace) -> None:
    """Refuse to compress random weights.

    Raises:
        RecipeError: The recipe trains nothing, and the space brings no weights.
    """
    if not recipe.train.epochs and not space.settings.get("weights"):
        raise RecipeError(
            f"train.epochs 0 leaves the supernet of {space.name!r} as it was made, with random weights: "
            "train at least 1 epoch; only a model that brings weights needs none (--weights, or "
            "space.arguments.weights)"
        )


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


def train(run: Run, shown: Shown) -> Supernet:
    """Train the supernet, from its checkpoint if there is one, or read the trained one."""
    if is_differentiable(run.recipe):
        return train_together(run, shown)[0]
    set_threads(run)
    supernet = run.supernet_space.supernet()
    path, report = run.path(CHECKPOINT), run.path(TRAINING)
    if report.exists():
        content = load_checkpoint(path, supernet_identity(supernet, run.data, run.recipe.train))
        supernet.load_state_dict(content["model"])
        if _choices(run).get("memory_format") == "channels_last":
            supernet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return supernet.eval()
    check(run)
    check_trained(run.recipe, run.space)
    with shown.stage("train the supernet") as progress:
        position = train_supernet(
            supernet, run.data, run.task, run.recipe.train, checkpoint=path, progress=progress
        )
    write_json(report, vars(position))
    last = {name: score for _, name, score in position.scores}
    scores = ", ".join(f"{name} {score:.4f}" for name, score in last.items())
    if scores:
        shown.say(f"supernet: validation {run.task.metric} {scores} ({position.choices['precision']})")
    return supernet.eval()


def train_together(run: Run, shown: Shown) -> tuple[Supernet, Constraints, Differentiable]:
    """Train the supernet and a differentiable strategy, from their checkpoint if there is one.

    Returns:
        The supernet, the budget, and the strategy, ready to be asked.
    """
    check(run)
    if not run.path(TRAINING).exists():
        try_out(run.recipe, run.space, target(run), run.task.metric)
    limits, proposing = proposer(run, shown)
    strategy = cast(Differentiable, proposing)
    set_threads(run)
    supernet, settings, report = run.supernet_space.supernet(), run.recipe.search, run.path(TRAINING)
    with shown.stage(f"train the supernet and {settings.strategy}") as progress:
        position = train_relaxed(
            supernet,
            strategy,
            run.data,
            run.task,
            run.recipe.train,
            seed=settings.seed,
            identity={
                "strategy": settings.strategy,
                "options": dict(settings.options),
                "limits": dict(limits.limits),
                "seed": settings.seed,
            },
            smaller=run.smaller,
            checkpoint=run.path(CHECKPOINT),
            progress=progress,
            say=shown.say,
        )
    if not report.exists():
        write_json(report, vars(position))
        shown.say(
            f"{settings.strategy}: loss {position.losses[-1]:.4f}; {describe_relaxation(strategy.notes)}"
        )
    return supernet.eval(), limits, strategy


def _choices(run: Run) -> Mapping[str, Any]:
    """Return the formats the supernet was trained in."""
    content = run.read(TRAINING)
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, dict):
        path = run.path(TRAINING)
        raise StorageError(f"{path} is damaged; remove it, and training makes it again from its checkpoint")
    return choices


def evaluator(run: Run, supernet: Supernet) -> SupernetEvaluator:
    """Return the evaluator of slices on the held-out validation images."""
    compared = compares(load_strategy(run.recipe.search.strategy))
    return SupernetEvaluator(supernet, run.data, run.task, calibration(run), compared=compared)


def spread(evaluator: Evaluator, workers: int) -> AbstractContextManager[Evaluator]:
    """Return the evaluator, to be entered; more than one worker are processes, which share the cores."""
    if workers == 1:
        return nullcontext(evaluator)
    from autocompress.distributed.ray_evaluator import RayEvaluator

    return RayEvaluator(evaluator, workers=workers, threads=cores() // workers)


def calibration(run: Run) -> list[Tensor]:
    """Return the training images on which batch-norm statistics are computed."""
    return calibration_batches(run.data, run.recipe.search.calibration_images, seed=run.recipe.search.seed)


def proposer(run: Run, shown: Shown) -> tuple[Constraints, Strategy]:
    """Return the budget, made absolute, and the strategy of a recipe; both can be wrong.

    Raises:
        InfeasibleBudgetError: Nothing fits.
        RecipeError: An option of the strategy is wrong, or there are more workers than cores.
    """
    settings = run.recipe.search
    if settings.workers > cores():
        raise RecipeError(
            f"search.workers must be at most the cores of this process, {cores()}, got {settings.workers}"
        )
    limits = constraints(run, shown)
    strategy = strategy_factory(run.recipe)
    return limits, strategy(limits, seed=settings.seed, objective=run.task.metric, **settings.options)


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
    with (
        spread(evaluator(run, supernet), settings.workers) as judge,
        shown.stage(f"search by {settings.strategy}") as progress,
    ):
        result = run_search(
            # Mixtures train the network that is derived, not the uniform-scaled ones.
            strategy if together else WarmStart(strategy, warm_start(run, limits)),
            limits,
            judge,
            evaluations=settings.evaluations,
            objective=run.task.metric,
            storage=run.path("trials.log"),
            identity=identity,
            progress=progress,
        )
    best = result.best()
    score = f"validation {run.task.metric} {best.metrics[run.task.metric]:.4f}"
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


def resolution(run: Run, arch: Architecture) -> tuple[int, int]:
    """Return height and width of the input of a network."""
    blocks = run.space.operations(run.space.encode([arch]))
    return blocks[0][1][0].in_shape[1:]


def extract_recalibrated(run: Run, supernet: Supernet, arch: Architecture) -> nn.Module:
    """Copy a network out of the supernet, with batch-norm statistics of its own.

    A model that brought its weights and was not trained further is itself where all of it is asked for.
    """
    brought = user_model(run.space, run.space.encode([arch]))
    if run.space.settings.get("weights") and not run.recipe.train.epochs and brought and brought.is_whole:
        return whole_network(run.space)
    return extract(supernet, arch, recalibrate(supernet, arch, calibration(run)))


def untrained(run: Run, shown: Shown, supernet: Supernet, arch: Architecture) -> nn.Module:
    """Return a network as it is before finetuning; one of few bits improved as the recipe says."""
    network = extract_recalibrated(run, supernet, arch)
    settings = run.recipe.quantize
    if not has_quantizers(network) or (settings.rounding, settings.biases) == ("nearest", "kept"):
        return network
    path = run.network_folder(arch) / IMPROVED
    if path.exists():
        try:
            network.load_state_dict(load_file(path), strict=False)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged: {error}; remove it, and it is made again") from None
        return network
    size, done = resolution(run, arch), list[str]()
    images = calibration_batches(run.data, settings.images, seed=run.recipe.search.seed)
    with shown.stage(f"round {arch.key} by {settings.rounding}") as progress:
        progress(0, 1, "")
        done = improve(
            model_of(network),
            model_of(whole_network(run.space)),
            torch.cat([resize(batch, size) for batch in images]),
            rounding=settings.rounding,
            bias_correction=settings.biases == "corrected",
            settings=RoundingSettings(steps=settings.steps, seed=run.recipe.search.seed),
        )
        progress(1, 1, "")
    for line in done:
        shown.say(f"{arch.key}: {line}")
    with replacing(path) as temporary:
        save_file(unshared(network.state_dict()), temporary)
    return network


def reference_score(run: Run, shown: Shown) -> float:
    """Return the validation score of what is made smaller: the model as it was brought, or the largest slice.

    Raises:
        ToleranceError: There is none before a strategy by gradients was run, which trains it along.
    """
    arch = run.space.decode(run.space.largest())[0]
    if run.space.settings.get("weights"):
        network = whole_network(run.space)
    elif is_differentiable(run.recipe):
        raise ToleranceError(
            f"a tolerance is measured from a trained network, but {run.recipe.search.strategy!r} trains one "
            "for each budget: bring weights (space.arguments.weights), or take another strategy"
        )
    else:
        network = extract_recalibrated(run, train(run, shown), arch)
    return score_of(network, resolution(run, arch), run.data, run.task).mean


def selected(run: Run, shown: Shown, arch: Architecture | None = None) -> Architecture:
    """Return the network that later stages work on: the given one, the one selected, or the search's best."""
    if arch is not None:
        return arch
    chosen = selection(run)
    return search(run, shown).best().architecture if chosen is None else chosen[0]


def selection(run: Run) -> tuple[Architecture, str] | None:
    """Return the network that was selected, and by which rule; `None` where the search's best stands.

    Raises:
        StorageError: `selected.json` is damaged.
        SpaceError: Its architecture is none of the space.
    """
    if not run.path(SELECTED).exists():
        return None
    content = run.read(SELECTED)
    if not isinstance(content, dict) or not {"architecture", "rule"} <= content.keys():
        raise StorageError(f"{run.path(SELECTED)} is damaged; remove it and select again")
    return run.space.from_json(json.dumps(content["architecture"])), str(content["rule"])


def finetune(run: Run, shown: Shown, arch: Architecture | None = None) -> tuple[nn.Module, Scored]:
    """Finetune one network with distillation from the largest, or read the finetuned one.

    Args:
        run: The run.
        shown: Told progress.
        arch: Which network; the selected one by default.

    Returns:
        The network in evaluation mode and its score on the validation part.
    """
    from autocompress.distill.finetune import Finetuned
    from autocompress.distill.finetune import finetune as finetune_network

    arch = selected(run, shown, arch)
    folder = run.network_folder(arch)
    report, weights = folder / FINETUNE_REPORT, folder / FINETUNED
    if report.exists():
        network: nn.Module = build_network(run.space.operations(run.space.encode([arch])), initialise=False)
        try:
            network.load_state_dict(load_file(weights), assign=True)
            scored = Finetuned(**read_json(report, CheckpointError, "report of finetuning"))
        except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"what was finetuned in {folder} is damaged: {error}; remove it") from None
        return network.eval(), scored
    # Settings of finetuning may have been changed since the supernet was trained.
    check_regularisers(run.data, run.recipe.finetune, run.space)
    supernet, network, teacher, teacher_size = _start(run, shown, arch)
    size = resolution(run, arch)
    before = evaluate(lambda images: network(resize(images, size)), run.data.validation, run.task.score)
    with shown.stage("finetune with distillation") as progress:
        scored = finetune_network(
            network,
            run.data,
            run.task,
            _settings_of(run, network),
            resolution=size,
            teacher=teacher,
            teacher_resolution=teacher_size,
            identity={"space": run.space.fingerprint, "architecture": arch.key,
                      "weights": weights_fingerprint(supernet)},
            checkpoint=folder / FINETUNE_CHECKPOINT,
            progress=progress,
        )  # fmt: skip
    with replacing(weights) as temporary:
        save_file(unshared(network.state_dict()), temporary)
    write_json(report, vars(scored))
    done = "trained anew" if trains_anew(run.recipe) else "finetuned"
    shown.say(f"{done} {arch.key}: validation {run.task.metric} {scored.mean:.4f}, before {before.mean:.4f}")
    if scored.epoch and scored.mean < before.mean:
        shown.say(
            "  that is within one standard error, and kept: the score before is that of the network which "
            "these very images chose"
        )
    if scored.epoch == 0:
        shown.say(
            "  no epoch of finetuning was better: the weights before it were kept. More epochs, or more "
            "steps in each (a smaller finetune.batch_size), may help"
        )
    return network, scored


def _start(
    run: Run, shown: Shown, arch: Architecture
) -> tuple[Supernet, nn.Module, nn.Module, tuple[int, int]]:
    """Return the supernet, what finetuning starts from, its teacher, and the size of the teacher's images.

    A slice of a supernet is finetuned, and taught by the largest one. What a differentiable search derives
    is trained anew and taught by the mixture: no network alone was ever trained there, and slices of it are
    worth little (a cell on digits: mixture 98 %, slice 38 %).
    """
    if not trains_anew(run.recipe):
        supernet = train(run, shown)
        largest = run.space.decode(run.space.largest())[0]
        # A model that brought its weights teaches, even where slices of it were trained since.
        brought = run.space.settings.get("weights")
        teacher = whole_network(run.space) if brought else extract_recalibrated(run, supernet, largest)
        return supernet, untrained(run, shown, supernet, arch), teacher, resolution(run, largest)
    supernet, _, strategy = train_together(run, shown)
    (start,) = supernet.space.decode(strategy.start)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.recipe.finetune.seed)
        network = build_network(run.space.operations(run.space.encode([arch])))
    mixture = Mixture(supernet, start, strategy.mixture(), channels=strategy.channels)
    return supernet, network, mixture, supernet.space.operations(strategy.start)[0][1][0].in_shape[1:]


def _settings_of(run: Run, network: nn.Module) -> FinetuneSettings:
    """Return the settings of finetuning, with the formats that were fastest for the supernet for `auto`."""
    settings, chosen = run.recipe.finetune, _choices(run)
    updates = {name: value for name, value in chosen.items() if getattr(settings, name) == "auto"}
    if not any(isinstance(module, DropPath) for module in network.modules()):
        # A cell of identities alone has no path to drop, though others of its space have.
        updates["drop_path"] = 0.0
    if has_quantizers(network):
        # Levels are numbers of 32 bits: rounded to bfloat16 on the way they would be others.
        updates["precision"] = "fp32"
    return settings.model_copy(update=updates)


def export(run: Run, shown: Shown, arch: Architecture | None = None) -> Path:
    """Export the finetuned network and check every format against it, or check what was exported.

    Returns:
        The folder with the files.
    """
    from autocompress.export.export import export_network
    from autocompress.export.manifest import verify_export

    arch = selected(run, shown, arch)
    network, scored = finetune(run, shown, arch)
    folder = run.network_folder(arch) / "exported"
    if (folder / "manifest.json").exists():
        try:
            verify_export(folder)
        except ExportError as error:
            raise ExportError(f"{error}; remove {folder} first") from None
        return folder
    codes = run.space.encode([arch])
    size = resolution(run, arch)
    priced = {cost.metric: float(cost.of(codes)[0]) for cost in costs(run, shown)}
    policy = _policy(run, arch)
    # Decisions of networks of few bits are compared one by one.
    sampled = QUANTIZED_SAMPLE if policy else 16
    with shown.stage("export") as progress:
        progress(0, 1, "writing and checking")
        manifest = export_network(
            network,
            architecture=arch,
            blocks=run.space.operations(codes),
            in_shape=(run.data.in_shape[0], *size),
            folder=folder,
            preprocessing={
                "resize": list(size),
                "resize_mode": "bilinear, antialiased",
                # Data sets of the user with float inputs come normalised and are taken as they are.
                "divide_by": 255 if isinstance(run.data.train, Images) else 1,
                "mean": list(run.data.mean),
                "std": list(run.data.std),
                "classes": list(run.data.class_names) or run.data.classes,
            },
            formats=run.recipe.export.formats,
            sample=resize(next(batches(run.data.validation, sampled, seed=None))[0], size),
            extra={
                "predicted_costs": priced,
                "validation": vars(scored),
                "metric": run.task.metric,
                **({"bits": policy} if policy else {}),
            },
        )
        progress(1, 1, "")
    left_out = "".join(f"; no {name}: {reason}" for name, reason in manifest.left_out.items())
    if manifest.input.shape[0] == 1:
        left_out += (
            "; ONNX and torch.export for one image at a time: forward() makes a constant of the batch size, "
            "as len(x) does; x.shape[0] would leave it free"
        )
    shown.say(f"exported to {folder}{left_out}")
    return folder


def _policy(run: Run, arch: Architecture) -> list[dict[str, Any]]:
    """Return bits and storage of each layer of a network of few bits; nothing of others."""
    model = user_model(run.space, run.space.encode([arch]))
    return model.described() if isinstance(model, QuantizedNetwork) else []


def select(run: Run, shown: Shown, *, budget: Budget | None, cheapest: str, within: float) -> Any:
    """Choose a network from a finished search and make later stages use it.

    Args:
        run: The run.
        shown: Told progress of missing stages.
        budget: The best network within it; `None` for the search's own best, as if nothing was selected.
        cheapest: Instead, the network of least cost in this metric...
        within: ...whose score is at most this much below the best.

    Returns:
        The trial.
    """
    result = search(run, shown)
    if cheapest:
        trial = result.cheapest(cheapest, within)
        rule = f"least {cheapest} of those within {within:g} of the best {run.task.metric} on validation"
    elif budget is not None:
        trial = result.best(resolve(run, shown, budget).limits)
        rule = f"best {run.task.metric} on validation within {budget}"
    else:
        trial = result.best()
        run.path(SELECTED).unlink(missing_ok=True)
        return trial
    write_json(run.path(SELECTED), {"architecture": json.loads(trial.architecture.to_json()), "rule": rule})
    return trial
