"""Operations of users' models that the spaces of autocompress do not have, as data."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocompress.ops import ACTIVATIONS, Activation, OpSpec, Shape

if TYPE_CHECKING:
    from torch import nn

Pair = tuple[int, int]
"""Height, width."""


@dataclass(frozen=True)
class Convolution(OpSpec):
    """A convolution of any geometry, then batch norm, then an activation; `Conv2d` is the usual one.

    Attributes:
        padding: On each side; of a transposed convolution, what is cut off there.
        transposed: Whether each input pixel adds a kernel to the output, as where maps grow.
        output_padding: Of a transposed convolution, rows and columns added at the end.
    """

    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = False
    norm: bool = True
    activation: Activation = "none"
    transposed: bool = False
    output_padding: Pair = (0, 0)

    @property
    def in_shape(self) -> Shape:
        """Channels, height and width of the input."""
        return self.in_channels, self.height, self.width

    @property
    def out_shape(self) -> Shape:
        """Channels, height and width of the output."""
        height, width = (self._side(axis, size) for axis, size in enumerate((self.height, self.width)))
        return self.out_channels, height, width

    def _side(self, axis: int, size: int) -> int:
        stride, padding = self.stride[axis], self.padding[axis]
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        if self.transposed:
            return (size - 1) * stride - 2 * padding + reach + self.output_padding[axis]
        return (size + 2 * padding - reach) // stride + 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the convolution; a bias counts zero."""
        _, height, width = self.in_shape if self.transposed else self.out_shape
        return self.weight_tensors[0] * height * width

    @property
    def params(self) -> int:
        """Weights, bias, and batch norm's scale and shift."""
        return self.weight_tensors[0] + sum(self.other_tensors)

    @property
    def weight_tensors(self) -> tuple[int, ...]:
        """The kernel."""
        return (math.prod(self.kernel) * self.in_channels // self.groups * self.out_channels,)

    @property
    def other_tensors(self) -> tuple[int, ...]:
        """The bias, and batch norm's scale and shift."""
        return (self.out_channels,) * (self.bias + 2 * self.norm)

    def module(self) -> "nn.Module":
        """Build `Sequential(conv, bn, act)`; parts that the operation lacks are absent."""
        from torch import nn

        parts: OrderedDict[str, nn.Module] = OrderedDict()
        channels = self.in_channels, self.out_channels
        geometry = self.kernel, self.stride, self.padding
        if self.transposed:
            parts["conv"] = nn.ConvTranspose2d(
                *channels, *geometry, self.output_padding, self.groups, self.bias, self.dilation
            )
        else:
            parts["conv"] = nn.Conv2d(*channels, *geometry, self.dilation, self.groups, self.bias)
        if self.norm:
            parts["bn"] = nn.BatchNorm2d(self.out_channels)
        if self.activation != "none":
            parts["act"] = getattr(nn, ACTIVATIONS[self.activation])()
        return nn.Sequential(parts)


@dataclass(frozen=True)
class BatchNorm(OpSpec):
    """Batch norm that stands alone, as before the convolutions of pre-activation networks."""

    channels: int
    height: int
    width: int
    affine: bool = True

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
        """None."""
        return 0

    @property
    def params(self) -> int:
        """Scale and shift."""
        return 2 * self.channels * self.affine

    @property
    def weight_tensors(self) -> tuple[int, ...]:
        """None: norms are not quantized."""
        return ()

    @property
    def other_tensors(self) -> tuple[int, ...]:
        """Scale and shift."""
        return (self.channels,) * 2 * self.affine

    def module(self) -> "nn.Module":
        """Build the batch norm."""
        from torch import nn

        return nn.BatchNorm2d(self.channels, affine=self.affine)


@dataclass(frozen=True)
class Parameters(OpSpec):
    """Parameters of anything else, such as scales of layers: they count, and take no time of their own.

    Attributes:
        each: Parameters of each channel, or of each pair of channels and others.
        channels: How many of these.
        others: And of those.
    """

    each: int
    channels: int = 1
    others: int = 1

    @property
    def in_shape(self) -> Shape:
        """As the output."""
        return self.channels, 1, 1

    @property
    def out_shape(self) -> Shape:
        """The channels."""
        return self.channels, 1, 1

    @property
    def macs(self) -> int:
        """None."""
        return 0

    @property
    def params(self) -> int:
        """All of them."""
        return self.each * self.channels * self.others

    def module(self) -> "nn.Module":
        """Build what does nothing."""
        from torch import nn

        return nn.Identity()


@dataclass(frozen=True)
class Product(OpSpec):
    """Products of matrices in what pruning does not follow, such as attention; it has no parameters.

    Attributes:
        each: Multiply-accumulates of each channel.
        channels: How many.
    """

    each: int
    channels: int = 1

    @property
    def in_shape(self) -> Shape:
        """The channels."""
        return self.channels, 1, 1

    @property
    def out_shape(self) -> Shape:
        """The channels."""
        return self.channels, 1, 1

    @property
    def macs(self) -> int:
        """Of all channels."""
        return self.each * self.channels

    @property
    def params(self) -> int:
        """None."""
        return 0

    def module(self) -> "nn.Module":
        """Build what does nothing: the operation is part of the user's own model."""
        from torch import nn

        return nn.Identity()
