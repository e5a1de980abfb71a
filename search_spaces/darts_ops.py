"""The parts of a DARTS network as operations: the cell, its edges, its preprocessing, what passes pairs on.

Source: Liu et al., DARTS, ICLR 2019, section 3.1.1 and figure 1; details as in its repository (quark0/darts,
`cnn/operations.py` and `cnn/model.py`): every convolution of an edge is ReLU, convolution without bias, batch
norm; separable convolutions are applied twice; average pooling does not count the padding; while a mixture is
trained, pooling is followed by a batch norm without scale and shift.

Each cell reads the outputs of the two cells before it. Between cells travels a pair of tensors: the last
output but one, and the last.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, cast

from autocompress.errors import SpaceError
from autocompress.ops import CellSpec, EdgeMixture, OpSpec, Shape

if TYPE_CHECKING:
    from torch import nn

    from autocompress.elastic.layers import SharedParts

# Modules are built by `search_spaces.darts_modules`, which imports PyTorch.

INPUTS: Final = 2
STEPS: Final = 4
"""Nodes of a cell after its two inputs; their outputs are concatenated."""

EDGES: Final = tuple((source, node) for node in range(INPUTS, INPUTS + STEPS) for source in range(node))
"""Source and target of each edge that a mixture has; of a node's edges, a cell keeps two."""

