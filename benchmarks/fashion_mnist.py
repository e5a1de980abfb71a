"""Search on Fashion-MNIST, three latency budgets: does the search beat what one picks by hand, or at random?

    python benchmarks/fashion_mnist.py            # about 60 minutes on 2 cores; continues where it stopped
    python benchmarks/fashion_mnist.py --quick    # a smoke test of a few minutes

One supernet (the tiny MobileNetV3 space) is trained by the sandwich rule on a stated subset. At each budget
it is searched with three seeds; beside the result stand the uniform-scaled network, random networks and
random search with as many evaluations, all as slices of the same supernet, the searched network finetuned
with distillation, and the searched network trained alone for as many epochs as the supernet. Sub-networks
spread over the range of MACs are trained alone too: Kendall's tau between supernet and stand-alone accuracy
says how far the supernet's ranking can be trusted. Decisions use held-out training images; the test set is
read for the table only.

Everything is kept in a work folder step by step: a killed benchmark goes on, and the table can be written
while parts are missing (it then says so).
"""

import argparse
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, SHARED, environment
from scipy import stats

from autocompress.atomic import write_json, write_text
from autocompress.baselines import uniform_candidates
from autocompress.budget import Budget, Constraints
from autocompress.cost import Values
from autocompress.distill.finetune import finetune
from autocompress.elastic.extract import extract
from autocompress.elastic.supernet import resize
from autocompress.engine import search
from autocompress.latency.plan import check_networks
from autocompress.recipe import FinetuneSettings, parse_recipe
from autocompress.run import Run, Shown
from autocompress.space import Architecture, Codes
from autocompress.stages import costs, evaluator, extract_recalibrated, profile, resolution, train
from autocompress.stages import finetune as finetune_slice
from autocompress.strategy import WarmStart
from autocompress.training.evaluate import evaluate
from strategies.predictor_guided import PredictorGuided
from strategies.random_search import RandomSearch

# The smallest network takes about 42 % of the largest one's latency here.
BUDGETS = ("50%", "65%", "80%")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Size:
    """How much is done."""

    images: int
    held_out: int
    epochs: int
    finetune_epochs: int
    evaluations: int
    random: int
    ranked: int


FULL = Size(
    images=12_000,
    held_out=3_000,
    epochs=15,
    finetune_epochs=5,
    evaluations=64,
    random=10,
    ranked=12,
)
QUICK = Size(images=1_500, held_out=300, epochs=2, finetune_epochs=1, evaluations=20, random=3, ranked=4)


