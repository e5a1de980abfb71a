"""How well supernets rank networks: sandwich, single paths and strictly fair paths on digits.

    python benchmarks/one_shot.py            # about 15 minutes on an idle core; continues where it stopped
    python benchmarks/one_shot.py --quick    # a smoke test

Supernets of each schedule and seed are trained with the same optimizer settings for the same number of
passes (one network, one batch, forward and backward), which is what a schedule costs; steps differ. The same
networks, evenly spread in MACs, are scored as slices on held-out images, and trained alone with several seeds
and scored on test images. Kendall's tau-b says how far the ranking of the slices is that of the networks
trained alone. Beside it stand how MACs rank them, and how one stand-alone training ranks them, against the
others: what that is below 1 is noise of training and of few test images.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import RESULTS, environment
from scipy import stats

from autocompress.atomic import write_json, write_text
from autocompress.cost import operation_cost
from autocompress.distill.finetune import finetune
from autocompress.elastic.extract import extract
from autocompress.elastic.supernet import Supernet, resize
from autocompress.evaluation.supernet import SupernetEvaluator
from autocompress.latency.plan import check_networks
from autocompress.recipe import FinetuneSettings, Recipe, TrainSettings, parse_recipe
from autocompress.run import load_recipe_data, make_space
from autocompress.space import Architecture, Codes
from autocompress.training.evaluate import calibration_batches, evaluate
from autocompress.training.paths import networks_of_step, phases_of
from autocompress.training.supernet import train_supernet
from autocompress.training.task import load_task

SCHEDULES = ("sandwich", "single_path", "fair")
LABELS = {
    "sandwich": "sandwich (largest, 2 random, smallest; distilled)",
    "single_path": "single path (SPOS)",
    "fair": "strictly fair (FairNAS)",
}


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        held_out: Training images on which slices are scored.
        passes: Passes over the other training images, those of all networks of a step added up.
        alone_epochs: Epochs of a network trained alone.
        networks: Networks that are ranked.
        supernet_seeds: One supernet each, for every schedule.
        alone_seeds: One training of every network each.
    """

    held_out: int
    passes: int
    alone_epochs: int
    networks: int
    supernet_seeds: tuple[int, ...]
    alone_seeds: tuple[int, ...]


FULL = Size(700, 60, 6, 24, (0, 1, 2), (0, 1, 2))
QUICK = Size(1000, 12, 5, 4, (0,), (0, 1))


