"""Which technique works on which network: every cell of the table is tried out here, none is promised.

    python benchmarks/support_matrix.py [--quick]    # about twenty minutes; resumes

Networks are those of `autocompress.models`, patterns of networks (`tests/prune/zoo.py`), and some of
torchvision and timm where they are installed; all with random weights. A cell says `yes`, or why not.
"""

import argparse
import importlib.util
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conversion import MODELS, counted
from record import RESULTS, ROOT, environment
from torch import Tensor, nn

from autocompress.atomic import read_json, write_json, write_text
from autocompress.cost import operation_cost
from autocompress.elastic.extract import extract
from autocompress.elastic.recalibrate import recalibrate
from autocompress.errors import AutocompressError, StorageError
from autocompress.export.export import export_network
from autocompress.latency.runtime import prepare
from autocompress.latency.target import load_target
from autocompress.network import model_of
from autocompress.prune.importance import CRITERIA, importance
from autocompress.prune.reconstruct import reconstruct
from autocompress.prune.source import Source, Widths
from autocompress.space import SearchSpace
from search_spaces.channels import channel_space

sys.path.insert(0, str(ROOT / "tests" / "prune"))
from zoo import ZOO

TORCHVISION = (
    *("resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "densenet121", "googlenet"),
    *("shufflenet_v2_x1_0", "squeezenet1_1", "regnet_y_400mf", "convnext_tiny", "vit_b_16"),
)
TIMM = (
    *("resnet18", "mobilenetv3_small_100", "efficientnet_b0", "densenet121", "repvgg_a0", "ghostnet_100"),
    *("convnext_atto", "vit_tiny_patch16_224"),
)
TOLERANCE = 1e-5


@dataclass
class Tried:
    """A converted network and what the techniques share.

    Attributes:
        source: The network.
        space: Its widths.
        side: Of its images.
        batch: Random images.
        widths: About half of each group.
    """

    source: Source
    space: SearchSpace
    side: int
    batch: Tensor
    widths: Widths

    @property
    def sample(self) -> list[tuple[Tensor, Tensor]]:
        """Images with targets of the network's output."""
        return [(self.batch, torch.zeros(len(self.batch), dtype=torch.long))]


def convert(make: Callable[[], nn.Module], side: int) -> Tried:
    """Convert a network."""
    torch.manual_seed(0)
    batch = torch.randn(4, 3, side, side)
    source = Source(make(), batch[:1])
    space = channel_space(source, steps=4)
    widths = tuple(max(least, len(g) // 2) for g, least in zip(source.groups, source.least, strict=True))
    return Tried(source, space, side, batch, widths)


def error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest output."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def same(found: Tensor, expected: Tensor) -> str:
    """Return `yes`, or by how much the outputs differ."""
    difference = error(found, expected)
    return "yes" if difference <= TOLERANCE else f"differs by {difference:.1e}"


def removes(tried: Tried) -> str:
    """Compare the narrow network with the masked one."""
    with torch.no_grad():
        narrow = tried.source.narrowed(tried.widths)(tried.batch)
        return same(narrow, tried.source.masked(tried.widths)(tried.batch))


def whole(tried: Tried) -> str:
    """Compare the network at full width with the original, bit for bit."""
    with torch.no_grad():
        full = tried.source.narrowed(tried.source.full)(tried.batch)
        return "yes" if torch.equal(full, tried.source.model(tried.batch)) else "differs"


def prices(tried: Tried) -> str:
    """Compare prices of three random networks with counts."""
    costs = [operation_cost(tried.space, metric) for metric in ("macs", "params")]
    codes = tried.space.sample(3, np.random.default_rng(0))
    for row in codes:
        priced = tuple(int(cost.of(row[None])[0]) for cost in costs)
        found = counted(tried.source, tried.space, row, tried.side)
        if found != priced:
            return f"priced {priced}, counted {found}"
    return "yes"


def criteria(tried: Tried) -> str:
    """Score by every criterion."""
    missing = []
    for name, criterion in CRITERIA.items():
        try:
            importance(
                tried.source,
                name,
                batches=tried.sample if criterion.batches else None,
                loss=nn.functional.cross_entropy if criterion.loss else None,
            )
        except AutocompressError:
            missing.append(name)
    return "yes" if not missing else f"not {', '.join(missing)}"


def reconstructs(tried: Tried) -> str:
    """Fit the weights of the narrow network by least squares."""
    narrow = tried.source.narrowed(tried.widths)
    left = reconstruct(tried.source, tried.widths, narrow, tried.sample)
    return "yes" if not left else f"yes, but {len(left)} grouped layers"


def slices(tried: Tried) -> str:
    """Compare a slice of the supernet with the network that is copied out of it."""
    supernet = tried.space.supernet().eval()
    codes = tried.space.sample(1, np.random.default_rng(1))
    (arch,) = tried.space.decode(codes)
    statistics = recalibrate(supernet, arch, [tried.batch])
    with torch.no_grad():
        return same(
            extract(supernet, arch, statistics)(tried.batch),
            supernet(tried.batch, arch, statistics=statistics),
        )


def trains(tried: Tried) -> str:
    """Take gradients of a slice: what training of supernets, and DMCP, stand on."""
    supernet = tried.space.supernet().train()
    (arch,) = tried.space.decode(tried.space.sample(1, np.random.default_rng(2)))
    supernet(tried.batch, arch).square().mean().backward()
    found = [p.grad for p in supernet.parameters() if p.grad is not None]
    return "yes" if found and all(bool(torch.isfinite(g).all()) for g in found) else "no gradient"


def exports(tried: Tried, formats: tuple[Any, ...]) -> str:
    """Export, which loads back and compares."""
    codes = tried.space.sample(1, np.random.default_rng(3))
    (arch,) = tried.space.decode(codes)
    supernet = tried.space.supernet().eval()
    network = extract(supernet, arch, recalibrate(supernet, arch, [tried.batch]))
    with tempfile.TemporaryDirectory() as folder:
        export_network(
            network,
            architecture=arch,
            blocks=tried.space.operations(codes),
            in_shape=(3, tried.side, tried.side),
            folder=Path(folder) / "exported",
            preprocessing={},
            formats=formats,
        )
    return "yes"


def runs(tried: Tried) -> str:
    """Run the narrow network in ONNX Runtime, as latency is measured."""
    codes = tried.space.sample(1, np.random.default_rng(4))
    prepare(tried.space.operations(codes), load_target("onnxruntime-cpu"))()
    return "yes"


def loads(tried: Tried) -> str:
    """Load the state dict of the narrow network into another copy of the same shapes."""
    (arch,) = tried.space.decode(tried.space.sample(1, np.random.default_rng(5)))
    widths = tuple(int(arch[choice.name]) for choice in tried.space.choices)
    narrow = tried.source.narrowed(widths)
    other = tried.source.narrowed(widths)
    other.load_state_dict(narrow.state_dict())
    ((_, (op,)),) = tried.space.operations(tried.space.encode([arch]))
    built = model_of(nn.ModuleDict({"network": nn.Sequential(op.module())}))  # type: ignore[arg-type]
    built.load_state_dict(narrow.state_dict())
    return "yes"


TECHNIQUES: dict[str, Callable[[Tried], str]] = {
    "whole = original, bit for bit": whole,
    "narrow = masked": removes,
    "price = count": prices,
    "all criteria": criteria,
    "least squares": reconstructs,
    "slices": slices,
    "training of slices, DMCP": trains,
    "state dict": loads,
    "ONNX": lambda tried: exports(tried, ("onnx",)),
    "torch.export": lambda tried: exports(tried, ("torch_export",)),
    "measured in ONNX Runtime": runs,
}


def networks(*, quick: bool) -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """Return name to what makes a network and the side of its images."""
    own = {f"{name} ({side} px)": (make, side) for name, (make, side) in MODELS.items()}
    if quick:
        return dict(list(own.items())[:1])
    found = dict(own)
    # The one with 138 million weights takes longer than all others.
    largest = found.popitem()
    found |= {f"pattern: {name}": pair for name, pair in ZOO.items()}
    for package, names in (("torchvision", TORCHVISION), ("timm", TIMM)):
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: its networks are left out")
            continue
        for name in names:
            found[f"{package} {name}"] = (lambda p=package, n=name: foreign(p, n), 224)  # type: ignore[misc]
    return {**found, largest[0]: largest[1]}


def foreign(package: str, name: str) -> nn.Module:
    """Make a network of another package, with random weights."""
    module = importlib.import_module("torchvision.models" if package == "torchvision" else "timm")
    if package == "timm":
        made: nn.Module = module.create_model(name, pretrained=False)
        return made
    arguments = {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    return getattr(module, name)(weights=None, **arguments)


def row(make: Callable[[], nn.Module], side: int) -> dict[str, str]:
    """Try everything on one network."""
    try:
        tried = convert(make, side)
    except AutocompressError as failure:
        return {"converted": f"no: {failure}"}
    kept = len(tried.source.kept)
    found = {
        "converted": f"{len(tried.source.groups)} groups, {kept} {'layer' if kept == 1 else 'layers'} kept"
    }
    for name, technique in TECHNIQUES.items():
        try:
            found[name] = technique(tried)
        except AutocompressError as failure:
            found[name] = f"no: {str(failure).splitlines()[0][:160]}"
        except Exception as failure:  # noqa: BLE001
            # A defect: shown in the table, so that it is mended.
            traceback.print_exc()
            found[name] = f"FAILS: {type(failure).__name__}"
    return found


def table(rows: dict[str, dict[str, str]]) -> str:
    """Return the matrix as Markdown; reasons are notes below it."""
    columns = ["converted", *TECHNIQUES]
    notes: list[str] = []
    lines = [
        "# Which technique works on which network",
        "",
        "Made by `python benchmarks/support_matrix.py`; every cell was tried out.",
        "",
        f"| network | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, found in rows.items():
        cells = []
        for column in columns:
            text = found.get(column, "")
            if (column != "converted" and text not in ("yes", "")) or text.startswith("no:"):
                if text not in notes:
                    notes.append(text)
                text = f"{'yes' if text.startswith('yes') else 'no'} [{notes.index(text) + 1}]"
            cells.append(text)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{n}. {note}" for n, note in enumerate(notes, start=1)), ""])


def main() -> None:
    """Fill what is missing, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one network; written nowhere")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "support_matrix.json"
    done: dict[str, dict[str, str]] = {}
    if path.exists() and not options.quick:
        done = read_json(path, StorageError, "results")["rows"]
    for name, (make, side) in networks(quick=options.quick).items():
        if name in done:
            continue
        done[name] = row(make, side)
        print(f"{name}: {done[name]}", flush=True)
        if not options.quick:
            write_json(path, {**environment(), "rows": done})
    text = table(done)
    if not options.quick:
        write_text(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
