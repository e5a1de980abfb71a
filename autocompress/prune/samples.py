"""Inputs and outputs of a layer at some positions of its output: rows of a regression."""

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from autocompress.prune.layers import Layer

POSITIONS: Final = 10
"""Of each image: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, section
4, and the released code of AMC (He et al., ECCV 2018)."""


@dataclass(frozen=True)
class Places:
    """Positions of an output, row by row.

    Attributes:
        images: Numbers of the images in the batch, `(rows,)`.
        positions: Numbers of the positions in the image, `(rows,)`.
    """

    images: Tensor
    positions: Tensor


def sample(layer: Layer, output: Tensor, count: int, generator: torch.Generator) -> Places:
    """Choose positions of each image, none of them twice; all if there are not so many.

    Args:
        layer: What made the output.
        output: `(batch, channels, height, width)`, or of a linear layer `(batch, ..., channels)`.
        count: Positions of each image.
        generator: Of the CPU.
    """
    batch, positions = _rows(layer, output).shape[:2]
    chosen = torch.rand(batch, positions, generator=generator).topk(min(count, positions)).indices
    images = torch.arange(batch).repeat_interleave(chosen.shape[1])
    return Places(images.to(output.device), chosen.flatten().to(output.device))


def outputs_at(layer: Layer, output: Tensor, places: Places) -> Tensor:
    """Return what a layer makes at some positions, `(rows, out)`, in double precision."""
    return _rows(layer, output)[places.images, places.positions].double()


def inputs_at(layer: Layer, x: Tensor, output: Tensor, places: Places) -> Tensor:
    """Return what a layer reads for its outputs at some positions.

    Args:
        layer: What reads the input.
        x: The input.
        output: What the layer makes of it; the shape alone matters.
        places: Some positions of the output.

    Returns:
        `(rows, in, points of the kernel)`, in double precision.
    """
    if layer.axis != 1:
        return _rows(layer, x)[places.images, places.positions].double().unsqueeze(2)
    width = output.shape[3]
    at = (places.positions // width, places.positions % width)
    # (rows, points of the kernel along one axis)
    rows, columns = (
        place[:, None] * stride + dilation * torch.arange(kernel, device=x.device)
        for place, stride, dilation, kernel in zip(
            at, layer.stride, layer.dilation, layer.kernel, strict=True
        )
    )
    found = _padded(layer, x)[places.images[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    # (rows, kernel height, kernel width, in), as the axes that are indexed come first
    return found.double().flatten(1, 2).transpose(1, 2)


def _padded(layer: Layer, x: Tensor) -> Tensor:
    if isinstance(layer.padding, str):
        whole = layer.padding == "same"
        (top, bottom), (left, right) = (
            (whole * (total // 2), whole * (total - total // 2))
            for kernel, dilation in zip(layer.kernel, layer.dilation, strict=True)
            for total in (dilation * (kernel - 1),)
        )
    else:
        top = bottom = layer.padding[0]
        left = right = layer.padding[1]
    return F.pad(x, (left, right, top, bottom))


def _rows(layer: Layer, tensor: Tensor) -> Tensor:
    """Return `(batch, positions, channels)`."""
    channels = tensor.movedim(layer.axis, -1)
    return channels.reshape(len(tensor), -1, channels.shape[-1])
