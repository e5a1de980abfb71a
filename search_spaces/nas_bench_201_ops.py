"""The parts of a NAS-Bench-201 network as operations: the cell, the reduction, the last norm.

Source: Dong & Yang, NAS-Bench-201, ICLR 2020, section 2 and figure 1; details as in its repository
(D-X-Y/AutoDL-Projects): every convolution of a cell is ReLU, convolution without bias, batch norm; average
pooling does not count the padding; a reduction is the basic block of ResNet with a pooled shortcut.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Final, cast

from autocompress.errors import SpaceError
from autocompress.ops import CellSpec, EdgeMixture, OpSpec, Shape

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autocompress.elastic.layers import SharedParts

EDGES: Final = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""Source and target of each edge, in the order in which the published tables number them."""

NODES: Final = 4

OPERATIONS: Final = ("none", "skip_connect", "avg_pool_3x3", "nor_conv_1x1", "nor_conv_3x3")
"""What an edge can be, from smallest to largest; the published tables number them otherwise."""

KERNELS: Final[Mapping[str, int]] = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}
"""The operations that have weights."""

FREE: Final = ("none", "skip_connect")
"""The operations that run nothing."""

_EDGE = r"(\w+)~{}"
_CELL = re.compile(
    r"\|\+\|".join(
        r"\|".join(_EDGE.format(source) for source, target in EDGES if target == node)
        for node in range(1, NODES)
    ).join((r"\|", r"\|"))
)


def cell_text(operations: Sequence[str]) -> str:
    """Write six operations, in the order of `EDGES`, as the benchmark does."""
    a, b, c, d, e, f = operations
    return f"|{a}~0|+|{b}~0|{c}~1|+|{d}~0|{e}~1|{f}~2|"


@lru_cache(maxsize=1 << 14)
def cell_operations(text: str) -> tuple[str, ...]:
    """Return the six operations of a cell, in the order of `EDGES`.

    Raises:
        SpaceError: The text is no cell, or names an unknown operation.
    """
    match = _CELL.fullmatch(text)
    if match is None:
        raise SpaceError(f"a cell is written |a~0|+|b~0|c~1|+|d~0|e~1|f~2|, got {text!r}")
    unknown = [name for name in match.groups() if name not in OPERATIONS]
    if unknown:
        raise SpaceError(f"operations of a cell are {', '.join(OPERATIONS)}; got {unknown[0]!r} in {text!r}")
    return match.groups()


