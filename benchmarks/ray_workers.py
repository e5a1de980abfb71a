"""What Ray's workers give and cost: speed, overhead, killed workers, memory.

    python benchmarks/ray_workers.py           # some 15 minutes on a quiet machine of two cores
    python benchmarks/ray_workers.py --quick   # a smoke test of two minutes

The supernet (`mobilenet_v3`, preset tiny, in its given weights: speed does not depend on them) scores slices
on CIFAR-10's held-out training images.

- Speed: two workers of one thread each against one such worker, in the same search, rounds interleaved; and
  both ways of asking. Beside it, what two processes without Ray reach: cores of one machine share its memory.
- Overhead: an evaluator that does nothing, through one worker.
- Faults: a search of 1,000 networks whose workers are killed (SIGKILL), one in five of their evaluations, and
  the same search undisturbed: networks, scores and the best.
- Memory: what a worker holds for itself alone (`Private` of /proc), with weights of 400 MB and without.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, cifar10_folder, environment
from torch import nn

from autocompress.atomic import write_json, write_text
from autocompress.budget import Budget, Constraints
from autocompress.cost import Values, operation_cost
from autocompress.distributed.ray_evaluator import RayEvaluator
from autocompress.engine import search
from autocompress.evaluation.supernet import SupernetEvaluator
from autocompress.evaluator import Evaluator
from autocompress.recipe import TaskSettings
from autocompress.space import Codes
from autocompress.testing.toys import toy_constraints, toy_score
from autocompress.training.data import load_data
from autocompress.training.evaluate import calibration_batches
from autocompress.training.task import load_task
from search_spaces.mobilenet_v3 import mobilenet_v3
from strategies.evolution import AgingEvolution

SPEED, OVERHEAD_MS, MEMORY = 1.7, 5.0, 0.10
WEIGHTS_MB = 400


class Slices:
    """A supernet of random weights on CIFAR-10, and the budget of a search of it."""

    def __init__(self, validation: int) -> None:
        torch.manual_seed(0)
        data = load_data("cifar10", folder=cifar10_folder(), limit=2000 + validation, validation=validation)
        space = mobilenet_v3(preset="tiny", in_channels=3, classes=10)
        self.evaluator = SupernetEvaluator(
            space.supernet(), data, load_task(TaskSettings()), calibration_batches(data, 256, seed=0)
        )
        self.limits = Budget.parse("macs=60%").resolve(space, [operation_cost(space, "macs")])


def evaluated_a_second(evaluator: Evaluator, limits: Constraints, count: int, *, asynchronous: bool) -> float:
    """Return sub-networks a second of a search."""
    strategy = AgingEvolution(limits, seed=0, population=20)
    start = time.perf_counter()
    result = search(strategy, limits, evaluator, evaluations=count, asynchronous=asynchronous)
    return len(result.trials) / (time.perf_counter() - start)


def speed(rounds: int, count: int, validation: int) -> dict[str, Any]:
    """Compare one worker with two, batch and asynchronous, interleaved; each search after a first one."""
    slices, found = Slices(validation), dict[str, list[float]]()
    ways: dict[str, tuple[int, bool]] = {
        "one worker": (1, False),
        "one worker, asynchronous": (1, True),
        "two workers": (2, False),
        "two workers, asynchronous": (2, True),
    }
    for _ in range(rounds):
        for workers in (1, 2):
            with RayEvaluator(slices.evaluator, workers=workers) as spread:
                list(spread.each(slices.limits.sample(2 * workers, np.random.default_rng(0))))
                for name, (needed, asynchronous) in ways.items():
                    if needed == workers:
                        rate = evaluated_a_second(spread, slices.limits, count, asynchronous=asynchronous)
                        found.setdefault(name, []).append(rate)
                        print(f"{name}: {rate:.2f} a second", flush=True)
        for processes in (1, 2):
            rate = bare(processes, count, validation)
            found.setdefault(f"{processes} processes without Ray", []).append(rate)
            print(f"{processes} processes without Ray: {rate:.2f} a second", flush=True)
    return found


BARE = """
import sys, time
sys.path.insert(0, {folder!r})
import numpy as np, torch
from ray_workers import Slices
torch.set_num_threads(1)
slices = Slices({validation})
rows = slices.limits.sample({count} + 2, np.random.default_rng({seed}))
slices.evaluator(rows[:1])
print("ready", flush=True)
sys.stdin.readline()
for index in range(2, len(rows)):
    slices.evaluator(rows[index : index + 1])
