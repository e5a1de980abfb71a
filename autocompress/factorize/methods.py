"""The ways to factorize a layer: which convolutions take its place, at which ranks, and what they cost.

A linear layer is a 1x1 convolution of one pixel here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from autocompress.errors import FactorizationError
from autocompress.factorize import decompose
from autocompress.factorize.canonical import composed as sum_of_products
from autocompress.factorize.canonical import cp_factors

Method = Literal["svd", "spatial", "depthwise", "tucker", "cp"]
METHODS: tuple[Method, ...] = get_args(Method)

Rank = int | tuple[int, int]
"""Of tucker the channels that enter and leave the core; of depthwise the kernels of an input channel."""

Pair = tuple[int, int]
"""Height, width."""


@dataclass(frozen=True)
class Geometry:
    """A convolution without groups, or a linear layer.

    Attributes:
        in_channels: Or features.
        out_channels: Or features.
        kernel: Height and width.
        stride: Of the kernel's places.
        padding: At top and bottom, left and right; or "same" or "valid".
        dilation: Distance of the kernel's points.
        groups: Of the channels.
    """

    in_channels: int
    out_channels: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair | str = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def points(self) -> int:
        """Of the kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def weights(self) -> int:
        """Numbers of the kernel."""
        return self.in_channels // self.groups * self.out_channels * self.points

    def out_size(self, size: Pair) -> Pair:
        """Return height and width of the output for those of the input."""
        height, width = (self._along(axis, size[axis]) for axis in (0, 1))
        return height, width

    def _along(self, axis: int, size: int) -> int:
        if self.padding == "same":
            return size
        padding = 0 if isinstance(self.padding, str) else self.padding[axis]
        room = size + 2 * padding - self.dilation[axis] * (self.kernel[axis] - 1) - 1
        return room // self.stride[axis] + 1


@dataclass(frozen=True)
class Part:
    """One of the layers that take the place of another."""

    name: str
    geometry: Geometry


def geometry_of(layer: nn.Module) -> Geometry:
    """Return the shape of an `nn.Linear` or an `nn.Conv2d`.

    Raises:
        FactorizationError: It is something else.
    """
    if isinstance(layer, nn.Linear):
        return Geometry(layer.in_features, layer.out_features)
    if not isinstance(layer, nn.Conv2d):
        raise FactorizationError(f"expected nn.Linear or nn.Conv2d, got {type(layer).__name__}")
    padding = layer.padding if isinstance(layer.padding, str) else _pair(layer.padding)
    return Geometry(
        layer.in_channels,
        layer.out_channels,
        _pair(layer.kernel_size),
        _pair(layer.stride),
        padding,
        _pair(layer.dilation),
        layer.groups,
    )


def _pair(values: Sequence[int]) -> Pair:
    return int(values[0]), int(values[1])


def applicable(geometry: Geometry) -> tuple[Method, ...]:
    """Return the methods that differ on a layer: on single points and single lines most are the SVD again."""
    if geometry.points == 1:
        return ("svd",)
    if 1 in geometry.kernel:
        return ("svd", "depthwise", "tucker")
    return METHODS


def full_rank(geometry: Geometry, method: Method) -> Rank:
    """Return the rank at which nothing is lost.

    Raises:
        FactorizationError: There is no such method.
    """
    _check_method(method)
    into, out, points = geometry.in_channels, geometry.out_channels, geometry.points
    height, width = geometry.kernel
    if method == "svd":
        return min(out, into * points)
    if method == "spatial":
        return min(into * height, out * width)
    if method == "depthwise":
        return min(out, points)
    if method == "tucker":
        return min(into, out * points), min(out, into * points)
    return geometry.weights // max(into, out, height, width)


