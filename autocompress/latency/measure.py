"""Measuring: single cold runs of all items in shuffled rounds, until every median is known well enough.

A loop over one block keeps its weights in cache, which no whole network enjoys: sums of such times come out
7 to 13 % too fast and rank worse. Here every round runs each item once, in another order, blocks and whole
networks alike, so that each meets the cache as it is in use and drift of the machine hits all alike.
"""

import bisect
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from autocompress.errors import TableError
from autocompress.latency.runtimes import Run, pinned, prepare_onnx
from autocompress.latency.samples import SampleFile
from autocompress.latency.target import Target

Timer = Callable[[Run], float]
"""Runs a function once and returns how long it took, in milliseconds."""

Progress = Callable[[int, int], None]
"""Told what is done and the total; the total does not change."""

REFERENCE: Final = "reference"
"""Key of the sentinel's samples."""

WARM_UP_RUNS: Final = 3
# With fewer items in a round the caches would keep what the last round left; finished ones then run untimed.
MIN_ITEMS_IN_ROUND: Final = 48
# More than the second-level cache of one core of any current CPU (2-4 MiB), and most shares of a third level.
EVICTED_BYTES: Final = 32 * 2**20
NORMAL_QUANTILE: Final = 1.96
"""Of the 95 % interval."""


@dataclass(frozen=True)
class Measurement:
    """What single runs took.

    Attributes:
        median_ms: Median.
        spread_ms: Interquartile range.
        p95_ms: 95th percentile.
        count: Number of runs.
    """

    median_ms: float
    spread_ms: float
    p95_ms: float
    count: int


def summarize(samples_ms: Sequence[float]) -> Measurement:
    """Return median, interquartile range and 95th percentile (linear interpolation), in ms.

    Raises:
        TableError: There are no samples.
    """
    if not samples_ms:
        raise TableError("a median needs at least one sample, got none")
    low, middle, high, tail = np.percentile(samples_ms, [25, 50, 75, 95]).tolist()
    return Measurement(middle, high - low, tail, len(samples_ms))


