"""Operations as data: the one description from which modules, costs and table keys are made.

An `OpSpec` states what runs: its kind, its shapes and its settings. A block of a network is a tuple of
them, executed in sequence; `Add` adds the input of the block. Batch size is never part of an operation.

A search space may bring operations of its own: a frozen dataclass that derives from `OpSpec` and answers
the same few questions. Nothing needs to be registered.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from autocompress.errors import CostError, SpaceError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autocompress.elastic.layers import SharedParts

Shape = tuple[int, int, int]
"""Channels, height, width."""

Activation = Literal["none", "relu", "relu6", "hard_swish", "hard_sigmoid", "sigmoid", "silu"]

ACTIVATIONS: dict[str, str] = {
    "none": "Identity",
    "relu": "ReLU",
    "relu6": "ReLU6",
    "hard_swish": "Hardswish",
    "hard_sigmoid": "Hardsigmoid",
    "sigmoid": "Sigmoid",
    "silu": "SiLU",
}
"""Name of an activation to the name of its class in `torch.nn`."""

BYTES_PER_PARAMETER = 4

SEPARATOR = " > "
"""Between operations in the key of a block."""


@dataclass(frozen=True)
class OpSpec(ABC):
    """One operation with its shapes. Frozen, hashable; equal specs cost the same."""

    @property
    @abstractmethod
    def in_shape(self) -> Shape:
        """Channels, height and width of the input."""

    @property
    @abstractmethod
    def out_shape(self) -> Shape:
        """Channels, height and width of the output."""

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-accumulates for one image: convolutions, linear layers and squeeze-excite.

        Batch norm, activations, pooling and additions count zero, as in the pruning and NAS literature.
        """

    @property
    @abstractmethod
    def params(self) -> int:
        """Trainable parameters, batch norm's scale and shift included."""

    @abstractmethod
    def module(self) -> "nn.Module":
        """Build the plain PyTorch module, randomly initialised.

        It maps `(batch, *in_shape)` to `(batch, *out_shape)`.
        """

    @classmethod
    def shared_module(cls, ops: "Sequence[OpSpec]") -> "nn.Module | None":
        """Build the module whose parameters all these operations share at one place of a supernet.

        `None`, the default, is the module of the largest of them: the others use the leading entries of its
        parameters. An operation that runs some of several alternatives gives a module that holds every
        alternative; the module of each operation finds its parameters there by their names. It is never run.

        Args:
            ops: Every operation that occurs at the place, all of this class.
        """
        return None

    @property
    def entries(self) -> Mapping[str, Mapping[int, Sequence[int]]]:
        """Which entries of shared parameters this operation uses, where these are not the leading ones.

        Name of the parameter to axis to positions along it; other axes are used as a whole.
        """
        return {}

    @property
    def size_bytes(self) -> int:
        """Bytes of the parameters in 32-bit floats."""
        return BYTES_PER_PARAMETER * self.params

    @property
    def bops(self) -> int:
        """Bit operations for one image: each MAC counts bits of the weights times bits of the activations.

        32 times 32, unless the operation is quantized (`autocompress.quantize.ops.Quantized`).
        """
        return 32 * 32 * self.macs

    @property
    def weight_tensors(self) -> tuple[int, ...]:
        """Elements of each tensor that quantization stores in few bits: kernels and matrices.

        By default all parameters, as one tensor; an operation with biases or norms says otherwise.
        """
        return (self.params,) if self.params else ()

    @property
    def other_tensors(self) -> tuple[int, ...]:
        """Elements of each other parameter tensor: biases, scale and shift of norms.

        By default what `weight_tensors` leaves of `params`, as one tensor.
        """
        rest = self.params - sum(self.weight_tensors)
        return (rest,) if rest else ()

    @property
    def peak_elements(self) -> int:
        """Elements for one image that are alive at the worst moment while it runs.

        By default input and output; an operation that holds more in between says how much in all.
        """
        return math.prod(self.in_shape) + math.prod(self.out_shape)

    @property
    def key(self) -> str:
        """A stable, readable name: the kind with every setting that differs from its default."""
        shown = (
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        )
        return f"{type(self).__name__}({','.join(shown)})"


def block_key(ops: Iterable[OpSpec]) -> str:
    """Return the key of a latency-table row: the keys of the operations of a block, in order."""
    return SEPARATOR.join(op.key for op in ops)


