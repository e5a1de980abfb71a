"""What a run will take: a few steps of every stage, timed, and multiplied. Writes nothing."""

import resource
import sys
import time
from collections.abc import Sized
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch.utils.data import Subset

from autocompress.budget import Budget
from autocompress.differentiable import Differentiable
from autocompress.elastic.supernet import Supernet, resize
from autocompress.evaluation.supernet import SupernetEvaluator
from autocompress.latency.plan import make_plan, plan_widths
from autocompress.latency.runtime import pinned, prepare
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import Target, load_target
from autocompress.latency.widths import EVEN
from autocompress.network import build_network
from autocompress.plugins import load_strategy
from autocompress.policy.passes import policy_text
from autocompress.recipe import Recipe
from autocompress.run import is_differentiable, load_recipe_data, make_space, strategy_factory
from autocompress.space import Architecture, SearchSpace
from autocompress.stages import check_losses, check_passes, check_reward, passes_of, try_out, untimed_costs
from autocompress.strategy import at_most
from autocompress.training.bilevel import halves, train_relaxed
from autocompress.training.check import check_regularisers, check_task
from autocompress.training.data import DataSet
from autocompress.training.evaluate import calibration_batches
from autocompress.training.loop import steps_per_epoch, training_batches
from autocompress.training.paths import networks_of_step, phases_of
from autocompress.training.speed import choose_threads, largest_step
from autocompress.training.task import load_task

TIMED_BLOCKS = 10
# Exporters take seconds, whatever the network; comparing takes some evaluations on the test part.
EXPORT_SECONDS, COMPARED_NETWORKS = 15.0, 8


@dataclass(frozen=True)
class Estimate:
    """One stage.

    Attributes:
        stage: Its name.
        seconds: Estimated.
        basis: What the estimate stands on.
    """

    stage: str
    seconds: float
    basis: str


def forecast(recipe: Recipe) -> list[str]:
    """Return the estimated time of each stage and the peak memory, as lines for people.

    The estimates come from a few timed steps on this machine, as loaded as it is now.

    Raises:
        AutocompressError: What the run itself would refuse at its start: data, space, budget.
    """
    strategy_factory(recipe)
    check_reward(recipe)
    check_losses(recipe)
    data = load_recipe_data(recipe)
    space = make_space(recipe, lambda: data)
    limits = {metric: value for metric, value in recipe.search.budget.items() if metric != "latency_ms"}
    if limits:
        Budget.of(limits).resolve(space, untimed_costs(space, _target(recipe)))
    check_task(data, load_task(recipe.task), space)
    check_regularisers(data, recipe.finetune, space)
    check_passes(recipe, space, _target(recipe))
    threads = recipe.threads or choose_threads(largest_step(space, data, recipe.train))
    torch.set_num_threads(threads)
    supernet = (
        make_space(recipe, lambda: data, proxy) if (proxy := recipe.train.proxy) else space
    ).supernet()
    stages = _gradients if is_differentiable(recipe) else _training
    estimates = [_profile(recipe, space), *stages(recipe, data, supernet, space)]
    lines = [f"{e.stage:<18} {_duration(e.seconds):>10}   {e.basis}" for e in estimates]
    total = sum(estimate.seconds for estimate in estimates)
    lines.append(
        f"{'in all':<18} {_duration(total):>10}   expect a factor of about 1.5 either way; {threads} threads"
    )
    # Kilobytes on Linux, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    lines.append(f"{'peak memory':<18} {peak / 1e9:>7.2f} GB   of the steps that were timed")
    if recipe.passes:
        lines.append(f"Not estimated: the passes after finetuning, {policy_text(passes_of(recipe))}.")
    if recipe.tolerance is not None:
        lines.append(
            f"For each of up to {recipe.tolerance.probes} budgets (tolerance.probes) search and finetuning "
            "come once more."
        )
    if "latency_ms" in recipe.search.budget:
        lines.append(
            "Whether the latency budget can be met is known after profiling, the first stage; `autocompress "
            "profile` does only that."
        )
    return lines


def _target(recipe: Recipe) -> Target:
    settings = recipe.target
    if recipe.profile.measured == "elsewhere" and recipe.profile.table is not None:
        return LatencyTable.load(recipe.profile.table).target
    return load_target(settings.name, threads=settings.threads, batch=settings.batch)


