"""Architecture and bits searched together, or one after the other, at the same budget and cost of search.

    python benchmarks/joint_bits.py             # CPU size: about two hours of one core; resumes
    python benchmarks/joint_bits.py --quick     # a smoke test of a minute

The small-image supernet (MobileNetV3, preset `tiny`) on Fashion-MNIST, 9,000 training and 3,000 held-out
images, trained once. Bits of 2, 4, 6 and 8 for weights and for inputs of each layer, 8 at both ends; the
budget is bytes of weights: a share of those of the largest network in 8 bits. Every search looks at the same
number of networks, each with statistics and ranges of its own, on 500 held-out images.

- joint: evolution over architectures and bits.
- sequential: half of the evaluations for the architecture, in 8 bits everywhere under twice the budget; the
  other half for its bits, under the budget.
- 8 bits: all evaluations for the architecture in 8 bits, under the budget.
- uniform: the better, on these images, of the uniform-scaled networks that fit in 4 and in 8 bits.
- random: architecture and bits drawn at random, at 95 % of the budget at least.

What is found is scored on all test images as it is, and after finetuning by LSQ, taught by the largest slice.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, ROOT, SHARED, counted, environment
from torch.utils.data import Subset

from autocompress.atomic import read_json, write_json, write_text
from autocompress.baselines import uniform_candidates
from autocompress.budget import Budget, Constraints
from autocompress.cost import operation_cost
from autocompress.distill.finetune import finetune
from autocompress.elastic.extract import extract
from autocompress.elastic.recalibrate import recalibrate
from autocompress.elastic.supernet import Supernet, resize
from autocompress.engine import search
from autocompress.errors import StorageError
from autocompress.latency.target import Scheme
from autocompress.plugins import load_strategy
from autocompress.quantize.joint import JointEvaluator, joint_space
from autocompress.recipe import FinetuneSettings, TaskSettings, TrainSettings
from autocompress.space import Codes, SearchSpace
from autocompress.strategy import WarmStart
from autocompress.training.data import DataSet, load_data
from autocompress.training.evaluate import calibration_batches, evaluate
from autocompress.training.supernet import train_supernet
from autocompress.training.task import load_task
from search_spaces.mobilenet_v3 import mobilenet_v3

WIDTHS = (2, 4, 6, 8)
PAIRS = [(w, a) for w in WIDTHS for a in WIDTHS]
METHODS = ("joint", "sequential", "8 bits", "uniform", "random")
SHARES = (0.35,)
SEEDS = 3
SIZE = "size_bytes"


@dataclass(frozen=True)
class Size:
    """What is trained, and for how long."""

    images: int = 12_000
    validation: int = 3_000
    epochs: int = 15
    evaluations: int = 150
    judged: int = 500
    calibration: int = 256
    finetune_epochs: int = 3
    tested: int = 10_000


CPU = Size()
QUICK = Size(600, 200, 1, 6, 100, 32, 1, 100)


class Benchmark:
    """All runs of one size; what is done stands in a file."""

    def __init__(self, size: Size, path: Path) -> None:
        """Load the data; train the supernet, or read it."""
        self.size, self.path = size, path
        torch.set_num_threads(1)
        self.data: DataSet = load_data(
            "fashion_mnist",
            folder=SHARED / "FashionMNIST",
            limit=size.images,
            validation=size.validation / size.images,
        )
        self.task = load_task(TaskSettings())
        self.base = mobilenet_v3(preset="tiny", in_channels=1, classes=10)
        self.joint = joint_space(self.base, PAIRS)
        self.cost = operation_cost(self.joint.space, SIZE)
        self.found: dict[str, Any] = {}
        if path.exists():
            self.found = read_json(path, StorageError, "results")["found"]
        self.supernet: Supernet = self.base.supernet()
        checkpoint = ROOT / "runs" / "joint_bits" / f"supernet_{size.epochs}.pt"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        settings = TrainSettings(
            epochs=size.epochs, learning_rate=0.2, precision="fp32", memory_format="contiguous"
        )
        train_supernet(self.supernet, self.data, self.task, settings, checkpoint=checkpoint)
        some = Subset(self.data.validation, range(size.judged))
        judged = DataSet(**{**vars(self.data), "validation": some})
        images = calibration_batches(self.data, size.calibration)
        scheme = Scheme(WIDTHS, granularity=("per_channel",))
        self.judge = JointEvaluator(self.supernet.eval(), self.joint, judged, self.task, images, scheme)
        self.whole = self.joint.joined(self.base.largest(), (8, 8))

    def limits(self, share: float) -> Constraints:
        """Return the joint space under a share of the largest network's bytes in 8 bits."""
        limit = share * float(self.cost.of(self.whole)[0]) * (1 + 1e-9)
        return Budget.of({SIZE: limit}).resolve(self.joint.space, [self.cost])

    def uniform(self, share: float, bits: int) -> Codes:
        """Return the uniform-scaled networks with these bits that fit."""
        costs = operation_cost(self.base, "params")
        limits, found = self.limits(share), list[Codes]()
        # As large as fits in these bits: the parameters of the base space order them.
        for percent in np.arange(100, 100 * costs.minimum / costs.maximum, -2):
            budget = Budget.of({"params": f"{percent}%"}).resolve(self.base, [costs])
            for row in uniform_candidates(budget):
                joined = self.joint.joined(row[None], (bits, 8))
                if limits.feasible(joined)[0]:
                    found.append(joined)
            if found:
                return np.vstack(found)
        return self.whole[:0]

    def searched(
        self, limits: Constraints, first: Codes, seed: int, evaluations: int, free: Any = None
    ) -> Codes:
        """Search by evolution, from some rows; `free` says which choices may differ from the first."""
        space = limits.space
        if free is not None:
            space = restricted(limits.space, first[0], free)
            limits = Constraints(space, {SIZE: operation_cost(space, SIZE)}, limits.limits)
            options = [
                c.options[int(code)] for c, code in zip(self.joint.space.choices, first[0], strict=True)
            ]
            codes = [
                choice.options.index(option) if option in choice.options else 0
                for choice, option in zip(space.choices, options, strict=True)
            ]
            first = space.canonical(np.array([codes], dtype=np.int64))
        strategy = load_strategy("evolution")(limits, seed=seed)
        judge = Translated(self.judge, space)
        found = search(WarmStart(strategy, first), limits, judge, evaluations=evaluations)
        return self.joint.space.encode([found.best().architecture])

    def find(self, name: str, share: float, seed: int) -> Codes:
        """Return what a method finds."""
        limits, count = self.limits(share), len(self.base.choices)
        of_arch = np.arange(len(self.joint.space.choices)) < count
        four, eight = self.uniform(share, 4), self.uniform(share, 8)
        most = self.size.evaluations
        if name == "random":
            return limits.sample(1, np.random.default_rng(seed), at_least=0.95)
        if name == "8 bits":
            return self.searched(limits, eight, seed, most, of_arch)
        if name == "sequential":
            wide = self.searched(self.limits(2 * share), self.uniform(2 * share, 8), seed, most // 2, of_arch)
            first = next(
                row
                for bits in (4, 2)
                if limits.feasible(row := self.joint.joined(wide[:, :count], (bits, 8)))[0]
            )
            return self.searched(limits, first, seed, most - most // 2, ~of_arch)
        start = np.vstack([four, eight])
        if name == "joint":
            return self.searched(limits, start, seed, most)
        return start[[int(self.judge(start)["accuracy"].argmax())]]

    def run(self, name: str, share: float, seed: int) -> dict[str, Any]:
        """Search, score, finetune, score again."""
        start = time.process_time()
        codes = self.find(name, share, seed)
        limits = self.limits(share)
        if not limits.feasible(codes)[0]:
            raise RuntimeError(f"{name} left the budget")
        seconds = time.process_time() - start
        network, side = self.judge.network(codes)
        base, bits = self.joint.split(codes)
        test = Subset(self.data.test, range(self.size.tested))

        def score() -> float:
            return 100 * evaluate(lambda x: network(resize(x, side)), test, self.task.score).mean

        before = score()
        (largest,) = self.base.decode(self.base.largest())
        teacher = extract(self.supernet, largest, recalibrate(self.supernet, largest, self.judge.calibration))
        settings = FinetuneSettings(
            epochs=self.size.finetune_epochs, learning_rate=0.02, precision="fp32",
            memory_format="contiguous", seed=seed,
        )  # fmt: skip
        resolution = self.base.operations(self.base.largest())[0][1][0].in_shape[1:]
        finetune(
            network, self.data, self.task, settings,
            resolution=side, teacher=teacher, teacher_resolution=resolution,
        )  # fmt: skip
        return {
            "ptq": before,
            "qat": score(),
            "macs": float(operation_cost(self.base, "macs").of(base)[0]),
            "params": float(operation_cost(self.base, "params").of(base)[0]),
            "use": float(1 + limits.violation(codes)[0]),
            "bits": np.mean(list(bits.values()), axis=0).tolist(),
            "search seconds": seconds,
        }

    def everything(self) -> None:
        """Do what is missing."""
        for seed in range(SEEDS):
            for share in SHARES:
                for name in METHODS:
                    key = f"{name} {share} {seed}"
                    if key not in self.found:
                        self._note(key, self.run(name, share, seed))

    def _note(self, name: str, found: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.found[name] = {**found, "commit": environment()["commit"]}
        write_json(self.path, {"environment": environment(), "size": asdict(self.size), "found": self.found})
        write_text(self.path.with_suffix(".md"), self.table())
        print(f"{name}: {found}", flush=True)

    def table(self) -> str:
        """Return the results as Markdown."""
        total = len(METHODS) * len(SHARES) * SEEDS
        lines = ["# Architecture and bits, together or one after the other", ""]
        if len(self.found) < total:
            lines += [f"Partial: {total - len(self.found)} of {total} runs are missing; it resumes.", ""]
        lines += [
            f"{self.size}. Test accuracy in percent, mean ± standard deviation over seeds; PTQ before, QAT "
            "after finetuning.",
        ]
        for share in SHARES:
            lines += [
                "",
                f"## {share:.0%} of the bytes of the largest network in 8 bits",
                "",
                "| method | PTQ | QAT | MACs, M | parameters, k | bits of weights, inputs | use | search s |",
                "|---|---|---|---|---|---|---|---|",
            ]
            for name in METHODS:
                runs = [self.found[k] for s in range(SEEDS) if (k := f"{name} {share} {s}") in self.found]
                if runs:
                    bits = np.mean([run["bits"] for run in runs], axis=0)
                    lines.append(
                        f"| {name} | {counted([r['ptq'] for r in runs])} | "
                        f"{counted([r['qat'] for r in runs])} | "
                        f"{np.mean([r['macs'] for r in runs]) / 1e6:.2f} | "
                        f"{np.mean([r['params'] for r in runs]) / 1e3:.0f} | {bits[0]:.2f}, {bits[1]:.2f} | "
                        f"{np.mean([r['use'] for r in runs]):.3f} | "
                        f"{np.mean([r['search seconds'] for r in runs]):.0f} |"
                    )
        return "\n".join([*lines, ""])


def restricted(space: SearchSpace, row: Any, free: Any) -> SearchSpace:
    """Return a space in which only some choices are left; the others are as in a row of it."""
    left = {
        choice.name: choice.options if open_ else (choice.options[int(code)],)
        for choice, code, open_ in zip(space.choices, row, free, strict=True)
    }
    choices = []
    for choice in space.choices:
        conditions = tuple(
            (parent, tuple(option for option in allowed if option in left[parent]))
            for parent, allowed in choice.active_when
        )
        if all(allowed for _, allowed in conditions):
            choices.append(replace(choice, options=left[choice.name], active_when=conditions))
        else:
            # It never has an effect any more.
            choices.append(replace(choice, options=left[choice.name][:1], active_when=()))
    return replace(space, choices=tuple(choices))


class Translated:
    """An evaluator of a space for one that has fewer options of its choices."""

    paid = True

    def __init__(self, inner: JointEvaluator, space: SearchSpace) -> None:
        self._inner, self._space = inner, space

    def __call__(self, codes: Codes) -> Mapping[str, Any]:
        """Score rows of the smaller space."""
        return self._inner(self._inner.joint.space.encode(self._space.decode(codes)))


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--output", type=Path, default=RESULTS / "joint_bits.json")
    given = parser.parse_args()
    path = Path("/tmp/joint_bits_quick.json") if given.quick else given.output
    if given.quick:
        path.unlink(missing_ok=True)
    benchmark = Benchmark(QUICK if given.quick else CPU, path)
    benchmark.everything()
    print(benchmark.table())


if __name__ == "__main__":
    main()
