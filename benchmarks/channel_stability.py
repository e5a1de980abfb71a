"""How much do found widths differ when a search is repeated? Kept channels of DMCP, PEEL-style and others.

    python benchmarks/channel_stability.py            # about half an hour on one core; resumes
    python benchmarks/channel_stability.py --quick    # a smoke test

The trained ResNet-20 of `shrink_resnet.py` (read, or trained first), at 40 % of its MACs, five seeds each.
PEEL-style's search begins with a sparse warm-up of its own: an L1 penalty on the scales of batch norm, with
another order of images for each seed; DMCP trains slices and chains. Without the warm-up, as `shrink` does it
with trained weights, PEEL-style by L1 draws nothing, and measured it draws images. The figure is the standard
deviation over the seeds of the share of channels that a group keeps, in the mean over groups. The paper of
PEEL claims that it is much smaller than that of DMCP.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, environment
from shrink_resnet import CPU, METHODS, QUICK, Benchmark
from torch import Tensor, nn

from autocompress.atomic import read_json, write_json, write_text
from autocompress.elastic.supernet import resize
from autocompress.errors import StorageError
from autocompress.plugins import load_strategy
from autocompress.prune.importance import comparable, importance
from autocompress.prune.source import Source
from autocompress.space import Codes, SearchSpace
from autocompress.sparse.methods import options_of
from autocompress.sparse.train import sparsify
from search_spaces.channels import channel_space

BUDGET, SEEDS = "macs=40%", range(5)
WARM_UP_EPOCHS, STRENGTH = 3, 1e-3
DMCP, NO_WARM_UP = "DMCP", ", no warm-up"
WARMED = ("PEEL-style, BN scale", "PEEL-style, L1")
SEARCHES = (
    DMCP,
    *WARMED,
    f"PEEL-style, L1{NO_WARM_UP}",
    f"PEEL-style, measured{NO_WARM_UP}",
    "sensitivity, Taylor",
    "evolution",
)
PROMISED = 0.5


class Smaller(nn.Module):
    """A network that sees its images smaller."""

    def __init__(self, network: nn.Module, side: tuple[int, int]) -> None:
        super().__init__()
        self.network, self.side = network, side

    def forward(self, x: Tensor) -> Tensor:
        """Map images of any size to the network's output."""
        return self.network(resize(x, self.side))  # type: ignore[no-any-return]


def peel(benchmark: Benchmark, criterion: str, seed: int) -> tuple[SearchSpace, Codes]:
    """Warm up with a penalty on scales, then find widths PEEL-style."""
    settings = benchmark.settings(WARM_UP_EPOCHS, benchmark.size.finetune_rate, seed)
    options = options_of("slimming", {"strength": STRENGTH})
    warm = sparsify(
        Smaller(benchmark.model, benchmark.side),
        benchmark.data,
        benchmark.task,
        settings,
        method="slimming",
        options=options,
    )
    source = Source(warm.network.get_submodule("network"), torch.zeros(1, 3, *benchmark.side))
    scores = comparable(importance(source, criterion), criterion)
    space = channel_space(source, steps=benchmark.size.steps, scores=scores)
    return space, load_strategy("peel")(benchmark.limits(space, BUDGET), seed=seed).ask(1)


def shares(benchmark: Benchmark, name: str, seed: int) -> list[float]:
    """Search, and return the share of its channels that each group keeps."""
    if name in WARMED:
        space, codes = peel(benchmark, METHODS[name].criterion, seed)
    else:
        name = name.removesuffix(NO_WARM_UP)
        space, codes, _ = benchmark.widths(METHODS[name], name, BUDGET, seed)
    kept: Any = [choice.options[code] for choice, code in zip(space.choices, codes[0].tolist(), strict=True)]
    return [float(units / choice.options[-1]) for units, choice in zip(kept, space.choices, strict=True)]


def table(found: dict[str, Any], size: object) -> str:
    """Return the result as Markdown."""
    lines = [
        "# How much found widths differ when a search is repeated",
        "",
        f"{size}. At {BUDGET}; sparse warm-up of PEEL-style: {WARM_UP_EPOCHS} epochs, strength {STRENGTH:g}.",
        "",
        "| search | repeats | standard deviation of kept shares, mean | largest group | of DMCP's | s |",
        "|---|---|---|---|---|---|",
    ]
    spreads = {}
    for name in SEARCHES:
        runs = [found[key] for key in found if key.rpartition(" ")[0] == name]
        if len(runs) > 1:
            spreads[name] = np.std([run["shares"] for run in runs], axis=0, ddof=1), runs
    for name, (spread, runs) in spreads.items():
        ratio = f"{spread.mean() / spreads[DMCP][0].mean():.2f}" if DMCP in spreads else ""
        seconds = np.mean([run["seconds"] for run in runs])
        lines.append(
            f"| {name} | {len(runs)} | {spread.mean():.4f} | {spread.max():.4f} | {ratio} | {seconds:.0f} |"
        )
    promised = f"Asked for: PEEL-style at most {PROMISED:g} of DMCP's."
    return "\n".join([*lines, "", promised, ""])


def main() -> None:
    """Run what is missing, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smoke size; written to runs/")
    parser.add_argument("--searches", default=";".join(SEARCHES))
    options = parser.parse_args()
    suffix, size = ("_quick", QUICK) if options.quick else ("", CPU)
    folder = Path("runs") if options.quick else RESULTS
    benchmark = Benchmark(
        size, folder / f"shrink_resnet{suffix}.json", Path("runs") / f"shrink_resnet{suffix}"
    )
    path = folder / f"channel_stability{suffix}.json"
    found: dict[str, Any] = {}
    if path.exists():
        found = read_json(path, StorageError, "results")["found"]
    for name in options.searches.split(";"):
        for seed in SEEDS:
            key = f"{name} {seed}"
            if key in found:
                continue
            start = time.process_time()
            kept = shares(benchmark, name, seed)
            found[key] = {"shares": kept, "seconds": time.process_time() - start}
            write_json(path, {"environment": environment(), "found": found})
            print(key, [round(share, 2) for share in kept], flush=True)
    text = table(found, size)
    write_text(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
