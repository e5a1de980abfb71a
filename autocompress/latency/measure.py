"""Measuring: single cold runs of all items in shuffled rounds, until the medians are known well enough.

A loop over one block keeps its weights in cache, which no whole network enjoys: sums of such times come out
7 to 13 % too fast and rank worse. Here every round runs each item once, in another order, blocks and whole
networks alike, so that each meets the cache as it is in use and drift of the machine hits all alike.
"""

import gc
import math
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Final

import numpy as np

from autocompress.errors import TableError
from autocompress.latency.drift import DISTURBED, without_drift
from autocompress.latency.runtime import Run, background, pinned, prepare_onnx
from autocompress.latency.samples import SampleFile
from autocompress.latency.target import Target

Timer = Callable[[Run], float]
"""Runs a function once and returns how long it took, in milliseconds."""

Progress = Callable[[int, int], None]
"""Told what is done and the total; the total does not change."""

REFERENCE: Final = "reference"
"""Key of the sentinel's samples."""

WARM_UP_RUNS: Final = 3
UNSTABLE_SHARE: Final = 0.05
"""Measuring ends when at most this share of items is less certain than asked: the last few may never be."""
EVICTED_BYTES: Final = 2**20
BACKGROUND_RUNS: Final = 6
CONFIDENCE: Final = 0.95
"""Of intervals of medians."""


