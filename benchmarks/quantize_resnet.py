"""A trained ResNet-20 at the bits that searches find under a budget: accuracy before and after finetuning.

    python benchmarks/quantize_resnet.py             # CPU size: some hours of one core; resumes
    python benchmarks/quantize_resnet.py --quick     # a smoke test of a minute
    python benchmarks/quantize_resnet.py --methods "uniform;exact" --budgets "size;size3"

The network is that of benchmarks/shrink_resnet.py, which stands with its results: CIFAR-10, 10,000 training
images at 16 pixels. Batch norm is folded; weights have one scale a channel, symmetric; inputs of layers are
unsigned after ReLU; the first and the last layer have 8 bits. Ranges by least squared error on 512
training images. Bits are 2, 3, 4, 5, 6 and 8.

Budgets are what the uniform network costs: of size, 4-bit or 3-bit weights (inputs are free: all have 8
bits); of latency, 4-bit weights and inputs, by BitFusion's table (../shared/data/tables) and the model fitted
to it, since the table has neither these shapes nor 2, 3 and 5 bits: an estimate, with its held-out error.
The budgets of 3 bits, of size and of bit operations (weights and inputs), were added after finetuning had
brought 4 bits everywhere to .2 to .4 points below floating point, which leaves little to win.

Searches look at 500 validation images, seeds are those of calibration images, of searches and of finetuning.
Every policy is scored as it is (after training: PTQ), then finetuned for the same epochs with LSQ, taught by
the network in floating point (QAT). Test images are read once, for these two. Beside them: rounding to
nearest against AdaRound and BRECQ at 4-bit weights, and 4 bits everywhere by LSQ against floating point,
which is finetuned for the same epochs as well.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, SHARED, cifar10_folder, counted, environment, interval_text
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Subset

from autocompress.atomic import read_json, write_json, write_text
from autocompress.budget import Budget, Constraints
from autocompress.cost import Cost, Values, compile_cost, operation_cost
from autocompress.distill.finetune import finetune
from autocompress.elastic.supernet import resize
from autocompress.engine import search
from autocompress.errors import StorageError
from autocompress.evaluation.supernet import SupernetEvaluator
from autocompress.latency.foreign.bitfusion import read_bitfusion
from autocompress.latency.target import Scheme
from autocompress.models.resnet_cifar import resnet20
from autocompress.plugins import load_strategy
from autocompress.quantize.estimate import ShapePrice, fused_bits
from autocompress.quantize.hawq import expected_losses
from autocompress.quantize.network import QuantizedNetwork
from autocompress.quantize.ptq import improve
from autocompress.quantize.reconstruct import Settings
from autocompress.quantize.source import Policy, QuantizationSource
from autocompress.recipe import FinetuneSettings, TaskSettings
from autocompress.space import Codes, SearchSpace
from autocompress.strategy import WarmStart, compares
from autocompress.training.data import DataSet, batches, load_data
from autocompress.training.evaluate import calibration_batches, evaluate
from autocompress.training.task import load_task
from search_spaces.bits import bit_space, worth_by_losses

# Of the uniform network: bits of weights and of inputs, and what is limited.
BUDGETS: dict[str, tuple[int, int, str]] = {
    "size": (4, 8, "size_bytes"),
    "bitfusion": (4, 4, "latency_ms"),
    "size3": (3, 8, "size_bytes"),
    "bops3": (3, 3, "bops"),
}
WIDTHS = (2, 3, 4, 5, 6, 8)
SCHEME = Scheme(WIDTHS, granularity=("per_channel",))
UNIFORM, RANDOM = "uniform", "random"
ROUNDINGS = ("nearest", "adaround", "brecq")
ENOUGH = 100_000


@dataclass(frozen=True)
class Method:
    """How bits are found.

    Attributes:
        strategy: Name of a strategy; empty for the baselines.
        options: Of it.
        evaluations: Networks that it may look at: 1 finds without looking, 0 stands for those of the size.
        warm: Whether it starts from the uniform network.
        seeds: How many; five for those that a claim is made of.
    """

    strategy: str = ""
    options: Mapping[str, Any] | None = None
    evaluations: int = ENOUGH
    warm: bool = False
    seeds: int = 3


METHODS: dict[str, Method] = {
    UNIFORM: Method(seeds=5),
    RANDOM: Method(),
    "exact": Method("sensitivity", seeds=5),
    "hawq": Method("importance", {"method": "exact"}, 1, seeds=5),
    "greedy": Method("greedy"),
    "evolution": Method("evolution", None, 0, True),
    "haq": Method("haq", {"episodes": 300}, 0, True),
}


@dataclass(frozen=True)
class Size:
    """What is trained, and for how long."""

    images: int = 10_000
    validation: int = 5_000
    resolution: int = 16
    epochs: int = 3
    batch: int = 64
    rate: float = 0.01
    judged: int = 500
    calibration: int = 512
    rounding_steps: int = 1000
    hessian_images: int = 256
    hessian_samples: int = 30
    tested: int = 10_000
    evaluations: int = 300
    seeds: int = 5


CPU = Size()
QUICK = Size(
    400,
    200,
    16,
    1,
    judged=100,
    calibration=64,
    rounding_steps=20,
    hessian_images=32,
    hessian_samples=3,
    tested=200,
    evaluations=12,
    seeds=1,
)


class Remembered:
    """An evaluator that scores no network twice: searches under several budgets ask for the same ones."""

    paid = True

    def __init__(self, inner: SupernetEvaluator) -> None:
        self._inner = inner
        self._known: dict[bytes, dict[str, float]] = {}

    def __call__(self, codes: Codes) -> dict[str, Values]:
        """Return the metrics of each row."""
        rows = []
        for row in codes:
            key = row.tobytes()
            if key not in self._known:
                self._known[key] = {name: float(v[0]) for name, v in self._inner(row[None]).items()}
            rows.append(self._known[key])
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}


class Benchmark:
    """All runs of one size; what is done stands in a file."""

    def __init__(self, size: Size, path: Path) -> None:
        """Load data and network."""
        self.size, self.path = size, path
        torch.set_num_threads(1)
        total = size.images + size.validation
        self.data: DataSet = load_data(
            "cifar10", folder=cifar10_folder(), limit=total, validation=size.validation / total
        )
        self.task = load_task(TaskSettings())
        self.found: dict[str, Any] = {}
        if path.exists():
            self.found = read_json(path, StorageError, "results")["found"]
        self.model = resnet20(classes=10)
        self.model.load_state_dict(load_file(RESULTS / "shrink_resnet" / "resnet20.safetensors"))
        self.model.eval()
        self._sources: dict[int, tuple[QuantizationSource, SearchSpace, Remembered]] = {}
        self._losses: dict[int, Any] = {}

    @property
    def side(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.size.resolution, self.size.resolution)

    def source(self, seed: int) -> tuple[QuantizationSource, SearchSpace, Remembered]:
        """Return the model with ranges of a seed's images, its space, and an evaluator."""
        if seed not in self._sources:
            self._sources.clear()
            images = [
                resize(batch, self.side)
                for batch in calibration_batches(self.data, self.size.calibration, seed=seed)
            ]
            source = QuantizationSource(
                self.model,
                images[0][:1],
                calibration=images,
                widths=itertools.product(WIDTHS, WIDTHS),
                scheme=SCHEME,
            )
            space = bit_space(source)
            some = Subset(self.data.validation, range(self.size.judged))
            data = DataSet(**{**vars(self.data), "validation": some})
            judge = SupernetEvaluator(space.supernet(), data, self.task, images[:1], compared=True)
            self._sources[seed] = (source, space, Remembered(judge))
        return self._sources[seed]

    def costs(self, space: SearchSpace, budget: str) -> list[Cost]:
        """Return bytes, bit operations and, where it is limited, BitFusion's latency."""
        found: list[Cost] = [operation_cost(space, "size_bytes"), operation_cost(space, "bops")]
        if budget == "bitfusion":
            found.append(self.latency(space))
        return found

    def latency(self, space: SearchSpace) -> Cost:
        """Return the latency on BitFusion."""
        tables = read_bitfusion(SHARED / "tables" / "bitfusion_conv_latency_energy.csv.gz")
        price = ShapePrice(tables.latency_ms, tables.operations, computes=fused_bits)
        cost = compile_cost(space, price, "latency_ms")
        if "bitfusion model" not in self.found:
            errors = [f"{kind} {found.mape_percent:.0f} %" for kind, found in price.held_out().items()]
            text = (
                f"{len(price.estimated)} operations at their bits were estimated; mean error for shapes that "
                f"were held out: {', '.join(errors)}"
            )
            self._note("bitfusion model", {"text": text, "estimated": price.estimated})
        return cost

    def uniform(self, space: SearchSpace, weights: int, inputs: int) -> Codes:
        """Return the network with these bits everywhere but at its ends."""
        settings = {}
        for choice in space.choices:
            wanted = weights if choice.name.endswith(".weight") else inputs
            settings[choice.name] = wanted if wanted in choice.options else choice.options[-1]
        return space.encode([space.architecture(settings)])

    def limits(self, space: SearchSpace, budget: str) -> tuple[Constraints, Codes]:
        """Return a space under the budget that the uniform network needs, and that network."""
        *bits, metric = BUDGETS[budget]
        uniform, costs = self.uniform(space, *bits), self.costs(space, budget)
        (limited,) = (cost for cost in costs if cost.metric == metric)
        limit = float(limited.of(uniform)[0]) * (1 + 1e-9)
        return Budget.of({metric: limit}).resolve(space, costs), uniform

    def losses(self, seed: int) -> Any:
        """Return the losses that the curvature foretells, which no budget changes."""
        if seed not in self._losses:
            source = self.source(seed)[0]
            some = next(batches(self.data.train, self.size.hessian_images, seed=seed))
            pairs = [
                (resize(some[0][at : at + 64], self.side), some[1][at : at + 64])
                for at in range(0, len(some[0]), 64)
            ]
            self._losses[seed] = expected_losses(
                source, pairs, self.task.training_loss(0.0), samples=self.size.hessian_samples, seed=seed
            )
        return self._losses[seed]

    def policy(self, name: str, budget: str, seed: int) -> tuple[Codes, Constraints, int]:
        """Return what a method finds, and how many networks it looked at."""
        source, space, judge = self.source(seed)
        limits, uniform = self.limits(space, budget)
        method = METHODS[name]
        if name == UNIFORM:
            return uniform, limits, 0
        if name == RANDOM:
            return limits.sample(1, np.random.default_rng(seed), at_least=0.95), limits, 0
        if name == "hawq":
            space = worth_by_losses(source, space, *self.losses(seed))
            limits = Constraints(space, limits.costs, limits.limits)
        made: Any = load_strategy(method.strategy)(limits, seed=seed, **(method.options or {}))
        if method.evaluations == 1:
            return made.ask(1), limits, 0
        strategy = WarmStart(made, uniform) if method.warm else made
        judge._inner.compared = compares(made)
        most = ENOUGH if method.evaluations == ENOUGH else self.size.evaluations
        found = search(strategy, limits, judge, evaluations=most)
        return space.encode([found.best().architecture]), limits, len(found.trials)

    def finetuned(self, network: nn.Module, seed: int) -> float:
        """Finetune in place, taught by the network in floating point; return the validation score."""
        settings = FinetuneSettings(
            epochs=self.size.epochs,
            batch_size=self.size.batch,
            learning_rate=self.size.rate,
            warmup_epochs=0.5,
            weight_decay=5e-4,
            precision="fp32",
            memory_format="contiguous",
            seed=seed,
        )
        return finetune(
            network,
            self.data,
            self.task,
            settings,
            resolution=self.side,
            teacher=self.model,
            teacher_resolution=self.side,
        ).mean

    def score(self, network: nn.Module, part: Any) -> float:
        """Return an accuracy in percent."""
        return 100 * evaluate(lambda x: network(resize(x, self.side)), part, self.task.score).mean

    def test(self, network: nn.Module) -> float:
        """Return the accuracy on the test part, in percent."""
        return self.score(network, Subset(self.data.test, range(self.size.tested)))

    def run(self, name: str, budget: str, seed: int) -> dict[str, Any]:
        """Find bits, score them, finetune, score again."""
        start = time.process_time()
        codes, limits, looked_at = self.policy(name, budget, seed)
        seconds = time.process_time() - start
        source, space, _ = self.source(seed)
        policy = policy_of(space, codes)
        network = source.network(policy)
        facts = {
            "policy": [list(bits) for bits in policy],
            "costs": {m: float(c.of(codes)[0]) for m, c in limits.costs.items()},
            "use": float(1 + limits.violation(codes)[0]),
            "networks looked at": looked_at,
            "search seconds": seconds,
            "ptq": self.test(network),
        }
        if not limits.feasible(codes)[0]:
            raise RuntimeError(f"{name} left the budget: {facts['costs']}")
        start = time.process_time()
        validation = self.finetuned(network, seed)
        return {
            **facts,
            "validation": 100 * validation,
            "qat": self.test(network),
            "finetuning seconds": time.process_time() - start,
        }

    def rounding(self, method: str, seed: int) -> dict[str, Any]:
        """Round 4-bit weights by a method, the inputs in 8 bits, and score."""
        source, space, _ = self.source(seed)
        network = source.network(policy_of(space, self.uniform(space, 4, 8)))
        images = torch.cat(
            [resize(b, self.side) for b in calibration_batches(self.data, self.size.calibration, seed=seed)]
        )
        start = time.process_time()
        settings = Settings(steps=self.size.rounding_steps, seed=seed)
        improve(network, source.model, images, rounding=method, settings=settings)  # type: ignore[arg-type]
        return {
            "ptq": self.test(network),
            "validation": self.score(network, self.data.validation),
            "seconds": time.process_time() - start,
        }

    def four_bits(self, kind: str, seed: int) -> dict[str, Any]:
        """Finetune the network in floating point, or at 4 bits everywhere but at its ends."""
        source, space, _ = self.source(seed)
        floats = kind == "floating point"
        network = (
            copy.deepcopy(source.model)
            if floats
            else source.network(policy_of(space, self.uniform(space, 4, 4)))
        )
        before = self.test(network)
        validation = self.finetuned(network, seed)
        return {"ptq": before, "validation": 100 * validation, "qat": self.test(network)}

    def everything(self, methods: list[str], budgets: list[str]) -> None:
        """Do what is missing."""
        if "full precision" not in self.found:
            self._note("full precision", {"test": self.test(self.model)})
        for seed in range(self.size.seeds):
            for kind in ("floating point", "LSQ W4A4"):
                self._once(f"{kind} {seed}", lambda k=kind, s=seed: self.four_bits(k, s))
            for rounding in ROUNDINGS:
                self._once(f"rounding {rounding} {seed}", lambda r=rounding, s=seed: self.rounding(r, s))
            for (name, method), budget in itertools.product(METHODS.items(), budgets):
                if name in methods and seed < method.seeds:
                    self._once(f"{name} {budget} {seed}", lambda n=name, b=budget, s=seed: self.run(n, b, s))

    def _once(self, key: str, run: Any) -> None:
        if key not in self.found:
            self._note(key, run())

    def _note(self, name: str, found: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.found[name] = {**found, "commit": environment()["commit"]}
        write_json(self.path, {"environment": environment(), "size": asdict(self.size), "found": self.found})
        short = {k: v for k, v in found.items() if k not in ("policy", "estimated")}
        print(f"{name}: {short}", flush=True)
        write_text(self.path.with_suffix(".md"), self.table())

    def table(self) -> str:
        """Return the results as Markdown."""
        wanted = [
            f"{name} {budget} {seed}"
            for (name, method), budget in itertools.product(METHODS.items(), BUDGETS)
            for seed in range(method.seeds)
        ]
        missing = sum(key not in self.found for key in wanted)
        lines = ["# ResNet-20 at the bits that searches find", ""]
        if missing:
            lines += [f"Partial: {missing} of {len(wanted)} runs are missing; the same command goes on.", ""]
        full = self.found.get("full precision", {}).get("test", float("nan"))
        lines += [
            f"{self.size}. In floating point: test {full:.2f} %. Test accuracy in percent, mean ± standard "
            "deviation over seeds; PTQ is before finetuning, QAT after it.",
        ]
        if model := self.found.get("bitfusion model"):
            lines += ["", f"BitFusion: {model.get('text', '')}"]
        for budget in BUDGETS:
            lines += [
                "",
                _title(*BUDGETS[budget]),
                "",
                "| method | PTQ | against uniform, paired (95 %) | QAT | against uniform, paired (95 %) "
                "| weights, inputs (mean bits) | use of the budget | networks looked at | search s |",
                "|---|---|---|---|---|---|---|---|---|",
            ]
            for name in METHODS:
                runs = self._runs(f"{name} {budget}")
                if runs:
                    lines.append(self._line(name, budget, runs))
        lines += [
            "",
            "## Rounding of 4-bit weights, inputs of 8 bits",
            "",
            "| method | PTQ | against nearest |",
            "|---|---|---|",
        ]
        for method in ROUNDINGS:
            runs = self._runs(f"rounding {method}")
            pairs = self._pairs(runs, self._runs("rounding nearest"), "ptq")
            if runs:
                lines.append(f"| {method} | {counted([r['ptq'] for r in runs.values()])} | {pairs} |")
        lines += [
            "",
            "## 4 bits everywhere",
            "",
            "| network | before | after | against floating point |",
            "|---|---|---|---|",
        ]
        for kind in ("floating point", "LSQ W4A4"):
            runs = self._runs(kind)
            if runs:
                pairs = self._pairs(runs, self._runs("floating point"), "qat")
                before, after = (counted([r[when] for r in runs.values()]) for when in ("ptq", "qat"))
                lines.append(f"| {kind} | {before} | {after} | {pairs} |")
        return "\n".join([*lines, ""])

    def _runs(self, prefix: str) -> dict[int, dict[str, Any]]:
        return {s: self.found[f"{prefix} {s}"] for s in range(10) if f"{prefix} {s}" in self.found}

    def _line(self, name: str, budget: str, runs: Mapping[int, dict[str, Any]]) -> str:
        base = self._runs(f"{UNIFORM} {budget}")
        policies = np.array([run["policy"] for run in runs.values()], dtype=float)
        weights, inputs = policies.mean((0, 1)).tolist()
        cells = [
            name,
            counted([run["ptq"] for run in runs.values()]),
            self._pairs(runs, base, "ptq"),
            counted([run["qat"] for run in runs.values()]),
            self._pairs(runs, base, "qat"),
            f"{weights:.2f}, {inputs:.2f}",
            f"{np.mean([run['use'] for run in runs.values()]):.3f}",
            f"{np.mean([run['networks looked at'] for run in runs.values()]):.0f}",
            f"{np.mean([run['search seconds'] for run in runs.values()]):.0f}",
        ]
        return "| " + " | ".join(cells) + " |"

    def _pairs(self, runs: Mapping[int, Any], base: Mapping[int, Any], what: str) -> str:
        pairs = [runs[seed][what] - base[seed][what] for seed in runs if seed in base]
        return f"{counted(pairs, '+')} {interval_text(pairs)}".rstrip()


def policy_of(space: SearchSpace, codes: Codes) -> Policy:
    """Return the bits of each layer."""
    ((_, (op,)),) = space.operations(codes)
    assert isinstance(op, QuantizedNetwork)
    return op.policy


def _title(weights: int, inputs: int, metric: str) -> str:
    return f"## At the {metric} of {weights}-bit weights and {inputs}-bit inputs"


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--methods", default=";".join(METHODS))
    parser.add_argument("--budgets", default=";".join(BUDGETS))
    parser.add_argument("--output", type=Path, default=RESULTS / "quantize_resnet.json")
    given = parser.parse_args()
    path = Path("/tmp/quantize_resnet_quick.json") if given.quick else given.output
    if given.quick:
        path.unlink(missing_ok=True)
    benchmark = Benchmark(QUICK if given.quick else CPU, path)
    benchmark.everything(given.methods.split(";"), given.budgets.split(";"))
    print(benchmark.table())


if __name__ == "__main__":
    main()
