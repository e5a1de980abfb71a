"""Equal ranges for all channels, by moving scales from one layer to the next; the output stays as it is.

Weights at one scale for a whole tensor are rounded by the widest channel. ReLU lets a positive factor pass,
so that a channel can be divided in one layer and multiplied in the next.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
sections 4.1 (equation 11) and 4.2 (bias absorption); the form for three layers follows from equal ranges in
all of them.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final, cast

import torch
from torch import Tensor, nn

from autocompress.errors import QuantizationError
from autocompress.quantize.layer import KINDS, Layer, out_axis, out_channels

PASSING: Final = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Dropout, nn.Dropout2d, nn.Flatten)
"""Modules through which a positive factor of a channel passes."""

ITERATIONS: Final = 100
"""At most this many passes over the chains; chains that share layers disturb each other."""

SETTLED: Final = 1e-5
"""Passes end when no factor is further from 1."""


def equalize(chains: Iterable[Sequence[nn.Module]]) -> list[tuple[Tensor, ...]]:
    """Equalize the ranges of channels within chains of layers, in place, until nothing moves.

    Args:
        chains: Each a layer, a second one, and perhaps a third where the second is depthwise, in the order of
            execution. Batch norms are folded into layers beforehand. What lies between may be listed too, and
            is checked; what is not listed must let positive factors pass, as ReLU does and ReLU6 does not.
            Nothing else may read what lies between.

    Returns:
        For each chain the factors `(channels,)` by which the output of each layer but the last has become
        smaller; biases and statistics of batch norms are to be divided by them.

    Raises:
        QuantizationError: A chain has other lengths, layers that do not fit, or holds what lets no factor
            pass.
    """
    checked = [_layers(chain) for chain in chains]
    totals = [[torch.ones(out_channels(layer)) for layer in layers[:-1]] for layers in checked]
    with torch.no_grad():
        for _ in range(ITERATIONS):
            moved = 0.0
            for layers, total in zip(checked, totals, strict=True):
                for at, factor in enumerate(_equalize(layers)):
                    total[at] = total[at] * factor
                    moved = max(moved, float((factor - 1).abs().max()))
            if moved < SETTLED:
                break
    return [tuple(total) for total in totals]


def absorb_bias(first: nn.Module, second: nn.Module, beta: Tensor, gamma: Tensor) -> Tensor:
    """Move what a layer adds to all outputs alike into the next layer's bias, in place.

    Activations that are normal with mean beta and deviation gamma exceed c = max(0, beta - 3 gamma) almost
    always; ReLU lets c pass then, and the range of the activations shrinks by it. Not exact: values below c
    exist, and where the second layer pads with zeros its border has no c to read.

    Args:
        first: A layer with a bias.
        second: The next layer behind ReLU.
        beta: `(channels,)`, shift of the batch norm that was folded into the first layer, divided by the
            factors of `equalize`.
        gamma: `(channels,)`, its scale, divided likewise.

    Returns:
        What was moved, `(channels,)`.

    Raises:
        QuantizationError: The layers do not fit, or the first has no bias.
    """
    a, b = _layers((first, second))
    if a.bias is None:
        raise QuantizationError("the first layer has no bias: fold its batch norm into it beforehand")
    if not beta.shape == gamma.shape == a.bias.shape:
        raise QuantizationError(
            f"beta and gamma must have the {len(a.bias)} channels of the first layer, got shapes "
            f"{tuple(beta.shape)} and {tuple(gamma.shape)}"
        )
    with torch.no_grad():
        absorbed = (beta - 3 * gamma.abs()).clamp_min(0).to(a.bias)
        a.bias -= absorbed
        moved = response(b, b.weight, absorbed)
        if b.bias is None:
            b.bias = nn.Parameter(moved)
        else:
            b.bias += moved
    return absorbed


def response(layer: Layer, weight: Tensor, inputs: Tensor) -> Tensor:
    """Return what a layer with some weights and no bias gives on constant channels, away from borders.

    Args:
        layer: The layer.
        weight: In the shape of its weights.
        inputs: `(channels,)`, the constants; a linear layer may read several positions of each.

    Returns:
        `(output channels,)`.
    """
    per_input = _by_input(layer, weight, len(inputs)).sum(-1)
    # Each output adds up its inputs; a group adds up its own.
    return (per_input * inputs.reshape(per_input.shape[0], 1, -1)).sum(-1).flatten()


def _layers(chain: Sequence[nn.Module]) -> tuple[Layer, ...]:
    """Return the layers of a chain, once all of it is known to fit."""
    layers = []
    for module in chain:
        if type(module) in KINDS:
            layers.append(cast(Layer, module))
        elif type(module) not in PASSING:
            raise QuantizationError(
                f"{type(module).__name__} between layers lets no factor of a channel pass, so that they "
                "cannot be equalized; replace ReLU6 by ReLU and fold batch norms beforehand, or leave the "
                "chain out"
            )
    if len(layers) not in (2, 3) or type(chain[0]) not in KINDS or type(chain[-1]) not in KINDS:
        raise QuantizationError(
            f"a chain must begin and end with a layer and have 2 or 3 of them, got "
            f"{[type(module).__name__ for module in chain]}"
        )
    if len(layers) == 3 and not _is_depthwise(layers[1]):
        raise QuantizationError("the middle layer of three must be depthwise; name two pairs instead")
    for layer, following in pairwise(layers):
        if isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1:
            raise QuantizationError("a transposed convolution with groups cannot be equalized")
        if isinstance(following, nn.ConvTranspose2d) and following.groups > 1:
            raise QuantizationError("a transposed convolution with groups cannot be equalized")
        given, read = out_channels(layer), _channels_in(following)
        # A linear layer behind a flattened map reads several positions of every channel.
        if read != given and not (isinstance(following, nn.Linear) and read % given == 0):
            raise QuantizationError(f"a layer of {given} outputs cannot precede one of {read} inputs")
    return tuple(layers)


def _equalize(layers: tuple[Layer, ...]) -> list[Tensor]:
    """Equalize one chain once, and return the factors between its layers, `(channels,)` each."""
    channels = out_channels(layers[0])
    ranges = [_by_output(layers[0]).abs().amax(1)]
    if len(layers) == 3:
        ranges.append(_by_output(layers[1]).abs().amax(1))
    ranges.append(_by_input(layers[-1], layers[-1].weight, channels).abs().amax((1, 3)).flatten())
    # All ranges become their geometric mean. A channel that is zero somewhere has nothing to be equal to.
    alive = torch.stack(ranges).amin(0) > 0
    goal = torch.stack(ranges).log().mean(0).exp()
    one = torch.ones_like(goal)
    factors = [torch.where(alive, ranges[0] / goal, one)]
    if len(layers) == 3:
        factors.append(torch.where(alive, goal / ranges[-1], one))
    for layer, factor in zip(layers[:-1], factors, strict=True):
        shape = [-1 if axis == out_axis(layer) else 1 for axis in range(layer.weight.dim())]
        layer.weight /= factor.reshape(shape)
        if layer.bias is not None:
            layer.bias /= factor
    for layer, factor in zip(layers[1:], factors, strict=True):
        _multiply_inputs(layer, factor)
    return factors


def _multiply_inputs(layer: Layer, factor: Tensor) -> None:
    """Multiply what weights each input channel is read by; not through views, which can be copies."""
    if isinstance(layer, nn.Linear):
        layer.weight *= factor.repeat_interleave(layer.in_features // len(factor))
    elif isinstance(layer, nn.ConvTranspose2d):
        layer.weight *= factor[:, None, None, None]
    else:
        outputs = layer.out_channels // layer.groups
        by_group = factor.reshape(layer.groups, 1, -1).expand(-1, outputs, -1)
        layer.weight *= by_group.reshape(layer.out_channels, -1, 1, 1)


def _by_output(layer: Layer) -> Tensor:
    """Return the weights as `(output channels, rest)`."""
    return layer.weight.movedim(out_axis(layer), 0).flatten(1)


def _by_input(layer: Layer, weight: Tensor, channels: int) -> Tensor:
    """Return the weights as `(groups, outputs a group, inputs a group, rest)`."""
    if isinstance(layer, nn.Linear):
        return weight.reshape(1, layer.out_features, channels, -1)
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.flatten(2).transpose(0, 1)[None]
    return weight.reshape(layer.groups, weight.shape[0] // layer.groups, weight.shape[1], -1)


def _channels_in(layer: Layer) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _is_depthwise(layer: Layer) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels
