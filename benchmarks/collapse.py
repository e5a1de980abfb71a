"""Does DARTS collapse to identities on NAS-Bench-201, when, and what keeps it from it?

    python benchmarks/collapse.py            # CPU size: an hour on one core; resumes, a seed at a time
    python benchmarks/collapse.py --quick    # a smoke test of a minute

Dong & Yang (ICLR 2020) report that DARTS ends with six skip connections (test accuracy 54.30). Here
first-order DARTS is trained for fewer epochs, in a smaller network and on fewer images; a higher
rate of the architecture makes up for the fewer steps. After every epoch the cell that would be derived is
looked up: test accuracy after 200 epochs of the full network, which no search sees. From the same trainings
follow what early stopping by the dominant eigenvalue would have kept (RobustDARTS), and what a limit on skip
connections and a budget derive in the end.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from differentiable import CPU, QUICK, SEEDS, Benchmark, spread
from record import RESULTS

from autocompress.atomic import write_text
from autocompress.budget import Budget, Constraints
from autocompress.cost import operation_cost
from autocompress.recipe import TrainSettings
from autocompress.training.bilevel import train_relaxed
from strategies.collapse import Watch
from strategies.darts import Darts

SIZE = replace(CPU, cells=2, epochs=20)
MOST_SKIPS = 2
BUDGET = "macs=60%"  # 95 % of 50 % are met by no cell: convolutions come in steps of 15 %


class Collapse(Benchmark):
    """First-order DARTS, looked at after every epoch."""

    def run(self, seed: int) -> dict[str, Any]:
        """Train once; return every epoch and what each remedy derives."""
        macs = operation_cost(self.space, "macs")
        limits = Constraints(self.space, {"macs": macs}, {})
        strategy = Darts(limits, seed=seed, learning_rate=self.size.architecture_rate, eigenvalue=True)
        epochs: list[dict[str, Any]] = []

        def look(_: str) -> None:
            seen = strategy.notes["relaxation"]["epochs"][-1]
            cell = self.of(strategy.relaxation.most_probable(strategy.weights()))
            share = strategy.relaxation.mean_probability("skip_connect")
            epochs.append({**seen, **cell, "probability of skips": share})
            print(f"seed {seed}: {epochs[-1]}", flush=True)

        start = time.process_time()
        settings = TrainSettings(**self.settings(self.size.epochs), seed=seed)
        train_relaxed(self.space.supernet(), strategy, self.data, self.task, settings, seed=seed, say=look)  # type: ignore[arg-type]
        relaxation = strategy.relaxation
        capped = [(cost, MOST_SKIPS) for cost in strategy.skips]
        within = Budget.parse(BUDGET).resolve(self.space, [macs])
        return {
            "epochs": epochs,
            "seconds": time.process_time() - start,
            "end": epochs[-1],
            "max_skips": self.of(relaxation.derive(limits, capped=capped).codes),
            BUDGET: self.of(relaxation.derive(within, at_least=0.95).codes),
        }

    def everything(self, methods: list[str]) -> None:
        """Train what is missing, seed by seed."""
        del methods
        for seed in SEEDS:
            self._once(str(seed), lambda s=seed: self.run(s))  # type: ignore[misc]

    def table(self) -> str:
        """Return the results as Markdown."""
        runs = {seed: self.found[seed] for seed in map(str, SEEDS) if seed in self.found}
        lines = [
            "# Does DARTS collapse on NAS-Bench-201?",
            "",
            f"First order, {self.size}. Test accuracy after 200 epochs of the cell that is derived, by "
            f"the table, in percent; {len(runs)} of {len(SEEDS)} seeds so far. Known: 54.30, all skip "
            "connections.",
            "",
            "| after epoch | " + " | ".join(f"seed {seed}: accuracy, skips of 6" for seed in runs) + " |",
            "|---|" + "---|" * len(runs),
        ]
        last = self.size.epochs
        for epoch in sorted({1, 2, 5, last, *range(10, last + 1, 10)} & set(range(1, last + 1))):
            seen = [run["epochs"][epoch - 1] for run in runs.values()]
            lines.append(
                f"| {epoch} | " + " | ".join(f"{at['test']:.2f}, {at['skips']}" for at in seen) + " |"
            )
        lines += ["", "| derived in the end | accuracy | each | skips |", "|---|---|---|---|"]
        for key, name in {
            "end": "without a budget: DARTS as published",
            "early stopping": "early stopping by the eigenvalue",
            "max_skips": f"at most {MOST_SKIPS} skip connections",
            BUDGET: f"budget of {BUDGET}, at least 95 % of it used",
        }.items():
            if any(key != "early stopping" and key not in run for run in runs.values()):
                lines.append(f"| {name} | not run | | |")
                continue
            found = [early(run["epochs"]) if key == "early stopping" else run[key] for run in runs.values()]
            each = ", ".join(format(at["test"], ".2f") for at in found)
            skips = ", ".join(str(at["cell"].count("skip_connect")) for at in found)
            lines.append(f"| {name} | {spread([at['test'] for at in found])} | {each} | {skips} |")
        stops = ", ".join(str(early(run["epochs"])["epoch"]) for run in runs.values())
        lines += ["", f"Early stopping kept the probabilities of epochs {stops}."]
        return "\n".join([*lines, ""])


def early(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the epoch that early stopping by the eigenvalue keeps; the last where it never stops."""
    watch = Watch("eigenvalue", None)
    for seen in epochs:
        watch.add({"eigenvalue": seen["eigenvalue"]}, [])
        if watch.stopped is not None:
            return epochs[watch.stopped - 1]
    return epochs[-1]


def main() -> None:
    """Run what is missing, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smoke size; written to runs/")
    parser.add_argument("--epochs", type=int, default=SIZE.epochs, help="others have results of their own")
    parser.add_argument("--table", action="store_true", help="write the table of what is there, run nothing")
    options = parser.parse_args()
    name = "collapse" + ("" if options.epochs == SIZE.epochs else f"_{options.epochs}_epochs")
    path = Path("runs/collapse_quick.json") if options.quick else RESULTS / f"{name}.json"
    size = replace(QUICK, epochs=2) if options.quick else replace(SIZE, epochs=options.epochs)
    benchmark = Collapse(size, path)
    if not options.table:
        benchmark.everything([])
    text = benchmark.table()
    write_text(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