def check_rank(geometry: Geometry, method: Method, rank: object) -> Rank:
    """Return the rank, which a method has on a layer.

    Raises:
        FactorizationError: There is no such method, or it has no such rank here.
    """
    most = full_rank(geometry, method)
    if isinstance(most, int):
        decompose.check_rank(f"rank of {method}", rank, most)
        return rank  # type: ignore[return-value]
    if not isinstance(rank, tuple) or len(rank) != 2:
        raise FactorizationError(
            f"rank of tucker must be a pair: channels that enter and leave the core, at most {most}, got "
            f"{rank!r}"
        )
    for side, one, limit in zip(("in", "out"), rank, most, strict=True):
        decompose.check_rank(f"rank_{side} of tucker", one, limit)
    if clipped(geometry, rank) != rank:
        raise FactorizationError(
            f"rank of tucker {rank}: neither can be more than the other times the {geometry.points} points "
            f"of the kernel; {clipped(geometry, rank)} does the same"
        )
    return rank


def clipped(geometry: Geometry, rank: Pair) -> Pair:
    """Return ranks of tucker that a core can use, and that give the same as these."""
    into, out = rank
    return min(into, out * geometry.points), min(out, into * geometry.points)


def parts(geometry: Geometry, method: Method, rank: Rank) -> tuple[Part, ...]:
    """Return the convolutions that take the place of a layer, in the order in which they run."""
    into, out = geometry.in_channels, geometry.out_channels
    (height, width), padding = geometry.kernel, geometry.padding
    upright = padding if isinstance(padding, str) else (padding[0], 0)
    across = padding if isinstance(padding, str) else (0, padding[1])
    (down, right), (far_down, far_right) = geometry.stride, geometry.dilation

    def square(first: int, last: int, groups: int = 1) -> Geometry:
        return Geometry(first, last, geometry.kernel, geometry.stride, padding, geometry.dilation, groups)

    def column(first: int, last: int, groups: int = 1) -> Geometry:
        return Geometry(first, last, (height, 1), (down, 1), upright, (far_down, 1), groups)

    def row(first: int, last: int, groups: int = 1) -> Geometry:
        return Geometry(first, last, (1, width), (1, right), across, (1, far_right), groups)

    if isinstance(rank, tuple):
        enter, leave = rank
        return (
            Part("reduce", Geometry(into, enter)),
            Part("core", square(enter, leave)),
            Part("expand", Geometry(leave, out)),
        )
    if method == "svd":
        return Part("reduce", square(into, rank)), Part("expand", Geometry(rank, out))
    if method == "spatial":
        return Part("vertical", column(into, rank)), Part("horizontal", row(rank, out))
    if method == "depthwise":
        return (
            Part("depthwise", square(into, into * rank, into)),
            Part("pointwise", Geometry(into * rank, out)),
        )
    return (
        Part("reduce", Geometry(into, rank)),
        Part("vertical", column(rank, rank, rank)),
        Part("horizontal", row(rank, rank, rank)),
        Part("expand", Geometry(rank, out)),
    )


def weights_of(found: Sequence[Part]) -> int:
    """Return the numbers of all kernels; a bias is not counted."""
    return sum(part.geometry.weights for part in found)


def macs_of(found: Sequence[Part], size: Pair) -> int:
    """Return the multiply-accumulates on one image of this height and width; a bias counts nothing."""
    total = 0
    for part in found:
        size = part.geometry.out_size(size)
        total += part.geometry.weights * size[0] * size[1]
    return total


def decomposed(weight: Tensor, method: Method) -> Callable[[Rank], tuple[Tensor, ...]]:
    """Return what gives the kernels of all parts, float64, for any rank that `check_rank` lets through.

    What the ranks of a method share is computed once.

    Args:
        weight: `(out, in, height, width)`, finite.
        method: Not checked.
    """
    if method == "svd":
        flat = decompose.svd(weight.flatten(1))

        def reduced(rank: Any) -> tuple[Tensor, ...]:
            left, right = flat.factors(rank)
            return right.reshape(rank, *weight.shape[1:]), left[:, :, None, None]

        return reduced
    if method == "spatial":
        lines = decompose.svd(decompose.spatial_matrix(weight))
        return lambda rank: decompose.spatial_kernels(*lines.factors(rank), weight)  # type: ignore[arg-type]
    if method == "depthwise":
        channels = decompose.channel_svd(weight)
        return lambda rank: channels.kernels(rank)  # type: ignore[arg-type]
    if method == "tucker":

        def cored(rank: Any) -> tuple[Tensor, ...]:
            enter, core, leave = decompose.tucker_factors(weight, *rank)
            return enter.T[:, :, None, None], core, leave[:, :, None, None]

        return cored

    def summed(rank: Any) -> tuple[Tensor, ...]:
        found = cp_factors(weight, rank)
        return (
            found.enter.T[:, :, None, None],
            found.vertical.T[:, None, :, None],
            found.horizontal.T[:, None, None, :],
            found.leave[:, :, None, None],
        )

    return summed


