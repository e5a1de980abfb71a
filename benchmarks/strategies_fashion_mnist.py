"""Every search strategy on one trained supernet of Fashion-MNIST, two latency budgets, three seeds.

    python benchmarks/strategies_fashion_mnist.py            # an hour on 2 cores; goes on where it stopped
    python benchmarks/strategies_fashion_mnist.py --quick    # a smoke test of a few minutes

The supernet, the data and the decisions are those of `fashion_mnist.py`: strategies score slices on held-out
training images, with their default options; none is told anything first, and each evaluates as many networks.
Beside them stand the uniform-scaled network and random networks at the same budget. Each winner is finetuned
with distillation from the largest network; the test set is read for the table only.
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fashion_mnist import FULL, QUICK, SEEDS, Benchmark
from record import RESULTS, SHARED, environment

from autocompress.atomic import write_json, write_text
from autocompress.budget import Constraints
from autocompress.compare.cells import Cell
from autocompress.compare.statistics import pairs, standings, verdicts
from autocompress.engine import search
from autocompress.latency.check import measured_before
from autocompress.latency.measure import measure_networks
from autocompress.latency.runtime import pinned, prepare
from autocompress.plugins import load_strategy
from autocompress.stages import profile, target

BUDGETS = ("50%", "70%")
STRATEGIES = ("random", "evolution", "elitist", "nsga2", "reinforce", "tpe", "predictor")


class Strategies(Benchmark):
    """All searches, in the work folder of `fashion_mnist.py`'s supernet or another."""

    def everything(self) -> None:
        """Do all that is missing."""
        profile(self.run, self.shown)
        self.once("largest", lambda: self.slice_test(self.run.space.largest()))
        for budget in BUDGETS:
            limits = self.constraints(budget)
            self.once(f"{budget} uniform", partial(self._uniform, limits))
            drawn = limits.sample(self.size.random, np.random.default_rng(17), at_least=0.9)
            for index, row in enumerate(drawn):
                self.once(f"{budget} network {index}", partial(self.slice_test, row))
            for seed in SEEDS:
                for strategy in STRATEGIES:
                    self.once(f"{budget} {strategy} {seed}", partial(self._by, strategy, limits, seed))
        winners = [
            (f"{name} finetuned", "finetuned", np.array(found["codes"]), 0)
            for name, found in sorted(self.found.items())
            if isinstance(found, dict) and "scores" in found and "finetuned" not in name
        ]
        self.trainings(winners)
        self.once("measured", self._measure)

    def _by(self, strategy: str, limits: Constraints, seed: int) -> dict[str, Any]:
        made = load_strategy(strategy)(limits, seed=seed, objective="accuracy")
        result = search(made, limits, self.score, evaluations=self.size.evaluations)
        best = result.best()
        return {
            **self.slice_test(self.run.space.encode([best.architecture])),
            "validation": best.metrics["accuracy"],
            "scores": [trial.metrics.get("accuracy") for trial in result.trials],
        }

    def _measure(self) -> dict[str, Any]:
        """Measure the latency of all winners, beside networks that the table was checked on."""
        where, space = target(self.run), self.run.space
        rows = {found["key"]: found["codes"] for found in self.found.values() if "scores" in found}
        checked = measured_before(profile(self.run, self.shown), space, self.run.recipe.profile.seed)
        with pinned(where):
            runs = {key: prepare(space.operations(np.array(codes)), where) for key, codes in rows.items()}
            runs |= {name: prepare(blocks, where) for name, (blocks, _) in checked.items()}
            found = measure_networks(runs, target=where, count=60)
        factors = [found[name].median_ms / then_ms for name, (_, then_ms) in checked.items()]
        return {
            "factor": float(np.median(factors)),
            "latency_ms": {key: found[key].median_ms for key in rows},
        }

    def table(self) -> str:
        """Return the tables of what is there, as Markdown."""
        lines = []
        if "largest" in self.found:
            lines.append(f"Largest network as a slice: test {self.found['largest']['test']:.4f}.")
        for budget in BUDGETS:
            lines += [
                "",
                f"## {budget} of the largest network's predicted latency",
                "",
                *self._budget(budget),
            ]
        if measured := self.found.get("measured"):
            ratios = [
                measured["latency_ms"][found["key"]] / measured["factor"] / found["latency_ms"] - 1
                for found in self.found.values()
                if "scores" in found
            ]
            lines += [
                "",
                f"Measured latencies of the winners, at the machine's speed of the profile (it took "
                f"{measured['factor']:.3f} times as long when they were measured), differ from their "
                f"predictions by {100 * np.mean(np.abs(ratios)):.1f} % on average, "
                f"{100 * np.max(np.abs(ratios)):.1f} % at most.",
            ]
        return "\n".join(lines)

    def _budget(self, budget: str) -> list[str]:
        lines = [
            "| network | best on validation | spread | test as a slice | spread | test finetuned | spread |",
            "|---|---|---|---|---|---|---|",
        ]
        cells = []
        for strategy in STRATEGIES:
            found = [self.found.get(f"{budget} {strategy} {seed}") for seed in SEEDS]
            done = [entry for entry in found if entry]
            tuned = [self.found.get(f"{budget} {strategy} {seed} finetuned") for seed in SEEDS]
            if len(done) < len(SEEDS):
                lines.append(f"| {strategy} | not run yet |" + " |" * 5)
                continue
            cells += [
                Cell(strategy, seed, tuple(entry["scores"]), (0.0,) * len(entry["scores"]), 0.0, entry["key"])
                for seed, entry in zip(SEEDS, done, strict=True)
            ]
            shown = [
                spread([entry["validation"] for entry in done]),
                spread([entry["test"] for entry in done]),
            ]
            tests = [entry["test"] for entry in tuned if entry]
            shown.append(spread(tests) if len(tests) == len(SEEDS) else "not run yet | ")
            lines.append(f"| {strategy} | " + " | ".join(shown) + " |")
        for label, key in (("uniform-scaled", "uniform"), ("random networks", "network")):
            rows = [
                value
                for name, value in self.found.items()
                if name == f"{budget} {key}" or name.rpartition(" ")[0] == f"{budget} {key}"
            ]
            if rows:
                lines.append(f"| {label} | | | {spread([row['test'] for row in rows])} | | |")
        if cells:
            ranked = standings(cells, self.size.evaluations)
            lines += ["", *(f"- {said}" for said in verdicts(ranked, pairs(ranked)))]
        return lines

    def complete(self) -> bool:
        """Whether nothing is missing."""
        return "measured" in self.found