class Benchmark:
    """One run of the benchmark in a work folder."""

    def __init__(self, folder: Path, size: Size) -> None:
        """Open the work folder."""
        self.size, self.folder = size, folder
        training = {"learning_rate": 0.2, "epochs": size.epochs, "shift": 2}
        recipe = parse_recipe(
            {
                "data": {
                    "source": "fashion_mnist",
                    "folder": str(SHARED / "FashionMNIST"),
                    "limit": size.images,
                    "validation": size.held_out,
                },
                "space": {"name": "mobilenet_v3", "arguments": {"preset": "tiny"}},
                "train": training,
                "finetune": {"epochs": size.finetune_epochs},
            }
        )
        self.run = Run(folder, recipe)
        self.alone_settings = FinetuneSettings(
            **training,
            warmup_epochs=1.0,
            label_smoothing=0.1,
            weight_decay=recipe.train.weight_decay,
            # What `auto` chose for the supernet; choosing again for each network would take longer.
            precision="fp32",
            memory_format="channels_last",
        )
        self.say = partial(print, flush=True)
        self.shown = Shown(say=self.say)
        self.path = folder / "found.json"
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return what was computed under a name, computing it if it was not."""
        if name not in self.found:
            self.found[name] = compute()
            write_json(self.path, self.found)
            self.say(f"{name}: {json.dumps(self.found[name])[:160]}")
        return self.found[name]

    @cached_property
    def supernet(self) -> Any:
        """The trained supernet."""
        return train(self.run, self.shown)

    @cached_property
    def score(self) -> "Remembered":
        """The evaluator of slices on held-out images, each evaluated once for the whole benchmark."""
        return Remembered(self)

    def constraints(self, budget: str) -> Constraints:
        """Return a latency budget, made absolute."""
        return Budget.of({"latency_ms": budget}).resolve(self.run.space, costs(self.run, self.shown))

    def architecture(self, codes: Codes) -> Architecture:
        """Return the architecture of one row."""
        return self.run.space.decode(codes.reshape(1, -1))[0]

    def slice_test(self, codes: Codes) -> dict[str, Any]:
        """Return test accuracy of a slice with statistics of its own, and its costs."""
        arch = self.architecture(codes)
        network = extract_recalibrated(self.run, self.supernet, arch)
        return {"key": arch.key, "codes": codes.reshape(-1).tolist(), **self._test(network, arch)}

    def alone(self, codes: Codes, seed: int) -> dict[str, Any]:
        """Train the architecture from scratch, as many epochs as the supernet; return its test accuracy."""
        arch = self.architecture(codes)
        # The same initialisation as the supernet's, other values by the seed.
        fresh = type(self.supernet)(self.run.space, seed=1000 + seed)
        network = extract(fresh, arch)
        settings = self.alone_settings.model_copy(update={"seed": seed})
        finetune(
            network,
            self.run.data,
            self.run.task,
            settings,
            resolution=resolution(self.run, arch),
            identity={"architecture": arch.key, "seed": seed},
            checkpoint=self.folder / "alone" / f"{arch.key}-{seed}.pt",
            keep_best=False,
        )
        (self.folder / "alone" / f"{arch.key}-{seed}.pt").unlink()
        return {"key": arch.key, **self._test(network, arch)}

    def finetuned(self, codes: Codes) -> dict[str, Any]:
        """Finetune the slice with distillation from the largest network; return its test accuracy."""
        arch = self.architecture(codes)
        network, _ = finetune_slice(self.run, self.shown, arch)
        return {"key": arch.key, **self._test(network, arch)}

    def _test(self, network: torch.nn.Module, arch: Architecture) -> dict[str, Any]:
        size = resolution(self.run, arch)
        network.eval()
        part, task = self.run.data.test, self.run.task
        test = evaluate(lambda images: network(resize(images, size)), part, task.score)
        row = self.run.space.encode([arch])
        priced = {cost.metric: float(cost.of(row)[0]) for cost in costs(self.run, self.shown)}
        return {"test": test.mean, "latency_ms": priced["latency_ms"], "macs": priced["macs"]}

    def everything(self) -> None:
        """Do all that is missing."""
        profile(self.run, self.shown)
        space, size = self.run.space, self.size
        self.once("largest", lambda: self.slice_test(space.largest()))
        for budget in BUDGETS:
            limits = self.constraints(budget)
            self.once(f"{budget} uniform", partial(self._uniform, limits))
            for seed in SEEDS:
                self.once(f"{budget} searched {seed}", partial(self._search, limits, seed))
                self.once(f"{budget} random search {seed}", partial(self._random_search, limits, seed))
            drawn = limits.sample(size.random, np.random.default_rng(17), at_least=0.9)
            for index, row in enumerate(drawn):
                self.once(f"{budget} random {index}", partial(self.slice_test, row))
        ranked = check_networks(space, size.ranked, seed=5)
        for index, row in enumerate(ranked):
            self.once(f"ranked slice {index}", partial(self._ranked_slice, row))
        searched = {
            f"{budget} {{}} {seed}": (np.array(self.found[f"{budget} searched {seed}"]["codes"]), seed)
            for seed in SEEDS
            for budget in BUDGETS
        }
        self.trainings([
            *((name.format("finetuned"), "finetuned", row, 0) for name, (row, _) in searched.items()),
            *((f"ranked alone {index}", "alone", row, 0) for index, row in enumerate(ranked)),
            *((name.format("alone"), "alone", row, seed) for name, (row, seed) in searched.items()),
        ])  # fmt: skip

    def trainings(self, jobs: list[tuple[str, str, Codes, int]]) -> None:
        """Train networks, each in a process of one thread: faster than one after the other on all cores.

        Args:
            jobs: Name of the result, method (`finetuned` or `alone`), codes, seed. Equal work is done once.
        """
        names: dict[tuple[str, bytes, int], list[str]] = {}
        for name, method, row, seed in jobs:
            names.setdefault((method, row.tobytes(), seed), []).append(name)
        missing = {work: known for work, known in names.items() if any(n not in self.found for n in known)}
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            running = {
                pool.submit(_train_one, self.folder, self.size, method, codes, seed): known
                for (method, codes, seed), known in missing.items()
            }
            for finished in as_completed(running):
                for name in running[finished]:
                    self.once(name, finished.result)

    def _ranked_slice(self, row: Codes) -> dict[str, Any]:
        found = self.score(row.reshape(1, -1))
        return {**self.slice_test(row), "validation": float(found["accuracy"][0])}

    def _uniform(self, limits: Constraints) -> dict[str, Any]:
        candidates = uniform_candidates(limits)
        scores = self.score(candidates)["accuracy"]
        return self.slice_test(candidates[int(scores.argmax())])

    def _search(self, limits: Constraints, seed: int) -> dict[str, Any]:
        strategy = WarmStart(PredictorGuided(limits, seed=seed), uniform_candidates(limits))
        result = search(strategy, limits, self.score, evaluations=self.size.evaluations)
        best = result.best()
        row = self.run.space.encode([best.architecture])
        tau = (result.notes or {}).get("predictor")
        return {
            **self.slice_test(row),
            "validation": best.metrics["accuracy"],
            "predictor_kendall_tau": tau["kendall_tau"] if isinstance(tau, dict) else None,
        }

    def _random_search(self, limits: Constraints, seed: int) -> dict[str, Any]:
        result = search(
            RandomSearch(limits, seed=100 + seed), limits, self.score, evaluations=self.size.evaluations
        )
        best = result.best()
        row = self.run.space.encode([best.architecture])
        return {**self.slice_test(row), "validation": best.metrics["accuracy"]}

    def table(self) -> str:
        """Return the table of what is there, as Markdown."""
        found, lines = self.found, []
        if "largest" in found:
            largest = found["largest"]
            lines.append(
                f"Largest network as a slice: test {largest['test']:.4f}, "
                f"{largest['latency_ms']:.3f} ms predicted."
            )
        lines += [
            "",
            "| budget (of the largest's predicted latency) | network | test accuracy | predicted ms |",
        ]
        lines.append("| --- | --- | --- | --- |")
        kinds = {
            "searched": "searched, slice",
            "uniform": "uniform-scaled, slice",
            "random": "random, slice",
            "random search": "random search, as many evaluations, slice",
            "finetuned": f"searched, slice finetuned for {self.size.finetune_epochs} epochs",
            "alone": f"searched, trained alone for {self.size.epochs} epochs",
        }
        for budget in BUDGETS:
            for kind, label in kinds.items():
                rows = [
                    value
                    for key, value in found.items()
                    if key == f"{budget} {kind}" or key.rpartition(" ")[0] == f"{budget} {kind}"
                ]
                rows = [row for row in rows if isinstance(row, dict)]
                if not rows:
                    lines.append(f"| {budget} | {label} | not run yet | |")
                    continue
                tests = np.array([row["test"] for row in rows])
                spread = f" ± {tests.std(ddof=1):.4f}" if len(tests) > 1 else ""
                latency = np.mean([row["latency_ms"] for row in rows])
                lines.append(
                    f"| {budget} | {label} | {tests.mean():.4f}{spread} (n={len(rows)}) | {latency:.3f} |"
                )
        pairs = [
            (found[f"ranked slice {i}"]["validation"], found[f"ranked alone {i}"]["test"])
            for i in range(self.size.ranked)
            if f"ranked alone {i}" in found
        ]
        if len(pairs) >= 4:
            tau, low, high = kendall(np.array(pairs))
            lines += [
                "",
                f"Kendall tau between supernet (validation, slice) and stand-alone (test) accuracy over "
                f"{len(pairs)} sub-networks: {tau:.3f}, 95 % bootstrap interval {low:.3f} to {high:.3f}.",
            ]
        return "\n".join(lines)

    def complete(self) -> bool:
        """Whether nothing is missing."""
        alone = [f"ranked alone {index}" for index in range(self.size.ranked)]
        alone += [f"{budget} alone {seed}" for budget in BUDGETS for seed in SEEDS]
        return all(name in self.found for name in alone)


def _train_one(folder: Path, size: Size, method: str, codes: bytes, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    benchmark = Benchmark(folder, size)
    benchmark.run.recipe = benchmark.run.recipe.model_copy(update={"threads": 1})
    row = np.frombuffer(codes, dtype=np.int64)
    return benchmark.finetuned(row) if method == "finetuned" else benchmark.alone(row, seed)


class Remembered:
    """The supernet's evaluator with a memory, since searches of several seeds meet the same networks."""

    paid = True

    def __init__(self, benchmark: Benchmark) -> None:
        """Start with an empty memory."""
        self._benchmark = benchmark
        self._known: dict[bytes, dict[str, float]] = {}

    @cached_property
    def _evaluator(self) -> Any:
        return evaluator(self._benchmark.run, self._benchmark.supernet)

    def __call__(self, codes: Codes) -> dict[str, Values]:
        """Return the scores of the rows."""
        rows = []
        for row in np.ascontiguousarray(codes, dtype=np.int64):
            if row.tobytes() not in self._known:
                values = self._evaluator(row[None])
                self._known[row.tobytes()] = {name: float(value[0]) for name, value in values.items()}
            rows.append(self._known[row.tobytes()])
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def kendall(pairs: Any) -> tuple[float, float, float]:
    """Return Kendall's tau-b of two columns and its 95 % percentile bootstrap interval."""
    rng = np.random.default_rng(0)
    draws = [pairs[rng.integers(len(pairs), size=len(pairs))] for _ in range(2000)]
    taus = [stats.kendalltau(draw[:, 0], draw[:, 1]).statistic for draw in draws]
    low, high = np.nanpercentile(taus, [2.5, 97.5])
    return float(stats.kendalltau(pairs[:, 0], pairs[:, 1]).statistic), float(low), float(high)


