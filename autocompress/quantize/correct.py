"""Biases that take back what rounding of weights adds to the mean of every output channel.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
section 4.2 and appendices C and D.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autocompress.errors import QuantizationError
from autocompress.quantize.capture import batches, calls, captured, evaluating, submodule
from autocompress.quantize.equalize import response
from autocompress.quantize.layer import KINDS, Layer, QuantizedLayer, quantized_layers


def correct_bias(
    network: nn.Module,
    reference: nn.Module,
    images: Tensor,
    *,
    names: Sequence[str] | None = None,
    batch: int = 32,
) -> dict[str, float]:
    """Shift the biases of quantized layers until each channel's mean is that of the floating-point network.

    Layers are corrected from input to output: what a layer reads is then already corrected. Means are those
    of the layer's output, behind its output quantizer if it has one.

    Args:
        network: Changed in place; layers without a bias get one.
        reference: The same network in floating point, with the same names; not changed.
        images: `(images, ...)`, already normalised; some hundreds.
        names: Of the layers; all quantized ones if `None`.
        batch: Images at once.

    Returns:
        The greatest shift of each layer, in the order of execution.

    Raises:
        QuantizationError: A layer is absent, is not quantized, or runs more or less often than once; nothing
            has changed then.
    """
    names = [name for name, _ in quantized_layers(network)] if names is None else names
    layers = {}
    for name in names:
        layer = submodule(network, name)
        if not isinstance(layer, QuantizedLayer):
            raise QuantizationError(f"{name!r} is no quantized layer, got {type(layer).__name__}")
        layers[name] = layer
    shifts = {}
    with evaluating(network, reference), torch.no_grad():
        first = next(batches(images, 1))
        order = calls(network, names, first)
        for name, times in (*order.items(), *calls(reference, names, first).items()):
            if times != 1:
                raise QuantizationError(
                    f"layer {name!r} runs {times} times in a forward pass: one bias cannot correct both; "
                    "name the other layers in `names`"
                )
        for name in order:
            layer = layers[name].layer
            wanted, given = (_means(each, name, layer, images, batch) for each in (reference, network))
            shift = wanted - given
            if "bias" in dict(layer.named_parameters(recurse=False)):
                layer.get_parameter("bias").add_(shift)
            else:
                layer.register_parameter("bias", nn.Parameter(shift))
            shifts[name] = float(shift.abs().max())
    return shifts


def _means(network: nn.Module, name: str, layer: nn.Module, images: Tensor, batch: int) -> Tensor:
    """Return the mean of each output channel of a layer, `(channels,)`."""
    axis = -1 if isinstance(layer, nn.Linear) else 1
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for part in batches(images, batch):
        output = captured(network, name, part, what="output", batch=batch)
        others = [other for other in range(output.dim()) if other != axis % output.dim()]
        total = total + output.double().mean(others) * (len(part) / len(images))
    return total.to(images)


def expected_shift(layer: nn.Module, rounded: Tensor, input_means: Tensor) -> Tensor:
    """Return by how much rounded weights raise the mean of each output channel: to be taken off the bias.

    Without data: the mean of the inputs comes from the batch norm before them, by `clipped_normal_mean`.
    Zeros that pad a border are not counted.

    Args:
        layer: A layer, with its weights in floating point.
        rounded: The weights rounded, in their shape.
        input_means: `(input channels,)`.

    Returns:
        `(output channels,)`.

    Raises:
        QuantizationError: The layer is of a kind that is not known.
    """
    if not isinstance(layer, KINDS):
        raise QuantizationError(f"the kind of layer is not known, got {type(layer).__name__}")
    known: Layer = layer
    with torch.no_grad():
        return response(known, rounded - known.weight, input_means)


def clipped_normal_mean(mean: Tensor, deviation: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
    """Return the mean of normal numbers that are clipped: those behind batch norm and ReLU, or ReLU6.

    Args:
        mean: The shift of the batch norm (beta).
        deviation: Its scale (gamma), of either sign; 0 stands for a constant.
        low: Where values are clipped from below.
        high: Where they are clipped from above.

    Returns:
        The means, in the shape of `mean`.
    """
    sigma = deviation.abs()
    safe = sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
    a, b = (low - mean) / safe, (high - mean) / safe
    below, above = torch.special.ndtr(a), torch.special.ndtr(-b)
    result = low * below + mean * (1 - below - above) + sigma * (_density(a) - _density(b))
    if math.isfinite(high):
        result = result + high * above
    return torch.where(sigma > 0, result, mean.clamp(low, high))


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
