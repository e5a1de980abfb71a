"""A tuned compression policy against the best of a single pass, at the same measured latency and trials.

    python benchmarks/policy_tuning.py            # CPU size: about an hour of one core; resumes
    python benchmarks/policy_tuning.py --quick    # a smoke test of a minute or two; written to runs/
    python benchmarks/policy_tuning.py --dry      # latency of every single-pass policy; trains nothing

The ResNet-20 of shrink_resnet.py, on CIFAR-10 at 16 pixels: the 10,000 images it was trained on, 5,000 for
validation, the whole test part. Images are made smaller once and kept as bytes: with the mean and deviation
of the small ones the network scores a little less than in shrink_resnet.py. Training images are shifted and,
other than there, not mirrored.

`tuned` and `random search` finetune the same number of policies, the single passes as many all together, for
the same epochs (nothing is stopped early) under the same budget, a share of the latency of the original:
eight images at a time on OpenVINO, one thread. Policies over the budget are measured and do not count.
Channels are pruned in multiples of 8. OpenVINO, for alone in ONNX Runtime this network is too small to be
faster in 8 bits. The budget was chosen by `--dry`, which looks at no accuracy: 8 bits and the cheapest
factorizations fit alone, and pruning hardly does. Much below it next to nothing fits, for what a network so
small takes is mostly the overhead of calls. One epoch is little: what lost much does not recover in it.

- `tuned`: prune > factorize > quantize > distill, from each pass alone on by TPE, as `autocompress tune`
  does; `random search`: the same space at random, from nothing.
- One pass and distillation, from the mildest that fits on by TPE. Of 8 bits there are few different policies:
  the ways in which ranges are found, and the learning rates.
- `random policy`: the first random ones that fit, chosen by nobody; the mean of them is one number a seed.

The default policy (everything off) is the original, and does not fit: there is no uniform baseline. A winner
is the best on validation; the test part is read once, for winners and random policies. `best single pass` is
the arm that validation prefers, so it has had the trials of all single passes together: as many as `tuned`.
Seeds are those of the search, of the images that passes look at, and of training. At the end all
winners of a seed are measured again, interleaved; that latency may lie beyond the budget, and is shown.
CPU seconds are of all processes of an arm: measuring, training and Ray's own.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, ROOT, cifar10_folder, counted, environment, interval_text
from torch import Tensor
from torch.utils.data import Dataset

from autocompress.atomic import held, locked, read_json, write_json, write_text
from autocompress.distributed.connect import connected
from autocompress.distributed.tune import tune
from autocompress.elastic.supernet import resize
from autocompress.errors import AutocompressError, BudgetError, StorageError
from autocompress.policy.passes import Policy, policy_text, structure_of
from autocompress.policy.recipe import PolicyRecipe
from autocompress.policy.run import begin, compare, gather, space_of
from autocompress.policy.trial import (
    TRIALS,
    WHOLE,
    Job,
    costs_of,
    key_of,
    original_costs,
    policy_of,
)
from autocompress.training.data import load_data
from autocompress.trial import Trial

SIDE = 16
POLLED_S = 0.5
ORIGINAL = "as you brought it"
TUNED, RANDOM, DRAWN, BEST_SINGLE = "tuned", "random search", "random policy", "best single pass"


# What a pass may do, besides being off; single passes and the whole space have the same.
PRUNE = {"ratio": [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], "criterion": ["l2", "taylor"], "multiple": 8}
FACTORIZE = {"method": ["svd", "spatial", "tucker", "depthwise"], "ratio": [0.15, 0.25, 0.4]}
QUANTIZE = {"bits": [8], "ranges": ["mse", "minmax", "percentile", "kl"]}
RATES = [0.02, 0.05]
OFF = {"prune": ("ratio", 0.0), "factorize": ("method", "none"), "quantize": ("bits", 32)}
SINGLE = {"prune only": ("prune", PRUNE), "factorize only": ("factorize", FACTORIZE)}
SINGLE |= {"8 bits only": ("quantize", QUANTIZE)}
ARMS = (TUNED, *SINGLE, RANDOM)
ROWS = (ORIGINAL, *ARMS, BEST_SINGLE, DRAWN)


@dataclass(frozen=True)
class Size:
    """What is trained, and for how long."""

    images: int = 10_000
    validation: int = 5_000
    test: int = 10_000
    seeds: int = 3
    trials: int = 6
    single_trials: int = 2
    epochs: int = 1
    runs: int = 60
    budgets: tuple[str, ...] = ("50%",)
    batch: int = 8
    drawn: int = 2
    arms: tuple[str, ...] = ARMS
    data: str = "images"


CPU = Size()
QUICK = Size(
    300, 200, 200, 1, 2, 1, runs=10, budgets=("150%",), drawn=1, arms=(*ARMS[:2], RANDOM), data="few_images"
)


def passes_of(arm: str, epochs: int) -> list[dict[str, Any]]:
    """Return the passes of an arm with what may be chosen of them."""
    distill = {"distill": {"epochs": epochs, "learning_rate": RATES}}
    if arm in SINGLE:
        name, settings = SINGLE[arm]
        return [{name: settings}, distill]
    entries: list[dict[str, Any]] = []
    for name, settings in SINGLE.values():
        switch, off = OFF[name]
        options = [off, *settings[switch]]
        entries.append({name: settings | {switch: sorted(options) if switch == "ratio" else options}})
    return [*entries, distill]


class Small(Dataset[tuple[Tensor, Tensor]]):
    """Images of 16 pixels as bytes."""

    classes = 10

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        """Make images smaller, as shrink_resnet.py does with floats."""
        self.images = resize(images.float(), (SIDE, SIDE)).round().clamp(0, 255).byte()
        self.labels = labels

    def __len__(self) -> int:
        """Return how many."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image and its label."""
        return self.images[index], self.labels[index]


