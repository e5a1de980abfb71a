"""Threads, precision and memory format: what a few timed steps say is fastest here."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from autocompress.elastic.supernet import resize
from autocompress.machine import cores
from autocompress.network import build_network
from autocompress.recipe import OptimizerSettings, TrainSettings
from autocompress.space import SearchSpace
from autocompress.training.data import DataSet
from autocompress.training.loop import training_batches

# A format has to win by this much, or the one tried before it stays.
WORTHWHILE = 0.95
TIMED_STEPS = 2
# The first bf16 steps of a supernet compile kernels for every shape, which took over 40 s where this was
# measured (and bf16 was slower in the end); only a training that takes much longer is worth the trial.
BF16_TRIAL_FROM_S = 1800.0


def choose_threads(
    step: Callable[[], object], *, most: int | None = None, clock: Callable[[], float] = time.perf_counter
) -> int:
    """Double PyTorch's threads as long as a step becomes clearly faster; leaves their number changed.

    All cores are not always best: a small network on many threads, or on cores that others use too, mostly
    waits for the slowest thread.

    Args:
        step: Runs one training step.
        most: Threads at most; all cores by default.
        clock: Seconds.
    """
    most = cores() if most is None else most

    def timed(threads: int) -> float:
        torch.set_num_threads(threads)
        step()
        times_s = []
        for _ in range(TIMED_STEPS):
            start = clock()
            step()
            times_s.append(clock() - start)
        return min(times_s)

    chosen, best_s = 1, timed(1)
    while chosen < most:
        more = min(2 * chosen, most)
        more_s = timed(more)
        if more_s >= WORTHWHILE * best_s:
            break
        chosen, best_s = more, more_s
    return chosen


def autocast(precision: str) -> AbstractContextManager[None]:
    """Return the autocast context of a precision, `fp32` or `bf16`."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")


def choose_formats(
    settings: OptimizerSettings,
    step: Callable[[str, str], None],
    *,
    steps: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, str]:
    """Decide precision and memory format, timing those that are `auto`.

    Args:
        settings: Names them, or says `auto`.
        step: Runs one training step, forward and backward, without changing the weights, in a precision and
            a memory format.
        steps: Steps of the whole training; bf16 is only tried where it could save minutes.
        clock: Seconds.

    Returns:
        `precision` and `memory_format`, neither of them `auto`.
    """
    memory = settings.memory_format
    precision = "fp32" if settings.precision == "auto" else settings.precision
    best_s = float("inf")

    def timed(precision: str, memory: str) -> float:
        step(precision, memory)  # the first step of a kind allocates and compiles
        times_s = []
        for _ in range(TIMED_STEPS):
            start = clock()
            step(precision, memory)
            times_s.append(clock() - start)
        return min(times_s)

    if memory == "auto":
        last_s, contiguous_s = timed(precision, "channels_last"), timed(precision, "contiguous")
        memory = "contiguous" if contiguous_s < WORTHWHILE * last_s else "channels_last"
        best_s = min(last_s, contiguous_s)
    if settings.precision == "auto":
        if best_s == float("inf"):
            best_s = timed(precision, memory)
        if steps * best_s >= BF16_TRIAL_FROM_S and timed("bf16", memory) < WORTHWHILE * best_s:
            precision = "bf16"
    return {"precision": precision, "memory_format": memory}


def largest_step(space: SearchSpace, data: DataSet, settings: TrainSettings) -> Callable[[], None]:
    """Return a function that runs a training step of the largest network, forward and backward."""
    network = build_network(space.operations(space.largest())).train()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, _ = next(training_batches(data, settings, epoch=0, seed=settings.seed))
    images = resize(images, space.operations(space.largest())[0][1][0].in_shape[1:])
    images = images.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        network(images).float().sum().backward()

    return step
