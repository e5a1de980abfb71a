"""What the benchmarks on NAS-Bench-201 share: strategies, one search on the table, many of them that resume.

A run is a function of strategy, options, problem and seed. What is finished stands in the results file and is
not run again; `--again NAME` forgets a strategy whose code has changed.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu

from autocompress.atomic import write_text
from autocompress.budget import Constraints
from autocompress.cost import AdditiveCost, operation_cost
from autocompress.engine import search
from autocompress.evaluation.nas_bench_201_table import (
    ASSUMED_MACS_PER_SECOND,
    SIMULATED,
    NasBench201Table,
    nas_bench_201_latencies,
    nas_bench_201_table,
)
from autocompress.evaluation.tabular import TabularEvaluator
from autocompress.plugins import load_strategy
from search_spaces.nas_bench_201 import nas_bench_201

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT.parent / "shared" / "data" / "nas_bench_201"
RESULTS = ROOT / "benchmarks" / "results"
REPORTED = "c10_test_200ep"
BASELINE = "random"
SAVE_EVERY_S = 20.0
CHUNK = 4
"""Runs that a worker takes at a time."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """A strategy with its options.

    Attributes:
        name: In tables and files.
        plugin: Name of an entry point, or `module:attribute`.
        options: Keyword arguments of the strategy, as JSON.
    """

    name: str
    plugin: str
    options: str = "{}"


CONTENDERS = (
    Contender("random", "random"),
    Contender("evolution", "evolution", '{"population": 10, "sample_size": 5}'),
    Contender("evolution (defaults)", "evolution"),
    Contender("elitist", "elitist"),
    Contender("nsga2", "nsga2"),
    Contender("reinforce", "reinforce"),
    Contender("reinforce (LSTM)", "reinforce", '{"policy": "lstm"}'),
    Contender("tpe", "tpe"),
    Contender("predictor", "predictor"),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is searched.

    Attributes:
        name: In tables and files.
        objective: The column that is maximised.
        evaluations: Look-ups that a search may make.
        device: Whose latency is limited; empty for no budget.
        quantile: The budget: this quantile of the device's latency over all networks.
    """

    name: str
    objective: str
    evaluations: int
    device: str = ""
    quantile: float = 1.0


@dataclasses.dataclass(frozen=True)
class Run:
    """How one search ended.

    Attributes:
        found: The best value of the objective.
        optimum: The best value of the objective of all networks that fit.
        test: `c10_test_200ep` of the network found, in percent.
        evaluations: Look-ups made; fewer than allowed if the strategy had nothing new to propose.
        refused: Rows that were proposed, but broke the budget or had been evaluated before.
        infeasible: Evaluated networks whose latency in the table is above the budget.
        simulated_s: Seconds that 12 epochs of every network evaluated would take; assumed, not measured.
        seconds: What the search itself took.
    """

    found: float
    optimum: float
    test: float
    evaluations: int
    refused: int
    infeasible: int
    simulated_s: float
    seconds: float

    @property
    def regret(self) -> float:
        """What the search missed, in points."""
        return self.optimum - self.found


Job = tuple[Contender, Problem, int]
Runs = dict[str, dict[str, dict[int, Run]]]
"""Contender, problem, seed."""


@lru_cache(maxsize=1)
def data() -> tuple[NasBench201Table, dict[str, AdditiveCost], AdditiveCost]:
    """Return the table, the latencies by device and the MACs; read once a process."""
    table = nas_bench_201_table(FOLDER, nas_bench_201())
    latencies, macs = nas_bench_201_latencies(FOLDER, table), operation_cost(table.space, "macs")
    # Made once a space and kept; the first search should not pay for it.
    assert table.space.fingerprint
    return table, latencies, macs


def constraints_of(problem: Problem) -> Constraints:
    """Return the space under the problem's budget."""
    table, latencies, macs = data()
    if not problem.device:
        return Constraints(table.space, {"macs": macs}, {})
    latency = latencies[problem.device]
    limit = float(np.quantile(latency.of(table.codes), problem.quantile))
    return Constraints(table.space, {"latency_ms": latency, "macs": macs}, {"latency_ms": limit})


def run(job: Job) -> tuple[Job, Run]:
    """Search once."""
    contender, problem, seed = job
    table = data()[0]
    names = {problem.objective, REPORTED, SIMULATED}
    evaluator = TabularEvaluator(
        table.space, table.codes, {name: table.columns[name] for name in sorted(names)}
    )
    constraints = constraints_of(problem)
    start = time.perf_counter()
    strategy = load_strategy(contender.plugin)(
        constraints, seed=seed, objective=problem.objective, **json.loads(contender.options)
    )
    result = search(
        strategy, constraints, evaluator, evaluations=problem.evaluations, objective=problem.objective
    )
    seconds = time.perf_counter() - start
    rows = table.space.encode([trial.architecture for trial in result.trials])
    best = result.best({})
    return job, Run(
        found=best.metrics[problem.objective],
        optimum=evaluator.optimum(problem.objective, constraints)[1],
        test=best.metrics[REPORTED],
        evaluations=len(result.trials),
        refused=result.asked - len(result.trials),
        infeasible=int((~constraints.feasible(rows)).sum()),
        simulated_s=math.fsum(trial.metrics[SIMULATED] for trial in result.trials),
        seconds=seconds,
    )