print("done", flush=True)
"""


def bare(processes: int, count: int, validation: int) -> float:
    """Return sub-networks a second of processes that know nothing of each other: what the machine gives."""
    share = count // processes
    started = []
    for seed in range(processes):
        code = BARE.format(folder=str(Path(__file__).parent), validation=validation, count=share, seed=seed)
        command = [sys.executable, "-c", code]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for process in started:
        process.stdout.readline()  # type: ignore[union-attr]
    start = time.perf_counter()
    for process in started:
        process.stdin.write("go\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    for process in started:
        process.stdout.readline()  # type: ignore[union-attr]
    seconds = time.perf_counter() - start
    for process in started:
        process.communicate()
    return share * processes / seconds


class Toy:
    """Scores toy networks in closed form."""

    paid = True

    def __init__(self, folder: Path, killed: float) -> None:
        self.folder, self.killed = folder, killed

    def __call__(self, codes: Codes) -> Mapping[str, Values]:
        """Score, or end the process as the kernel does where memory runs out."""
        if self.killed and np.random.default_rng().random() < self.killed:
            (self.folder / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"accuracy": toy_score(toy_constraints().space, codes)}


class Nothing:
    """Costs nothing."""

    paid = True

    def __call__(self, codes: Codes) -> Mapping[str, Values]:
        """Return at once."""
        return {"accuracy": np.zeros(len(codes))}


def overhead(count: int) -> dict[str, float]:
    """Return milliseconds an evaluation that takes no time, one after another and queued."""
    rows = np.zeros((count, 5), dtype=np.int64)
    with RayEvaluator(Nothing(), workers=1) as spread:
        list(spread.each(rows[:50]))
        start = time.perf_counter()
        for index in range(count):
            spread.submit(rows[index : index + 1])
            spread.result()
        alone = 1000 * (time.perf_counter() - start) / count
        start = time.perf_counter()
        list(spread.each(rows))
        queued = 1000 * (time.perf_counter() - start) / count
    return {"one after another": alone, "queued": queued}


def faults(count: int) -> dict[str, Any]:
    """Search with workers that are killed and with others; compare everything."""
    limits, found = toy_constraints(), {}
    for name, killed in (("undisturbed", 0.0), ("killed", 0.2)):
        with (
            tempfile.TemporaryDirectory() as marks,
            RayEvaluator(Toy(Path(marks), killed), workers=2) as spread,
        ):
            start = time.perf_counter()
            strategy = AgingEvolution(limits, seed=0, population=20)
            result = search(strategy, limits, spread, evaluations=count)
            deaths = len(list(Path(marks).iterdir()))
        found[name] = {
            "trials": len(result.trials),
            "failed": sum(bool(trial.error) for trial in result.trials),
            "deaths": deaths,
            "seconds": time.perf_counter() - start,
            "best": result.best().architecture.key,
            "all": [[t.architecture.key, dict(t.metrics)] for t in result.trials],
        }
        print(name, {key: value for key, value in found[name].items() if key != "all"}, flush=True)
    same = found["killed"].pop("all") == found["undisturbed"].pop("all")
    return {**found, "same networks and scores": same}


class Heavy:
    """Has weights, reads them all, and says what memory its process has for itself."""

    paid = True

    def __init__(self, megabytes: int) -> None:
        torch.manual_seed(0)
        self.network = nn.Linear(1000, max(1, megabytes * 250), bias=False)

    def __call__(self, codes: Codes) -> Mapping[str, Values]:
        """Read the weights; return what is private, in MB."""
        with torch.no_grad():
            total = float(self.network.weight.sum())
        kilobytes = dict.fromkeys(("Private_Clean", "Private_Dirty"), 0)
        for line in Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]:
            name, value, *_ = line.replace(":", "").split()
            if name in kilobytes:
                kilobytes[name] = int(value)
        private = sum(kilobytes.values()) / 1000
        return {"accuracy": np.full(len(codes), total), "private_mb": np.full(len(codes), private)}


def memory() -> dict[str, Any]:
    """Return private memory of each of two workers, with heavy weights and with light ones."""
    rows, found = np.arange(40)[:, None], {}
    for name, megabytes in (("light", 1), ("heavy", WEIGHTS_MB)):
        with RayEvaluator(Heavy(megabytes), workers=2) as spread:
            columns = spread(rows)
        found[name] = sorted({round(float(value)) for value in columns["private_mb"]})
    most = max(found["heavy"]) - min(found["light"])
    return {"private MB": found, "weights MB": WEIGHTS_MB, "of the weights, at most": most / WEIGHTS_MB}


@contextmanager
def noted(found: dict[str, Any], path: Path) -> Iterator[Callable[[str, Any], None]]:
    """Give what keeps a result at once."""

    def note(name: str, value: Any) -> None:
        found[name] = value
        write_json(path, {"environment": environment(), "found": found})
        write_text(path.with_suffix(".md"), table(found))

    yield note


def table(found: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = ["# Workers of Ray", ""]
    if rates := found.get("speed"):
        lines += ["| sub-networks a second | median | rounds |", "|---|---|---|"]
        medians = {name: statistics.median(values) for name, values in rates.items()}
        for name, values in rates.items():
            lines.append(f"| {name} | {medians[name]:.2f} | {', '.join(f'{v:.2f}' for v in values)} |")
        for name in ("two workers", "two workers, asynchronous"):
            ratios = [b / a for a, b in zip(rates["one worker"], rates[name], strict=True)]
            lines += ["", f"{name} against one: {statistics.median(ratios):.2f}x (asked: {SPEED}x)."]
        pairs = zip(rates["1 processes without Ray"], rates["2 processes without Ray"], strict=True)
        lines += [
            "",
            f"Two processes without Ray against one: {statistics.median(b / a for a, b in pairs):.2f}x.",
        ]
    if taken := found.get("overhead"):
        shown = ", ".join(f"{name} {value:.2f} ms" for name, value in taken.items())
        lines += ["", f"Overhead of an evaluation: {shown} (asked: at most {OVERHEAD_MS} ms)."]
    if killed := found.get("faults"):
        lines += ["", "| search | trials | failed | workers killed | s | best |", "|---|---|---|---|---|---|"]
        for name in ("undisturbed", "killed"):
            row = killed[name]
            cells = [name, row["trials"], row["failed"], row["deaths"], round(row["seconds"]), row["best"]]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines += [
            "",
            f"Same networks with the same scores, all of them: {killed['same networks and scores']}.",
        ]
    if held := found.get("memory"):
        lines += [
            "",
            f"Private memory of two workers: {held['private MB']['light']} MB without weights, "
            f"{held['private MB']['heavy']} MB with {held['weights MB']} MB of them: at most "
            f"{held['of the weights, at most']:.1%} of the weights (asked: {MEMORY:.0%}).",
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    given = parser.parse_args()
    path = Path("/tmp/ray_workers_quick.json") if given.quick else RESULTS / "ray_workers.json"
    torch.set_num_threads(1)
    # Workers import the classes of this file.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    found: dict[str, Any] = {}
    with noted(found, path) as note:
        note("overhead", overhead(200 if given.quick else 2000))
        note("memory", memory())
        note("speed", speed(1, 8, 500) if given.quick else speed(5, 40, 1000))
        note("faults", faults(30 if given.quick else 1000))
    print(table(found))


if __name__ == "__main__":
    main()
