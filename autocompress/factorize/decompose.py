"""Low-rank approximations of matrices and of the kernels of convolutions, in double precision.

A kernel is a tensor `(out, in, height, width)`, as PyTorch stores it. Those of the SVD have the least error
of their rank; Tucker and CP decompositions are local optima of iterations.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.errors import FactorizationError

SWEEPS = 50
"""Of HOOI, at most; it has mostly converged after a few."""

TOLERANCE = 1e-6
"""HOOI has converged when a sweep changes the norm that is kept by less, in parts of that of the kernel."""

ROUNDING = 1e-12
"""Share of the squared singular values that sums in another order may miss."""


@dataclass(frozen=True, eq=False)
class Svd:
    """All singular vectors and values of a matrix.

    Attributes:
        left: `(rows, values)`, orthonormal columns.
        values: `(values,)`, falling.
        right: `(values, columns)`, orthonormal rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return `(rows, rank)` and `(rank, columns)`, whose product is the best approximation of that rank.

        Each has the square root of the singular values, so that both train at a similar pace.
        """
        root = self.values[:rank].sqrt()
        return self.left[:, :rank] * root, root[:, None] * self.right[:rank]


def svd(matrix: Tensor) -> Svd:
    """Decompose a matrix `(rows, columns)` once for all ranks.

    Raises:
        FactorizationError: It is no matrix, is empty or not finite.
    """
    check_tensor(matrix, 2)
    return Svd(*torch.linalg.svd(matrix.detach().double(), full_matrices=False))


def svd_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the two factors of a matrix whose product has the least squared error of that rank.

    Source: Eckart and Young, Psychometrika 1936: the error is the root of the sum of the squares of the
    singular values that are left out.

    Args:
        matrix: `(rows, columns)`.
        rank: 1 to the smaller of the two.

    Returns:
        `(rows, rank)` and `(rank, columns)`, float64.

    Raises:
        FactorizationError: The matrix is none or not finite, or the rank is out of range.
    """
    check_tensor(matrix, 2)
    check_rank("rank", rank, min(matrix.shape))
    return svd(matrix).factors(rank)


def spatial_matrix(weight: Tensor) -> Tensor:
    """Lay out a kernel as `(in * height, out * width)`: what a column and a row of it have to make."""
    return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