def _profile(recipe: Recipe, space: SearchSpace) -> Estimate:
    if recipe.profile.measured == "elsewhere":
        return Estimate("profile", 0.0, "the table is of another device: nothing is measured")
    if recipe.profile.measured == "nowhere":
        return Estimate("profile", 0.0, "nothing is measured")
    where = _target(recipe)
    settings = recipe.profile
    if settings.widths == "grid":
        plan = plan_widths(space, 0, 0, knots=settings.knots, steps=EVEN)
    else:
        plan = make_plan(space, settings.granularity, 0, 0)
    blocks = list(plan.rows.values())
    sample = blocks[:: max(1, len(blocks) // TIMED_BLOCKS)]
    with pinned(where):
        start = time.perf_counter()
        runs = [prepare([("block", ops)], where) for ops in sample]
        build_s = (time.perf_counter() - start) / len(sample)
        rounds_s = []
        for _ in range(3):
            start = time.perf_counter()
            for run in runs:
                run()
            rounds_s.append(time.perf_counter() - start)
        run_s = min(rounds_s) / len(sample)  # the first round allocates
    rounds, networks = settings.max_rounds, settings.networks
    # Runtimes are built anew every 8 rounds; a network costs as much as its blocks.
    seconds = (len(blocks) + networks * len(space.blocks)) * (rounds * run_s + rounds / 8 * build_s)
    basis = f"at most {rounds} rounds of {len(blocks)} blocks and operations and {networks} networks"
    return Estimate("profile", seconds, basis)


def _gradients(recipe: Recipe, data: DataSet, supernet: Supernet, space: SearchSpace) -> list[Estimate]:
    """Estimate a search by gradients: mixtures are trained, then networks anew."""
    task, moments = load_task(recipe.task), [time.perf_counter()]
    strategy = cast(Differentiable, try_out(recipe, space, _target(recipe), task.metric))
    few = replace(data, train=Subset(data.train, range(min(_length(data), 8 * recipe.train.batch_size))))
    epochs = len(strategy.phases)
    train_relaxed(
        supernet,
        strategy,
        few,
        task,
        recipe.train.model_copy(update={"epochs": epochs}),
        seed=recipe.search.seed,
        smaller=lambda settings: make_space(recipe, lambda: data, {**recipe.train.proxy, **settings}),
        progress=lambda *_: moments.append(time.perf_counter()),
    )
    # The last step of an epoch looks at the signs of a collapse.
    mean_s, step_s = (moments[-1] - moments[0]) / (len(moments) - 1), float(np.median(np.diff(moments)))
    per_epoch = steps_per_epoch(halves(data, 0.5)[0], recipe.train)
    looks_s = max(0.0, mean_s - step_s) * (len(moments) - 1) / epochs
    seconds = recipe.train.epochs * (per_epoch * step_s + looks_s)
    steps = recipe.train.epochs * per_epoch
    found = [
        Estimate("train and search", seconds, f"{steps} steps of {step_s:.3f} s, {looks_s:.1f} s an epoch")
    ]
    network = build_network(space.operations(space.largest())).train()
    images, targets = next(training_batches(data, recipe.finetune, epoch=0, seed=0))
    images = resize(images, space.operations(space.largest())[0][1][0].in_shape[1:])
    for _ in range(2):  # the first step allocates
        start = time.perf_counter()
        task.loss(network(images), targets).backward()  # type: ignore[no-untyped-call]
        alone_s = time.perf_counter() - start
    networks = 2 + recipe.random_networks
    steps = networks * recipe.finetune.epochs * steps_per_epoch(data, recipe.finetune)
    basis = f"{steps} steps of at most {alone_s:.3f} s and the teacher's: {networks} networks, trained anew"
    found.append(Estimate("finetune", steps * (alone_s + step_s / 6), basis))
    return [*found, Estimate("export, compare", EXPORT_SECONDS, f"{networks} networks")]


def _length(data: DataSet) -> int:
    return len(cast(Sized, data.train))


def _training(recipe: Recipe, data: DataSet, supernet: Supernet, space: SearchSpace) -> list[Estimate]:
    """Estimate training, search, finetuning and the comparison."""
    task = load_task(recipe.task)
    (largest,) = space.decode(space.largest())
    images, targets = next(training_batches(data, recipe.train, epoch=0, seed=recipe.train.seed))
    images = images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images
    supernet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def step_s(archs: list[Architecture]) -> float:
        start = time.perf_counter()
        for arch in archs:
            task.loss(supernet(images, arch), targets).backward()  # type: ignore[no-untyped-call]
        supernet.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    step_s([largest])  # the first step allocates
    alone_s = step_s([largest])
    steps, train_s = 0, 0.0
    for phase in phases_of(space, recipe.train):
        # Steps of random networks differ: the mean of a few.
        timed = [step_s(networks_of_step(space, recipe.train, phase, step)) for step in range(3)]
        steps += phase.epochs * steps_per_epoch(data, recipe.train)
        train_s += phase.epochs * steps_per_epoch(data, recipe.train) * sum(timed) / len(timed)
    basis = f"{steps} steps of {train_s / steps:.3f} s" if steps else "the weights that the model brings"
    found = [Estimate("train", train_s, basis)]

    calibration = calibration_batches(data, recipe.search.calibration_images)
    score = SupernetEvaluator(supernet.eval(), data, task, calibration)
    start = time.perf_counter()
    score(space.sample(1, np.random.default_rng(0)))
    evaluation_s = time.perf_counter() - start
    paid = recipe.search.evaluations
    if getattr(load_strategy(recipe.search.strategy), "beyond_budget", False):
        # Such a strategy ends by itself, and knows when.
        paid = at_most(try_out(recipe, space, _target(recipe), task.metric), paid)
    paid_s = evaluation_s
    if recipe.search.reward == "distilled":
        # No slice is larger than the one that was timed.
        paid_s += recipe.search.reward_epochs * steps_per_epoch(data, recipe.finetune) * alone_s
    most = "" if paid_s == evaluation_s else "at most "
    found.append(Estimate("search", paid * paid_s, f"{paid} evaluations of {most}{paid_s:.3f} s"))
    # The searched network and the uniform-scaled one; each step also runs the teacher.
    steps = 2 * recipe.finetune.epochs * steps_per_epoch(data, recipe.finetune)
    found.append(Estimate("finetune", steps * alone_s, f"{steps} steps of at most {alone_s:.3f} s"))
    seconds = EXPORT_SECONDS + COMPARED_NETWORKS * evaluation_s
    return [*found, Estimate("export, compare", seconds, f"{COMPARED_NETWORKS} networks")]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
