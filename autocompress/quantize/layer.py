"""Layers whose weights, inputs and outputs pass through quantizers: what a network of few bits is made of."""

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.errors import QuantizationError
from autocompress.quantize.ops import FULL_PRECISION
from autocompress.quantize.quantizer import Quantizer

Layer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear

KINDS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
"""Exactly these: a class of the user's own may compute something else."""


MOST_BIAS = 2.0**30
"""Greatest integer of a bias: sums of 32 bits need room beside it. A power of two, exact in float32."""


def room_for_bias(scale: Tensor, bias: Tensor | None, input_scale: Tensor) -> Tensor:
    """Return scales of weights, `(channels,)`, at which the bias of each channel fits its integers.

    A channel of next to no weights, as batch norm leaves them, would have a scale so small that its bias does
    not fit: its weights are as good as zero at a greater one too.

    Args:
        scale: Of the weights, `(channels,)` or `(1,)`.
        bias: Of the layer, `(channels,)`.
        input_scale: Of the input, at its most bits.
    """
    if bias is None:
        return scale
    least = bias.detach().abs() / (input_scale * MOST_BIAS)
    return torch.maximum(scale, least if len(scale) > 1 else least.max())


class QuantizedLayer(nn.Module):
    """A layer in which weights, inputs and outputs pass through quantizers, where there are some.

    Args:
        layer: Its parameters are taken, not copied; batch norm is folded into it beforehand.
        weight: Of the weights; `None` leaves them as they are.
        input: Of what the layer reads.
        output: Of what it gives. Integer runtimes give integers: where no quantized layer reads them as they
            are, somebody has to say at which scale.

    Raises:
        QuantizationError: The layer is of a kind that is not known.
    """

    def __init__(
        self,
        layer: nn.Module,
        *,
        weight: Quantizer | None = None,
        input: Quantizer | None = None,
        output: Quantizer | None = None,
    ) -> None:
        """Hold the layer and its quantizers."""
        super().__init__()
        if type(layer) not in KINDS:
            raise QuantizationError(
                f"{type(layer).__name__} cannot be quantized; "
                f"layers of {', '.join(kind.__name__ for kind in KINDS)} can"
            )
        self.layer, self.weight, self.input, self.output = layer, weight, input, output
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer on quantized numbers; shapes are those of the layer."""
        layer = cast(Layer, self.layer)
        x = x if self.input is None else self.input(x)
        weight = layer.weight if self.weight is None else self.weight(layer.weight)
        x = apply(layer, x, weight, self._bias())
        return x if self.output is None else self.output(x)

    def _bias(self) -> Tensor | None:
        """Return the bias on the grid of the sums it is added to; gradients pass straight through.

        Integer kernels add it to sums of products of integers, which are multiples of both scales' product
        (Jacob et al., CVPR 2018, section 2.4). At few bits that is no small rounding.
        """
        bias, weight, given = cast(Layer, self.layer).bias, self.weight, self.input
        if bias is None or not (isinstance(weight, Quantizer) and isinstance(given, Quantizer)):
            return bias
        if "logarithmic" in (weight.grid.levels, given.grid.levels):
            return bias
        step = (weight.step() * given.step()).detach()
        q = torch.round(bias / step).clamp(-MOST_BIAS, MOST_BIAS)
        return bias + (q * step - bias).detach()


def apply(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run a layer with other weights and another bias than its own."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(layer, nn.ConvTranspose2d):
        return F.conv_transpose2d(
            x,
            weight,
            bias,
            layer.stride,
            cast(tuple[int, ...], layer.padding),
            layer.output_padding,
            layer.groups,
            layer.dilation,
        )
    result: Tensor = layer._conv_forward(x, weight, bias)
    return result


def out_axis(layer: nn.Module) -> int:
    """Return the axis of the weights along which output channels lie."""
    return 1 if isinstance(layer, nn.ConvTranspose2d) else 0


def out_channels(layer: nn.Module) -> int:
    """Return how many output channels a layer has."""
    return int(cast(Layer, layer).weight.shape[out_axis(layer)])


def quantized_layers(network: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Yield the layers of a network that were prepared for quantization, by name, in order."""
    for name, module in network.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module


def has_quantizers(network: nn.Module) -> bool:
    """Whether a network has layers that were prepared for quantization."""
    return any(True for _ in quantized_layers(network))


def effective_bits(network: nn.Module) -> tuple[float, float]:
    """Return the mean bits of a weight, and of a layer's input, the mean over layers; floats have 32."""
    found = [(cast(Layer, layer.layer), layer) for _, layer in quantized_layers(network)]
    weights = [(plain.weight.numel(), _bits_of(layer.weight)) for plain, layer in found]
    inputs = [_bits_of(layer.input) for _, layer in found]
    stored = sum(count for count, _ in weights)
    return sum(count * bits for count, bits in weights) / stored, sum(inputs) / len(inputs)


def _bits_of(quantizer: nn.Module | None) -> int:
    return quantizer.grid.bits if isinstance(quantizer, Quantizer) else FULL_PRECISION
