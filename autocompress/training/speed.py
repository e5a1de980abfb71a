"""Precision and memory format: what a few timed steps say is fastest here."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from autocompress.recipe import OptimizerSettings

# A format has to win by this much, or the plain one stays.
WORTHWHILE = 0.95
TIMED_STEPS = 2


def autocast(precision: str) -> AbstractContextManager[None]:
    """Return the autocast context of a precision, `fp32` or `bf16`."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")


def choose_formats(
    settings: OptimizerSettings,
    step: Callable[[str, str], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, str]:
    """Decide precision and memory format, timing those that are `auto`.

    Args:
        settings: Names them, or says `auto`.
        step: Runs one training step, forward and backward, without changing the weights, in a precision and
            a memory format.
        clock: Seconds.

    Returns:
        `precision` and `memory_format`, neither of them `auto`.
    """
    precisions = ["fp32", "bf16"] if settings.precision == "auto" else [settings.precision]
    formats = (
        ["contiguous", "channels_last"] if settings.memory_format == "auto" else [settings.memory_format]
    )
    best, best_s = (precisions[0], formats[0]), float("inf")
    if len(precisions) * len(formats) > 1:
        for memory in formats:
            for precision in precisions:
                step(precision, memory)  # the first step of a kind allocates and compiles
                times_s = []
                for _ in range(TIMED_STEPS):
                    start = clock()
                    step(precision, memory)
                    times_s.append(clock() - start)
                if min(times_s) < WORTHWHILE * best_s:
                    best, best_s = (precision, memory), min(times_s)
    return {"precision": best[0], "memory_format": best[1]}