def border_elements(ops: Sequence[OpSpec]) -> int:
    """Return the elements that enter and leave operations in sequence, for one image."""
    return math.prod(ops[0].in_shape) + math.prod(ops[-1].out_shape)


def make_divisible(value: float, divisor: int = 8) -> int:
    """Round a channel count to a multiple of `divisor`, never below 90 % of `value`.

    Source: Sandler et al., MobileNetV2, CVPR 2018, as in the reference implementation.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor


def _positive(spec: OpSpec, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if not isinstance(value, int) or value < 1:
            raise SpaceError(f"{type(spec).__name__}.{name} must be an integer >= 1, got {value!r}")


@dataclass(frozen=True)
class EdgeMixture:
    """What one edge of a cell computes.

    Attributes:
        parts: Operations, each with its weight; `None` is 1.
        scale: Of their sum; `None` is 1.
        dropout: Operation to the rate at which what an identity gives is dropped.
    """

    parts: "Sequence[tuple[str, Tensor | None]]"
    scale: "Tensor | None" = None
    dropout: Mapping[str, float] = field(default_factory=dict)


class CellSpec(OpSpec):
    """An operation with several choices inside, one an edge, which differentiable searches mix edge by edge.

    It is alone in its block, whose choices stand in the order of the edges and have the names of operations
    as options.
    """

    @property
    @abstractmethod
    def targets(self) -> tuple[int, ...]:
        """The node that each edge ends in."""

    @property
    def connected(self) -> bool:
        """Whether the output depends on the input; searches by gradients derive no other cells."""
        return True

    @property
    def runs_all(self) -> bool:
        """Whether the output depends on every operation inside: runtimes leave the others out."""
        return True

    @abstractmethod
    def mixture(
        self, shared: "SharedParts", x: "Tensor", edges: Sequence[EdgeMixture], channels: int
    ) -> "Tensor":
        """Run every edge as the weighted sum of operations.

        Args:
            shared: What `shared_module` made.
            x: `(batch, *in_shape)`.
            edges: One a choice of the block.
            channels: Operations see one in so many channels; the others are passed on, and channels are
                shuffled (Xu et al., PC-DARTS, ICLR 2020).
        """


class GatedSpec(OpSpec):
    """An operation in which many choices decide widths; mixtures run it once, at its full width.

    It is alone in its block, whose choices are widths, in the order of `kept`.
    """

    @abstractmethod
    def full(self) -> "GatedSpec":
        """Return the operation at its full width."""

    @abstractmethod
    def channel_gate(self, norm: str, kept: "Sequence[Tensor | None]") -> "Tensor | None":
        """Return what the outputs of a batch norm inside are multiplied by, `(channels,)`; `None` for 1.

        Args:
            norm: Path of the batch norm in the module.
            kept: For each choice the probability that the unit at each place of its ranking is kept,
                `(units,)`; `None` where all are.
        """


class UserModel(OpSpec):
    """A user's own model as one operation, alone in its block, whose parts are its layers: their sum."""

    @property
    @abstractmethod
    def ops(self) -> "Ops":
        """The operations of the network that cost something."""

    @property
    @abstractmethod
    def is_whole(self) -> bool:
        """Whether it is the model as it was brought."""

    @abstractmethod
    def whole(self) -> "nn.Module":
        """Return a copy of the model as it was brought, in evaluation mode."""

    @property
    def macs(self) -> int:
        """Of all operations."""
        return sum(op.macs for op in self.ops)

    @property
    def params(self) -> int:
        """Of all operations."""
        return sum(op.params for op in self.ops)

    @property
    def size_bytes(self) -> int:
        """Of all operations, weights at their bits."""
        return sum(op.size_bytes for op in self.ops)

    @property
    def bops(self) -> int:
        """Of all operations."""
        return sum(op.bops for op in self.ops)

    @property
    def weight_tensors(self) -> tuple[int, ...]:
        """Of all operations."""
        return tuple(tensor for op in self.ops for tensor in op.weight_tensors)

    @property
    def other_tensors(self) -> tuple[int, ...]:
        """Of all operations."""
        return tuple(tensor for op in self.ops for tensor in op.other_tensors)

    @property
    def peak_elements(self) -> int:
        """Not known: what is alive at once depends on the order in which a runtime runs the graph.

        Raises:
            CostError: Always.
        """
        raise CostError("the peak of activations of a user's model is not computed: measure the process")