def spread(values: list[float]) -> str:
    """Return mean and standard deviation as two cells."""
    deviation = f"{np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f} | {deviation}"


def main() -> None:
    """Run the benchmark, or go on with it, and write its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smoke size")
    parser.add_argument("--work", type=Path, help="work folder (default: runs/strategies_fashion_mnist)")
    parser.add_argument("--output", type=Path, help="where the table goes, without suffix")
    parser.add_argument("--table", action="store_true", help="write the table of what is there, run nothing")
    options = parser.parse_args()
    if not (SHARED / "FashionMNIST").exists():
        raise SystemExit(f"Fashion-MNIST is absent: expected its IDX files in {SHARED / 'FashionMNIST'}")
    torch.set_num_threads(os.cpu_count() or 1)
    name = "strategies_fashion_mnist" + ("_quick" if options.quick else "")
    benchmark = Strategies(options.work or Path("runs") / name, QUICK if options.quick else FULL)
    if not options.table:
        benchmark.everything()
    size = benchmark.size
    head = [
        "# Strategies on a supernet of Fashion-MNIST",
        "",
        f"{size.images} training images, {size.held_out} of them held out for every decision; "
        f"{size.epochs} epochs; {size.evaluations} evaluations a search; seeds {SEEDS}; winners finetuned "
        f"for {size.finetune_epochs} epochs; spread is the standard deviation.",
        "" if benchmark.complete() else "\n**Partial: some parts have not run yet.**\n",
    ]
    text = "\n".join([*head, benchmark.table(), ""]) + "\n"
    output = options.output or RESULTS / name
    write_text(output.with_suffix(".md"), text)
    write_json(output.with_suffix(".json"), {"environment": environment(), "found": benchmark.found})
    print(text)


if __name__ == "__main__":
    main()