def parser(description: str, name: str, *, seeds: int) -> argparse.ArgumentParser:
    """Return the options of both benchmarks."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument(
        "--quick", action="store_true", help="3 seeds, nothing is written unless --output is given"
    )
    result.add_argument(
        "--seeds", type=int, default=seeds, help=f"runs of each strategy and problem ({seeds})"
    )
    result.add_argument(
        "--strategies", help="names, comma-separated; default: all that the results or code have"
    )
    result.add_argument(
        "--add", action="append", default=[], metavar="NAME=PLUGIN{JSON}", help="another strategy"
    )
    result.add_argument(
        "--again", action="append", default=[], metavar="NAME", help="forget its finished runs"
    )
    result.add_argument("--problems", default="", metavar="TEXT", help="only those with this in their names")
    result.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    result.add_argument("--output", type=Path, help=f"default: benchmarks/results/{name}.json")
    return result


def contenders_of(options: argparse.Namespace) -> list[Contender]:
    """Return the strategies that the command line asks for."""
    known = {contender.name: contender for contender in CONTENDERS}
    for text in options.add:
        name, _, rest = text.partition("=")
        plugin, brace, settings = rest.partition("{")
        known[name] = Contender(name, plugin, json.dumps(json.loads(brace + settings or "{}")))
    chosen = list(known) if options.strategies is None else options.strategies.split(",")
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise SystemExit(f"there is no strategy {unknown[0]!r} here; there are {', '.join(known)}, and --add")
    return [known[name] for name in chosen]


def problems_of(options: argparse.Namespace, problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems that the command line asks for."""
    chosen = [problem for problem in problems if options.problems in problem.name]
    if not chosen:
        named = ", ".join(problem.name for problem in problems)
        raise SystemExit(f"no problem has {options.problems!r} in its name; there are {named}")
    return chosen


def run_all(
    path: Path | None,
    contenders: Sequence[Contender],
    problems: Sequence[Problem],
    seeds: int,
    *,
    workers: int,
    again: Iterable[str],
    describe: Callable[[], Mapping[str, Any]],
) -> tuple[Runs, dict[str, Any]]:
    """Run what is missing in the results file, on several cores, and keep the file up to date.

    Returns:
        All runs of the file, and what it says of each contender: plug-in, options, commit, machine.
    """
    # Before the workers start: two processes of one thread each use two cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    runs, about = _load(path)
    for contender in contenders:
        stated = {"plugin": contender.plugin, "options": json.loads(contender.options)}
        known = about.get(contender.name, stated)
        if contender.name in again or any(known[key] != value for key, value in stated.items()):
            runs.pop(contender.name, None)
        if contender.name not in runs:
            runs[contender.name] = {}
            about[contender.name] = {**stated, **describe()}
    jobs: list[Job] = [
        (contender, problem, seed)
        for contender in contenders
        for problem in problems
        for seed in range(seeds)
        if seed not in runs[contender.name].get(problem.name, {})
    ]
    saved = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for done, ((contender, problem, seed), outcome) in enumerate(
            pool.imap_unordered(run, jobs, chunksize=CHUNK), start=1
        ):
            runs[contender.name].setdefault(problem.name, {})[seed] = outcome
            if time.monotonic() - saved > SAVE_EVERY_S or done == len(jobs):
                _save(path, runs, about)
                saved = time.monotonic()
                print(f"{done} of {len(jobs)} runs ({contender.name}, {problem.name})", flush=True)
    return runs, about


def _load(path: Path | None) -> tuple[Runs, dict[str, Any]]:
    if path is None or not path.exists():
        return {}, {}
    payload = json.loads(path.read_text(encoding="utf-8"))
    runs = {
        contender: {
            problem: {int(seed): Run(*values) for seed, values in by_seed.items()}
            for problem, by_seed in by_problem.items()
        }
        for contender, by_problem in payload["runs"].items()
    }
    return runs, payload["contenders"]


def _save(path: Path | None, runs: Runs, about: Mapping[str, Any]) -> None:
    if path is None:
        return
    payload = {
        "benchmark": path.stem,
        "columns of a run": [field.name for field in dataclasses.fields(Run)],
        "simulated_s": f"assumed: {ASSUMED_MACS_PER_SECOND:g} multiply-accumulates a second",
        "contenders": about,
        "runs": {
            contender: {
                problem: {str(seed): _rounded(by_seed[seed]) for seed in sorted(by_seed)}
                for problem, by_seed in by_problem.items()
            }
            for contender, by_problem in runs.items()
        },
    }
    # One run a line.
    text = re.sub(
        r"\[\s+([^][{}]*?)\s+\]",
        lambda found: f"[{' '.join(found[1].split())}]",
        json.dumps(payload, indent=1),
    )
    write_text(path, text + "\n")


def _rounded(outcome: Run) -> list[float]:
    return [value if isinstance(value, int) else round(value, 4) for value in dataclasses.astuple(outcome)]


def against(values: Sequence[float], baseline: Sequence[float], *, larger_is_better: bool) -> float:
    """Return the one-sided p-value of the Mann-Whitney U test that values are better than the baseline's."""
    side = "greater" if larger_is_better else "less"
    return float(mannwhitneyu(values, baseline, alternative=side).pvalue)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def made_by(about: Mapping[str, Any]) -> str:
    """Return a list of strategies: plug-in, options, commit, machine."""
    return "\n".join(
        f"- {name}: `{stated['plugin']}` {stated['options']}, commit {stated['commit'][:10]}"
        f"{' with changes' if stated['uncommitted_changes'] else ''}, {stated['date']}, "
        f"{stated['machine']['processor']}, {stated['machine']['cores']} cores"
        for name, stated in about.items()
    )