class Benchmark:
    """One run of the benchmark in a work folder."""

    def __init__(self, folder: Path, size: Size) -> None:
        """Open the work folder, which belongs to one size."""
        self.size = size
        self.recipe: Recipe = parse_recipe(
            {
                "data": {"source": "digits", "validation": size.held_out},
                "space": {
                    "name": "mobilenet_v3",
                    # Wide ranges: on an easy set only networks that differ much can be ranked.
                    "arguments": {
                        "preset": "tiny",
                        "resolutions": [8, 12, 16],
                        "expands": [1, 2, 4],
                        "depths": [1, 2, 3],
                    },
                },
                "train": {
                    "batch_size": 64,
                    "learning_rate": 0.1,
                    "precision": "fp32",
                    "memory_format": "channels_last",
                },
            }
        )
        self.data = load_recipe_data(self.recipe)
        self.space = make_space(self.recipe, lambda: self.data)
        self.task = load_task(self.recipe.task)
        self.folder = folder
        self.path = folder / "found.json"
        self.found: dict[str, Any] = {"size": json.loads(json.dumps(asdict(size)))}
        if self.path.exists():
            found = json.loads(self.path.read_text())
            if found["size"] != self.found["size"]:
                raise SystemExit(f"{self.path} holds a run of another size; take another --work folder")
            self.found = found

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return what was computed under a name, computing it if it was not."""
        if name not in self.found:
            self.found[name] = compute()
            write_json(self.path, self.found)
            print(f"{name}: {json.dumps(self.found[name])[:120]}", flush=True)
        return self.found[name]

    @cached_property
    def networks(self) -> Codes:
        """The networks that are ranked, from least to most MACs."""
        return check_networks(self.space, self.size.networks, seed=5)

    def settings(self, schedule: str, seed: int) -> TrainSettings:
        """Return the settings of a supernet; each schedule gets as many passes."""
        common = self.recipe.train.model_dump() | {"schedule": schedule, "seed": seed}
        one = TrainSettings(**common)
        a_step = len(networks_of_step(self.space, one, phases_of(self.space, one)[0], 0))
        epochs, rest = divmod(self.size.passes, a_step)
        assert rest == 0, f"{self.size.passes} passes are no whole epochs of {a_step} networks"
        return TrainSettings(**common | {"epochs": epochs})

    def slices(self, schedule: str, seed: int) -> dict[str, Any]:
        """Train a supernet and score the networks as its slices on the held-out images."""
        supernet = Supernet(self.space, seed=seed)
        settings = self.settings(schedule, seed)
        checkpoint = self.folder / f"{schedule}-{seed}.pt"
        start = time.perf_counter()
        position = train_supernet(supernet, self.data, self.task, settings, checkpoint=checkpoint)
        seconds = time.perf_counter() - start
        calibration = calibration_batches(self.data, self.recipe.search.calibration_images)
        score = SupernetEvaluator(supernet, self.data, self.task, calibration)
        found = score(self.networks)[self.task.metric].tolist()
        checkpoint.unlink()
        return {
            "slices": found,
            "epochs": settings.epochs,
            "seconds": seconds,
            "losses": [position.losses[0], position.losses[-1]],
            "rollbacks": position.rollbacks,
        }

    def alone(self, arch: Architecture, seed: int) -> float:
        """Train a network by itself, from the initialisation of a supernet; return its test accuracy."""
        network = extract(Supernet(self.space, seed=1000 + seed), arch)
        size = self.space.operations(self.space.encode([arch]))[0][1][0].in_shape[1:]
        optimizer = self.recipe.train.model_dump(exclude={"schedule", "random_networks", "phases"})
        settings = FinetuneSettings(**optimizer | {"epochs": self.size.alone_epochs, "seed": seed})
        finetune(network, self.data, self.task, settings, resolution=size, keep_best=False)
        network.eval()
        scored = evaluate(lambda images: network(resize(images, size)), self.data.test, self.task.score)
        return scored.mean

    def everything(self) -> None:
        """Do all that is missing; single seeds of everything first."""
        for seed in self.size.alone_seeds:
            for index, arch in enumerate(self.space.decode(self.networks)):
                self.once(f"alone {index} {seed}", partial(self.alone, arch, seed))
        for seed in self.size.supernet_seeds:
            for schedule in SCHEDULES:
                self.once(f"{schedule} {seed}", partial(self.slices, schedule, seed))

    def summary(self) -> dict[str, Any]:
        """Return taus with 95 % percentile bootstrap intervals over the networks."""
        indices = range(len(self.networks))
        alone = np.array(
            [[self.found[f"alone {i} {seed}"] for i in indices] for seed in self.size.alone_seeds]
        )
        macs = operation_cost(self.space, "macs").of(self.networks)
        rankings = {"macs": macs[None]}
        for schedule in SCHEDULES:
            runs = [self.found[f"{schedule} {seed}"]["slices"] for seed in self.size.supernet_seeds]
            rankings[schedule] = np.array(runs)
        # The same resampled networks for every ranking: their differences can be compared.
        rng = np.random.default_rng(0)
        draws = [np.arange(len(macs)), *rng.integers(len(macs), size=(1000, len(macs)))]
        taus = {
            name: [mean_tau(runs[:, draw], alone[:, draw].mean(axis=0)) for draw in draws]
            for name, runs in rankings.items()
        }
        taus["one seed"] = [agreement(alone[:, draw]) for draw in draws]
        for one, other in (("fair", "single_path"), ("sandwich", "fair"), ("sandwich", "single_path")):
            taus[f"{one} - {other}"] = [a - b for a, b in zip(taus[one], taus[other], strict=True)]
        result: dict[str, Any] = {"alone": {"mean": alone.mean(axis=0).tolist(), "macs": macs.tolist()}}
        for name, values in taus.items():
            low, high = np.nanpercentile(values[1:], [2.5, 97.5])
            result[name] = {"tau": values[0], "low": float(low), "high": float(high)}
        for schedule in SCHEDULES:
            runs = [self.found[f"{schedule} {seed}"] for seed in self.size.supernet_seeds]
            result[schedule] |= {
                "epochs": runs[0]["epochs"],
                "seconds": float(np.mean([run["seconds"] for run in runs])),
                "slice_accuracy": float(rankings[schedule].mean()),
                "taus": [tau(run, alone.mean(axis=0)) for run in rankings[schedule]],
            }
        return result


def tau(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return Kendall's tau-b; not a number where one of them is constant."""
    return float(stats.kendalltau(one, other).statistic)