OPERATIONS: Final = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""What an edge can be; a cell that was derived has no `none`."""

Step = tuple[str, int, int, int]
"""Kind (`depthwise`, `pointwise`, `relu`, `bn`); kernel, stride and dilation of a convolution."""

RELU: Final[Step] = ("relu", 0, 0, 0)
NORM: Final[Step] = ("bn", 0, 0, 0)


@lru_cache(maxsize=64)
def steps_of(operation: str, stride: int) -> tuple[tuple[str, Step], ...]:
    """Return the steps of a convolution of an edge, by their names in its module; none of others."""
    kind, _, kernel = operation.partition("_conv_")
    if kind not in ("sep", "dil"):
        return ()
    size = int(kernel[0])

    def once(stride: int, dilation: int, suffix: str) -> tuple[tuple[str, Step], ...]:
        return (
            (f"relu{suffix}", RELU),
            (f"depthwise{suffix}", ("depthwise", size, stride, dilation)),
            (f"pointwise{suffix}", ("pointwise", 1, 1, 1)),
            (f"bn{suffix}", NORM),
        )

    return once(stride, 2, "") if kind == "dil" else once(stride, 1, "1") + once(1, 1, "2")


def is_free(operation: str, stride: int) -> bool:
    """Return whether an edge runs nothing: the identity, where it need not halve the size."""
    return operation == "skip_connect" and stride == 1


@lru_cache(maxsize=4096)
def parse_node(text: str) -> tuple[tuple[str, int], tuple[str, int]]:
    """Return operation and source of the two edges of a node, written `sep_conv_3x3~0+skip_connect~1`.

    Raises:
        SpaceError: The text is no node.
    """
    found = []
    for part in text.split("+"):
        operation, _, source = part.partition("~")
        if operation not in OPERATIONS[1:] or not source.isdecimal():
            break
        found.append((operation, int(source)))
    if len(found) != 2 or text.count("+") != 1 or found[0][1] >= found[1][1]:
        raise SpaceError(
            "a node is written OPERATION~SOURCE+OPERATION~SOURCE, two different sources in ascending order, "
            f"with operations of {', '.join(OPERATIONS[1:])}; got {text!r}"
        )
    return found[0], found[1]


def node_text(edges: Sequence[tuple[str, int]]) -> str:
    """Write a node, see `parse_node`."""
    return "+".join(f"{operation}~{source}" for operation, source in sorted(edges, key=lambda edge: edge[1]))


def _check(op: OpSpec, *names: str) -> None:
    for name in names:
        value = getattr(op, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SpaceError(f"{type(op).__name__}.{name} must be an integer >= 1, got {value!r}")


def _halves(op: OpSpec, size: int) -> None:
    if size % 2:
        raise SpaceError(f"{type(op).__name__} halves the size, which must be even, got {size}")


@dataclass(frozen=True)
class Edge(OpSpec):
    """What one edge of a cell runs; it prices the cell, which is built and run as a whole.

    Attributes:
        channels: Of both nodes.
        size: Pixels of a side of the source.
        operation: One of `OPERATIONS` but `none`, and no identity.
        stride: 2 from an input of a reduction cell, else 1.
    """

    channels: int
    size: int
    operation: str
    stride: int = 1

    def __post_init__(self) -> None:
        """Check geometry and operation once, here."""
        _check(self, "channels", "size", "stride")
        if self.operation not in OPERATIONS[1:] or is_free(self.operation, self.stride):
            raise SpaceError(f"Edge.operation must be one that runs something, got {self.operation!r}")
        if self.stride == 2:
            _halves(self, self.size)

    @property
    def in_shape(self) -> Shape:
        """Channels, height and width of the source."""
        return self.channels, self.size, self.size

    @property
    def out_shape(self) -> Shape:
        """Channels, height and width of the target."""
        return self.channels, self.size // self.stride, self.size // self.stride

    @property
    def weight_tensors(self) -> tuple[int, ...]:
        """The kernel of every convolution."""
        if self.operation == "skip_connect":
            first = self.channels // 2
            return self.channels * first, self.channels * (self.channels - first)
        found = []
        for _, (kind, kernel, _, _) in steps_of(self.operation, self.stride):
            if kind == "depthwise":
                found.append(kernel**2 * self.channels)
            elif kind == "pointwise":
                found.append(self.channels**2)
        return tuple(found)

    @property
    def other_tensors(self) -> tuple[int, ...]:
        """Scale and shift of every batch norm."""
        if self.operation == "skip_connect":
            return (self.channels,) * 2
        norms = sum(kind == "bn" for _, (kind, *_) in steps_of(self.operation, self.stride))
        return (self.channels,) * (2 * norms)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the convolutions, all at the target's size; pooling counts zero."""
        return sum(self.weight_tensors) * (self.size // self.stride) ** 2

    @property
    def params(self) -> int:
        """Weights of the convolutions, and scale and shift of their batch norms."""
        return sum(self.weight_tensors) + sum(self.other_tensors)

    @property
    def peak_elements(self) -> int:
        """Input, output, and what a convolution writes between: never more than two buffers and the input."""
        between = math.prod(self.out_shape) if self.weight_tensors else 0
        return math.prod(self.in_shape) + math.prod(self.out_shape) + between

    def module(self) -> "nn.Module":
        """Build the operation."""
        from search_spaces.darts_modules import edge_module

        return edge_module(self.operation, self.channels, self.stride)


@dataclass(frozen=True)
class Preprocess(OpSpec):
    """What brings an input of a cell to its channels and size: ReLU, 1x1 convolution, batch norm.

    Attributes:
        in_channels: Of the input.
        out_channels: Of the cell.
        size: Pixels of a side of the input.
        halved: Whether the size is halved, by two convolutions that see other pixels (factorized reduction).
    """

    in_channels: int
    out_channels: int
    size: int
    halved: bool = False

    def __post_init__(self) -> None:
        """Check the geometry once, here."""
        _check(self, "in_channels", "out_channels", "size")
        if self.halved:
            _halves(self, self.size)

    @property
    def in_shape(self) -> Shape:
        """Channels, height and width of the input."""
        return self.in_channels, self.size, self.size

    @property
    def out_shape(self) -> Shape:
        """Channels, height and width of what nodes read."""
        size = self.size // 2 if self.halved else self.size
        return self.out_channels, size, size

    @property
    def weight_tensors(self) -> tuple[int, ...]:
        """The kernels."""
        if not self.halved:
            return (self.in_channels * self.out_channels,)
        first = self.out_channels // 2
        return self.in_channels * first, self.in_channels * (self.out_channels - first)

    @property
    def other_tensors(self) -> tuple[int, ...]:
        """Scale and shift of the batch norm."""
        return (self.out_channels,) * 2

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the convolutions."""
        return sum(self.weight_tensors) * self.out_shape[1] ** 2

    @property
    def params(self) -> int:
        """Weights, and scale and shift of the batch norm."""
        return sum(self.weight_tensors) + sum(self.other_tensors)

    def module(self) -> "nn.Module":
        """Build the module."""
        from search_spaces.darts_modules import preprocessing

        return preprocessing(self.in_channels, self.out_channels, self.halved)


@dataclass(frozen=True)
class Pass(OpSpec):
    """No computation: makes the pair that cells pass on out of one tensor, or takes the last of a pair.

    Attributes:
        channels: Of the tensor.
        size: Pixels of a side.
        what: `twice` or `last`.
    """

    channels: int
    size: int
    what: str

    @property
    def in_shape(self) -> Shape:
        """Channels, height and width of the tensor, or of the last one."""
        return self.channels, self.size, self.size

    @property
    def out_shape(self) -> Shape:
        """The same."""
        return self.in_shape

    @property
    def macs(self) -> int:
        """Zero."""
        return 0

    @property
    def params(self) -> int:
        """Zero."""
        return 0

    def module(self) -> "nn.Module":
        """Build the module."""
        from search_spaces.darts_modules import Last, Twice

        return Twice() if self.what == "twice" else Last()


@dataclass(frozen=True)
class DartsCell(CellSpec):
    """Two inputs, four nodes; each node is the sum of an operation on two earlier ones; nodes are joined.

    Shapes are those of the second input and of the output; between cells travels a pair of tensors.

    Attributes:
        before: Channels of the first input, the output of the last cell but one.
        last: Channels of the second, the output of the last cell.
        channels: Of every node; the output has four times as many.
        size: Pixels of a side of the second input.
        reduction: Whether edges from the inputs halve the size.
        halved: Whether the cell before was a reduction: the first input is then twice as large.
        nodes: The four nodes, each as `parse_node` reads it.
    """

    before: int
    last: int
    channels: int
    size: int
    reduction: bool
    halved: bool
    nodes: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check the geometry and the nodes once, here."""
        _check(self, "before", "last", "channels", "size")
        if self.reduction:
            _halves(self, self.size)
        if len(self.nodes) != STEPS:
            raise SpaceError(f"a cell has {STEPS} nodes, got {len(self.nodes)}")
        for at, text in enumerate(self.nodes):
            for _, source in parse_node(text):
                if source >= INPUTS + at:
                    raise SpaceError(f"node {INPUTS + at} reads earlier ones only, got {text!r}")

    @property
    def kept(self) -> dict[tuple[int, int], str]:
        """Source and target to operation, of the eight edges that the cell keeps."""
        return {
            (source, INPUTS + at): operation
            for at, text in enumerate(self.nodes)
            for operation, source in parse_node(text)
        }

    def stride(self, source: int) -> int:
        """Return the stride of the edges from a node."""
        return 2 if self.reduction and source < INPUTS else 1

    @property
    def inside(self) -> tuple[OpSpec, ...]:
        """What runs inside: preprocessing, then edges that run something."""
        return (*self.prepared, *(op for op in map(self.edge, self.kept.items()) if op is not None))

    @property
    def prepared(self) -> tuple[Preprocess, Preprocess]:
        """The preprocessing of the two inputs."""
        size = 2 * self.size if self.halved else self.size
        return (
            Preprocess(self.before, self.channels, size, self.halved),
            Preprocess(self.last, self.channels, self.size),
        )

    def edge(self, kept: tuple[tuple[int, int], str]) -> Edge | None:
        """Return what an edge runs, `None` for the identity."""
        (source, _), operation = kept
        stride = self.stride(source)
        if is_free(operation, stride):
            return None
        size = self.size if source < INPUTS or not self.reduction else self.size // 2
        return Edge(self.channels, size, operation, stride)

    @property
    def in_shape(self) -> Shape:
        """Channels, height and width of the second input."""
        return self.last, self.size, self.size

    @property
    def out_shape(self) -> Shape:
        """Channels, height and width of the joined nodes."""
        size = self.size // 2 if self.reduction else self.size
        return STEPS * self.channels, size, size

    @property
    def weight_tensors(self) -> tuple[int, ...]:
        """The kernel of every convolution."""
        return tuple(tensor for op in self.inside for tensor in op.weight_tensors)

    @property
    def other_tensors(self) -> tuple[int, ...]:
        """Scale and shift of every batch norm."""
        return tuple(tensor for op in self.inside for tensor in op.other_tensors)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all convolutions."""
        return sum(op.macs for op in self.inside)

    @property
    def params(self) -> int:
        """Weights of the convolutions, and scale and shift of their batch norms."""
        return sum(op.params for op in self.inside)

    @property
    def peak_elements(self) -> int:
        """An upper bound: inputs, what is made of them, all nodes and the largest edge at once."""
        first, second = self.prepared
        held = sum(math.prod(op.in_shape) + math.prod(op.out_shape) for op in (first, second))
        return held + 2 * math.prod(self.out_shape) + max(op.peak_elements for op in self.inside)

    def module(self) -> "nn.Module":
        """Build the cell; its parameters are `edge_0_2.sep_conv_3x3.depthwise1.weight` and the like.

        It maps a pair of tensors `(batch, before, ...)`, `(batch, last, ...)` to the second and the output.
        """
        from search_spaces.darts_modules import cell_module

        return cell_module(self)

    @classmethod
    def shared_module(cls, ops: Sequence[OpSpec]) -> "nn.Module":
        """Build every operation that an edge of one of these cells can be: they share the supernet's weights.

        Raises:
            SpaceError: The cells differ in more than their nodes.
        """
        from search_spaces.darts_modules import shared_cell

        return shared_cell([cast(DartsCell, op) for op in ops])

    @property
    def targets(self) -> tuple[int, ...]:
        """The node that each edge of a mixture ends in, in the order of `EDGES`."""
        return tuple(target for _, target in EDGES)

    def mixture(self, shared: "SharedParts", x: Any, edges: Sequence[EdgeMixture], channels: int) -> Any:
        """Run the cell with every edge a weighted sum of operations, see `CellSpec.mixture`.

        Takes and returns pairs of tensors, as the module does.
        """
        from search_spaces.darts_modules import run_mixed_cell

        return run_mixed_cell(self, shared, x, edges, channels)
