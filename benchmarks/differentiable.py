"""Differentiable searches on NAS-Bench-201 and CIFAR-10: what the derived cells are worth, by the table.

    python benchmarks/differentiable.py            # CPU size: an hour and a half on 2 cores; resumes
    python benchmarks/differentiable.py --quick    # a smoke test of a minute
    python benchmarks/differentiable.py --full     # the published schedules; for a GPU

Each method trains a supernet of the 15,625 cells and its architecture parameters on halves of the training
images; the cell it derives, without any budget unless one is named, is looked up: test accuracy after 200
epochs, which no search sees. Beside each stands random search for as many seconds: random cells trained alone
on the same halves, the best one by the other half. The CPU size is smaller in everything (images, channels,
cells, epochs), and says so; the table's accuracies are those of full networks in either case. Seconds are
processor time on one thread, so that other work on the machine takes nothing from either side.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, SHARED, cifar10_folder, environment

from autocompress.atomic import read_json, write_json, write_text
from autocompress.budget import Budget, Constraints
from autocompress.cost import operation_cost
from autocompress.distill.finetune import finetune
from autocompress.errors import StorageError
from autocompress.evaluation.nas_bench_201_table import nas_bench_201_table
from autocompress.network import build_network
from autocompress.plugins import load_strategy
from autocompress.recipe import FinetuneSettings, TaskSettings, TrainSettings
from autocompress.space import SearchSpace
from autocompress.training.bilevel import halves, train_relaxed
from autocompress.training.data import DataSet, load_data
from autocompress.training.task import load_task
from search_spaces.nas_bench_201 import CHOICES, arch_str, nas_bench_201

NAME = "differentiable"
SEEDS = (0, 1, 2)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "DARTS, first order": ("darts", {"eigenvalue": False}),
    "DARTS, second order": ("darts", {"order": 2, "eigenvalue": False}),
    "DARTS, early stopping": ("darts", {"early_stopping": "eigenvalue"}),
    "PC-DARTS": ("pc_darts", {"eigenvalue": False}),
    "P-DARTS": ("p_darts", {"eigenvalue": False}),
    "GDAS (hard Gumbel)": ("gumbel", {}),
    "SNAS (soft Gumbel)": ("gumbel", {"hard": False}),
    "ProxylessNAS": ("proxyless", {}),
    # What avoids identities: of the same trainings, other cells are derived; or a budget that is to be used.
    "DARTS, at most 2 skips": ("darts", {"eigenvalue": False, "max_skips": 2}),
    "GDAS, at most 2 skips": ("gumbel", {"max_skips": 2}),
    "ProxylessNAS, at most 2 skips": ("proxyless", {"max_skips": 2}),
    "GDAS, 60 % of the MACs": ("gumbel", {"budget": "macs=60%"}),
    "ProxylessNAS, 60 % of the MACs": ("proxyless", {"budget": "macs=60%"}),
}
REPORTED = "c10_test_200ep"


@dataclass(frozen=True)
class Size:
    """What is trained, and for how long."""

    images: int | None
    channels: int
    cells: int
    resolution: int
    epochs: int
    alone_epochs: int
    batch: int
    learning_rate: float
    architecture_rate: float


CPU = Size(4000, 8, 1, 16, 30, 3, 64, 0.05, 1e-2)
QUICK = Size(400, 4, 1, 8, 1, 1, 64, 0.05, 3e-3)
FULL = Size(None, 16, 5, 32, 50, 12, 64, 0.025, 3e-4)


class Benchmark:
    """All searches of one size; what is done stands in a file."""

    def __init__(self, size: Size, path: Path) -> None:
        """Load data and table."""
        self.size, self.path = size, path
        torch.set_num_threads(1)
        self.data: DataSet = load_data("cifar10", folder=cifar10_folder(), limit=size.images, validation=0.1)
        self.space: SearchSpace = nas_bench_201(
            channels=size.channels, cells=size.cells, resolution=size.resolution
        )
        self.task = load_task(TaskSettings())
        table = nas_bench_201_table(SHARED / "nas_bench_201", nas_bench_201())
        self.accuracy = {
            tuple(row): value
            for row, value in zip(table.codes.tolist(), table.columns[REPORTED], strict=True)
        }
        self.found: dict[str, Any] = {}
        if path.exists():
            self.found = read_json(path, StorageError, "results")["found"]

    def settings(self, epochs: int) -> dict[str, Any]:
        """Return what all trainings share."""
        return {
            "epochs": epochs,
            "batch_size": self.size.batch,
            "learning_rate": self.size.learning_rate,
            "warmup_epochs": 0.0,
            "weight_decay": 3e-4,
            "label_smoothing": 0.0,
            "precision": "fp32",
            "memory_format": "contiguous",
        }

    def of(self, codes: Any) -> dict[str, Any]:
        """Return a cell with what the table says of it."""
        (arch,) = self.space.decode(codes)
        cell = arch_str(arch)
        return {
            "cell": cell,
            "test": float(self.accuracy[tuple(codes[0].tolist())]),
            "skips": cell.count("skip_connect"),
            "convolutions": cell.count("nor_conv"),
        }

    def search(self, method: str, seed: int) -> dict[str, Any]:
        """Train and derive."""
        plugin, options = METHODS[method]
        options = dict(options)
        macs = operation_cost(self.space, "macs")
        limits = Constraints(self.space, {"macs": macs}, {})
        if budget := options.pop("budget", None):
            limits = Budget.parse(budget).resolve(self.space, [macs])
        strategy = load_strategy(plugin)(
            limits, seed=seed, learning_rate=self.size.architecture_rate, **options
        )
        supernet = self.space.supernet()
        start = time.process_time()
        settings = TrainSettings(**self.settings(self.size.epochs), seed=seed)
        train_relaxed(supernet, strategy, self.data, self.task, settings, seed=seed)  # type: ignore[arg-type]
        seconds = time.process_time() - start
        notes = strategy.notes["relaxation"]  # type: ignore[attr-defined]
        return {
            **self.of(strategy.ask(1)),
            "seconds": seconds,
            "entropy": notes["entropy"],
            "probability of skips": notes["skips"],
        }

    def random(self, seed: int, seconds: float) -> dict[str, Any]:
        """Train random cells alone until the time is over; return the one that is best on the other half."""
        rng = np.random.default_rng(1000 + seed)
        ours, theirs = halves(self.data, 0.5)
        judged = DataSet(**{**vars(ours), "validation": theirs.train})
        start, tried = time.process_time(), []
        while not tried or time.process_time() - start < seconds:
            row = self.space.sample(1, rng)
            torch.manual_seed(seed)
            network = build_network(self.space.operations(row))
            scored = finetune(
                network,
                judged,
                self.task,
                FinetuneSettings(**self.settings(self.size.alone_epochs), seed=seed),
                resolution=(self.size.resolution, self.size.resolution),
            )
            tried.append((scored.mean, row))
        _, best = max(tried, key=lambda pair: pair[0])
        return {**self.of(best), "seconds": time.process_time() - start, "cells": len(tried)}

    def everything(self, methods: list[str]) -> None:
        """Do what is missing, seed by seed."""
        for seed in SEEDS:
            for method in methods:
                self._once(f"{method} {seed}", lambda m=method, s=seed: self.search(m, s))  # type: ignore[misc]
                if {"max_skips", "budget"} & METHODS[method][1].keys():
                    continue
                taken = self.found[f"{method} {seed}"]["seconds"]
                self._once(
                    f"random beside {method} {seed}",
                    lambda s=seed, t=taken: self.random(s, t),  # type: ignore[misc]
                )

    def _once(self, name: str, compute: Any) -> None:
        if name not in self.found:
            self.found[name] = {**compute(), "commit": environment()["commit"]}
            write_json(
                self.path, {"environment": environment(), "size": asdict(self.size), "found": self.found}
            )
            print(f"{name}: {self.found[name]}", flush=True)

    def table(self) -> str:
        """Return the results as Markdown."""
        lines = [
            "# Differentiable searches, NAS-Bench-201 and CIFAR-10",
            "",
            f"Schedule: {asdict(self.size)}. Test accuracy after 200 epochs of the derived cell, by the "
            "table, in percent: mean ± standard deviation over the seeds, and each.",
            "",
            "| method | test accuracy | each | skips of 6 | convolutions of 6 | entropy | s | random search "
            "in as many s |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method in METHODS:
            runs = [self.found[f"{method} {s}"] for s in SEEDS if f"{method} {s}" in self.found]
            beside = [self.found.get(f"random beside {method} {s}") for s in SEEDS]
            if not runs:
                lines.append(f"| {method} | not run yet |" + " |" * 6)
                continue
            each = ", ".join(format(run["test"], ".2f") for run in runs)
            lines.append(
                f"| {method} | {spread([run['test'] for run in runs])} | "
                f"{each} | "
                f"{np.mean([run['skips'] for run in runs]):.1f} | "
                f"{np.mean([run['convolutions'] for run in runs]):.1f} | "
                f"{np.mean([run['entropy'] for run in runs]):.2f} | "
                f"{np.mean([run['seconds'] for run in runs]):.0f} | "
                f"{spread([run['test'] for run in beside if run])} |"
            )
        for name, option in {"all 3x3 convolutions": "nor_conv_3x3", "all skips": "skip_connect"}.items():
            codes = self.space.encode([self.space.architecture(dict.fromkeys(CHOICES, option))])
            lines.append(f"| {name} | {self.of(codes)['test']:.2f} |" + " |" * 6)
        return "\n".join([*lines, ""])


def spread(values: list[float]) -> str:
    """Return mean and standard deviation as text; nothing of no values."""
    if not values:
        return ""
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}"


def main() -> None:
    """Run what is missing, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smoke size; written to runs/")
    parser.add_argument("--full", action="store_true", help="the published schedules")
    parser.add_argument("--methods", help="names, separated by semicolons")
    parser.add_argument("--table", action="store_true", help="write the table of what is there, run nothing")
    options = parser.parse_args()
    size: Mapping[bool, Size] = {options.quick: QUICK, options.full: FULL}
    name = NAME + ("_quick" if options.quick else "_full" if options.full else "")
    path = (Path("runs") if options.quick else RESULTS) / f"{name}.json"
    benchmark = Benchmark(size.get(True, CPU), path)
    if not options.table:
        benchmark.everything(options.methods.split(";") if options.methods else list(METHODS))
    text = benchmark.table()
    write_text(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