def mean_tau(runs: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    """Return the mean over runs `(runs, networks)` of their tau against `(networks,)`."""
    return float(np.mean([tau(run, truth) for run in runs]))


def agreement(alone: NDArray[np.float64]) -> float:
    """Return the mean tau of each stand-alone seed `(seeds, networks)` against the mean of the others."""
    others = [np.delete(alone, seed, axis=0).mean(axis=0) for seed in range(len(alone))]
    return float(np.mean([tau(run, rest) for run, rest in zip(alone, others, strict=True)]))


def table(summary: dict[str, Any], size: Size) -> str:
    """Return the summary as Markdown."""
    accuracies = summary["alone"]["mean"]
    lines = [
        "# One-shot training schedules: does the supernet rank as stand-alone training does?",
        "",
        f"Digits, {size.held_out} images held out; {len(accuracies)} networks of a tiny MobileNetV3 space, "
        f"alone {size.alone_epochs} epochs and {len(size.alone_seeds)} seeds (mean test accuracy "
        f"{min(accuracies):.3f} to {max(accuracies):.3f}); {len(size.supernet_seeds)} supernets a schedule, "
        f"{size.passes} passes over the training images each. Mean Kendall tau-b against the mean over the "
        "stand-alone seeds; 95 % bootstrap interval over the networks.",
        "",
        "| ranking | tau | 95 % interval | each supernet | mean slice accuracy | epochs | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for schedule in SCHEDULES:
        row = summary[schedule]
        each = ", ".join(f"{value:.2f}" for value in row["taus"])
        lines.append(
            f"| {LABELS[schedule]} | {row['tau']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {each} "
            f"| {row['slice_accuracy']:.3f} | {row['epochs']} | {row['seconds']:.0f} |"
        )
    for name, label in (("macs", "MACs"), ("one seed", "one stand-alone training, against the others")):
        row = summary[name]
        lines.append(f"| {label} | {row['tau']:.3f} | {row['low']:.3f} to {row['high']:.3f} | | | | |")
    lines.append("")
    for name in (name for name in summary if " - " in name):
        row = summary[name]
        lines.append(f"- {name}: {row['tau']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark, or go on with it, and write its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smoke size; prints, and writes no results")
    parser.add_argument("--work", type=Path, help="work folder (default: runs/one_shot)")
    parser.add_argument("--output", type=Path, default=RESULTS / "one_shot", help="results, without suffix")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.work or Path("runs") / ("one_shot_quick" if options.quick else "one_shot")
    folder.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(folder, QUICK if options.quick else FULL)
    benchmark.everything()
    summary = benchmark.summary()
    text = table(summary, benchmark.size)
    print(text)
    if options.quick:
        return
    write_text(
        options.output.with_suffix(".md"), f"{text}\n\nMachine and versions: {json.dumps(environment())}\n"
    )
    write_json(
        options.output.with_suffix(".json"),
        {"benchmark": "one_shot", **environment(), "summary": summary, "found": benchmark.found},
    )


if __name__ == "__main__":
    main()
