"""Measure a bundle of autocompress on this device: `python device.zip`, or `python runner.py device.zip`.

This file needs Python 3.8 or newer, numpy and onnxruntime, and nothing of autocompress: a copy of it travels
in every bundle. It measures as `autocompress profile` does: every round runs each block and network once, in
another order; everything is built anew every 8 rounds; an item leaves when its median is known well enough.
Only models that fit into memory together are loaded at once: all blocks, and networks in turn.

It is longer than other files of autocompress because it cannot import any of them.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import platform
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import onnxruntime
except ImportError as error:
    raise SystemExit(f"this needs numpy and onnxruntime: pip install numpy onnxruntime ({error})") from None

SCHEMA = "autocompress.bundle"
VERSION = 1
SAMPLES_SCHEMA = "autocompress.latency_samples"
SAMPLES_VERSION = 1
REFERENCE = "reference"
OUTPUT = "samples.jsonl"

WARM_UP_RUNS = 3
ROUNDS_PER_LOAD = 8
# Measuring ends when at most this share of items is less certain than asked.
UNSTABLE_SHARE = 0.05
CONFIDENCE = 0.95
DEFAULT_MEMORY_MB = 512
# A loaded network takes its weights, and once more what kernels have packed of them.
BYTES_IN_MEMORY = 2.5
# Read before each network where networks take turns: they then find caches as cold as if all were loaded.
# Without it, one network of 17 MB among small blocks came out 20 % too fast.
EVICTED_BYTES = 2**26
SECONDS_BETWEEN_REPORTS = 10


class Refused(Exception):  # noqa: N818  (what it says is printed; nothing went wrong inside)
    """What is given cannot be measured; the message says why."""


class Bundle:
    """A bundle as it lies on disk: a zip file, or the folder it was unpacked into.

    Attributes:
        fingerprint: SHA-256 of the manifest.
        manifest: What `manifest.json` says.
        files: Item to its file; blocks, networks and the reference.
        networks: Which items are networks.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._zip = None if path.is_dir() else zipfile.ZipFile(path)
            text = self.read("manifest.json")
            manifest = json.loads(text.decode("utf-8"))
            if manifest["schema"] != SCHEMA or manifest["version"] != VERSION:
                raise Refused(f"{path} is no {SCHEMA} of version {VERSION}")
            self.files = {f"block {key}": file for key, file in manifest["rows"].items()}
            self.files[REFERENCE] = manifest["rows"][manifest["reference"]]
            self.networks = {network["name"] for network in manifest["networks"]}
            self.files.update({network["name"]: network["file"] for network in manifest["networks"]})
            self.target = {
                name: manifest["target"][name]
                for name in ("runtime", "threads", "batch", "device", "number_format")
            }
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise Refused(f"{path} is no bundle of autocompress: {type(error).__name__} {error}") from None
        self.fingerprint = hashlib.sha256(text).hexdigest()
        self.manifest = manifest

    @property
    def items(self) -> list[str]:
        """Blocks, then networks; without the reference."""
        return [item for item in self.files if item != REFERENCE]

    def read(self, name: str) -> bytes:
        """Return a file of the bundle."""
        return (self._path / name).read_bytes() if self._zip is None else self._zip.read(name)

    def size(self, item: str) -> int:
        """Return how large the model of an item is, in bytes."""
        name = self.files[item]
        return (self._path / name).stat().st_size if self._zip is None else self._zip.getinfo(name).file_size

    def session(self, item: str) -> Callable[[], object]:
        """Load the model of an item; what is returned runs it once, on one random input."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.target["threads"]
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        # Threads that spin while they wait take the cores from whatever is measured next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(
                self.read(self.files[item]), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # noqa: BLE001  (onnxruntime has a dozen unrelated exception classes)
            raise Refused(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {self.files[item]}: {error}"
            ) from None
        rng = np.random.default_rng(0)
        feeds = {
            value.name: rng.standard_normal(value.shape, dtype=np.float32) for value in session.get_inputs()
        }
        return lambda: session.run(None, feeds)


class Samples:
    """The file of samples: JSON lines, appended as rounds finish; an incomplete last line is cut.

    Attributes:
        rounds: How many there are.
        taken: Item to its times in ms, in the order of time.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._path = path
        self._ids: dict[str, int] = {}
        self.rounds = 0
        self.taken: dict[str, list[float]] = {}
        self.finished: set[str] = set()
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        if not whole:
            self._write({**header, "started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())})
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self._read(number, json.loads(line.decode("utf-8")), header)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                said = f"{path}, line {number} is damaged ({error}): choose another --output"
                raise Refused(said) from None

    def _read(self, number: int, row: Any, header: dict[str, Any]) -> None:
        if number == 1:
            different = [name for name in header if row.get(name) != header[name]]
            if different:
                said = "; ".join(f"{name} is {row.get(name)}, not {header[name]}" for name in different)
                raise Refused(f"{self._path} has samples of something else ({said}): choose another --output")
        elif "item" in row:
            self._ids[row["item"]] = int(row["id"])
        elif "finished" in row:
            names = {identity: item for item, identity in self._ids.items()}
            self.finished |= {names[identity] for identity in row["finished"]}
        else:
            names = {identity: item for item, identity in self._ids.items()}
            self._take({names[int(identity)]: float(ms) for identity, ms in row["ms"].items()})

    def _take(self, round_ms: dict[str, float]) -> None:
        self.rounds += 1
        for item, ms in round_ms.items():
            self.taken.setdefault(item, []).append(ms)

    def append(self, round_ms: dict[str, float]) -> None:
        """Append one finished round."""
        for item in round_ms:
            if item not in self._ids:
                self._ids[item] = len(self._ids)
                self._write({"id": self._ids[item], "item": item})
        self._write({"ms": {str(self._ids[item]): ms for item, ms in round_ms.items()}})
        self._take(round_ms)

    def finish(self, items: list[str], tolerance: float) -> None:
        """Note that items were measured well enough."""
        self._write({"finished": [self._ids[item] for item in items], "tolerance": tolerance})
        self.finished |= set(items)

    def count(self, item: str) -> int:
        """Return how often an item was measured."""
        return len(self.taken.get(item, ()))

    def _write(self, row: dict[str, Any]) -> None:
        # Opened for each line: nothing is buffered when the process is killed.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


@lru_cache(maxsize=None)  # noqa: UP033  (functools.cache came with Python 3.9)
def bootstrap_positions(count: int) -> tuple[int, int]:
    """Return which of `count` ordered samples bound the 95 % bootstrap interval of their median.

    As `autocompress.latency.measure.bootstrap_positions`, in whole numbers instead of scipy.
    """

    def first_rank(least: int, bound: float) -> int:
        """Return the first r for which a binomial (count, r / count) is >= least with probability bound."""
        low, high = 1, count
        while low < high:
            rank = (low + high) // 2
            ways = sum(
                math.comb(count, hits) * rank**hits * (count - rank) ** (count - hits)
                for hits in range(least, count + 1)
            )
            low, high = (low, rank) if ways / count**count >= bound else (rank + 1, high)
        return low

    outside = (1 - CONFIDENCE) / 2
    return first_rank((count + 1) // 2, outside) - 1, first_rank(count // 2 + 1, 1 - outside) - 1


def half_width(times_ms: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of the median, relative to it; infinite below 6 samples."""
    count = len(times_ms)
    if count < 6:
        return math.inf
    ordered = sorted(times_ms)
    low, high = bootstrap_positions(count)
    middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    return (ordered[high] - ordered[low]) / 2 / middle if middle > 0 else 0.0


def load(
    bundle: Bundle, waiting: list[str], samples: Samples, network_bytes: int, rng: np.random.Generator
) -> dict[str, Callable[[], object]]:
    """Load all blocks, and as many networks as fit, those with the fewest samples first.

    Args:
        bundle: Where the models are.
        waiting: Items that need more samples.
        samples: Of them all.
        network_bytes: Size of the models of all networks that are loaded together; one always is.
        rng: Of the order, and of what is chosen among equals.
    """
    mixed = [bundle.items[index] for index in rng.permutation(len(bundle.items))]
    networks = [item for item in mixed if item in bundle.networks]
    networks.sort(key=lambda item: (item not in waiting, samples.count(item)))
    chosen: list[str] = []
    left = network_bytes
    for item in networks:
        if bundle.size(item) <= left or not chosen:
            left -= bundle.size(item)
            chosen.append(item)
    wanted = [item for item in mixed if item not in bundle.networks or item in chosen]
    runs = {item: bundle.session(item) for item in [*wanted, REFERENCE]}
    for run in runs.values():
        for _ in range(WARM_UP_RUNS):
            run()
    return runs


def run_round(
    runs: dict[str, Callable[[], object]],
    waiting: set[str],
    rng: np.random.Generator,
    before_each: Callable[[str], object],
) -> dict[str, float]:
    """Run everything once in random order; return what was timed, in ms, in that order.

    What needs no more samples runs untimed: without it the others would have colder or warmer neighbours.
    """
    timed = waiting | {REFERENCE}
    items = list(runs)
    result = {}
    for index in rng.permutation(len(items)):
        run = runs[items[index]]
        before_each(items[index])
        start = time.perf_counter_ns()
        run()
        elapsed = time.perf_counter_ns() - start
        if items[index] in timed:
            # Whole nanoseconds: what the file holds is then exactly what is kept here.
            result[items[index]] = round(elapsed / 1e6, 6)
    return result


def settle(bundle: Bundle, samples: Samples) -> list[str]:
    """Note which items are measured well enough, all together or after the most rounds; return the others."""
    least, most = bundle.manifest["min_rounds"], bundle.manifest["max_rounds"]
    tolerance = bundle.manifest["tolerance"]
    waiting = [item for item in bundle.items if item not in samples.finished]
    done = [item for item in waiting if samples.count(item) >= most]
    if waiting and min(map(samples.count, waiting)) >= least:
        unstable = sum(half_width(samples.taken[item]) > tolerance for item in waiting)
        if unstable <= UNSTABLE_SHARE * len(bundle.items):
            done = waiting
    if done:
        samples.finish(done, tolerance)
    return [item for item in waiting if item not in samples.finished]


def measure(
    bundle: Bundle,
    samples: Samples,
    network_bytes: int,
    deadline: float,
    report: Callable[[list[str]], object],
) -> bool:
    """Run rounds until each item is measured well enough; return whether that was before the deadline."""
    runs: dict[str, Callable[[], object]] = {}
    rounds_left = 0
    take_turns = sum(map(bundle.size, bundle.networks)) > network_bytes
    evicted = np.ones(EVICTED_BYTES // 8 if take_turns else 1)

    def evict(item: str) -> None:
        if item in bundle.networks:
            evicted.max()

    waiting = settle(bundle, samples)
    while waiting:
        if time.monotonic() >= deadline:
            return False
        rng = np.random.default_rng([bundle.manifest["seed"], samples.rounds])
        if rounds_left == 0 or not runs.keys() & set(waiting):
            # Freed before others are loaded: the two together may be too much.
            runs.clear()
            runs = load(bundle, waiting, samples, network_bytes, rng)
            rounds_left = ROUNDS_PER_LOAD
            # Collected now, so that it does not happen inside a timed run.
            gc.collect()
            gc.disable()
        samples.append(run_round(runs, set(waiting), rng, evict))
        rounds_left -= 1
        waiting = settle(bundle, samples)
        report(waiting)
    return True


class Report:
    """Lines about progress on stderr, with the least and the most time that is left."""

    def __init__(self, bundle: Bundle, samples: Samples) -> None:
        self._manifest, self._items, self._samples = bundle.manifest, len(bundle.items), samples
        self._begun = self._last = time.monotonic()
        self._known = self._taken()

    def _taken(self) -> int:
        return sum(len(times) for item, times in self._samples.taken.items() if item != REFERENCE)

    def __call__(self, waiting: list[str]) -> None:
        """Say where the measurement stands, at most every 10 seconds."""
        now = time.monotonic()
        if waiting and now < self._last + SECONDS_BETWEEN_REPORTS:
            return
        self._last = now
        least, most = (
            sum(max(0, self._manifest[name] - self._samples.count(item)) for item in waiting)
            for name in ("min_rounds", "max_rounds")
        )
        minutes_each = (now - self._begun) / 60 / max(1, self._taken() - self._known)
        say(
            f"round {self._samples.rounds}: {self._items - len(waiting)} of {self._items} items finished, "
            f"{least * minutes_each:.1f} to {most * minutes_each:.1f} minutes left"
        )


def say(text: str) -> None:
    """Print a line on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def describe_device() -> dict[str, Any]:
    """Return what identifies this machine, as `autocompress.latency.target.describe_device`."""
    return {"cpu": _cpu_model(), "cores": os.cpu_count() or 1, "architecture": platform.machine()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"


def free_memory_mb() -> int:
    """Return half of the memory that is free, in MB; `DEFAULT_MEMORY_MB` where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) // 1024 // 2
    except (OSError, ValueError, IndexError):
        pass
    return DEFAULT_MEMORY_MB


def find_bundle() -> Path:
    """Return the bundle this file lies in or beside."""
    place = Path(__file__).absolute().parent
    if place.is_file() or (place / "manifest.json").exists():
        return place
    found = sorted(place.glob("*.zip"))
    if len(found) != 1:
        raise Refused(f"there are {len(found)} zip files in {place}: say which one, `runner.py device.zip`")
    return found[0]


def main(arguments: list[str] | None = None) -> int:
    """Measure; return 0 if everything is measured, 1 if time ran out or it was interrupted, 2 if refused."""
    parser = argparse.ArgumentParser(description="Measure a bundle of autocompress on this device.")
    parser.add_argument("bundle", nargs="?", type=Path, help="zip file, or the folder it was unpacked into")
    parser.add_argument("--output", type=Path, default=Path(OUTPUT), help="file of samples; resumed if there")
    parser.add_argument("--threads", type=int, help="only checked: must be what the bundle was made for")
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="stop then; run again to go on")
    parser.add_argument("--memory", type=int, metavar="MB", help="for networks; half of what is free")
    given = parser.parse_args(arguments)
    try:
        return _main(given)
    except Refused as error:
        say(f"refused: {error}")
        return 2
    except OSError as error:
        say(f"cannot go on: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted: run the same command again to go on")
        return 1


def _main(given: argparse.Namespace) -> int:
    bundle = Bundle(given.bundle or find_bundle())
    threads = bundle.target["threads"]
    if given.threads not in (None, threads):
        raise Refused(
            f"the bundle was made for threads = {threads}, not {given.threads}: make one for a target with "
            f"{given.threads} threads"
        )
    if not given.max_minutes > 0 or (given.memory is not None and given.memory < 1):
        raise Refused("--max-minutes and --memory must be positive")
    memory_mb = given.memory or free_memory_mb()
    header = {
        "schema": SAMPLES_SCHEMA,
        "version": SAMPLES_VERSION,
        "unit": "ms",
        "target": bundle.target,
        "device": describe_device(),
        "bundle": bundle.fingerprint,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {"numpy": np.__version__, "onnxruntime": onnxruntime.__version__},
    }
    samples = Samples(given.output, header)
    say(
        f"{len(bundle.items) - len(bundle.networks)} blocks and operations, {len(bundle.networks)} networks; "
        f"{memory_mb} MB for networks at once; {threads} threads; samples go to {given.output}"
    )
    network_bytes = int(memory_mb * 1e6 / BYTES_IN_MEMORY)
    deadline = time.monotonic() + 60 * given.max_minutes
    try:
        complete = measure(bundle, samples, network_bytes, deadline, Report(bundle, samples))
    finally:
        gc.enable()
    said = "finished: give this file back" if complete else "time is up: run the same command again to go on"
    say(f"{said} ({given.output})")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