def main() -> None:
    """Run the benchmark, or go on with it, and write its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smoke size")
    parser.add_argument("--work", type=Path, help="work folder (default: runs/fashion_mnist)")
    parser.add_argument("--output", type=Path, help="where the table goes, without suffix")
    parser.add_argument("--table", action="store_true", help="write the table of what is there, run nothing")
    options = parser.parse_args()
    if not (SHARED / "FashionMNIST").exists():
        raise SystemExit(
            f"Fashion-MNIST is absent: expected its IDX files in {SHARED / 'FashionMNIST'} (or set another "
            "folder by editing SHARED in benchmarks/record.py); nothing was run"
        )
    torch.set_num_threads(os.cpu_count() or 1)
    name = "fashion_mnist_quick" if options.quick else "fashion_mnist"
    benchmark = Benchmark(options.work or Path("runs") / name, QUICK if options.quick else FULL)
    if not options.table:
        benchmark.everything()
    output = options.output or RESULTS / name
    size = benchmark.size
    head = [
        "# Fashion-MNIST",
        "",
        f"{size.images} training images, {size.held_out} of them held out; all 10,000 test images; "
        f"{size.epochs} epochs; seeds {SEEDS}; spread is the standard deviation.",
        "" if benchmark.complete() else "\n**Partial: some parts have not run yet.**\n",
    ]
    text = (
        "\n".join([*head, benchmark.table(), "", f"Machine and versions: {json.dumps(environment())}"]) + "\n"
    )
    write_text(output.with_suffix(".md"), text)
    write_json(output.with_suffix(".json"), {"environment": environment(), "found": benchmark.found})
    print(text)


if __name__ == "__main__":
    main()
