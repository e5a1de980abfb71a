"""How long it takes to convert a user's network and to price widths of it, and whether prices are counts.

    python benchmarks/conversion.py [--quick]    # about ten minutes

Every model of `autocompress.models` is converted; 100,000 random width assignments are priced (MACs and
parameters, compiled); and random assignments are built and counted: MACs by PyTorch's own counter, parameters
by their elements. The baseline of pricing is what other pruning tools do: build the network and count it.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from record import Figure, parser, report, timed, use_one_core
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autocompress.cost import operation_cost
from autocompress.models.mobilenet_v2 import mobilenet_v2, mobilenet_v2_cifar
from autocompress.models.resnet import resnet18, resnet50
from autocompress.models.resnet_cifar import resnet20, resnet56
from autocompress.models.vgg import vgg16_bn, vgg16_bn_cifar
from autocompress.prune.source import Source
from autocompress.space import SearchSpace
from search_spaces.channels import channel_space

MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-20": (resnet20, 32),
    "ResNet-56": (resnet56, 32),
    "VGG-16-BN, CIFAR": (vgg16_bn_cifar, 32),
    "MobileNetV2, CIFAR": (mobilenet_v2_cifar, 32),
    "ResNet-18": (resnet18, 224),
    "ResNet-50": (resnet50, 224),
    "MobileNetV2": (mobilenet_v2, 224),
    "VGG-16-BN": (vgg16_bn, 224),
}
PRICED, COUNTED = 100_000, 30
CONVERSION_S, PRICING_S = 5.0, 1.0


def counted(source: Source, space: SearchSpace, row: np.ndarray[Any, Any], side: int) -> tuple[int, int]:
    """Build the network with these widths, and count its MACs and parameters."""
    (arch,) = space.decode(row[None])
    narrow = source.narrowed(tuple(int(arch[choice.name]) for choice in space.choices))
    # Before the move, which gives layers that share weights one each.
    params = sum(p.numel() for p in narrow.parameters())
    # MACs depend on shapes alone: nothing has to be computed.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        narrow.to("meta")(torch.zeros(1, 3, side, side, device="meta"))
    return counter.get_total_flops() // 2, params


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__.splitlines()[0] if __doc__ else "", repeats=3).parse_args()
    use_one_core()
    figures: list[Figure] = []
    equal = total = 0
    for name, (make, side) in list(MODELS.items())[: 1 if options.quick else None]:
        torch.manual_seed(0)
        model, image = make(), torch.zeros(1, 3, side, side)
        converting = timed(lambda: Source(model, image), repeats=options.repeats)  # noqa: B023
        source = Source(model, image)
        space = channel_space(source, steps=10)
        start = time.perf_counter()
        costs = {metric: operation_cost(space, metric) for metric in ("macs", "params")}
        compiled_s = time.perf_counter() - start
        codes = space.sample(PRICED, np.random.default_rng(0))
        pricing = timed(lambda: [cost.of(codes) for cost in costs.values()], repeats=options.repeats)  # noqa: B023
        start = time.perf_counter()
        for row in codes[:COUNTED]:
            priced = tuple(int(cost.of(row[None])[0]) for cost in costs.values())
            equal += counted(source, space, row, side) == priced
            total += 1
        counting_s = (time.perf_counter() - start) / COUNTED
        promised = name == "ResNet-50"
        figures += [
            Figure(
                f"{name}: convert",
                converting.median,
                "s",
                converting.least,
                converting.greatest,
                f"<= {CONVERSION_S:g}" if promised else "",
                converting.median <= CONVERSION_S if promised else None,
            ),
            Figure(
                f"{name}: price {PRICED:,} assignments",
                pricing.median,
                "s",
                pricing.least,
                pricing.greatest,
                f"<= {PRICING_S:g}",
                pricing.median <= PRICING_S,
            ),
            Figure(f"{name}: compile prices, once", compiled_s, "s", compiled_s, compiled_s),
            Figure(
                f"{name}: ratio to building and counting each",
                counting_s * PRICED / pricing.median,
                "x",
                counting_s * PRICED / pricing.greatest,
                counting_s * PRICED / pricing.least,
            ),
        ]
    figures.append(
        Figure(f"equal to counting, of {total}", equal, "", equal, equal, f"{total}", equal == total)
    )
    settings = {"assignments": "uniform over 10 options a group", "repeats": options.repeats, "threads": 1}
    report("conversion", figures, settings=settings, options=options)


if __name__ == "__main__":
    main()