def _check_counts(op: OpSpec, *names: str) -> None:
    for name in names:
        value = getattr(op, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SpaceError(f"{type(op).__name__}.{name} must be an integer >= 1, got {value!r}")


def _relu_conv_norm(in_channels: int, out_channels: int, kernel: int, stride: int) -> "nn.Module":
    from torch import nn

    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["relu"] = nn.ReLU()
    parts["conv"] = nn.Conv2d(
        in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False
    )
    parts["bn"] = nn.BatchNorm2d(out_channels)
    return nn.Sequential(parts)


def _edge(operation: str, channels: int) -> "nn.Module":
    """Build what an edge other than `none` does."""
    from torch import nn

    if operation == "skip_connect":
        return nn.Identity()
    if operation == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return _relu_conv_norm(channels, channels, KERNELS[operation], 1)


def _mixed(shared: "SharedParts", place: str, edge: EdgeMixture, x: "Tensor") -> "Tensor":
    """Run the weighted sum of operations on an edge; convolutions use leading channels of their weights."""
    import torch
    import torch.nn.functional as F

    from autocompress.elastic.partial import identity, weighted

    def run(name: str, x: "Tensor") -> "Tensor":
        if name == "skip_connect":
            return identity(x, edge.dropout.get(name, 0.0))
        if name == "avg_pool_3x3":
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        weight = shared.parameter(f"{place}.{name}.conv.weight")[: x.shape[1], : x.shape[1]]
        return shared.norm(f"{place}.{name}.bn", F.conv2d(x.relu(), weight, padding=KERNELS[name] // 2))

    total = weighted(x, ((partial(run, name), weight) for name, weight in edge.parts if name != "none"))
    return torch.zeros_like(x) if total is None else total


@dataclass(frozen=True)
class Edge(OpSpec):
    """What one edge of a cell runs; it prices the cell, which is built and run as a whole.

    Attributes:
        channels: Of both nodes.
        size: Pixels of a side.
        operation: One of `OPERATIONS` that runs something.
    """

    channels: int
    size: int
    operation: str

    def __post_init__(self) -> None:
        """Check geometry and operation once, here."""
        _check_counts(self, "channels", "size")
        if self.operation not in OPERATIONS or self.operation in FREE:
            raise SpaceError(f"Edge.operation must be one that runs something, got {self.operation!r}")

    @property
    def in_shape(self) -> Shape:
        """Channels, height and width of the input."""
        return self.channels, self.size, self.size

    @property
    def out_shape(self) -> Shape:
        """The shape of the input."""
        return self.in_shape

    @property
    def weight_tensors(self) -> tuple[int, ...]:
        """The kernel of a convolution."""
        kernel = KERNELS.get(self.operation)
        return () if kernel is None else (kernel**2 * self.channels**2,)

    @property
    def other_tensors(self) -> tuple[int, ...]:
        """Scale and shift of a convolution's batch norm."""
        return (self.channels,) * (2 * len(self.weight_tensors))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a convolution; pooling counts zero."""
        return sum(self.weight_tensors) * self.size**2

    @property
    def params(self) -> int:
        """Weights, scale and shift of a convolution."""
        return sum(self.weight_tensors) + sum(self.other_tensors)

    def module(self) -> "nn.Module":
        """Build the operation."""
        return _edge(self.operation, self.channels)


@dataclass(frozen=True)
class Cell(CellSpec):
    """Four nodes, each the sum of an operation on every earlier one; the first is the input.

    Operations that no path to the output uses are built, run and counted, as in the benchmark.

    Attributes:
        channels: Of every node.
        size: Pixels of a side.
        cell: The six operations, as `cell_text` writes them.
    """

    channels: int
    size: int
    cell: str

    def __post_init__(self) -> None:
        """Check the geometry and the cell once, here."""
        _check_counts(self, "channels", "size")
        cell_operations(self.cell)

    @property
    def operations(self) -> tuple[str, ...]:
        """The operation of each edge of `EDGES`."""
        return cell_operations(self.cell)

    @property
    def in_shape(self) -> Shape:
        """Channels, height and width of the input."""
        return self.channels, self.size, self.size

    @property
    def out_shape(self) -> Shape:
        """The shape of the input."""
        return self.in_shape

    @property
    def weight_tensors(self) -> tuple[int, ...]:
        """The kernel of every convolution."""
        kernels = (KERNELS[name] for name in self.operations if name in KERNELS)
        return tuple(kernel**2 * self.channels**2 for kernel in kernels)

    @property
    def other_tensors(self) -> tuple[int, ...]:
        """Scale and shift of every batch norm."""
        return (self.channels,) * (2 * len(self.weight_tensors))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the convolutions; pooling and additions count zero."""
        return sum(self.weight_tensors) * self.size**2

    @property
    def params(self) -> int:
        """Weights of the convolutions, and scale and shift of their batch norms."""
        return sum(self.weight_tensors) + sum(self.other_tensors)

    @property
    def peak_elements(self) -> int:
        """Elements alive at the worst moment when the edges run in order, each result in a buffer of its own.

        A node lives until its last reader has run. The ReLU before a convolution works in place where its
        node is not read again; additions do not.
        """
        steps = [(*edge, name) for edge, name in zip(EDGES, self.operations, strict=True) if name != "none"]
        worst = 2
        for position, (source, target, name) in enumerate(steps):

            def alive(after: int, target: int = target) -> set[int]:
                return {node for node, _, _ in steps[after:] if node < target}

            partial_sum = any(end == target for _, end, _ in steps[:position])
            before, later = alive(position), alive(position + 1)
            copied = name in KERNELS and source in later
            worst = max(worst, len(before) + partial_sum + copied + 1)
            if partial_sum:
                worst = max(worst, len(later) + 3)
        return worst * math.prod(self.in_shape)

    def module(self) -> "nn.Module":
        """Build the cell; its parameters are `edge_0_1.nor_conv_3x3.conv.weight` and the like."""
        from torch import nn

        from autocompress.network import DropPath, Graph

        edges = {}
        for edge, name in zip(EDGES, self.operations, strict=True):
            if name != "none":
                layers = OrderedDict({name: _edge(name, self.channels)})
                if name not in FREE:
                    layers["drop"] = DropPath()
                edges[edge] = nn.Sequential(layers)
        return Graph(NODES, edges)

    @classmethod
    def shared_module(cls, ops: Sequence[OpSpec]) -> "nn.Module":
        """Build every operation that an edge of one of these cells can be: they share the supernet's weights.

        Raises:
            SpaceError: The cells have different channels.
        """
        from torch import nn

        cells = [cast(Cell, op) for op in ops]
        channels = {cell.channels for cell in cells}
        if len(channels) > 1:
            raise SpaceError(f"cells at one place must have the same channels, got {sorted(channels)}")
        used = [set(names) & set(KERNELS) for names in zip(*(cell.operations for cell in cells), strict=True)]
        return nn.ModuleDict(
            {
                f"edge_{source}_{target}": nn.ModuleDict(
                    {name: _edge(name, cells[0].channels) for name in sorted(names)}
                )
                for (source, target), names in zip(EDGES, used, strict=True)
            }
        )

    @property
    def connected(self) -> bool:
        """Whether a path of operations other than `none` leads from the first node to the last."""
        reached = {0}
        for (source, target), name in zip(EDGES, self.operations, strict=True):
            if source in reached and name != "none":
                reached.add(target)
        return NODES - 1 in reached

    @property
    def runs_all(self) -> bool:
        """Whether every edge but `none` is on a path from the first node to the last."""
        kept = [edge for edge, name in zip(EDGES, self.operations, strict=True) if name != "none"]
        reached, read = {0}, {NODES - 1}
        for source, target in kept:
            if source in reached:
                reached.add(target)
        for source, target in reversed(kept):
            if target in read:
                read.add(source)
        return self.connected and all(source in reached and target in read for source, target in kept)

    @property
    def targets(self) -> tuple[int, ...]:
        """The node that each edge ends in."""
        return tuple(target for _, target in EDGES)

    def mixture(
        self, shared: "SharedParts", x: "Tensor", edges: Sequence[EdgeMixture], channels: int
    ) -> "Tensor":
        """Run the cell with every edge a weighted sum of operations, see `CellSpec.mixture`."""
        import torch

        from autocompress.elastic.partial import through_part

        nodes = [x]
        for node in range(1, NODES):
            total = torch.zeros_like(x)
            for (source, target), edge in zip(EDGES, edges, strict=True):
                if target == node:
                    mixed = partial(_mixed, shared, f"edge_{source}_{target}", edge)
                    added = through_part(mixed, nodes[source], channels)
                    total = total + (added if edge.scale is None else edge.scale.to(added.dtype) * added)
            nodes.append(total)
        return nodes[-1]


@dataclass(frozen=True)
class Reduction(OpSpec):
    """The basic block of ResNet at stride 2: two convolutions of kernel 3, and a pooled shortcut.

    Attributes:
        in_channels: Of the input.
        out_channels: Of the output.
        size: Pixels of a side of the input, even.
    """

    in_channels: int
    out_channels: int
    size: int

    def __post_init__(self) -> None:
        """Check the geometry once, here."""
        _check_counts(self, "in_channels", "out_channels", "size")
        if self.size % 2:
            raise SpaceError(f"Reduction.size must be even, got {self.size}")

    @property
    def in_shape(self) -> Shape:
        """Channels, height and width of the input."""
        return self.in_channels, self.size, self.size

    @property
    def out_shape(self) -> Shape:
        """Half the height and width."""
        return self.out_channels, self.size // 2, self.size // 2

    @property
    def weight_tensors(self) -> tuple[int, ...]:
        """The kernels of the two convolutions and of the shortcut's."""
        first, second = 9 * self.in_channels * self.out_channels, 9 * self.out_channels**2
        return first, second, self.in_channels * self.out_channels

    @property
    def other_tensors(self) -> tuple[int, ...]:
        """Scale and shift of two batch norms; the shortcut has none."""
        return (self.out_channels,) * 4

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the three convolutions, all at the output's size."""
        return sum(self.weight_tensors) * (self.size // 2) ** 2

    @property
    def params(self) -> int:
        """Weights of the convolutions, and scale and shift of the batch norms."""
        return sum(self.weight_tensors) + sum(self.other_tensors)

    @property
    def peak_elements(self) -> int:
        """Elements alive at the worst moment: the input is kept for the shortcut, which runs last."""
        before, after = math.prod(self.in_shape), math.prod(self.out_shape)
        pooled = before // 4
        return max(
            2 * before + after, before + 2 * after, before + after + pooled, 2 * after + pooled, 3 * after
        )

    def module(self) -> "nn.Module":
        """Build the two convolutions (`edge_0_1`, `edge_1_2`) and the shortcut (`edge_0_2`)."""
        from torch import nn

        from autocompress.network import Graph

        shortcut: OrderedDict[str, nn.Module] = OrderedDict()
        shortcut["pool"] = nn.AvgPool2d(2)
        shortcut["conv"] = nn.Conv2d(self.in_channels, self.out_channels, 1, bias=False)
        return Graph(
            3,
            {
                (0, 1): _relu_conv_norm(self.in_channels, self.out_channels, 3, 2),
                (1, 2): _relu_conv_norm(self.out_channels, self.out_channels, 3, 1),
                (0, 2): nn.Sequential(shortcut),
            },
        )


@dataclass(frozen=True)
class NormReLU(OpSpec):
    """Batch norm, then ReLU: what follows the last cell.

    Attributes:
        channels: Of the input.
        size: Pixels of a side.
    """

    channels: int
    size: int

    def __post_init__(self) -> None:
        """Check the geometry once, here."""
        _check_counts(self, "channels", "size")

    @property
    def in_shape(self) -> Shape:
        """Channels, height and width of the input."""
        return self.channels, self.size, self.size

    @property
    def out_shape(self) -> Shape:
        """The shape of the input."""
        return self.in_shape

    @property
    def weight_tensors(self) -> tuple[int, ...]:
        """None: there is no kernel."""
        return ()

    @property
    def other_tensors(self) -> tuple[int, ...]:
        """Scale and shift."""
        return self.channels, self.channels

    @property
    def macs(self) -> int:
        """Zero, as for every batch norm."""
        return 0

    @property
    def params(self) -> int:
        """Scale and shift."""
        return 2 * self.channels

    def module(self) -> "nn.Module":
        """Build `Sequential(bn, act)`."""
        from torch import nn

        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["bn"] = nn.BatchNorm2d(self.channels)
        parts["act"] = nn.ReLU()
        return nn.Sequential(parts)
