"""Half the MACs: how much faster is a narrow network really, on this machine?

    python benchmarks/narrow_latency.py [--quick]    # about ten minutes

Every network is made uniformly narrower until it has at most half of its MACs, once in widths of any number
of channels and once in multiples of 8, with random weights, which change no time. Whole and narrow networks
are exported to ONNX and measured in turn by ONNX Runtime, 32-bit floats, one thread, one image. The baseline
is the whole network, measured in the same rounds.
"""

import statistics
from collections.abc import Callable

import torch
from record import Figure, parser, report, use_one_core
from torch import nn

from autocompress.baselines import uniform_candidates
from autocompress.budget import Budget
from autocompress.cost import operation_cost
from autocompress.latency.measure import time_once
from autocompress.latency.runtime import Run, pinned, prepare
from autocompress.latency.target import load_target
from autocompress.models.mobilenet_v2 import mobilenet_v2
from autocompress.models.resnet import resnet18, resnet50
from autocompress.models.resnet_cifar import resnet20, resnet56
from autocompress.models.vgg import vgg16_bn, vgg16_bn_cifar
from autocompress.prune.source import Source
from autocompress.space import Codes, SearchSpace
from search_spaces.channels import channel_space

MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-20, 32 px": (resnet20, 32),
    "ResNet-56, 32 px": (resnet56, 32),
    "ResNet-18, 224 px": (resnet18, 224),
    "ResNet-50, 224 px": (resnet50, 224),
    "VGG-16-BN, 32 px": (vgg16_bn_cifar, 32),
    "VGG-16-BN, 224 px": (vgg16_bn, 224),
    "MobileNetV2, 224 px": (mobilenet_v2, 224),
}
HALF, PROMISED, STEPS = "macs=50%", 1.6, 64


def half(source: Source, align: int) -> tuple[SearchSpace, Codes, float]:
    """Return the largest uniform network of at most half of the MACs, and by what factor it has fewer."""
    space = channel_space(source, steps=STEPS, align=align)
    macs = operation_cost(space, "macs")
    (row, *_) = uniform_candidates(Budget.parse(HALF).resolve(space, [macs]))
    return space, row[None], float(macs.of(space.largest())[0] / macs.of(row[None])[0])


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__.splitlines()[0] if __doc__ else "", repeats=15).parse_args()
    use_one_core()
    target, figures = load_target("onnxruntime-cpu", threads=1), []
    for name, (make, side) in list(MODELS.items())[: 1 if options.quick else None]:
        torch.manual_seed(0)
        source = Source(make(), torch.zeros(1, 3, side, side))
        with pinned(target):
            runs: dict[str, Run] = {}
            fewer: dict[str, float] = {}
            for kind, align in (("any width", 1), ("multiples of 8", 8)):
                space, row, fewer[kind] = half(source, align)
                runs[kind] = prepare(space.operations(row), target)
            runs["whole"] = prepare(space.operations(space.largest()), target)
            times: dict[str, list[float]] = {kind: [] for kind in runs}
            for _ in range(options.repeats):
                for kind, run in runs.items():
                    times[kind].append(time_once(run))
        for kind, factor in fewer.items():
            # Each round is a pair: what disturbs the machine disturbs both.
            pairs = [whole / ms for whole, ms in zip(times["whole"], times[kind], strict=True)]
            faster = statistics.median(pairs)
            low, _, high = statistics.quantiles(pairs, n=4)
            promised = name.startswith("ResNet") and kind == "multiples of 8"
            figures.append(
                Figure(
                    f"{name}, {kind}: {factor:.2f}x fewer MACs, "
                    f"{statistics.median(times['whole']):.2f} ms to {statistics.median(times[kind]):.2f} ms",
                    faster,
                    "x faster",
                    low,
                    high,
                    f">= {PROMISED:g}" if promised else "",
                    faster >= PROMISED if promised else None,
                )
            )
    settings = {
        "target": "onnxruntime-cpu, 1 thread, 32-bit floats, one image",
        "rounds": options.repeats,
        "range": "quartiles of the ratio within each round",
    }
    report("narrow_latency", figures, settings=settings, options=options)


if __name__ == "__main__":
    main()
