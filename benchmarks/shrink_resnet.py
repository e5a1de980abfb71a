"""A trained ResNet-20 made narrower by every method, under a budget: accuracy after equal finetuning.

    python benchmarks/shrink_resnet.py            # CPU size: about five hours of one core; resumes
    python benchmarks/shrink_resnet.py --quick    # a smoke test of a minute
    python benchmarks/shrink_resnet.py --methods "uniform;AMC" --budgets "macs=40%"    # some of them

Several such processes share the work and the file of results. The trained network and the latency table
stand beside the results, so that runs of other sessions and machines are runs of the same network.

CIFAR-10, a part of its training images, at 16 pixels. The network is trained once. Every method starts from
these weights, finds widths under the budget by looking at validation images alone (or at none), and what it
finds is finetuned for the same epochs, taught by the trained network; seeds are those of searches and of
finetuning. Test images are read once, for the finetuned networks. Beside it stand uniform and random widths,
Torch-Pruning's own global pruner as its documentation shows it, and Scratch-E: the widths trained anew for as
many epochs as the large network was (Liu et al., "Rethinking the Value of Network Pruning", ICLR 2019).

Latency budgets are of a table that is measured first (ONNX Runtime, one thread).
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from differentiable import cifar10_folder
from record import RESULTS, counted, environment, interval_text, spread
from safetensors.torch import load_file, save_file
from torch import nn

from autocompress.atomic import held, read_json, replacing, write_json, write_text
from autocompress.baselines import uniform_candidates
from autocompress.budget import Budget, Constraints
from autocompress.cost import operation_cost
from autocompress.differentiable import Differentiable
from autocompress.distill.finetune import finetune
from autocompress.elastic.extract import extract
from autocompress.elastic.recalibrate import recalibrate
from autocompress.elastic.supernet import resize
from autocompress.engine import search
from autocompress.errors import StorageError
from autocompress.evaluation.supernet import SupernetEvaluator
from autocompress.latency.measure import time_once
from autocompress.latency.profile import TABLE_FILE, profile
from autocompress.latency.runtime import Run, pinned, prepare
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import load_target
from autocompress.models.resnet_cifar import resnet20
from autocompress.plugins import load_strategy
from autocompress.prune.importance import comparable, importance
from autocompress.prune.source import Source
from autocompress.recipe import FinetuneSettings, TaskSettings, TrainSettings
from autocompress.space import Codes, SearchSpace
from autocompress.strategy import WarmStart, compares
from autocompress.training.bilevel import train_relaxed
from autocompress.training.data import DataSet, load_data
from autocompress.training.evaluate import calibration_batches, evaluate
from autocompress.training.loop import training_batches
from autocompress.training.supernet import train_supernet
from autocompress.training.task import load_task
from search_spaces.channels import channel_space

BUDGETS = ("macs=40%", "latency_ms=60%", "macs=20%")
MOST_SEEDS = 10
# For methods that end by themselves.
ENOUGH = 10_000
MEASURED, ROUNDS = "measured share", 51
UNIFORM, RANDOM, TORCH_PRUNING = "uniform", "random", "Torch-Pruning, global L2"
SCRATCH = "from scratch: "
# Uniform widths in eighths would leave up to 28 % of a budget.
FINE_STEPS = 64


@dataclass(frozen=True)
class Method:
    """How widths are found: which channels stay, and how many.

    Attributes:
        criterion: Of `autocompress.prune.importance`.
        strategy: Name of a strategy; empty for the baselines.
        options: Of the strategy.
        evaluations: Networks that it may look at.
        warm: Whether it starts from the uniform-scaled networks.
        images: Training images for the statistics of batch norm and for distances; Taylor scores see 512 at
            least.
        trained: Epochs in which slices of the network are trained before or in the search; what is found
            starts finetuning from the weights before that, like all others.
        budgets: At how many of `BUDGETS` it is run: variants of other methods at the first only.
        seeds: How many; five for those that a claim is made of.
        scratch: Of how many seeds the widths found at the first budget are also trained anew.
    """

    criterion: str
    strategy: str = ""
    options: Mapping[str, Any] | None = None
    evaluations: int = 1
    warm: bool = False
    trained: int = 0
    images: int = 256
    budgets: int = 2
    seeds: int = 3
    scratch: int = 0


METHODS: dict[str, Method] = {
    UNIFORM: Method("l2", budgets=3, seeds=5, scratch=3),
    RANDOM: Method("l2", budgets=3),
    "L1, threshold": Method("l1", "importance", budgets=3),
    "BN scale, threshold": Method("bn_scale", "importance"),
    "PEEL-style, L1": Method("l1", "peel", budgets=3),
    "PEEL-style, measured": Method(
        "taylor", "peel", {"importance": "loss", "backbone": "uniform"}, ENOUGH, images=2048, scratch=1
    ),
    "AutoSlim: greedy, slimmable": Method("l2", "slimming", {"per_cost": True}, ENOUGH, trained=2),
    "sensitivity, Taylor, 2048 images": Method(
        "taylor", "sensitivity", None, ENOUGH, images=2048, budgets=3, seeds=5, scratch=3
    ),
    "AMC": Method("l2", "amc", {"episodes": 200}, 200, True),
    "DMCP": Method("l2", "dmcp", {"learning_rate": 0.05}, trained=4, scratch=1),
    "evolution": Method("l2", "evolution", None, 200, True),
    "MetaPruning-style: evolution, slimmable": Method(
        "l2",
        "elitist",
        {"population": 50, "parent_ratio": 0.2, "mutation_ratio": 0.5, "mutation_rate": 0.1},
        200,
        True,
        trained=2,
        budgets=1,
        seeds=1,
    ),
    TORCH_PRUNING: Method("l2", budgets=3),
    "L2, exact optimum": Method("l2", "importance", {"method": "exact"}, budgets=1, seeds=1),
    "Taylor, threshold": Method("taylor", "importance", budgets=1, seeds=1),
    "PEEL-style, BN scale": Method("bn_scale", "peel", budgets=1, seeds=1),
    "PEEL-style, Taylor": Method("taylor", "peel", budgets=1, seeds=1),
    "PEEL-style, L1, uniform backbone": Method("l1", "peel", {"backbone": "uniform"}, budgets=1, seeds=1),
    "PEEL-style, L1, shift": Method("l1", "peel", {"sharing": "shift"}, budgets=1, seeds=1),
    "greedy, the trained network": Method("l2", "slimming", {"per_cost": True}, ENOUGH, budgets=1, seeds=1),
    "sensitivity": Method("l2", "sensitivity", None, ENOUGH, budgets=1, seeds=1),
    "sensitivity, Taylor": Method("taylor", "sensitivity", None, ENOUGH, budgets=1, seeds=1),
}


@dataclass(frozen=True)
class Size:
    """What is trained, and for how long."""

    images: int
    validation: int
    resolution: int
    width: int
    epochs: int
    finetune_epochs: int
    batch: int = 64
    learning_rate: float = 0.1
    finetune_rate: float = 0.02
    steps: int = 8
    judged: int = 500
    checked_networks: int = 20


CPU = Size(10_000, 5_000, 16, 16, 30, 3)
QUICK = Size(400, 200, 8, 4, 1, 1, steps=4, judged=100, checked_networks=4)


class Benchmark:
    """All runs of one size; what is done stands in a file."""

    def __init__(self, size: Size, path: Path, work: Path) -> None:
        """Load the data; train the network, or read it.

        Args:
            size: What is trained.
            path: File of results; the network and the latency table are kept in a folder beside it.
            work: Folder for what may be lost.
        """
        self.size, self.path, self.kept, self.work = size, path, path.with_suffix(""), work
        torch.set_num_threads(1)
        total = size.images + size.validation
        self.data: DataSet = load_data(
            "cifar10", folder=cifar10_folder(), limit=total, validation=size.validation / total
        )
        self.task = load_task(TaskSettings())
        self.found: dict[str, Any] = {}
        self._read()
        self.model = self._trained()
        image = torch.zeros(1, 3, size.resolution, size.resolution)
        self.source = Source(self.model, image)
        self._spaces: dict[tuple[str, int, int, int], SearchSpace] = {}

    @property
    def side(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.size.resolution, self.size.resolution)

    def settings(self, epochs: int, rate: float, seed: int) -> FinetuneSettings:
        """Return what all trainings share."""
        return FinetuneSettings(
            epochs=epochs,
            batch_size=self.size.batch,
            learning_rate=rate,
            warmup_epochs=0.5,
            weight_decay=5e-4,
            precision="fp32",
            memory_format="contiguous",
            seed=seed,
        )

    def train(
        self, network: nn.Module, epochs: int, rate: float, seed: int, teacher: nn.Module | None
    ) -> float:
        """Train, and return the score on the validation part."""
        scored = finetune(
            network,
            self.data,
            self.task,
            self.settings(epochs, rate, seed),
            resolution=self.side,
            teacher=teacher,
            teacher_resolution=self.side,
        )
        return scored.mean

    def _trained(self) -> nn.Module:
        torch.manual_seed(0)
        model = resnet20(classes=10, width=self.size.width)
        path = self.kept / "resnet20.safetensors"
        if path.exists():
            model.load_state_dict(load_file(path))
            return model.eval()
        start = time.process_time()
        validation = self.train(model, self.size.epochs, self.size.learning_rate, 0, None)
        with replacing(path) as temporary:
            save_file(model.state_dict(), temporary)
        self._note(
            "trained",
            {"validation": validation, "test": self.test(model), "seconds": time.process_time() - start},
        )
        return model.eval()

    def test(self, network: nn.Module) -> float:
        """Return the accuracy on the test part, in percent."""
        return 100 * evaluate(lambda x: network(resize(x, self.side)), self.data.test, self.task.score).mean

    def space_of(self, name: str, seed: int) -> SearchSpace:
        """Return the widths that a method chooses from; uniform ones are fine enough to use the budget."""
        method = METHODS[name]
        return self.space(method.criterion, seed, max(method.images, 512), fine=name == UNIFORM)

    def space(self, criterion: str, seed: int, images: int = 512, *, fine: bool = False) -> SearchSpace:
        """Return the widths, with channels in the order of a criterion."""
        steps = FINE_STEPS if fine else self.size.steps
        key = (criterion, seed if criterion in ("taylor", "random") else 0, images, steps)
        if key not in self._spaces:
            batches = training_batches(self.data, self.settings(1, 0.1, seed), epoch=0, seed=seed)
            some = [
                (resize(x, self.side), y) for x, y in itertools.islice(batches, images // self.size.batch)
            ]
            scores = importance(
                self.source, criterion, batches=some, loss=self.task.training_loss(0.0), seed=seed
            )
            scores = comparable(scores, criterion)
            self._spaces[key] = channel_space(self.source, steps=steps, scores=scores)
        return self._spaces[key]

    def limits(self, space: SearchSpace, budget: str) -> Constraints:
        """Return a space under a budget."""
        costs = [operation_cost(space, "macs"), operation_cost(space, "params")]
        if "latency" in budget:
            costs.append(self._table().cost(space))
        return Budget.parse(budget).resolve(space, costs)

    def _table(self) -> LatencyTable:
        path = self.kept / TABLE_FILE
        if not path.exists():
            folder = self.work / "profile"
            folder.mkdir(parents=True, exist_ok=True)
            profile(
                self.space("l2", 0),
                load_target("onnxruntime-cpu"),
                folder=folder,
                widths="grid",
                networks=self.size.checked_networks,
            )
            write_text(path, (folder / TABLE_FILE).read_text())
        return LatencyTable.load(path)

    def widths(self, method: Method, name: str, budget: str, seed: int) -> tuple[SearchSpace, Codes, int]:
        """Return what a method finds, and how many networks it looked at."""
        space = self.space_of(name, seed)
        limits = self.limits(space, budget)
        if name == UNIFORM:
            return space, uniform_candidates(limits)[:1], 0
        if name == RANDOM:
            return space, limits.sample(1, np.random.default_rng(seed), at_least=0.95), 0
        strategy: Any = load_strategy(method.strategy)(limits, seed=seed, **(method.options or {}))
        if method.warm:
            strategy = WarmStart(strategy, uniform_candidates(limits))
        supernet = space.supernet()
        if method.trained:
            shared = self.settings(method.trained, self.size.finetune_rate, seed).model_dump()
            fields = set(TrainSettings.model_fields) & set(shared)
            settings = TrainSettings(**{field: shared[field] for field in fields})
            if isinstance(strategy, Differentiable):
                train_relaxed(supernet, strategy, self.data, self.task, settings, seed=seed)
            else:
                train_supernet(supernet, self.data, self.task, settings)
        images = calibration_batches(self.data, method.images, seed=seed)
        compared = compares(strategy)
        judge = SupernetEvaluator(supernet, self._judged(), self.task, images, compared=compared)
        if method.evaluations == 1:
            return space, strategy.ask(1), 0
        result = search(strategy, limits, judge, evaluations=method.evaluations)
        best = space.encode([result.best().architecture])
        return space, best, len(result.trials)

    def _judged(self) -> DataSet:
        """Return the data with fewer validation images: what searches look at."""
        from torch.utils.data import Subset

        some = Subset(self.data.validation, range(self.size.judged))
        return DataSet(**{**vars(self.data), "validation": some})

    def narrow(self, space: SearchSpace, codes: Codes) -> nn.Module:
        """Return the network with these widths, with the weights that were trained."""
        (arch,) = space.decode(codes)
        supernet = space.supernet().eval()
        return extract(
            supernet, arch, recalibrate(supernet, arch, calibration_batches(self.data, 256, seed=0))
        )

    def run(self, name: str, budget: str, seed: int) -> dict[str, Any]:
        """Find widths, finetune, test."""
        start = time.process_time()
        if name == TORCH_PRUNING:
            network, facts = self._by_torch_pruning(budget)
            forwards = 0
        else:
            space, codes, forwards = self.widths(METHODS[name], name, budget, seed)
            network = self.narrow(space, codes)
            limits = self.limits(space, budget)
            facts = {
                "codes": codes[0].tolist(),
                "use": float(1 + limits.violation(codes)[0]),
                "costs": {m: float(c.of(codes)[0]) for m, c in limits.costs.items()},
            }
        seconds = time.process_time() - start
        validation = self.train(network, self.size.finetune_epochs, self.size.finetune_rate, seed, self.model)
        return {
            **facts,
            "validation": 100 * validation,
            "test": self.test(network),
            "networks looked at": forwards,
            "search seconds": seconds,
        }

    def _by_torch_pruning(self, budget: str) -> tuple[nn.Module, dict[str, Any]]:
        """Prune as the documentation shows, to the greatest ratio at which the MACs are within the budget."""
        import copy

        import torch_pruning as tp

        image = torch.zeros(1, 3, *self.side)
        whole = tp.utils.count_ops_and_params(self.model, image)[0]
        limit = float(budget.partition("=")[2].rstrip("%")) / 100 * whole
        low, high = 0.0, 1.0
        best = None
        for _ in range(12):
            ratio = (low + high) / 2
            model = copy.deepcopy(self.model)
            tp.pruner.BasePruner(
                model,
                image,
                importance=tp.importance.GroupMagnitudeImportance(p=2),
                global_pruning=True,
                pruning_ratio=ratio,
                ignored_layers=[model.fc],
            ).step()
            macs = tp.utils.count_ops_and_params(model, image)[0]
            if macs <= limit:
                high, best = ratio, (model, macs)
            else:
                low = ratio
        if best is None:
            raise RuntimeError("Torch-Pruning does not reach the budget at any ratio")
        return best[0], {"use": best[1] / limit, "costs": {"macs": float(best[1])}}

    def scratch(self, name: str, budget: str, seed: int) -> dict[str, Any]:
        """Train the widths of a method anew, for as many epochs as the large network was (Scratch-E)."""
        found = self.found[f"{name} {budget} {seed}"]
        space = self.space_of(name, seed)
        torch.manual_seed(seed)
        ((_, (op,)),) = space.operations(np.array([found["codes"]]))
        network = op.module()
        start = time.process_time()
        validation = self.train(network, self.size.epochs, self.size.learning_rate, seed, None)
        return {
            "validation": 100 * validation,
            "test": self.test(network),
            "seconds": time.process_time() - start,
        }

    def everything(self, methods: Collection[str], budgets: list[str]) -> None:
        """Do what is missing."""
        for key in self.runs(methods, budgets):
            # Another process may have done it meanwhile, or be doing it.
            claim = self.work / "claims" / f"{key.replace(' ', '_')}.lock"
            claim.parent.mkdir(parents=True, exist_ok=True)
            with suppress(StorageError), held(claim, key):
                self._read()
                if key not in self.found:
                    name, budget, seed = key.rsplit(" ", 2)
                    anew = name.startswith(SCRATCH)
                    run = self.scratch if anew else self.run
                    self._note(key, run(name.removeprefix(SCRATCH), budget, int(seed)))

    def runs(self, methods: Collection[str], budgets: list[str]) -> list[str]:
        """Return the names of all runs; what is trained anew comes last."""
        found, anew = [], []
        for place, budget in enumerate(BUDGETS):
            for seed, (name, method) in itertools.product(range(MOST_SEEDS), METHODS.items()):
                if name not in methods or budget not in budgets:
                    continue
                if seed >= method.seeds or place >= method.budgets:
                    continue
                if name == TORCH_PRUNING and "macs" not in budget:
                    continue
                found.append(f"{name} {budget} {seed}")
                if not place and seed < method.scratch:
                    anew.append(f"{SCRATCH}{name} {budget} {seed}")
        return found + anew

    def measure(self) -> None:
        """Measure what was found under latency budgets, in turns with the whole network."""
        target, space = load_target("onnxruntime-cpu", threads=1), self.space("l2", 0)
        with pinned(target):
            whole = prepare(space.operations(space.largest()), target)
            for key, found in list(self.found.items()):
                name, budget, seed = key.rsplit(" ", 2) if " " in key else (key, "", "")
                if "latency" not in budget or MEASURED in found:
                    continue
                space = self.space_of(name, int(seed))
                narrow = prepare(space.operations(np.array([found["codes"]])), target)
                pairs = [_seconds(narrow) / _seconds(whole) for _ in range(ROUNDS)]
                self._note(key, {**found, MEASURED: statistics.median(pairs)}, at=found["commit"])

    def _read(self) -> None:
        if self.path.exists():
            self.found = read_json(self.path, StorageError, "results")["found"]

    def _note(self, name: str, found: Mapping[str, Any], *, at: str = "") -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                with held(self.work / "results.lock", "another process writes"):
                    self._read()
                    self.found[name] = {**found, "commit": at or environment()["commit"]}
                    content = {"environment": environment(), "size": asdict(self.size), "found": self.found}
                    write_json(self.path, content)
                break
            except StorageError:
                time.sleep(0.1)
        print(f"{name}: {self.found[name]}", flush=True)

    def table(self, budgets: list[str]) -> str:
        """Return the results as Markdown."""
        trained = self.found.get("trained", {})
        runs = self.runs(METHODS, budgets)
        missing = len(set(runs) - set(self.found))
        partial = f"Partial: {missing} of {len(runs)} runs are missing; the same command goes on from here."
        lines = [
            "# ResNet-20 made narrower",
            "",
            *([partial, ""] if missing else []),
            f"{self.size}. The trained network: test {trained.get('test', float('nan')):.2f} %. Test "
            "accuracy in percent after finetuning, mean ± standard deviation over seeds.",
        ]
        lines += ["", *self._overview(budgets)]
        for budget in budgets:
            lines += ["", f"## {budget}", ""]
            lines += [
                "| method | test | each | against uniform, paired (95 %) | use of the budget "
                "| measured, of the whole | networks looked at | search s |",
                "|---|---|---|---|---|---|---|---|",
            ]
            names = [*METHODS, *(f"{SCRATCH}{name}" for name in METHODS)]
            rows = [(name, self._tests(name, budget)) for name in names]
            for name, tests in sorted(rows, key=lambda row: -np.mean(list(row[1].values()) or [0])):
                if not tests:
                    continue
                runs = [self.found[f"{name} {budget} {seed}"] for seed in tests]
                values = list(tests.values())
                base = self._tests(f"{SCRATCH if name.startswith(SCRATCH) else ''}{UNIFORM}", budget)
                pairs = [tests[seed] - base[seed] for seed in tests if seed in base]
                lines.append(
                    f"| {name} | {spread(values)} | {', '.join(f'{v:.2f}' for v in values)} | "
                    f"{spread(pairs, '+')} {interval_text(pairs)} | "
                    f"{np.mean([r.get('use', np.nan) for r in runs]):.3f} | "
                    f"{', '.join(f'{r[MEASURED]:.3f}' for r in runs if MEASURED in r)} | "
                    f"{np.mean([r.get('networks looked at', 0) for r in runs]):.0f} | "
                    f"{np.mean([r.get('search seconds', r.get('seconds', 0)) for r in runs]):.0f} |"
                )
        return "\n".join([*lines, ""])

    def _overview(self, budgets: list[str]) -> list[str]:
        """Return mean, deviation and number of seeds of each method at each budget, without Scratch-E."""
        lines = [f"| test accuracy, % (seeds) | {' | '.join(budgets)} |", "|---" * (len(budgets) + 1) + "|"]
        rows = {}
        for name in METHODS:
            found = [list(self._tests(name, budget).values()) for budget in budgets]
            if any(found):
                rows[name] = found
        for name, found in sorted(rows.items(), key=lambda row: [-np.mean(v) if v else 0.0 for v in row[1]]):
            cells = [counted(v) for v in found]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return lines

    def _tests(self, name: str, budget: str) -> dict[int, float]:
        found = {seed: self.found.get(f"{name} {budget} {seed}") for seed in range(MOST_SEEDS)}
        return {seed: run["test"] for seed, run in found.items() if run is not None}


def _seconds(run: Run) -> float:
    """Return the time of five calls, after one that fills the caches."""
    run()
    return sum(time_once(run) for _ in range(5))


def main() -> None:
    """Run what is missing, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smoke size; written to runs/")
    parser.add_argument("--methods", default=";".join(METHODS))
    parser.add_argument("--budgets", help="some of BUDGETS; by default all, or the first with --quick")
    parser.add_argument("--measure", action="store_true", help="the latency of what was found; idle machine")
    options = parser.parse_args()
    name = "shrink_resnet" + ("_quick" if options.quick else "")
    path = (Path("runs") if options.quick else RESULTS) / f"{name}.json"
    benchmark = Benchmark(QUICK if options.quick else CPU, path, Path("runs") / name)
    budgets = list(BUDGETS[:1] if options.quick else BUDGETS)
    asked = options.budgets.split(";") if options.budgets else budgets
    if options.measure:
        benchmark.measure()
    else:
        benchmark.everything(options.methods.split(";"), asked)
    text = benchmark.table(budgets)
    write_text(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