@dataclass(frozen=True)
class Conv2d(OpSpec):
    """A convolution with 'same' padding (`kernel // 2`), then batch norm, then an activation."""

    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    bias: bool = False
    norm: bool = True
    activation: Activation = "none"

    def __post_init__(self) -> None:
        """Check the geometry once, here."""
        _positive(self, "in_channels", "out_channels", "height", "width", "kernel", "stride", "groups")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise SpaceError(
                f"Conv2d.groups must divide in_channels ({self.in_channels}) and out_channels "
                f"({self.out_channels}), got {self.groups}"
            )
        if self.activation not in ACTIVATIONS:
            raise SpaceError(
                f"Conv2d.activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )

    @property
    def in_shape(self) -> Shape:
        """Channels, height and width of the input."""
        return self.in_channels, self.height, self.width

    @property
    def out_shape(self) -> Shape:
        """Channels, height and width of the output."""
        shrink = 2 * (self.kernel // 2) - self.kernel
        return (
            self.out_channels,
            (self.height + shrink) // self.stride + 1,
            (self.width + shrink) // self.stride + 1,
        )

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved on its own."""
        return self.groups == self.in_channels == self.out_channels and self.groups > 1

    @property
    def _weights(self) -> int:
        return self.kernel**2 * self.in_channels // self.groups * self.out_channels

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the convolution; a bias counts zero."""
        _, height, width = self.out_shape
        return self._weights * height * width

    @property
    def params(self) -> int:
        """Weights, bias, and batch norm's scale and shift."""
        return self._weights + self.out_channels * (self.bias + 2 * self.norm)

    @property
    def weight_tensors(self) -> tuple[int, ...]:
        """The kernel."""
        return (self._weights,)

    @property
    def other_tensors(self) -> tuple[int, ...]:
        """The bias, and batch norm's scale and shift."""
        return (self.out_channels,) * (self.bias + 2 * self.norm)

    def module(self) -> "nn.Module":
        """Build `Sequential(conv, bn, act)`; parts that the operation lacks are absent."""
        from torch import nn

        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["conv"] = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel,
            stride=self.stride,
            padding=self.kernel // 2,
            groups=self.groups,
            bias=self.bias,
        )
        if self.norm:
            parts["bn"] = nn.BatchNorm2d(self.out_channels)
        if self.activation != "none":
            parts["act"] = getattr(nn, ACTIVATIONS[self.activation])()
        return nn.Sequential(parts)


@dataclass(frozen=True)
class SqueezeExcite(OpSpec):
    """Channel attention: global average, reduce with ReLU, expand with hard sigmoid, scale the input.

    Source: Hu et al., CVPR 2018; hard sigmoid as in MobileNetV3 (Howard et al., ICCV 2019).
    """

    channels: int
    height: int
    width: int
    hidden: int

    def __post_init__(self) -> None:
        """Check the geometry once, here."""
        _positive(self, "channels", "height", "width", "hidden")

    @property
    def in_shape(self) -> Shape:
        """Channels, height and width of the input."""
        return self.channels, self.height, self.width

    @property
    def out_shape(self) -> Shape:
        """The shape of the input."""
        return self.in_shape

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the two 1x1 convolutions on one pixel; the scaling counts zero."""
        return 2 * self.channels * self.hidden

    @property
    def params(self) -> int:
        """Weights and biases of the two convolutions."""
        return 2 * self.channels * self.hidden + self.channels + self.hidden

    @property
    def weight_tensors(self) -> tuple[int, ...]:
        """The kernels of the two convolutions."""
        return (self.channels * self.hidden,) * 2

    @property
    def other_tensors(self) -> tuple[int, ...]:
        """The biases of the two convolutions."""
        return self.hidden, self.channels

    @property
    def peak_elements(self) -> int:
        """The input, kept for the final multiplication, with one number a channel and what is made of it.

        That is first the hidden numbers (before and after, from the averages to the scales), then the output.
        """
        elements = math.prod(self.in_shape)
        return elements + self.channels + max(self.hidden, elements)

    def module(self) -> "nn.Module":
        """Build the module with its two 1x1 convolutions, `reduce` and `expand`."""
        from autocompress.network import SqueezeExcite as Module

        return Module(self.channels, self.hidden)


@dataclass(frozen=True)
class GlobalAvgPool(OpSpec):
    """The mean over height and width, kept as `(channels, 1, 1)`."""

    channels: int
    height: int
    width: int

    def __post_init__(self) -> None:
        """Check the geometry once, here."""
        _positive(self, "channels", "height", "width")

    @property
    def in_shape(self) -> Shape:
        """Channels, height and width of the input."""
        return self.channels, self.height, self.width

    @property
    def out_shape(self) -> Shape:
        """One pixel a channel."""
        return self.channels, 1, 1

    @property
    def macs(self) -> int:
        """Zero: there is nothing to multiply."""
        return 0

    @property
    def params(self) -> int:
        """Zero."""
        return 0

    def module(self) -> "nn.Module":
        """Build `AdaptiveAvgPool2d(1)`."""
        from torch import nn

        return nn.AdaptiveAvgPool2d(1)


@dataclass(frozen=True)
class MaxPool(OpSpec):
    """Maximum over windows of `kernel` at `stride`, padded by `kernel // 2` unless kernel equals stride."""

    channels: int
    height: int
    width: int
    kernel: int = 2
    stride: int = 2

    def __post_init__(self) -> None:
        """Check the geometry once, here."""
        _positive(self, "channels", "height", "width", "kernel", "stride")
        if self.kernel > min(self.height, self.width) + 2 * self.padding:
            raise SpaceError(
                f"MaxPool.kernel {self.kernel} is larger than the padded input of {self.height}x{self.width}"
            )

    @property
    def padding(self) -> int:
        """Pixels added at each border."""
        return 0 if self.kernel == self.stride else self.kernel // 2

    @property
    def in_shape(self) -> Shape:
        """Channels, height and width of the input."""
        return self.channels, self.height, self.width

    @property
    def out_shape(self) -> Shape:
        """Channels, height and width of the output."""
        shrink = 2 * self.padding - self.kernel
        return (
            self.channels,
            (self.height + shrink) // self.stride + 1,
            (self.width + shrink) // self.stride + 1,
        )

    @property
    def macs(self) -> int:
        """Zero: there is nothing to multiply."""
        return 0

    @property
    def params(self) -> int:
        """Zero."""
        return 0

    def module(self) -> "nn.Module":
        """Build `MaxPool2d`."""
        from torch import nn

        return nn.MaxPool2d(self.kernel, self.stride, self.padding)


@dataclass(frozen=True)
class Linear(OpSpec):
    """A fully connected layer on the flattened input; the output has shape `(out_features, 1, 1)` as a spec.

    The module returns `(batch, out_features)`: a linear layer ends a chain of images.
    """

    in_features: int
    out_features: int
    bias: bool = True
    activation: Activation = "none"

    def __post_init__(self) -> None:
        """Check the geometry once, here."""
        _positive(self, "in_features", "out_features")
        if self.activation not in ACTIVATIONS:
            raise SpaceError(
                f"Linear.activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )

    @property
    def in_shape(self) -> Shape:
        """The flattened input."""
        return self.in_features, 1, 1

    @property
    def out_shape(self) -> Shape:
        """The features as channels of one pixel."""
        return self.out_features, 1, 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the matrix product; a bias counts zero."""
        return self.in_features * self.out_features

    @property
    def params(self) -> int:
        """Weights and bias."""
        return self.macs + self.out_features * self.bias

    @property
    def weight_tensors(self) -> tuple[int, ...]:
        """The matrix."""
        return (self.macs,)

    def module(self) -> "nn.Module":
        """Build `Sequential(flatten, linear, act)`."""
        from torch import nn

        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["flatten"] = nn.Flatten()
        parts["linear"] = nn.Linear(self.in_features, self.out_features, bias=self.bias)
        if self.activation != "none":
            parts["act"] = getattr(nn, ACTIVATIONS[self.activation])()
        return nn.Sequential(parts)


@dataclass(frozen=True)
class Add(OpSpec):
    """Add the input of the block; the last operation of a residual block."""

    channels: int
    height: int
    width: int

    def __post_init__(self) -> None:
        """Check the geometry once, here."""
        _positive(self, "channels", "height", "width")

    @property
    def in_shape(self) -> Shape:
        """Channels, height and width of the input."""
        return self.channels, self.height, self.width

    @property
    def out_shape(self) -> Shape:
        """The shape of the input."""
        return self.in_shape

    @property
    def macs(self) -> int:
        """Zero: there is nothing to multiply."""
        return 0

    @property
    def params(self) -> int:
        """Zero."""
        return 0

    def module(self) -> "nn.Module":
        """Build nothing: the addition belongs to the block (`autocompress.network.Residual`)."""
        from torch import nn

        return nn.Identity()


Ops = tuple[OpSpec, ...]
"""What one block runs, in order; empty when the block is not active."""
