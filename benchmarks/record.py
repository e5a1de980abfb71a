"""What every benchmark shares: one core, repeated timing, a table on the screen, a dated file of results."""

import argparse
import dataclasses
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import threadpoolctl
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats

from autocompress.atomic import write_json
from autocompress.latency.target import describe_device

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results"


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Wall-clock and processor time of one call, over repetitions: median, least, greatest."""

    median: float
    least: float
    greatest: float
    processor_median: float
    repeats: int


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of a benchmark.

    Attributes:
        name: What was measured.
        value: Median over the repetitions.
        unit: Its unit.
        low: Worst or least of the repetitions.
        high: Best or greatest of the repetitions.
        target: What the figure should reach, as text; empty if nothing was promised.
        reached: Whether it does; `None` without a target.
    """

    name: str
    value: float
    unit: str
    low: float
    high: float
    target: str = ""
    reached: bool | None = None


def parser(description: str, *, repeats: int = 7) -> argparse.ArgumentParser:
    """Return the options that all benchmarks have: `--quick`, `--repeats`, `--output`."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--quick", action="store_true", help="smoke size: checks that it runs, not how fast")
    result.add_argument("--repeats", type=int, default=repeats, help="repetitions; the median counts")
    result.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/NAME.json)")
    return result


def use_one_core() -> None:
    """Pin this process to one core and every library to one thread."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    threadpoolctl.threadpool_limits(1)
    torch.set_num_threads(1)


def timed(function: Callable[[], object], *, repeats: int) -> Seconds:
    """Call once to warm up, then `repeats` times."""
    function()
    walls, processors = [], []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        function()
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return Seconds(statistics.median(walls), min(walls), max(walls), statistics.median(processors), repeats)


def rate(name: str, count: int, seconds: Seconds, unit: str, *, at_least: float | None = None) -> Figure:
    """Return how many a second, from the time that `count` took."""
    value = count / seconds.median
    reached = None if at_least is None else value >= at_least
    target = "" if at_least is None else f">= {at_least:,.0f}"
    return Figure(name, value, unit, count / seconds.greatest, count / seconds.least, target, reached)


def spread(values: Sequence[float], sign: str = "") -> str:
    """Return mean ± standard deviation, as a table shows them; empty without values."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation}"


def counted(values: Sequence[float], sign: str = "") -> str:
    """Return `spread`, and of how many."""
    return f"{spread(values, sign)} ({len(values)})" if values else ""


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of paired differences, by Student's t; `None` without a spread."""
    if len(differences) < 2 or not statistics.stdev(differences):
        return None
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * float(stats.sem(differences))
    mean = statistics.mean(differences)
    return mean - half, mean + half


def interval_text(differences: Sequence[float]) -> str:
    """Return `interval`, as a table shows it; empty without one."""
    known = interval(differences)
    return "" if known is None else f"({known[0]:+.2f} to {known[1]:+.2f})"


def cifar10_folder() -> Path:
    """Return a folder with CIFAR-10 in its official layout, unpacked from the shared data once."""
    folder = ROOT / "runs" / "cifar-10"
    if not (folder / "cifar-10-batches-bin" / "test_batch.bin").exists():
        script = SHARED / "unpack_cifar10.py"
        if not script.exists():
            raise SystemExit(f"this benchmark needs CIFAR-10: {script} is absent")
        subprocess.run([sys.executable, str(script), str(folder)], check=True)
    return folder


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def environment() -> dict[str, Any]:
    """Return date, commit, machine and versions, for a file of results."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "machine": {
            "processor": describe_device()["cpu"],
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "load_average": list(os.getloadavg()),
        },
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("autocompress", "numpy", "torch")},
        },
    }


def report(
    name: str,
    figures: Sequence[Figure],
    *,
    settings: Mapping[str, Any],
    options: argparse.Namespace,
) -> None:
    """Print the figures as a table and write them with machine, commit, date and versions.

    A `--quick` run is printed only, unless `--output` says where to.
    """
    table = Table(title=f"{name}{' (quick: not a measurement)' if options.quick else ''}")
    for column in ("figure", "median", "range", "unit", "target", "reached"):
        table.add_column(column, justify="right" if column in ("median", "range") else "left")
    for figure in figures:
        reached = {None: "", True: "yes", False: "NO"}[figure.reached]
        spread = f"{figure.low:,.4g} .. {figure.high:,.4g}"
        table.add_row(figure.name, f"{figure.value:,.4g}", spread, figure.unit, figure.target, reached)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
    for key, value in settings.items():
        console.print(f"{key}: {value}", highlight=False)
    if options.quick and options.output is None:
        return
    path = options.output or RESULTS / f"{name}.json"
    payload = {
        "benchmark": name,
        "quick": options.quick,
        **environment(),
        "settings": dict(settings),
        "figures": [dataclasses.asdict(figure) for figure in figures],
    }
    write_json(path, payload)
    console.print(f"written to {path}")