def images() -> tuple[Small, Small, Small]:
    """Return the parts of the CPU size: what `data.source` of the recipes names."""
    return _parts(CPU)


def few_images() -> tuple[Small, Small, Small]:
    """Return those of the quick size."""
    return _parts(QUICK)


def _parts(size: Size) -> tuple[Small, Small, Small]:
    # The very parts of shrink_resnet.py: the network has seen the training part only.
    total = CPU.images + CPU.validation
    data = load_data("cifar10", folder=cifar10_folder(), limit=total, validation=CPU.validation / total)
    counts = (size.images, size.validation, size.test)
    parts: Any = zip((data.train, data.validation, data.test), counts, strict=True)
    train, validation, test = (Small(part.images[:count], part.labels[:count]) for part, count in parts)
    return train, validation, test


@contextmanager
def processor_seconds() -> Iterator[Callable[[], float]]:
    """Give a function that returns the processor time of this process and its descendants since the start.

    Workers of Ray are grandchildren that nobody waits for: they are looked up from time to time.
    """
    seen = _descendants()
    before, started, stop = sum(seen.values()), time.process_time(), threading.Event()

    def poll() -> None:
        while not stop.wait(POLLED_S):
            seen.update(_descendants())

    def since() -> float:
        seen.update(_descendants())
        return time.process_time() - started + sum(seen.values()) - before

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield since
    finally:
        stop.set()
        thread.join()


