"""Operations at few bits, as data: what prices a network whose bit widths are chosen."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from autocompress.errors import QuantizationError
from autocompress.ops import OpSpec, Shape
from autocompress.weight_bytes import weight_bytes

if TYPE_CHECKING:
    from torch import nn

WIDTHS: Final = (*range(2, 9), 16)
"""Bits that integers can have."""

FULL_PRECISION: Final = 32
"""Bits that stand for 32-bit floats: what is not quantized."""


@dataclass(frozen=True)
class Quantized(OpSpec):
    """An operation whose weights and inputs have few bits; `at_bits` makes it.

    Its time is that between tensors of integers: what it takes to make them from floats, or floats from them,
    is `Conversion`.

    Attributes:
        op: What is computed.
        weight_bits: Of each weight; biases and norms have 32.
        activation_bits: Of each input.
    """

    op: OpSpec
    weight_bits: int
    activation_bits: int

    @property
    def key(self) -> str:
        """The key of the operation, and the bits: `...@w4a8`."""
        return f"{self.op.key}@w{self.weight_bits}a{self.activation_bits}"

    @property
    def in_shape(self) -> Shape:
        """That of the operation."""
        return self.op.in_shape

    @property
    def out_shape(self) -> Shape:
        """That of the operation."""
        return self.op.out_shape

    @property
    def macs(self) -> int:
        """Of the operation, whatever the bits."""
        return self.op.macs

    @property
    def params(self) -> int:
        """Of the operation; scales and zero points are not counted."""
        return self.op.params

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights at their bits and of the other parameters at 32."""
        return weight_bytes((self.op,), weight_bits=self.weight_bits)

    @property
    def bops(self) -> int:
        """MACs times bits of the weights times bits of the activations.

        Source: Yao et al., HAWQ-V3, ICML 2021, section 4.
        """
        return self.weight_bits * self.activation_bits * self.macs

    @property
    def weight_tensors(self) -> tuple[int, ...]:
        """Those of the operation."""
        return self.op.weight_tensors

    @property
    def other_tensors(self) -> tuple[int, ...]:
        """Those of the operation."""
        return self.op.other_tensors

    @property
    def peak_elements(self) -> int:
        """Those of the operation."""
        return self.op.peak_elements

    def module(self) -> "nn.Module":
        """Build the operation in floating point: networks of integers are made from whole models."""
        return self.op.module()


def at_bits(op: OpSpec, weight_bits: int, activation_bits: int) -> OpSpec:
    """Return an operation at some bits; at 32 and 32 it is itself.

    Raises:
        QuantizationError: A width is none.
    """
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        if isinstance(bits, bool) or bits not in (1, *WIDTHS, FULL_PRECISION):
            raise QuantizationError(
                f"{name} must be one of {', '.join(map(str, WIDTHS))} or {FULL_PRECISION} for floating "
                f"point, got {bits!r}; what is not quantized is charged at {FULL_PRECISION}, not at -1"
            )
    if weight_bits == activation_bits == FULL_PRECISION:
        return op
    return Quantized(op, weight_bits, activation_bits)


def bits_of(op: OpSpec, weight_bits: int, activation_bits: int) -> tuple[OpSpec, int, int]:
    """Return what an operation computes and at which bits: its own, or those that all others have."""
    if isinstance(op, Quantized):
        return op.op, op.weight_bits, op.activation_bits
    return op, weight_bits, activation_bits


@dataclass(frozen=True)
class Conversion(OpSpec):
    """Floats to integers or back, between layers of different precision.

    Attributes:
        kind: Which way.
        bits: Of the integers.
    """

    kind: Literal["quantize", "dequantize"]
    channels: int
    height: int
    width: int
    bits: int = 8

    @property
    def in_shape(self) -> Shape:
        """Channels, height and width."""
        return self.channels, self.height, self.width

    @property
    def out_shape(self) -> Shape:
        """As the input."""
        return self.in_shape

    @property
    def macs(self) -> int:
        """None."""
        return 0

    @property
    def params(self) -> int:
        """None."""
        return 0

    def module(self) -> "nn.Module":
        """Build what does nothing: the quantizers of layers do it."""
        from torch import nn

        return nn.Identity()