def spatial_kernels(left: Tensor, right: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Lay out the factors of `spatial_matrix` as two kernels, see `spatial_factors`."""
    out, channels, height, width = weight.shape
    vertical = left.T.reshape(-1, channels, height, 1)
    horizontal = right.reshape(-1, out, 1, width).transpose(0, 1)
    return vertical, horizontal


def spatial_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the kernels of a vertical and a horizontal convolution that replace a square one.

    Source: Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions", BMVC 2014,
    scheme 2; the best of all such kernels is an SVD (Tai et al., "Convolutional Neural Networks with Low-rank
    Regularization", ICLR 2016, theorem 1).

    Args:
        weight: `(out, in, height, width)`.
        rank: Channels between the two, 1 to the smaller of in * height and out * width.

    Returns:
        `(rank, in, height, 1)` and `(out, rank, 1, width)`, float64.

    Raises:
        FactorizationError: The weight is no kernel or not finite, or the rank is out of range.
    """
    check_tensor(weight, 4)
    matrix = spatial_matrix(weight)
    return spatial_kernels(*svd_factors(matrix, rank), weight)


@dataclass(frozen=True, eq=False)
class ChannelSvd:
    """The kernels of each input channel, as matrices `(out, height * width)`, decomposed.

    Attributes:
        left: `(in, out, values)`.
        values: `(in, values)`.
        right: `(in, values, height * width)`.
        height: Of the kernels.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    height: int

    def kernels(self, multiplier: int) -> tuple[Tensor, Tensor]:
        """Return the depthwise and the pointwise kernel, see `depthwise_factors`."""
        root = self.values[:, :multiplier].sqrt()
        points = root[:, :, None] * self.right[:, :multiplier]
        depthwise = points.reshape(points.shape[0] * multiplier, 1, self.height, -1)
        mixing = self.left[:, :, :multiplier] * root[:, None]
        return depthwise, mixing.permute(1, 0, 2).flatten(1)[:, :, None, None]


def channel_svd(weight: Tensor) -> ChannelSvd:
    """Decompose the kernels of each input channel once for all multipliers.

    Raises:
        FactorizationError: The weight is no kernel or not finite.
    """
    check_tensor(weight, 4)
    matrices = weight.detach().double().flatten(2).transpose(0, 1)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    return ChannelSvd(left, values, right, weight.shape[2])


def depthwise_factors(weight: Tensor, multiplier: int = 1) -> tuple[Tensor, Tensor]:
    """Return the kernels of a depthwise and a pointwise convolution nearest to a full one.

    The kernels of an input channel, one an output, become `multiplier` kernels that outputs mix: a low-rank
    approximation of a matrix for each input channel, by SVD. With height * width kernels nothing is lost.

    Source: Guo et al., "Network Decoupling: From Regular to Depthwise Separable Convolutions", BMVC 2018,
    section 3.

    Args:
        weight: `(out, in, height, width)`.
        multiplier: Kernels of an input channel, 1 to the smaller of out and height * width.

    Returns:
        `(in * multiplier, 1, height, width)` and `(out, in * multiplier, 1, 1)`, float64.

    Raises:
        FactorizationError: The weight is no kernel or not finite, or the multiplier is out of range.
    """
    check_tensor(weight, 4)
    check_rank("multiplier", multiplier, min(weight.shape[0], weight.shape[2] * weight.shape[3]))
    return channel_svd(weight).kernels(multiplier)


def tucker_factors(weight: Tensor, rank_in: int, rank_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return matrices for input and output channels and the core between them (Tucker-2).

    Started from the singular vectors of each unfolding (HOSVD), then the matrices are improved in turn, each
    with the other held (HOOI): the error never grows, and ends at a local optimum.

    Source: Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
    Applications", ICLR 2016, section 3.1; De Lathauwer et al., "On the Best Rank-1 and Rank-(R1, ..., RN)
    Approximation of Higher-Order Tensors", SIAM J. Matrix Anal. Appl. 2000, section 4.

    Args:
        weight: `(out, in, height, width)`.
        rank_in: Channels that enter the core.
        rank_out: Channels that leave it. Neither can be more than the other times height * width.

    Returns:
        `(in, rank_in)` and the core `(rank_out, rank_in, height, width)` and `(out, rank_out)`, float64. The
        matrices have orthonormal columns.

    Raises:
        FactorizationError: The weight is no kernel or not finite, or a rank is out of range.
    """
    check_tensor(weight, 4)
    out, channels, height, width = weight.shape
    points = height * width
    check_rank("rank_in", rank_in, channels)
    check_rank("rank_out", rank_out, out)
    if rank_in > rank_out * points or rank_out > rank_in * points:
        raise FactorizationError(
            f"rank_in ({rank_in}) and rank_out ({rank_out}) differ by more than the {points} points of the "
            "kernel: a core cannot use so many; lower the greater one"
        )
    kernel = weight.detach().double()
    total, kept = kernel.norm(), -1.0
    enter = _leading(kernel.transpose(0, 1).flatten(1), rank_in)
    leave = _leading(kernel.flatten(1), rank_out)
    # The greater rank first: where it is all that the other leaves, its step loses nothing.
    order = ("enter", "leave") if rank_in > rank_out else ("leave", "enter")
    for _ in range(SWEEPS):
        for side in order:
            if side == "enter":
                enter = _leading(torch.einsum("tcyx,to->coyx", kernel, leave).flatten(1), rank_in)
            else:
                leave = _leading(torch.einsum("tcyx,ci->tiyx", kernel, enter).flatten(1), rank_out)
        core = torch.einsum("tcyx,to,ci->oiyx", kernel, leave, enter)
        before, kept = kept, float(core.norm())
        if kept - before <= TOLERANCE * float(total):
            break
    return enter, core, leave


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Return the first left singular vectors, `(rows, rank)`.

    By the eigenvectors of the rows' inner products: many times quicker than an SVD where columns are many,
    and as good for the leading ones.
    """
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)
    leading: Tensor = vectors[:, -rank:]
    return leading


def rank_by_energy(singular_values: Tensor, energy: float) -> int:
    """Return the smallest rank that keeps a share of the squared singular values; at least 1.

    Args:
        singular_values: `(values,)`, falling.
        energy: In (0, 1]; at 1 everything but rounding is kept.

    Raises:
        FactorizationError: The energy is out of range, or the values are none, negative or do not fall.
    """
    check_share("energy", energy)
    values = singular_values.detach().double()
    if values.dim() != 1 or not len(values) or not bool((values.diff() <= 0).all()) or not values[-1] >= 0:
        raise FactorizationError("singular values must be a vector of numbers >= 0 that do not rise")
    squares = values.square()
    # From the small end, so that nothing small is lost beside a large sum.
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    allowed = max(1 - energy, ROUNDING) * tails[0]
    return max(1, int((tails > allowed).sum()))


def check_share(name: str, share: object) -> None:
    """Check a share.

    Raises:
        FactorizationError: It is not in (0, 1].
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise FactorizationError(f"{name} must be a number in (0, 1], got {share!r}")


def check_rank(name: str, rank: object, most: int) -> None:
    """Check a rank.

    Raises:
        FactorizationError: It is no integer in 1..most.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise FactorizationError(f"{name} must be an integer in 1..{most}, got {rank!r}")


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """Return the norm of the difference in parts of the norm of the weight; 0 where both are zero."""
    whole = weight.detach().double()
    difference, norm = float((whole - approximation.double()).norm()), float(whole.norm())
    return 0.0 if difference == 0 else difference / norm if norm else math.inf


def check_tensor(tensor: Tensor, axes: int) -> None:
    """Check a matrix (2 axes) or a kernel (4 axes).

    Raises:
        FactorizationError: It has other axes, is empty, or its values are missing or not finite.
    """
    what = {2: "a matrix (rows, columns)", 4: "a kernel (out, in, height, width)"}[axes]
    if not isinstance(tensor, Tensor) or tensor.dim() != axes or not tensor.numel():
        got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise FactorizationError(f"expected {what}, got {got}")
    if tensor.is_meta or not bool(tensor.isfinite().all()):
        raise FactorizationError(f"{what} must have finite values: its training failed, or it was not loaded")
