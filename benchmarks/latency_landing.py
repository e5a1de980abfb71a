"""Where differentiable searches under a latency budget land: MobileNetV3, a table measured on this machine.

    python benchmarks/latency_landing.py            # CPU size: up to an hour on one busy core; resumes
    python benchmarks/latency_landing.py --quick    # a smoke test of less than a minute
    python benchmarks/latency_landing.py --full     # 32 px, depths 2 to 4, published rates; not yet run

The latency table is measured first (ONNX Runtime, one thread). Budgets are its minimum over the space plus
40, 60 and 80 % of the way to its maximum. Each method trains a mixture of kernels and depths, with marginal
gates for expand ratios, and derives one network under the budget. Figure: its table latency is 0.95 to 1.0 of
the budget. Beside it stand the expected latency of the relaxation at the end of training, where the most
probable option of every choice would have landed, the accuracy after a short training from scratch, and what
the network takes when it is measured whole. Accuracy is of the validation part; the test part is not used.

Work in progress is in `runs/`: started again there, it does what is missing. PC-DARTS mixes edges of cells,
of which this space has none: it is left out.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import RESULTS, ROOT, SHARED, environment, spread

from autocompress.atomic import read_json, write_json, write_text
from autocompress.baselines import uniform_candidates
from autocompress.budget import Constraints
from autocompress.distill.finetune import finetune
from autocompress.errors import StorageError
from autocompress.latency.check import measure_beside, measured_before
from autocompress.latency.profile import TABLE_FILE, profile
from autocompress.latency.runtime import pinned, prepare
from autocompress.latency.table import METRIC, LatencyTable
from autocompress.latency.target import load_target
from autocompress.network import build_network
from autocompress.plugins import load_strategy
from autocompress.recipe import FinetuneSettings, TaskSettings, TrainSettings
from autocompress.space import Codes
from autocompress.training.bilevel import train_relaxed
from autocompress.training.data import load_data
from autocompress.training.task import load_task
from search_spaces.mobilenet_v3 import mobilenet_v3
from strategies.random_search import RandomSearch

NAME = "latency_landing"
AT_LEAST = 0.95
RANDOM_NETWORKS = 3
UNIFORM, RANDOM = "uniform-scaled", "random"
# Of the range: so low that even probabilities expect more than this budget; the lagrangian has to lower it.
LOW = 0.2
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "DARTS, lagrangian": ("darts", {}),
    "GDAS, lagrangian": ("gumbel", {}),
    "SNAS, lagrangian": ("gumbel", {"hard": False}),
    "ProxylessNAS, lagrangian": ("proxyless", {}),
    "ProxylessNAS, product_log": ("proxyless", {"penalty": "product_log"}),
    "ProxylessNAS, additive": ("proxyless", {"penalty": "additive"}),
    "ProxylessNAS, hinge": ("proxyless", {"penalty": "hinge"}),
}
LAGRANGIAN = tuple(method for method in METHODS if method.endswith("lagrangian"))


@dataclass(frozen=True)
class Size:
    """What is trained, and for how long.

    Attributes:
        train_images: Halved between weights and architecture; all of them train derived networks.
        validation_images: Of which accuracies are; no search sees them.
        space: Arguments of the space.
        epochs: Of the search.
        alone_epochs: Of a derived network, from scratch.
        batch: Images a step.
        learning_rate: Of the weights.
        architecture_rates: By plug-in: of the logits.
        checked_networks: Whole networks to which the latency table is fitted.
        rounds: Runs of every row of the table, at most.
        shares: Of the way from the minimum to the maximum latency: the budgets.
        seeds: Of searches and trainings.
    """

    train_images: int
    validation_images: int
    space: dict[str, Any]
    epochs: int
    alone_epochs: int
    batch: int
    learning_rate: float
    architecture_rates: dict[str, float]
    checked_networks: int
    rounds: int
    shares: tuple[float, ...] = (0.4, 0.6, 0.8)
    seeds: tuple[int, ...] = (0, 1, 2)


SMALL = {"preset": "tiny", "resolutions": [16], "kernels": [3, 5], "expands": [3, 4, 6], "depths": [1, 2]}
# Rates of the logits are such that they can travel about as far as in the published schedules: 3e-4 over 50
# epochs of 390 steps (DARTS), 1e-3 over 120 epochs of ImageNet (ProxylessNAS, which goes much further).
FAST = {"darts": 0.05, "gumbel": 0.05, "proxyless": 0.05}
CPU = Size(2400, 2000, SMALL, 5, 4, 48, 0.05, FAST, 40, 40)
QUICK = Size(96, 100, SMALL, 1, 1, 16, 0.05, FAST, 4, 6, (0.6,), (0,))
LARGE = {"geometry": "small", "resolutions": [32], "kernels": [3, 5, 7], "expands": [3, 4, 6]}
PUBLISHED = {"darts": 3e-4, "gumbel": 3e-4, "proxyless": 1e-3}
FULL = Size(54_000, 6000, LARGE | {"depths": [2, 3, 4]}, 120, 20, 128, 0.05, PUBLISHED, 40, 40)


class Benchmark:
    """All runs of one size; what is done stands in a file of the work folder."""

    def __init__(self, size: Size, folder: Path) -> None:
        """Load the data, measure the table, and open what is done."""
        self.size = size
        torch.set_num_threads(1)
        images = SHARED / "FashionMNIST"
        if not images.exists():
            raise SystemExit(f"this benchmark needs Fashion-MNIST: {images} is absent")
        self.data = load_data(
            "fashion_mnist",
            folder=images,
            validation=size.validation_images,
            limit=size.train_images + size.validation_images,
        )
        self.task = load_task(TaskSettings())
        self.space = mobilenet_v3(**size.space, in_channels=1, classes=10)
        self.resolution = int(size.space["resolutions"][0])
        self.target = load_target("onnxruntime-cpu", threads=1)
        known = folder / TABLE_FILE
        self.latencies = profile(
            self.space,
            self.target,
            folder=folder,
            networks=size.checked_networks,
            min_rounds=min(24, size.rounds),
            max_rounds=size.rounds,
            table=LatencyTable.load(known) if known.exists() else None,
        )
        self.cost = self.latencies.cost(self.space)
        self.path = folder / "found.json"
        self.found: dict[str, Any] = {}
        if self.path.exists():
            before = read_json(self.path, StorageError, "results")
            if before["budgets_ms"] != self.budgets_ms or before["size"] != _plain(asdict(size)):
                raise SystemExit(f"{self.path} is of another table or size: remove {folder} to start anew")
            self.found = before["found"]

    @property
    def budgets_ms(self) -> dict[str, float]:
        """The budgets, share of the range as text to ms."""
        return {f"{share:.0%}": self.budget_ms(share) for share in self.size.shares}

    def budget_ms(self, share: float) -> float:
        """Return the budget at a share of the range."""
        least, most = self.cost.minimum, self.cost.maximum
        return least + share * (most - least)

    def limits(self, budget_ms: float) -> Constraints:
        """Return the constraints of a budget."""
        return Constraints(self.space, {METRIC: self.cost}, {METRIC: budget_ms})

    def settings(self, epochs: int, seed: int) -> dict[str, Any]:
        """Return what all trainings share."""
        return {
            "epochs": epochs,
            "batch_size": self.size.batch,
            "learning_rate": self.size.learning_rate,
            "warmup_epochs": 0.0,
            "label_smoothing": 0.0,
            "precision": "fp32",
            "memory_format": "contiguous",
            "seed": seed,
        }

    def use(self, codes: Codes, budget_ms: float) -> float:
        """Return the table latency of a network as a share of a budget."""
        return float(self.cost.of(codes)[0] / budget_ms)

    def alone(self, codes: Codes, budget_ms: float, seed: int) -> dict[str, Any]:
        """Train a network from scratch; its score is that of the last epoch."""
        torch.manual_seed(seed)
        scored = finetune(
            build_network(self.space.operations(codes)),
            self.data,
            self.task,
            FinetuneSettings(**self.settings(self.size.alone_epochs, seed)),
            resolution=(self.resolution, self.resolution),
            keep_best=False,
        )
        return {**self.described(codes, budget_ms), "accuracy": scored.mean}

    def described(self, codes: Codes, budget_ms: float) -> dict[str, Any]:
        """Return a network with its use of the budget."""
        return {"codes": codes[0].tolist(), "use": self.use(codes, budget_ms)}

    def search(self, method: str, budget_ms: float, seed: int) -> dict[str, Any]:
        """Train a relaxation under the budget, and derive."""
        plugin, options = METHODS[method]
        strategy: Any = load_strategy(plugin)(
            self.limits(budget_ms),
            seed=seed,
            learning_rate=self.size.architecture_rates[plugin],
            at_least=AT_LEAST,
            **options,
        )
        even = float(strategy.ratios()[METRIC].detach())
        start = time.process_time()
        settings = TrainSettings(**self.settings(self.size.epochs, seed))
        train_relaxed(self.space.supernet(), strategy, self.data, self.task, settings, seed=seed)
        seconds = time.process_time() - start
        most_probable = strategy.relaxation.largest()
        for name, weights in strategy.weights().items():
            most_probable[0, self.space.positions[name]] = int(weights.argmax())
        return {
            **self.described(strategy.ask(1), budget_ms),
            "expected_at_start": even,
            "expected": float(strategy.ratios()[METRIC].detach()),
            "argmax": self.use(self.space.canonical(most_probable), budget_ms),
            "multiplier": strategy.state_dict()["penalty"].get("multipliers", {}).get(METRIC),
            "entropy": strategy.notes["relaxation"]["entropy"],
            "seconds": seconds,
        }

    def search_and_train(self, method: str, budget_ms: float, seed: int) -> dict[str, Any]:
        """Search, and train what was derived from scratch."""
        found = self.search(method, budget_ms, seed)
        return {**found, **self.alone(np.array([found["codes"]]), budget_ms, seed)}

    def uniform(self, budget_ms: float) -> Codes:
        """Return the uniform-scaled network that uses most of the budget."""
        rows = uniform_candidates(self.limits(budget_ms))
        return rows[[int(self.cost.of(rows).argmax())]]

    def random(self, budget_ms: float) -> Codes:
        """Return random networks that use at least as much of the budget as a derived one is to."""
        return RandomSearch(self.limits(budget_ms), seed=0, at_least=AT_LEAST).ask(RANDOM_NETWORKS)

    def everything(self) -> None:
        """Do what is missing, seed by seed."""
        for seed in self.size.seeds:
            for budget, ms in self.budgets_ms.items():
                for method in METHODS:
                    self._once(method, budget, seed, partial(self.search_and_train, method, ms, seed))
                one = self.random(ms)[[seed % RANDOM_NETWORKS]]
                self._once(RANDOM, budget, seed, partial(self.alone, one, ms, seed))
                self._once(UNIFORM, budget, seed, partial(self.alone, self.uniform(ms), ms, seed))
            for method in LAGRANGIAN:
                low_ms = self.budget_ms(LOW)
                self._once(method, f"{LOW:.0%}", seed, partial(self.search, method, low_ms, seed))

    def _once(self, method: str, budget: str, seed: int, compute: Callable[[], dict[str, Any]]) -> None:
        name = f"{method} {budget} {seed}"
        if name not in self.found:
            self.found[name] = {"method": method, "budget": budget, "seed": seed, **compute()}
            write_json(
                self.path,
                {"size": asdict(self.size), "budgets_ms": self.budgets_ms, "found": self.found},
            )
            print(f"{name}: {self.found[name]}", flush=True)

    def measured(self) -> dict[str, Any]:
        """Measure every network that was found, whole, beside networks that the table was fitted to."""
        rows = {str(run["codes"]): np.array([run["codes"]]) for run in self.found.values()}
        with pinned(self.target):
            prepared = {key: prepare(self.space.operations(row), self.target) for key, row in rows.items()}
            taken, factor = measure_beside(
                measured_before(self.latencies, self.space, 0),
                prepared,
                self.target,
                count=3 * self.size.rounds,
            )
        return {
            "machine_factor": factor,
            "networks": {
                key: {
                    "table_ms": float(self.cost.of(rows[key])[0]),
                    "measured_ms": row.median_ms,
                    "low_ms": row.low_ms,
                    "high_ms": row.high_ms,
                }
                for key, row in taken.items()
            },
        }

    def results(self) -> dict[str, Any]:
        """Return all that is reported."""
        report = self.latencies.error_report
        assert report is not None
        return {
            **environment(),
            "size": asdict(self.size),
            "complete": len(self.found) == self.runs,
            "table": {
                "target": self.target.conditions(),
                "rows": len(self.latencies.rows),
                "granularity": self.latencies.granularity,
                "form": report.chosen,
                "fitted_to": len(report.networks),
                "leave_one_out": asdict(report.figures),
                "repeat_noise_percent": report.repeat_noise_percent,
                "drift_percent": report.drift_percent,
                "disturbed_percent": report.disturbed_percent,
                "least_ms": self.cost.minimum,
                "greatest_ms": self.cost.maximum,
            },
            "budgets_ms": self.budgets_ms,
            "found": self.found,
            "measured": self.measured(),
        }

    @property
    def runs(self) -> int:
        """How many searches and trainings there are in all."""
        a_seed = (len(METHODS) + 2) * len(self.budgets_ms) + len(LAGRANGIAN)
        return a_seed * len(self.size.seeds)


class Tables:
    """The results as Markdown."""

    def __init__(self, results: dict[str, Any]) -> None:
        """Hold what `Benchmark.results` returned."""
        self._results = results
        self._budgets_ms: dict[str, float] = results["budgets_ms"]
        self._runs: list[dict[str, Any]] = list(results["found"].values())

    def _of(self, method: str, budget: str | None = None) -> list[dict[str, Any]]:
        """Return the runs of a method, at one of the budgets or at all of the figure."""
        budgets = self._budgets_ms if budget is None else (budget,)
        return [run for run in self._runs if run["method"] == method and run["budget"] in budgets]

    def text(self) -> str:
        """Return the page."""
        table, size = self._results["table"], self._results["size"]
        errors = table["leave_one_out"]
        partial_text = "" if self._results["complete"] else " (partial: not all runs are done)"
        budgets = ", ".join(f"{budget} {ms:.4f} ms" for budget, ms in self._budgets_ms.items())
        machine = self._results["machine"]
        return "\n".join(
            [
                f"# Where differentiable searches under a latency budget land{partial_text}",
                "",
                f"`python benchmarks/latency_landing.py`; {machine['processor']}, {machine['cores']} cores, "
                f"load {machine['load_average'][0]:.1f}; commit {self._results['commit'][:10]}, "
                f"{self._results['date']}.",
                "",
                f"Latency table of this machine: {table['target']['runtime']}, {table['target']['threads']} "
                f"thread, batch {table['target']['batch']}; {table['rows']} rows, by {table['granularity']}, "
                f"fitted ({table['form']}) to {table['fitted_to']} whole networks. Its error report, "
                f"leave-one-out: MAPE {errors['mape_percent']:.2f} %, bias {errors['bias_percent']:.2f} %, "
                f"greatest {errors['max_error_percent']:.2f} %, {errors['within_5_percent']:.0f} % within "
                f"5 %; repeat noise {table['repeat_noise_percent']:.2f} %. Networks take "
                f"{table['least_ms']:.4f} to {table['greatest_ms']:.4f} ms by it; budgets: {budgets}.",
                "",
                f"Schedule: {size}.",
                "",
                "## Landing",
                "",
                "Latencies by the table, divided by the budget, a seed each. *derived*: of the network that "
                f"the search returns, which is to be in {AT_LEAST} .. 1. *expected*: an expectation, of the "
                "relaxation at the end of training; only the lagrangian is to bring it to 1, and only from "
                "above: at a multiplier of 0 the limit does not bind. *argmax*: of the most probable option "
                "of each choice, which nothing holds to the budget.",
                "",
                *self._landing(),
                "",
                f"From above: the same at {LOW:.0%} of the range, where even probabilities expect more than "
                "the budget.",
                "",
                *self._from_above(),
                "",
                "## Summary",
                "",
                f"Accuracy: of {size['validation_images']} validation images after {size['alone_epochs']} "
                "epochs from scratch, in percent. *against random*: mean difference at the same budget, and "
                "its standard error. PC-DARTS is left out: it mixes edges of cells.",
                "",
                *self._summary(),
                "",
                *self._measured(),
                "",
            ]
        )

    def _landing(self) -> list[str]:
        rows = [
            "| method | budget | derived | expected | multiplier | argmax | entropy | accuracy % | s |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for method in (*METHODS, UNIFORM, RANDOM):
            for budget in self._budgets_ms:
                runs = self._of(method, budget)
                if not runs:
                    rows.append(f"| {method} | {budget} | not run yet |" + " |" * 6)
                    continue
                rows.append(
                    f"| {method} | {budget} | {_each(runs, 'use')} | {_each(runs, 'expected')} | "
                    f"{_each(runs, 'multiplier')} | {_each(runs, 'argmax')} | {_each(runs, 'entropy')} | "
                    f"{spread([100 * run['accuracy'] for run in runs])} | "
                    f"{_mean(runs, 'seconds')} |"
                )
        return rows

    def _from_above(self) -> list[str]:
        rows = [
            "| method | expected at the start | expected | multiplier | derived | argmax |",
            "|---|---|---|---|---|---|",
        ]
        keys = ("expected_at_start", "expected", "multiplier", "use", "argmax")
        for method in LAGRANGIAN:
            runs = self._of(method, f"{LOW:.0%}")
            rows.append(f"| {method} | " + " | ".join(_each(runs, key) for key in keys) + " |")
        return rows

    def _summary(self) -> list[str]:
        rows = [
            f"| method | derived in {AT_LEAST} .. 1 | derived above | expected, least .. greatest | "
            "argmax above the budget | argmax in range | accuracy % | against random |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method in (*METHODS, UNIFORM, RANDOM):
            runs = self._of(method)
            if not runs:
                continue
            landed = sum(AT_LEAST <= run["use"] <= 1 for run in runs)
            cells = [f"{landed} of {len(runs)}", f"{sum(run['use'] > 1 for run in runs)}"]
            if method in METHODS:
                within = sum(AT_LEAST <= run["argmax"] <= 1 for run in runs)
                expected = [run["expected"] for run in runs]
                cells += [
                    f"{min(expected):.3f} .. {max(expected):.3f}",
                    f"{sum(run['argmax'] > 1 for run in runs)} of {len(runs)}",
                    f"{within} of {len(runs)}",
                ]
            else:
                cells += [""] * 3
            cells.append(spread([100 * run["accuracy"] for run in runs]))
            cells.append(self._against_random(method) if method != RANDOM else "")
            rows.append(f"| {method} | " + " | ".join(cells) + " |")
        return rows

    def _against_random(self, method: str) -> str:
        """Return the mean difference to random networks and its standard error, over budgets."""
        differences, variances = [], []
        for budget in self._budgets_ms:
            pair = [[run["accuracy"] for run in self._of(m, budget)] for m in (method, RANDOM)]
            if min(len(accuracies) for accuracies in pair) < 2:
                return "too few runs"
            differences.append(np.mean(pair[0]) - np.mean(pair[1]))
            variances.append(sum(np.var(accuracies, ddof=1) / len(accuracies) for accuracies in pair))
        mean = 100 * float(np.mean(differences))
        error = 100 * float(np.sqrt(np.sum(variances))) / len(variances)
        verdict = "told apart" if abs(mean) > 2 * error else "not told apart"
        return f"{mean:+.2f} ± {error:.2f}: {verdict}"

    def _measured(self) -> list[str]:
        factor = self._results["measured"]["machine_factor"]
        networks = self._results["measured"]["networks"]
        derived = [(run, networks[str(run["codes"])]) for method in METHODS for run in self._of(method)]
        raw = np.array([row["table_ms"] / row["measured_ms"] - 1 for _, row in derived])
        own = factor * (raw + 1) - 1
        above = sum(row["measured_ms"] / factor > self._budgets_ms[run["budget"]] for run, row in derived)
        return [
            "## Measured",
            "",
            f"Every network was measured whole after the searches ({len(networks)} distinct ones, "
            f"interleaved; {len(derived)} runs derived one). The machine took {factor:.3f} times as long as "
            "when the table was measured, by networks of its error report in the same rounds. Table against "
            "measurement, over "
            f"derived networks: error {_errors(raw)} as measured; {_errors(own)} at the speed of the table, "
            f"where {above} of {len(derived)} take longer than their budget. Each stands in the JSON file.",
            "",
            "| budget | method | table ms | measured ms, at the speed of the table | error % |",
            "|---|---|---|---|---|",
            *(
                f"| {run['budget']} | {run['method']}, seed {run['seed']} | {row['table_ms']:.4f} | "
                f"{row['measured_ms'] / factor:.4f} | {100 * error:+.2f} |"
                for (run, row), error in zip(derived, own, strict=True)
            ),
        ]


def _errors(errors: NDArray[np.float64]) -> str:
    sizes = 100 * np.abs(errors)
    return (
        f"{sizes.mean():.2f} % in the mean (bias {100 * errors.mean():+.2f} %, greatest {sizes.max():.2f} %)"
    )


def _each(runs: Sequence[dict[str, Any]], key: str) -> str:
    values = [run[key] for run in runs if run.get(key) is not None]
    # Up, not to the nearest: what is above 1 must not look like 1.
    return ", ".join(f"{max(0, math.ceil(1000 * value - 1e-6)) / 1000:.3f}" for value in values)


def _mean(runs: Sequence[dict[str, Any]], key: str) -> str:
    values = [run[key] for run in runs if key in run]
    return f"{np.mean(values):.0f}" if values else ""


def _plain(value: Any) -> Any:
    """Return a value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def main() -> None:
    """Run what is missing, print and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smoke size; results go to runs/ too")
    parser.add_argument("--full", action="store_true", help="the published schedules")
    parser.add_argument("--table", action="store_true", help="write the tables of what is there, run nothing")
    options = parser.parse_args()
    name = NAME + ("_quick" if options.quick else "_full" if options.full else "")
    folder = ROOT / "runs" / name
    benchmark = Benchmark(QUICK if options.quick else FULL if options.full else CPU, folder)
    if not options.table:
        benchmark.everything()
    results = benchmark.results()
    text = Tables(results).text()
    path = (folder if options.quick else RESULTS) / f"{name}.json"
    write_json(path, results)
    write_text(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