def half_width(ordered_ms: Sequence[float]) -> float:
    """Return half the width of the 95 % confidence interval of the median, relative to the median.

    The interval reaches from one order statistic to another, whatever the distribution: the number of samples
    below the median is binomial (n, 1/2), here in its normal approximation. Infinite below 6 samples, where no
    such interval has 95 %.

    Args:
        ordered_ms: Ascending, positive.

    Source: Conover, Practical Nonparametric Statistics, 3rd ed., section 3.2.
    """
    count = len(ordered_ms)
    if count < 6:
        return math.inf
    reach = NORMAL_QUANTILE * math.sqrt(count) / 2
    low = max(0, math.floor(count / 2 - reach))
    high = min(count - 1, math.ceil(count / 2 + reach))
    middle = (ordered_ms[(count - 1) // 2] + ordered_ms[count // 2]) / 2
    return (ordered_ms[high] - ordered_ms[low]) / 2 / middle if middle > 0 else 0.0


def time_once(run: Run) -> float:
    """Run once and return the wall-clock time in ms."""
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e6


@dataclass(frozen=True)
class Item:
    """Something to measure.

    Attributes:
        key: Unique; under it samples are kept.
        prepare: Builds it; called only if it runs at all.
    """

    key: str
    prepare: Callable[[], Run]


@dataclass(frozen=True)
class Stopping:
    """When an item is measured well enough.

    Attributes:
        tolerance: Relative half width of the 95 % interval of the median, 0.02 is 2 %.
        min_rounds: At least this many runs.
        max_rounds: At most this many.
    """

    tolerance: float = 0.02
    min_rounds: int = 15
    max_rounds: int = 60

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.tolerance >= 0:
            raise TableError(f"tolerance must be >= 0, got {self.tolerance}")
        if not 1 <= self.min_rounds <= self.max_rounds:
            raise TableError(
                f"min_rounds must be in 1..max_rounds ({self.max_rounds}), got {self.min_rounds}"
            )

    def stable(self, ordered_ms: Sequence[float]) -> bool:
        """Whether the median is known well enough."""
        return len(ordered_ms) >= self.min_rounds and half_width(ordered_ms) <= self.tolerance

    def finished(self, ordered_ms: Sequence[float]) -> bool:
        """Whether to measure no more: stable, or as often as allowed."""
        return len(ordered_ms) >= self.max_rounds or self.stable(ordered_ms)


@dataclass
class _Sampled:
    """Samples of one item, in the order of time and ordered by value."""

    in_time: list[float] = field(default_factory=list)
    ordered: list[float] = field(default_factory=list)

    def add(self, sample_ms: float) -> None:
        self.in_time.append(sample_ms)
        bisect.insort(self.ordered, sample_ms)


def measure(
    items: Sequence[Item],
    *,
    stopping: Stopping | None = None,
    seed: int = 0,
    samples: SampleFile | None = None,
    reference: Item | None = None,
    timer: Timer = time_once,
    progress: Progress | None = None,
    before_each: Run | None = None,
) -> dict[str, list[float]]:
    """Run all items in shuffled rounds, each once a round, until each is finished.

    Args:
        items: With different keys.
        stopping: When an item is finished; it then leaves the rounds.
        seed: Of the order within rounds.
        samples: Rounds are appended here as they end; what it holds counts, and finished items are not
            measured again.
        reference: Runs in every round, however many; its samples show drift of the machine.
        timer: Reads the clock.
        progress: Told the samples there are, and the most there can be.
        before_each: Runs untimed before each timed run.

    Returns:
        Samples in ms of each item, in the order of time, and of the reference under `REFERENCE`.
    """
    stopping = stopping or Stopping()
    sampled = {item.key: _Sampled() for item in items}
    sampled[REFERENCE] = _Sampled()
    rounds = samples.rounds if samples else []
    for known in rounds:
        for key, sample_ms in known.items():
            if key in sampled:
                sampled[key].add(sample_ms)

    def pending() -> list[Item]:
        return [item for item in items if not stopping.finished(sampled[item.key].ordered)]

    total = len(items) * stopping.max_rounds
    waiting = pending()
    runs: dict[str, Run] = {}
    rng = np.random.default_rng([seed, len(rounds)])
    unfinished = {item.key for item in waiting}
    done_before = [item for item in items if item.key not in unfinished]
    fillers = _prepared(done_before, runs, MIN_ITEMS_IN_ROUND, rng) if waiting else []
    for item in waiting:
        runs[item.key] = item.prepare()
        _warm_up(runs[item.key])
        if progress:
            progress(_done(items, sampled, stopping), total)
    if waiting and reference:
        runs[REFERENCE] = reference.prepare()
        _warm_up(runs[REFERENCE])
    collects = gc.isenabled()
    gc.disable()
    try:
        while waiting:
            timed = [item.key for item in waiting] + [REFERENCE] * (reference is not None)
            spare = rng.permutation(len(fillers))[: max(0, MIN_ITEMS_IN_ROUND - len(timed))]
            untimed = [fillers[index] for index in spare]
            order = rng.permutation(len(timed) + len(untimed)).tolist()
            result = {}
            for index in order:
                if index >= len(timed):
                    runs[untimed[index - len(timed)]]()
                    continue
                if before_each:
                    before_each()
                # Nanoseconds: what the file holds is then exactly what is kept here.
                result[timed[index]] = round(timer(runs[timed[index]]), 6)
            if samples:
                samples.append(result)
            for key, sample_ms in result.items():
                sampled[key].add(sample_ms)
            fillers += [item.key for item in waiting if stopping.finished(sampled[item.key].ordered)]
            waiting = pending()
            if progress:
                progress(_done(items, sampled, stopping), total)
    finally:
        if collects:
            gc.enable()
    return {key: item.in_time for key, item in sampled.items()}


def _prepared(items: Sequence[Item], runs: dict[str, Run], most: int, rng: np.random.Generator) -> list[str]:
    """Prepare a random few of the items that an earlier session finished; return their keys."""
    chosen = [items[index] for index in rng.permutation(len(items))[:most]]
    for item in chosen:
        runs[item.key] = item.prepare()
    return [item.key for item in chosen]


def _warm_up(run: Run) -> None:
    for _ in range(WARM_UP_RUNS):
        run()


def _done(items: Sequence[Item], sampled: Mapping[str, _Sampled], stopping: Stopping) -> int:
    """Count samples; a finished item counts as often as it could have been measured."""
    return sum(
        stopping.max_rounds
        if stopping.finished(sampled[item.key].ordered)
        else len(sampled[item.key].ordered)
        for item in items
    )


def drift_percent(reference_ms: Sequence[float]) -> float | None:
    """Return the greatest difference between the medians of four quarters of time, in % of the median.

    Args:
        reference_ms: In the order of time; `None` is returned for fewer than 8.
    """
    if len(reference_ms) < 8:
        return None
    quarters = [float(np.median(quarter)) for quarter in np.array_split(reference_ms, 4)]
    return 100 * (max(quarters) - min(quarters)) / float(np.median(reference_ms))


def measure_networks(
    runs: Mapping[str, Run], *, count: int = 200, seed: int = 0, timer: Timer = time_once
) -> dict[str, Measurement]:
    """Measure prepared networks, interleaved, each `count` times with caches evicted before.

    In the rounds of a profile hundreds of other runs lie between two of one network; here a buffer that is
    written over does what they do to the caches.
    """
    buffer = np.zeros(EVICTED_BYTES, dtype=np.uint8)

    def evict() -> None:
        np.add(buffer, 1, out=buffer)

    items = [Item(name, partial(_same, run)) for name, run in runs.items()]
    samples = measure(items, stopping=Stopping(0.0, count, count), seed=seed, timer=timer, before_each=evict)
    return {name: summarize(samples[name]) for name in runs}


def _same(run: Run) -> Run:
    return run


def measure_network(run: Run, *, count: int = 200, timer: Timer = time_once) -> Measurement:
    """Measure one prepared network; see `measure_networks`."""
    return measure_networks({"network": run}, count=count, timer=timer)["network"]


def measure_onnx_files(
    paths: Mapping[str, Path], target: Target, *, runs: int = 200, seed: int = 0, timer: Timer = time_once
) -> dict[str, Measurement]:
    """Measure exported networks on the target, interleaved, caches evicted before each run.

    Args:
        paths: ONNX files by name; free dimensions of the input become the target's batch.
        target: Of ONNX Runtime.
        runs: Timed runs of each.
        seed: Of the order.
        timer: Reads the clock.

    Raises:
        TableError: The target is of another runtime, or a file cannot be loaded.
    """
    with pinned(target):
        prepared = {name: prepare_onnx(path, target) for name, path in paths.items()}
        return measure_networks(prepared, count=runs, seed=seed, timer=timer)


def measure_onnx(path: Path, target: Target, *, runs: int = 200) -> Measurement:
    """Measure one exported network; see `measure_onnx_files`."""
    return measure_onnx_files({"network": path}, target, runs=runs)["network"]
