"""The supernet: one set of weights from which every network of a space is a slice."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.elastic.layers import NORM_EPS, ElasticConv2d, ElasticLayer, Normalise, elastic_layer, slot
from autocompress.elastic.marginal import MarginalGates
from autocompress.errors import SpaceError
from autocompress.network import module_name
from autocompress.ops import Add, Ops, OpSpec
from autocompress.space import Architecture, Block, SearchSpace

Statistics = Mapping[str, tuple[Tensor, Tensor]]
"""Batch-norm mean and variance `(channels,)` of one sub-network, by name of the layer."""

# Plans of so many architectures are kept; a training run meets new ones all the time.
MAX_PLANS = 1024

_Plan = tuple[tuple[str, tuple[tuple[ElasticLayer | None, OpSpec], ...]], ...]


class Supernet(nn.Module):
    """Elastic layers for every block of a space.

    There is no active sub-network: `forward` takes the architecture. There are no running statistics
    either, since slices of different width and depth have different ones; they are arguments too.

    Args:
        space: The space.
        seed: Of the initialisation; the global random state is left as it was.
        kernel_transform: Whether smaller kernels are learned transforms of larger ones (as in OFA) or plain
            centre crops (as in AttentiveNAS).

    Raises:
        SpaceError: A block has no largest setting that contains all others.
    """

    def __init__(self, space: SearchSpace, *, seed: int = 0, kernel_transform: bool = True) -> None:
        """Make the weights."""
        super().__init__()
        self.space = space
        self.kernel_transform = kernel_transform
        self.layers = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for block in space.blocks:
                self.layers[module_name(block.name)] = self._make_block(block)
        self._plans: dict[Architecture, _Plan] = {}

    def _make_block(self, block: Block) -> nn.ModuleDict:
        places: dict[str, dict[OpSpec, None]] = {}
        last: dict[str, None] = {}
        for setting in self.space.covering_settings(block):
            ops = block.operations(*setting)
            for position, op in enumerate(ops):
                if not isinstance(op, Add):
                    places.setdefault(slot(position, op), {})[op] = None
            if len(ops) > 1 and isinstance(ops[-1], Add):
                last[slot(len(ops) - 2, ops[-2])] = None
        layers = nn.ModuleDict()
        for place, ops_there in places.items():
            layer = elastic_layer(
                f"{block.name}.{place}", list(ops_there), kernel_transform=self.kernel_transform
            )
            if place in last and isinstance(layer, ElasticConv2d) and layer.norm_weight is not None:
                # A residual block starts as the identity: deep and shallow networks then start alike.
                nn.init.zeros_(layer.norm_weight)
            layers[place] = layer
        return layers

    @cached_property
    def marginal_gates(self) -> MarginalGates:
        """Which choices are widths, and what they gate in a mixture."""
        return MarginalGates(self.space)

    def bind(self, name: str, ops: Ops) -> tuple[tuple[ElasticLayer | None, OpSpec], ...]:
        """Return the layer of each operation of a block; `None` for the addition of a residual block."""
        layers = cast(nn.ModuleDict, self.layers[module_name(name)])
        return tuple(
            (None if isinstance(op, Add) else cast(ElasticLayer, layers[slot(position, op)]), op)
            for position, op in enumerate(ops)
        )

    def plan(self, arch: Architecture) -> _Plan:
        """Return the layers and operations of each active block of an architecture."""
        plan = self._plans.get(arch)
        if plan is None:
            blocks = self.space.operations(self.space.encode([arch]))
            plan = tuple((name, self.bind(name, ops)) for name, ops in blocks)
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[arch] = plan
        return plan

    def forward(
        self,
        x: Tensor,
        arch: Architecture,
        *,
        statistics: Statistics | None = None,
    ) -> Tensor:
        """Run one sub-network; `mixture.run_mixture` runs several at once.

        Args:
            x: `(batch, channels, height, width)`; resized when the architecture has another resolution.
            arch: An architecture of the space.
            statistics: Batch-norm statistics of this very sub-network, from `recalibrate`; without them
                the statistics of the batch are used, whether training or not.

        Returns:
            The output of the last block.

        Raises:
            SpaceError: The architecture is of another space, or the statistics are of another sub-network.
        """
        return self.run(x, arch, batch_statistics if statistics is None else fixed(statistics))

    def run(self, x: Tensor, arch: Architecture, normalise: Normalise) -> Tensor:
        """Run one sub-network with batch norm as given; `forward` and recalibration stand on this."""
        plan = self.plan(arch)
        x = resize(x, plan[0][1][0][1].in_shape[1:])
        for _, layers in plan:
            x = run_block(x, layers, normalise)
        return x


def run_block(
    x: Tensor, layers: Sequence[tuple[ElasticLayer | None, OpSpec]], normalise: Normalise
) -> Tensor:
    """Run the operations of a block as `Supernet.bind` gives them; none is the identity."""
    entry = x
    for layer, op in layers:
        x = entry + x if layer is None else layer(x, op, normalise)
    return x


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images `(batch, channels, height, width)` bilinearly, smoothed when they shrink."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)


def batch_statistics(name: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float = NORM_EPS) -> Tensor:
    """Batch norm with the statistics of the batch."""
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def fixed(statistics: Statistics) -> Normalise:
    """Return batch norm with given statistics."""

    def normalise(name: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float = NORM_EPS) -> Tensor:
        mean, variance = statistics_of(statistics, name, x.shape[1])
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    return normalise


def statistics_of(statistics: Statistics, name: str, channels: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance of a layer.

    Raises:
        SpaceError: There are none, or of another width: they are of another sub-network.
    """
    found = statistics.get(name)
    if found is None or len(found[0]) != channels:
        have = "none" if found is None else f"those of {len(found[0])} channels"
        raise SpaceError(
            f"layer {name!r} needs batch-norm statistics of {channels} channels, got {have}; recalibrate "
            "this very sub-network"
        )
    return found
