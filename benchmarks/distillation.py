"""What distillation is worth: students alone and taught, few labels, a larger teacher, after a search.

    python benchmarks/distillation.py              # CPU size: two and a half hours of one core; resumes
    python benchmarks/distillation.py --quick      # a smoke test of a minute
    python benchmarks/distillation.py --part losses    # beside one with the other parts: 80 minutes

CIFAR-10, 10,000 training images at 16 pixels, as in shrink_resnet.py, whose ResNet-20 is the teacher. The
student is a ResNet-8, trained from random weights that are the seed's, for the same epochs and with the same
settings whatever teaches it; weights of losses are the published ones. Nothing was tuned on the test part,
which is read once for each student; the epoch is chosen on validation images by all alike.

- `losses`: each loss beside the labels (six representative ones, and pairs), against labels alone.
- `few`: hard labels, or soft targets alone, on 3 % of the training images, for as many steps as on all.
- `larger`: distillation, whole and stopped early, from a ResNet-56 and from ResNet-20.
- `searched`: a searched network (the widths that `sensitivity` found in shrink_resnet.py at 40 % of the
  MACs), finetuned with distillation, without, and trained alone from scratch for the same epochs.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, ROOT, cifar10_folder, counted, environment, interval, interval_text
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Subset

from autocompress.atomic import held, read_json, replacing, write_json, write_text
from autocompress.distill.finetune import finetune
from autocompress.elastic.extract import extract
from autocompress.elastic.recalibrate import recalibrate
from autocompress.elastic.supernet import resize
from autocompress.errors import StorageError
from autocompress.models.resnet_cifar import ResNetCifar, resnet20, resnet56
from autocompress.prune.source import Source
from autocompress.recipe import FinetuneSettings, TaskSettings
from autocompress.training.data import DataSet, load_data
from autocompress.training.evaluate import calibration_batches, evaluate
from autocompress.training.task import load_task
from search_spaces.channels import channel_space

ALONE = "none"
# Name: what is distilled, seeds; five for those that a claim is made of.
LOSSES: dict[str, tuple[Any, int]] = {
    ALONE: ("none", 5),
    "kd": ("kd", 5),
    "eskd": ("eskd", 3),
    "fitnets": ("fitnets", 3),
    "at": ("at", 3),
    "sp": ("sp", 3),
    "rkd": ("rkd", 3),
    "kd+at": ("kd+at", 3),
    "kd+sp": ("kd+sp", 3),
}
FEW = 0.03
PARTS = ("losses", "few", "larger", "searched")


# Title: the rows and their runs; the first is what the others are compared with.
SECTIONS: dict[str, dict[str, str]] = {
    "Losses": {("labels alone" if name == ALONE else name): f"loss {name}" for name in LOSSES},
    f"{FEW:.0%} of the training images, as many steps": {
        "hard labels": "few none",
        "soft targets": "few kd",
        "hard labels of all images": f"loss {ALONE}",
    },
    "A much larger teacher": {
        "labels alone": f"loss {ALONE}",
        "ResNet-20, kd": "loss kd",
        "ResNet-20, eskd": "loss eskd",
        "ResNet-56, kd": "larger kd",
        "ResNet-56, eskd": "larger eskd",
    },
    "A much larger teacher, stopped early": {"ResNet-56, kd": "larger kd", "ResNet-56, eskd": "larger eskd"},
    "A searched network: finetuned, or trained alone, for the same epochs": {
        "without distillation": "searched without",
        "with distillation": "searched with distillation",
        "from scratch": "searched from scratch",
    },
}


@dataclass(frozen=True)
class Size:
    """What is trained, and for how long."""

    images: int = 10_000
    validation: int = 5_000
    resolution: int = 16
    epochs: int = 15
    batch: int = 64
    rate: float = 0.1
    larger_epochs: int = 20
    finetune_epochs: int = 8
    finetune_rate: float = 0.02
    seeds: int = 5


CPU = Size()
QUICK = Size(300, 200, 16, 1, larger_epochs=1, finetune_epochs=1, seeds=1)


class Benchmark:
    """All runs of one size; what is done stands in a file."""

    def __init__(self, size: Size, path: Path, only: tuple[str, ...] = ("",)) -> None:
        """Load data and teacher."""
        self.size, self.path, self.only = size, path, only
        torch.set_num_threads(1)
        total = size.images + size.validation
        self.data: DataSet = load_data(
            "cifar10", folder=cifar10_folder(), limit=total, validation=size.validation / total
        )
        self.task = load_task(TaskSettings())
        self.found: dict[str, Any] = {}
        self._read()
        self.teacher = resnet20(classes=10)
        self.teacher.load_state_dict(load_file(RESULTS / "shrink_resnet" / "resnet20.safetensors"))
        self.teacher.eval()

    @property
    def side(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.size.resolution, self.size.resolution)

    def settings(self, distill: Any, seed: int, **changes: Any) -> FinetuneSettings:
        """Return what all trainings share."""
        given = {
            "epochs": self.size.epochs,
            "batch_size": self.size.batch,
            "learning_rate": self.size.rate,
            "warmup_epochs": 0.5,
            "weight_decay": 5e-4,
            "precision": "fp32",
            "memory_format": "contiguous",
            "distill": distill,
            "seed": seed,
        }
        return FinetuneSettings(**given | changes)

    def train(
        self,
        network: nn.Module,
        settings: FinetuneSettings,
        teacher: nn.Module | None,
        data: DataSet | None = None,
    ) -> dict[str, Any]:
        """Train in place; return accuracies in percent."""
        start = time.process_time()
        scored = finetune(
            network, data or self.data, self.task, settings, resolution=self.side, teacher=teacher,
            teacher_resolution=self.side,
        )  # fmt: skip
        seconds = time.process_time() - start
        return {"validation": 100 * scored.mean, "test": self.test(network), "seconds": seconds}

    def test(self, network: nn.Module) -> float:
        """Return the accuracy on the test part, in percent."""
        part = self.data.test if self.size == CPU else Subset(self.data.test, range(200))
        return 100 * evaluate(lambda x: network(resize(x, self.side)), part, self.task.score).mean

    def student(self, seed: int) -> nn.Module:
        """Return a ResNet-8 with weights of a seed."""
        torch.manual_seed(seed)
        return ResNetCifar(1, classes=10)

    def larger(self) -> nn.Module:
        """Return a ResNet-56, trained on labels once."""
        network, path = resnet56(classes=10), ROOT / "runs" / "distillation" / "resnet56.safetensors"
        if self.size == CPU and path.exists():
            network.load_state_dict(load_file(path))
            return network.eval()
        torch.manual_seed(0)
        network = resnet56(classes=10)
        found = self.train(network, self.settings("none", 0, epochs=self.size.larger_epochs), None)
        if self.size == CPU:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save_file(network.state_dict(), temporary)
        self._note("ResNet-56 teacher", found)
        return network.eval()

    def taught(self, name: str, seed: int) -> dict[str, Any]:
        """Train a student by one row of `LOSSES`."""
        return self.train(self.student(seed), self.settings(LOSSES[name][0], seed), self.teacher)

    def with_few(self, distill: str, seed: int) -> dict[str, Any]:
        """Train a student on few images, for as many steps as on all."""
        count = int(FEW * self.size.images)
        # A part's beginning is stratified.
        data = replace(
            self.data,
            train=Subset(self.data.train, range(count)),
            # As many as there are epochs, each of which is validated.
            validation=Subset(self.data.validation, range(min(500, len(self.data.validation)))),
            fingerprint=f"{self.data.fingerprint} first {count}",
        )
        epochs = round(self.size.epochs / FEW)
        settings = self.settings(
            distill, seed, epochs=epochs, warmup_epochs=0.5 / FEW, alpha=1.0, temperature=2.0
        )
        return self.train(self.student(seed), settings, self.teacher, data)

    def searched(self, kind: str, seed: int) -> dict[str, Any]:
        """Finetune a searched network, or train it alone."""
        found = read_json(RESULTS / "shrink_resnet.json", StorageError, "results")["found"]
        codes = np.array([found["sensitivity macs=40% 0"]["codes"]])
        image = torch.zeros(1, 3, *self.side)
        space = channel_space(Source(self.teacher, image), steps=8)
        if kind == "from scratch":
            torch.manual_seed(seed)
            ((_, (op,)),) = space.operations(codes)
            settings = self.settings("none", seed, epochs=self.size.finetune_epochs)
            return self.train(op.module(), settings, None)
        (arch,) = space.decode(codes)
        supernet = space.supernet().eval()
        images = calibration_batches(self.data, 256, seed=0)
        network = extract(supernet, arch, recalibrate(supernet, arch, images))
        distill = "kd" if kind == "with distillation" else "none"
        changes = {"epochs": self.size.finetune_epochs, "learning_rate": self.size.finetune_rate}
        return self.train(network, self.settings(distill, seed, **changes), self.teacher)

    def everything(self, parts: list[str]) -> None:
        """Do what is missing."""
        if "ResNet-20 teacher" not in self.found:
            self._note("ResNet-20 teacher", {"test": self.test(self.teacher)})
        for seed in range(self.size.seeds):
            if "losses" in parts:
                for name, (_, seeds) in LOSSES.items():
                    if seed < seeds:
                        self._once(f"loss {name} {seed}", lambda n=name, s=seed: self.taught(n, s))
            if "searched" in parts:
                for kind in ("with distillation", "without", "from scratch"):
                    self._once(f"searched {kind} {seed}", lambda k=kind, s=seed: self.searched(k, s))
            if "few" in parts and seed < 3:
                for distill in ("none", "kd"):
                    self._once(f"few {distill} {seed}", lambda d=distill, s=seed: self.with_few(d, s))
            if "larger" in parts and seed < 3 and any("larger".startswith(o[:6]) for o in self.only):
                big = self.larger()
                for distill in ("kd", "eskd"):
                    self._once(
                        f"larger {distill} {seed}",
                        lambda d=distill, s=seed, b=big: self.train(self.student(s), self.settings(d, s), b),
                    )

    def _once(self, key: str, run: Callable[[], dict[str, Any]]) -> None:
        if key not in self.found and key.startswith(self.only):
            self._note(key, run())

    def _note(self, name: str, found: Mapping[str, Any]) -> None:
        with held(self.path.with_suffix(".lock")):
            self._read()  # another process may do other parts
            self.found[name] = {**found, "commit": environment()["commit"]}
            content = {"environment": environment(), "size": asdict(self.size), "found": self.found}
            write_json(self.path, content)
            write_text(self.path.with_suffix(".md"), self.table())
        print(f"{name}: {dict(found)}", flush=True)

    def _read(self) -> None:
        if self.path.exists():
            self.found = read_json(self.path, StorageError, "results")["found"]

    def table(self) -> str:
        """Return the results as Markdown."""
        lines = [
            "# What distillation is worth",
            "",
            f"{self.size}. Teachers: test {self._test('ResNet-20 teacher')} % (ResNet-20) and "
            f"{self._test('ResNet-56 teacher')} % (ResNet-56). Test accuracy in percent of a ResNet-8, mean "
            "± standard deviation over seeds; differences are of the same seeds, with 95 % intervals.",
        ]
        for title, rows in SECTIONS.items():
            base = self._runs(next(iter(rows.values())))
            lines += ["", f"## {title}", ""]
            lines += [
                f"| | test | against {next(iter(rows))}, paired | helps | CPU s |",
                "|---|---|---|---|---|",
            ]
            lines += [self._line(name, runs, base) for name, key in rows.items() if (runs := self._runs(key))]
        return "\n".join([*lines, ""])

    def _test(self, name: str) -> str:
        return f"{self.found[name]['test']:.2f}" if name in self.found else "not yet"

    def _runs(self, prefix: str) -> dict[int, dict[str, Any]]:
        return {s: self.found[f"{prefix} {s}"] for s in range(10) if f"{prefix} {s}" in self.found}

    def _line(self, name: str, runs: Mapping[int, Any], base: Mapping[int, Any]) -> str:
        tests = [run["test"] for run in runs.values()]
        pairs = [runs[seed]["test"] - base[seed]["test"] for seed in runs if seed in base]
        difference, helps = "", ""
        if (known := interval(pairs)) is not None:
            low, high = known
            difference = f"{counted(pairs, '+')} {interval_text(pairs)}"
            helps = "yes" if low > 0 else "no" if high < 0 else "not shown"
        seconds = statistics.mean(run["seconds"] for run in runs.values())
        return f"| {name} | {counted(tests)} | {difference} | {helps} | {seconds:.0f} |"


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--part", action="append", choices=PARTS, help="by default all")
    parser.add_argument("--only", action="append", help="runs whose name begins so, as 'loss kd '")
    parser.add_argument("--output", type=Path, default=RESULTS / "distillation.json")
    given = parser.parse_args()
    path = Path("/tmp/distillation_quick.json") if given.quick else given.output
    if given.quick:
        path.unlink(missing_ok=True)
    benchmark = Benchmark(QUICK if given.quick else CPU, path, tuple(given.only or [""]))
    benchmark.everything(given.part or list(PARTS))
    print(benchmark.table())


if __name__ == "__main__":
    main()