@dataclass(frozen=True)
class Measurement:
    """What single runs took.

    Attributes:
        median_ms: Median.
        low_ms: Lower end of the 95 % bootstrap interval of the median.
        high_ms: Upper end.
        spread_ms: Interquartile range.
        p95_ms: 95th percentile.
        count: Number of runs.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    spread_ms: float
    p95_ms: float
    count: int


def summarize(samples_ms: Sequence[float]) -> Measurement:
    """Return median, its interval, interquartile range and 95th percentile (linear interpolation), in ms.

    Raises:
        TableError: There are no samples.
    """
    if not samples_ms:
        raise TableError("a median needs at least one sample, got none")
    low, middle, high, tail = np.percentile(samples_ms, [25, 50, 75, 95]).tolist()
    bounds = bootstrap_positions(len(samples_ms))
    least, most = (sorted(samples_ms)[position] for position in bounds)
    return Measurement(middle, least, most, high - low, tail, len(samples_ms))


@lru_cache(maxsize=4096)
def bootstrap_positions(count: int) -> tuple[int, int]:
    """Return which of `count` samples, in ascending order, bound the 95 % bootstrap interval of their median.

    The bootstrap distribution of a median needs no resampling: the r-th of n resampled values is at most the
    k-th sample with the probability that a binomial (n, k/n) is at least r. Of an even number the lower
    middle bounds the interval below and the upper middle above.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, section 2 and problem 2.4 (percentile
    interval of an order statistic).
    """
    from scipy.stats import binom

    ranks = np.arange(1, count + 1)
    lower_middle = binom.sf((count + 1) // 2 - 1, count, ranks / count)
    upper_middle = binom.sf(count // 2, count, ranks / count)
    outside = (1 - CONFIDENCE) / 2
    return int(np.argmax(lower_middle >= outside)), int(np.argmax(upper_middle >= 1 - outside))


def half_width(ordered_ms: Sequence[float]) -> float:
    """Return half the width of the 95 % bootstrap interval of the median, relative to the median.

    Infinite below 6 samples, of which no such interval says anything.

    Args:
        ordered_ms: Ascending, positive.
    """
    count = len(ordered_ms)
    if count < 6:
        return math.inf
    low, high = bootstrap_positions(count)
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
    """When measuring ends: for all items together.

    Items that left the rounds one by one would leave the others among colder or warmer neighbours: networks
    then came out up to 5 % off what they take among all.

    Attributes:
        tolerance: Relative half width of the 95 % interval of the median, 0.02 is 2 %.
        min_rounds: At least this many runs of each.
        max_rounds: At most this many.
        rounds_per_load: Rounds after which everything is built anew. Where memory happens to lie makes one
            session of a block 3 % faster or slower than the next, all its life.
    """

    tolerance: float = 0.02
    min_rounds: int = 24
    max_rounds: int = 40
    rounds_per_load: int = 8

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.rounds_per_load < 1:
            raise TableError(f"rounds_per_load must be >= 1, got {self.rounds_per_load}")
        if not self.tolerance >= 0:
            raise TableError(f"tolerance must be >= 0, got {self.tolerance}")
        if not 1 <= self.min_rounds <= self.max_rounds:
            raise TableError(
                f"min_rounds must be in 1..max_rounds ({self.max_rounds}), got {self.min_rounds}"
            )

    def stable(self, ordered_ms: Sequence[float]) -> bool:
        """Whether the median is known well enough."""
        return len(ordered_ms) >= self.min_rounds and half_width(ordered_ms) <= self.tolerance


@dataclass(frozen=True)
class Sampled:
    """What was measured of one item, in the order of time.

    Attributes:
        raw_ms: As the timer gave it.
        steady_ms: Without the drift of the machine, and without the samples of stretches in which it was
            disturbed (`autocompress.latency.drift`).
    """

    raw_ms: tuple[float, ...] = ()
    steady_ms: tuple[float, ...] = ()


def measure(
    items: Sequence[Item],
    *,
    stopping: Stopping | None = None,
    seed: int = 0,
    samples: SampleFile | None = None,
    reference: Item | None = None,
    timer: Timer = time_once,
    progress: Progress | None = None,
    before_each: Callable[[str], object] | None = None,
) -> dict[str, Sampled]:
    """Run all items in shuffled rounds, each once a round, until they are measured well enough.

    Args:
        items: With different keys.
        stopping: When they are. An item that has all its samples, from an earlier call, runs untimed.
        seed: Of the order within rounds.
        samples: Rounds are appended here as they end; what it holds counts, and finished items are not
            measured again.
        reference: Runs in every round, however many; its samples show drift of the machine.
        timer: Reads the clock.
        progress: Told the samples there are, and the most there can be.
        before_each: Called, untimed, with the key before each timed run.

    Returns:
        Samples of each item by key, and of the reference under `REFERENCE`.
    """
    stopping = stopping or Stopping()
    state = _State([item.key for item in items], stopping, samples)
    total = len(items) * stopping.max_rounds
    runs: dict[str, Run] = {}
    rounds_left = 0
    collects = gc.isenabled()
    # What is there already is looked through once, not at every load: half a second with PyTorch around.
    gc.collect()
    gc.freeze()
    try:
        while waiting := [item for item in items if item.key not in state.finished]:
            rng = np.random.default_rng([seed, state.round])
            if rounds_left == 0:
                runs = _load(items, reference, rng)
                rounds_left = stopping.rounds_per_load
                # Collected now, so that it does not happen inside a timed run.
                gc.collect()
                gc.disable()
            timed = {item.key for item in waiting} | {REFERENCE}
            state.add(_round(runs, timed, timer, rng, before_each))
            rounds_left -= 1
            if progress:
                progress(state.done(), total)
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()
    if progress:
        progress(total, total)
    return state.result()


def _load(items: Sequence[Item], reference: Item | None, rng: np.random.Generator) -> dict[str, Run]:
    """Build everything, in random order: what is built last runs about 1 % faster than what comes first."""
    runs = {items[index].key: items[index].prepare() for index in rng.permutation(len(items))}
    if reference:
        runs[REFERENCE] = reference.prepare()
    for run in runs.values():
        for _ in range(WARM_UP_RUNS):
            run()
    return runs


def _round(
    runs: Mapping[str, Run],
    timed: Container[str],
    timer: Timer,
    rng: np.random.Generator,
    before_each: Callable[[str], object] | None,
) -> dict[str, float]:
    """Run everything once in random order; return what was timed, in ms, in that order."""
    keys = list(runs)
    result = {}
    for index in rng.permutation(len(keys)):
        key = keys[index]
        if key not in timed:
            runs[key]()
            continue
        if before_each:
            before_each(key)
        # Nanoseconds: what the file holds is then exactly what is kept here.
        result[key] = round(timer(runs[key]), 6)
    return result


class _State:
    """All samples in the order of time, and which items are finished."""

    def __init__(self, keys: Sequence[str], stopping: Stopping, samples: SampleFile | None) -> None:
        self._positions = {key: position for position, key in enumerate([*keys, REFERENCE])}
        self._stopping = stopping
        self._file = samples
        self._samples: list[float] = []
        self._items: list[int] = []
        self.round = 0
        self.finished: set[str] = set()
        if samples:
            for known in samples.rounds:
                self._take(known)
            self.finished = self._positions.keys() & samples.finished(stopping.tolerance)
        self._settle()

    def _take(self, round_ms: Mapping[str, float]) -> None:
        self.round += 1
        for key, sample_ms in round_ms.items():
            if key in self._positions:
                self._samples.append(sample_ms)
                self._items.append(self._positions[key])

    def add(self, round_ms: dict[str, float]) -> None:
        """Take the samples of a round, and find what is finished by them."""
        if self._file:
            self._file.append(round_ms)
        self._take(round_ms)
        self._settle()

    def _settle(self) -> None:
        counts = self._counts()
        left = {
            key: counts[position]
            for key, position in self._positions.items()
            if key != REFERENCE and key not in self.finished
        }
        new = [key for key, count in left.items() if count >= self._stopping.max_rounds]
        if left and min(left.values()) >= self._stopping.min_rounds:
            steady = self.result()
            unstable = sum(not self._stopping.stable(sorted(steady[key].steady_ms)) for key in left)
            if unstable <= UNSTABLE_SHARE * (len(self._positions) - 1):
                new = list(left)
        if new and self._file:
            self._file.finish(new, self._stopping.tolerance)
        self.finished |= set(new)

    def _counts(self) -> list[int]:
        counts = np.bincount(np.array(self._items, dtype=np.int64), minlength=len(self._positions))
        return [int(count) for count in counts]

    def done(self) -> int:
        """Count samples; a finished item counts as often as it could have been measured."""
        most = self._stopping.max_rounds
        counts = self._counts()
        return sum(
            most if key in self.finished else counts[position]
            for key, position in self._positions.items()
            if key != REFERENCE
        )

    def result(self) -> dict[str, Sampled]:
        """Return the samples of each item."""
        return _steady(list(self._positions), self._samples, self._items)


def steady_samples(rounds: Iterable[Mapping[str, float]], keys: Sequence[str]) -> dict[str, Sampled]:
    """Take the drift of the machine out of rounds that were measured elsewhere, or before.

    Args:
        rounds: Item to ms, each in the order of time.
        keys: Of the items; samples of others are left out.

    Returns:
        Samples of each item by key, none of an item that no round has.
    """
    positions = {key: position for position, key in enumerate(keys)}
    taken = [(positions[key], ms) for row in rounds for key, ms in row.items() if key in positions]
    return _steady(keys, [ms for _, ms in taken], [position for position, _ in taken])


def _steady(keys: Sequence[str], samples_ms: Sequence[float], items: Sequence[int]) -> dict[str, Sampled]:
    steady, slower = without_drift(samples_ms, items)
    raw_ms: list[list[float]] = [[] for _ in keys]
    steady_ms: list[list[float]] = [[] for _ in keys]
    kept_ms: list[list[float]] = [[] for _ in keys]
    for position, raw, value, factor in zip(items, samples_ms, steady.tolist(), slower.tolist(), strict=True):
        raw_ms[position].append(raw)
        steady_ms[position].append(value)
        if factor < DISTURBED:
            kept_ms[position].append(value)
    # Of an item that was only seen in bad moments, what was seen is all there is.
    return {
        key: Sampled(tuple(raw_ms[position]), tuple(kept_ms[position] or steady_ms[position]))
        for position, key in enumerate(keys)
    }


def measure_networks(
    runs: Mapping[str, Run],
    *,
    target: Target | None = None,
    count: int = 200,
    seed: int = 0,
    timer: Timer = time_once,
) -> dict[str, Measurement]:
    """Measure prepared networks, interleaved, each `count` times, as cold as in the rounds of a profile.

    Small networks take half the time when nothing else runs between, and a third more after a buffer of
    32 MiB was written; after some other blocks or networks they take what they took in the profile.

    Args:
        runs: By name.
        target: Blocks are built for it that run untimed before each timed run; without it another one of the
            networks runs, or, before the only one, a buffer of 1 MiB is written over.
        count: Timed runs of each.
        seed: Of the order.
        timer: Reads the clock.

    Returns:
        Medians, spreads and percentiles of the times as they are: drift is not taken out.
    """
    others = background(target) if target else []
    rng = np.random.default_rng(seed)
    buffer = np.zeros(EVICTED_BYTES, dtype=np.uint8)

    def disturb(key: str) -> None:
        for index in rng.permutation(len(others))[:BACKGROUND_RUNS]:
            others[index]()
        if others:
            return
        rest = [run for name, run in runs.items() if name != key]
        if rest:
            rest[int(rng.integers(len(rest)))]()
        else:
            np.add(buffer, 1, out=buffer)

    items = [Item(name, partial(_same, run)) for name, run in runs.items()]
    samples = measure(
        items, stopping=Stopping(0.0, count, count), seed=seed, timer=timer, before_each=disturb
    )
    return {name: summarize(samples[name].raw_ms) for name in runs}


def _same(run: Run) -> Run:
    return run


def measure_onnx_files(
    paths: Mapping[str, Path], target: Target, *, runs: int = 200, seed: int = 0, timer: Timer = time_once
) -> dict[str, Measurement]:
    """Measure exported networks on the target, interleaved; see `measure_networks`.

    Args:
        paths: ONNX files by name; free dimensions of the input become the target's batch.
        target: Of a runtime that reads ONNX.
        runs: Timed runs of each.
        seed: Of the order.
        timer: Reads the clock.

    Raises:
        TableError: The target's runtime does not read ONNX, or a file cannot be loaded.
    """
    with pinned(target):
        prepared = {name: prepare_onnx(path, target) for name, path in paths.items()}
        return measure_networks(prepared, target=target, count=runs, seed=seed, timer=timer)


def measure_onnx(path: Path, target: Target, *, runs: int = 200) -> Measurement:
    """Measure one exported network; see `measure_onnx_files`."""
    return measure_onnx_files({"network": path}, target, runs=runs)["network"]
