"""What a run will take: a few steps of every stage, timed, and multiplied. Writes nothing."""

import resource
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from autocompress.budget import Budget
from autocompress.elastic.supernet import Supernet
from autocompress.evaluation.supernet import SupernetEvaluator
from autocompress.latency.plan import make_plan, plan_widths
from autocompress.latency.runtime import pinned, prepare
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import Target, load_target
from autocompress.latency.widths import EVEN
from autocompress.recipe import Recipe
from autocompress.run import load_recipe_data, make_space, strategy_factory
from autocompress.space import Architecture, SearchSpace
from autocompress.stages import untimed_costs
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
    data = load_recipe_data(recipe)
    space = make_space(recipe, lambda: data)
    limits = {metric: value for metric, value in recipe.search.budget.items() if metric != "latency_ms"}
    if limits:
        Budget.of(limits).resolve(space, untimed_costs(space, _target(recipe)))
    check_task(data, load_task(recipe.task), space)
    check_regularisers(data, recipe.finetune, space)
    threads = recipe.threads or choose_threads(largest_step(space, data, recipe.train))
    torch.set_num_threads(threads)
    supernet = (
        make_space(recipe, lambda: data, proxy) if (proxy := recipe.train.proxy) else space
    ).supernet()
    estimates = [_profile(recipe, space), *_training(recipe, data, supernet)]
    lines = [f"{e.stage:<18} {_duration(e.seconds):>10}   {e.basis}" for e in estimates]
    total = sum(estimate.seconds for estimate in estimates)
    lines.append(
        f"{'in all':<18} {_duration(total):>10}   expect a factor of about 1.5 either way; {threads} threads"
    )
    # Kilobytes on Linux, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    lines.append(f"{'peak memory':<18} {peak / 1e9:>7.2f} GB   of the steps that were timed")
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


def _training(recipe: Recipe, data: DataSet, supernet: Supernet) -> list[Estimate]:
    """Estimate training, search, finetuning and the comparison."""
    space, task = supernet.space, load_task(recipe.task)
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
    found = [Estimate("train", train_s, f"{steps} steps of {train_s / steps:.3f} s")]

    calibration = calibration_batches(data, recipe.search.calibration_images)
    score = SupernetEvaluator(supernet.eval(), data, task, calibration)
    start = time.perf_counter()
    score(space.sample(1, np.random.default_rng(0)))
    evaluation_s = time.perf_counter() - start
    paid = recipe.search.evaluations
    found.append(Estimate("search", paid * evaluation_s, f"{paid} evaluations of {evaluation_s:.3f} s"))
    # The searched network and the uniform-scaled one; each step also runs the teacher.
    steps = 2 * recipe.finetune.epochs * steps_per_epoch(data, recipe.finetune)
    found.append(Estimate("finetune", steps * alone_s, f"{steps} steps of at most {alone_s:.3f} s"))
    seconds = EXPORT_SECONDS + COMPARED_NETWORKS * evaluation_s
    return [*found, Estimate("export, compare", seconds, f"{COMPARED_NETWORKS} networks")]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