def _descendants() -> dict[int, float]:
    """Return the processor time of each process below this one; none where there is no /proc."""
    parents, seconds = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # After the name, which may hold anything: state, parent, ...; utime and stime.
            fields = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            parents[pid] = int(fields[1])
            seconds[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    found, added = {os.getpid()}, {os.getpid()}
    while added:
        added = {pid for pid, parent in parents.items() if parent in added}
        found |= added
    return {pid: seconds[pid] for pid in found - {os.getpid()}}


class Benchmark:
    """All arms of one size; what is done stands in a file."""

    def __init__(self, size: Size, path: Path, work: Path) -> None:
        """Read what is done.

        Args:
            size: What is tuned.
            path: File of results.
            work: Folder of the run directories, from which what was stopped goes on.
        """
        self.size, self.path, self.work = size, path, work
        self.found: dict[str, Any] = {}
        if path.exists():
            content = read_json(path, StorageError, "results")
            if content["size"] != json.loads(json.dumps(asdict(size))):
                raise SystemExit(f"{path} is of another size, {content['size']}: move it away")
            self.found = content["found"]

    def folder(self, budget: str, seed: int) -> Path:
        """Return the folder of the arms of a seed."""
        return self.work / budget / f"seed {seed}"

    def job(self, budget: str, arm: str, seed: int) -> Job:
        """Open the run directory of an arm; all of a seed have one measured original, and so one limit."""
        folder = self.folder(budget, seed) / arm
        folder.mkdir(parents=True, exist_ok=True)
        recipe = PolicyRecipe.model_validate(
            {
                "model": "autocompress.models.resnet_cifar:resnet20",
                "weights": str(RESULTS / "shrink_resnet" / "resnet20.safetensors"),
                "data": {"source": f"policy_tuning:{self.size.data}"},
                "passes": passes_of(arm, self.size.epochs),
                "finetune": {"batch_size": 64, "warmup_epochs": 0.1, "weight_decay": 5e-4, "shift": 2},
                "target": {"name": "openvino-cpu", "threads": 1, "batch": self.size.batch},
                "tune": {
                    "budget": {"latency_ms": budget},
                    "trials": self.size.single_trials if arm in SINGLE else self.size.trials,
                    "strategy": "random" if arm == RANDOM else "tpe",
                    "warm_start": "none" if arm == RANDOM else "mildest",
                    # Nothing is stopped before its last epoch.
                    "grace_epochs": self.size.epochs,
                    "runs": self.size.runs,
                    "seed": seed,
                },
            }
        )
        job = begin(folder, recipe)
        if arm != TUNED:
            whole = self.job(budget, TUNED, seed)
            original_costs(whole)
            for name in (WHOLE, "original.json"):
                if not (folder / name).exists():
                    shutil.copyfile(whole.folder / name, folder / name)
        return job

    def everything(self) -> None:
        """Do what is missing."""
        for budget, seed in itertools.product(self.size.budgets, range(self.size.seeds)):
            for arm in self.size.arms:
                if (key := f"{budget} {arm} {seed}") not in self.found:
                    job = self.job(budget, arm, seed)
                    with locked(job.folder):
                        self._note(key, self.tuned(job))
            if (key := f"{budget} winners {seed}") not in self.found:
                self._note(key, self.winners(budget, seed))

    def tuned(self, job: Job) -> dict[str, Any]:
        """Tune an arm; return its winner on validation."""
        space, path = space_of(job.recipe), job.folder / "seconds.json"
        spent = float(read_json(path, StorageError, "seconds")["seconds"]) if path.exists() else 0.0
        with processor_seconds() as since:

            def note(done: int, total: int, text: str = "") -> None:
                write_json(path, {"seconds": spent + since()})

            original_costs(job)
            tune(job, space, note)
            note(0, 0)
            seconds = spent + since()
        result = gather(job, space)
        found = {
            "policies": len(result.trials),
            "fitting": len(result.measured),
            "seconds": seconds,
            "drawn": [self._policy(job, trial) for trial in result.measured[: self.size.drawn]],
        }
        try:
            best = result.best()
        except BudgetError:
            return found
        return found | {
            "policy": self._policy(job, best),
            "validation": 100 * best.metrics[result.objective],
        }

    @staticmethod
    def _policy(job: Job, trial: Trial) -> list[Any]:
        """Return the policy of a trial as JSON has it."""
        policy = policy_of(job.recipe, dict(trial.architecture.settings))
        return [[name, dict(settings)] for name, settings in policy]

    def winners(self, budget: str, seed: int) -> dict[str, Any]:
        """Measure the winners of a seed side by side, and score them on the test part."""
        policies: dict[str, Policy] = {}
        folder = self.folder(budget, seed) / "winners"
        whole = self.job(budget, TUNED, seed)
        (folder / TRIALS).mkdir(parents=True, exist_ok=True)
        for name in (WHOLE, "original.json"):
            shutil.copyfile(whole.folder / name, folder / name)
        for arm in self.size.arms:
            found = self.found[f"{budget} {arm} {seed}"]
            chosen = {arm: found["policy"]} if "policy" in found else {}
            if arm == RANDOM:
                chosen |= {f"{DRAWN} {n}": policy for n, policy in enumerate(found["drawn"], start=1)}
            for name, policy in chosen.items():
                policies[name] = policy
                for part in (Path(TRIALS, key_of(policy)), Path("structures", key_of(structure_of(policy)))):
                    source = self.folder(budget, seed) / arm / part
                    shutil.copytree(source, folder / part, dirs_exist_ok=True)
        return compare(Job(whole.recipe, folder), policies)

    def dry(self) -> str:
        """Measure every policy of one pass; return their shares of the latency of the original."""
        lines = ["| pass | settings | latency, of the original | MACs |", "|---|---|---|---|"]
        for arm in SINGLE:
            job = self.job("100%", arm, 0)
            whole, done = original_costs(job), set()
            choices = space_of(job.recipe).choices
            for options in itertools.product(*(choice.options for choice in choices)):
                names = (choice.name for choice in choices)
                structure = structure_of(policy_of(job.recipe, dict(zip(names, options, strict=True))))
                if key_of(structure) in done:
                    continue
                done.add(key_of(structure))
                try:
                    costs = costs_of(job, structure)
                    shares = " | ".join(f"{costs[c] / whole[c]:.3f}" for c in ("latency_ms", "macs"))
                except AutocompressError as error:
                    shares = f"{error} |"
                lines.append(f"| {arm} | {policy_text(structure)} | {shares} |")
                print(lines[-1], flush=True)
        return "\n".join(lines)

    def _note(self, name: str, found: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with held(self.path.with_suffix(".lock")):
            self.found[name] = {**found, "commit": environment()["commit"]}
            content = {"environment": environment(), "size": asdict(self.size), "found": self.found}
            write_json(self.path, content)
            write_text(self.path.with_suffix(".md"), self.table())
        print(f"{name}: {self.found[name].get('validation', '')}", flush=True)

    def table(self) -> str:
        """Return the results as Markdown."""
        wanted = [
            f"{budget} {name} {seed}"
            for budget, seed in itertools.product(self.size.budgets, range(self.size.seeds))
            for name in (*self.size.arms, "winners")
        ]
        missing = len(set(wanted) - set(self.found))
        partial = f"Partial: {missing} of {len(wanted)} runs are missing; the same command goes on from here."
        lines = [
            "# A tuned policy against a single pass",
            "",
            *([partial, ""] if missing else []),
            f"{self.size}. Test accuracy in percent, mean ± standard deviation over seeds; latency of "
            "winners measured again, interleaved, as share of the original's. `best single pass` is the arm "
            "of the best validation score, and had the trials of all of them.",
        ]
        for budget in self.size.budgets:
            lines += ["", f"## At most {budget} of the latency", "", *self._section(budget)]
        return "\n".join([*lines, ""])

    def _section(self, budget: str) -> list[str]:
        seeds = {seed: self._rows(budget, seed) for seed in range(self.size.seeds)}
        seeds = {seed: rows for seed, rows in seeds.items() if rows}
        lines = [
            "| | test | each | latency, of the original | beyond the budget | tried | of these fit | CPU s |",
            "|---|---|---|---|---|---|---|---|",
            *(self._line(budget, name, seeds) for name in ROWS),
            "",
            "| tuned minus | test, paired difference (95 %) | each |",
            "|---|---|---|",
        ]
        tuned = _tests(TUNED, seeds)
        for other in (BEST_SINGLE, RANDOM, DRAWN, *SINGLE):
            base = _tests(other, seeds)
            pairs = [tuned[seed] - base[seed] for seed in tuned if seed in base]
            each = ", ".join(f"{pair:+.2f}" for pair in pairs)
            lines.append(f"| {other} | {counted(pairs, '+')} {interval_text(pairs)} | {each} |")
        lines += ["", "| seed | arm | validation | policy |", "|---|---|---|---|"]
        for seed, arm in itertools.product(range(self.size.seeds), self.size.arms):
            if (found := self.found.get(f"{budget} {arm} {seed}")) is not None:
                fits = "policy" in found
                score = f"{found['validation']:.2f}" if fits else ""
                text = policy_text(found["policy"]) if fits else "nothing that was tried fits"
                lines.append(f"| {seed} | {arm} | {score} | {text} |")
        return lines

    def _rows(self, budget: str, seed: int) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of the final comparison of a seed by what they are; empty before it."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in self.found.get(f"{budget} winners {seed}", {}).get("rows", []):
            rows.setdefault(DRAWN if row["name"].startswith(DRAWN) else row["name"], []).append(row)
        singles = [arm for arm in SINGLE if arm in rows]
        if singles:
            scores = {arm: self.found[f"{budget} {arm} {seed}"]["validation"] for arm in singles}
            rows[BEST_SINGLE] = rows[max(singles, key=lambda arm: scores[arm])]
        return rows

    def _line(self, budget: str, name: str, seeds: Mapping[int, Mapping[str, Any]]) -> str:
        shares = [
            row["latency_ms"]["median"] / rows[ORIGINAL][0]["latency_ms"]["median"]
            for rows in seeds.values()
            for row in rows.get(name, [])
        ]
        limit = float(budget.rstrip("%")) / 100
        beyond = "" if name == ORIGINAL else f"{sum(share > limit for share in shares)} of {len(shares)}"
        arms = [arm for arm in self.size.arms if arm in SINGLE] if name == BEST_SINGLE else [name]
        counts = []
        for key in ("policies", "fitting", "seconds"):
            sums = [
                sum(self.found[f"{budget} {arm} {seed}"][key] for arm in arms)
                for seed in range(self.size.seeds)
                if all(f"{budget} {arm} {seed}" in self.found for arm in arms)
            ]
            counts.append(f"{statistics.mean(sums):.{0 if key == 'seconds' else 1}f}" if sums else "")
        tests = list(_tests(name, seeds).values())
        each = ", ".join(f"{value:.2f}" for value in tests)
        latency = ", ".join(f"{share:.3f}" for share in shares)
        return f"| {' | '.join([name, counted(tests), each, latency, beyond, *counts])} |"


def _tests(name: str, seeds: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    """Return the test accuracy of each seed, of several networks their mean."""
    return {
        seed: statistics.mean(100 * row["test"]["mean"] for row in rows[name])
        for seed, rows in seeds.items()
        if name in rows
    }


def main() -> None:
    """Run what is missing, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smoke size; written to runs/")
    parser.add_argument("--dry", action="store_true", help="measure single passes only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Workers import the images from here.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    name = "policy_tuning" + ("_quick" if options.quick else "")
    work, path = ROOT / "runs" / name, (ROOT / "runs" if options.quick else RESULTS) / f"{name}.json"
    size = QUICK if options.quick else CPU
    if options.dry:
        benchmark = Benchmark(size, work / "dry" / "none.json", work / "dry")
        write_text(work / "dry.md", benchmark.dry())
        return
    if options.quick:
        path.unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
    benchmark = Benchmark(size, path, work)
    with ExitStack() as opened:
        connected(opened, workers=1, threads=1, address=None)
        benchmark.everything()
    text = benchmark.table()
    write_text(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