def composed(method: Method, rank: Rank, kernels: Sequence[Tensor]) -> Tensor:
    """Return the kernel of the one convolution that does what the parts do, `(out, in, height, width)`."""
    multiplier = rank if isinstance(rank, int) else 1
    if method == "svd":
        return torch.einsum("rcyx,tr->tcyx", kernels[0], kernels[1][:, :, 0, 0])
    if method == "spatial":
        return torch.einsum("rcy,trx->tcyx", kernels[0][..., 0], kernels[1][:, :, 0])
    if method == "depthwise":
        points, mixing = kernels[0], kernels[1][:, :, 0, 0]
        return torch.einsum(
            "cmyx,tcm->tcyx",
            points.reshape(-1, multiplier, *points.shape[2:]),
            mixing.reshape(len(mixing), -1, multiplier),
        )
    if method == "tucker":
        enter, core, leave = kernels
        return torch.einsum("ic,oiyx,to->tcyx", enter[:, :, 0, 0], core, leave[:, :, 0, 0])
    enter, vertical, horizontal, leave = kernels
    return sum_of_products(
        [leave[:, :, 0, 0], enter[:, :, 0, 0].T, vertical[:, 0, :, 0].T, horizontal[:, 0, 0].T]
    )


def rank_at_energy(weight: Tensor, method: Method, energy: float) -> Rank:
    """Return the smallest rank that keeps a share of the squared norm of a kernel.

    The depthwise method has one rank for all input channels. Each side of a Tucker decomposition may lose
    half of what may be lost, so that both together lose no more (De Lathauwer et al., 2000, property 10).

    Args:
        weight: `(out, in, height, width)`, finite.
        method: Not "cp", which has no singular values.
        energy: In (0, 1].

    Raises:
        FactorizationError: The method is "cp" or none, or the energy is out of range.
    """
    _check_method(method)
    decompose.check_share("energy", energy)
    kernel = weight.detach().double()
    if method == "svd":
        return decompose.rank_by_energy(torch.linalg.svdvals(kernel.flatten(1)), energy)
    if method == "spatial":
        return decompose.rank_by_energy(torch.linalg.svdvals(decompose.spatial_matrix(kernel)), energy)
    if method == "depthwise":
        values = torch.linalg.svdvals(kernel.flatten(2).transpose(0, 1))
        return decompose.rank_by_energy(values.square().sum(0).sqrt(), energy)
    if method == "tucker":
        sides = (kernel.transpose(0, 1).flatten(1), kernel.flatten(1))
        each = 1 - (1 - energy) / 2
        into, out = (decompose.rank_by_energy(torch.linalg.svdvals(side), each) for side in sides)
        return clipped(Geometry(1, 1, (kernel.shape[2], kernel.shape[3])), (into, out))
    raise FactorizationError("cp has no singular values to keep a share of: give a rank or a ratio")


def ranks_below(geometry: Geometry, method: Method, size: Pair, macs: float) -> list[Rank]:
    """Return all ranks, rising, whose parts need at most so many multiply-accumulates on one image.

    Those of Tucker keep the proportion of input to output channels.
    """
    full = full_rank(geometry, method)
    candidates: list[Rank] = []
    if isinstance(full, tuple):
        steps = max(full)
        pairs = [
            clipped(geometry, (-(-full[0] * step // steps), -(-full[1] * step // steps)))
            for step in range(1, steps + 1)
        ]
        candidates += dict.fromkeys(pairs)
    else:
        candidates += range(1, full + 1)
    return [rank for rank in candidates if macs_of(parts(geometry, method, rank), size) <= macs]


def _check_method(method: object) -> None:
    if method not in METHODS:
        raise FactorizationError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
