"""The canonical polyadic (CP) decomposition of a kernel: a sum of outer products of four vectors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.errors import FactorizationError
from autocompress.factorize.decompose import check_rank, check_tensor, relative_error

STARTS = 3
SWEEPS = 200
TOLERANCE = 1e-5
"""A start has converged when a sweep changes the relative error by less."""

DAMPING = 1e-10
"""Penalty on the squared change of a factor, in parts of the mean square of what it multiplies."""


@dataclass(frozen=True, eq=False)
class CpFactors:
    """A kernel as the sum over `rank` products of four vectors.

    Attributes:
        leave: Output channels, `(out, rank)`.
        enter: Input channels, `(in, rank)`.
        vertical: `(height, rank)`.
        horizontal: `(width, rank)`.
        error: Norm of the difference in parts of the norm of the kernel.
        errors: The same of each start.
    """

    leave: Tensor
    enter: Tensor
    vertical: Tensor
    horizontal: Tensor
    error: float
    errors: tuple[float, ...]


def cp_factors(
    weight: Tensor, rank: int, *, starts: int = STARTS, sweeps: int = SWEEPS, seed: int = 0
) -> CpFactors:
    """Approximate a kernel by a sum of outer products, by alternating least squares.

    Each sweep solves for one factor after the other with the rest held; a small penalty on its change keeps
    the equations solvable and the error falling. The best of several starts is returned: the first from
    singular vectors, the others random.

    A best approximation need not exist (de Silva and Lim, SIAM J. Matrix Anal. Appl. 2008): terms may grow
    without bound and cancel each other. Such factors are hard to finetune: Lebedev et al. had to use a tiny
    learning rate. A greater rank can end with a greater error here, and the last digits depend on the
    machine. Tucker decompositions have none of this.

    Source: Lebedev et al., "Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition",
    ICLR 2015, section 3.1; the penalty: Navasca et al., "Swamp Reducing Technique for Tensor Decomposition",
    EUSIPCO 2008.

    Args:
        weight: `(out, in, height, width)`.
        rank: Terms, 1 to the number of weights over the greatest of the four sizes: with so many nothing is
            lost.
        starts: At least 1.
        sweeps: Of each start, at most.
        seed: Of the random starts.

    Returns:
        Factors of equal norms in each term, float64.

    Raises:
        FactorizationError: The weight is no kernel or not finite, or a number is out of range.
    """
    check_tensor(weight, 4)
    check_rank("rank", rank, weight.numel() // max(weight.shape))
    for name, value in (("starts", starts), ("sweeps", sweeps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise FactorizationError(f"{name} must be an integer >= 1, got {value!r}")
    kernel = weight.detach().double()
    generator = torch.Generator().manual_seed(seed)
    found = [
        _descended(kernel, _start(kernel, rank, generator, from_vectors=start == 0), sweeps)
        for start in range(starts)
    ]
    errors = tuple(error for _, error in found)
    (leave, enter, vertical, horizontal), error = min(found, key=lambda one: one[1])
    return CpFactors(leave, enter, vertical, horizontal, error, errors)


def composed(factors: Sequence[Tensor]) -> Tensor:
    """Return the sum of the outer products, `(out, in, height, width)`."""
    return torch.einsum("tr,cr,yr,xr->tcyx", *factors)


def _start(kernel: Tensor, rank: int, generator: torch.Generator, *, from_vectors: bool) -> list[Tensor]:
    factors = []
    for axis, size in enumerate(kernel.shape):
        factor = torch.randn(size, rank, generator=generator, dtype=torch.float64).to(kernel.device)
        if from_vectors:
            vectors = torch.linalg.svd(kernel.movedim(axis, 0).flatten(1), full_matrices=False).U[:, :rank]
            factor[:, : vectors.shape[1]] = vectors
        factors.append(factor)
    return factors


def _descended(kernel: Tensor, factors: list[Tensor], sweeps: int) -> tuple[list[Tensor], float]:
    """Return the factors after the sweeps, and their error."""
    leave, enter, vertical, horizontal = factors
    total, error = float(kernel.square().sum()), float("inf")
    if not total:
        return [torch.zeros_like(factor) for factor in factors], 0.0
    for _ in range(sweeps):
        # Only channels are many: what is contracted over them once serves three of the four factors.
        mixed = torch.einsum("tcyx,tr->cyxr", kernel, leave)
        products = torch.einsum("cyxr,yr,xr->cr", mixed, vertical, horizontal)
        enter = _solved(products, enter, (leave, vertical, horizontal))
        mixed = torch.einsum("tcyx,cr->tyxr", kernel, enter)
        products = torch.einsum("tyxr,yr,xr->tr", mixed, vertical, horizontal)
        leave = _solved(products, leave, (enter, vertical, horizontal))
        products = torch.einsum("tyxr,tr,xr->yr", mixed, leave, horizontal)
        vertical = _solved(products, vertical, (leave, enter, horizontal))
        products = torch.einsum("tyxr,tr,yr->xr", mixed, leave, vertical)
        horizontal = _solved(products, horizontal, (leave, enter, vertical))
        inner = float((products * horizontal).sum())
        square = float(_gram((leave, enter, vertical, horizontal)).sum())
        leave, enter, vertical, horizontal = _balanced([leave, enter, vertical, horizontal])
        before, error = error, math.sqrt(max(0.0, 1 + (square - 2 * inner) / total))
        if before - error < TOLERANCE:
            break
    factors = [leave, enter, vertical, horizontal]
    # The squares above cancel each other where the error is small.
    return factors, relative_error(kernel, composed(factors))


def _gram(factors: Sequence[Tensor]) -> Tensor:
    """Return the inner products of the terms that so many factors make, `(rank, rank)`."""
    return math.prod((factor.T @ factor for factor in factors[1:]), start=factors[0].T @ factors[0])


def _solved(products: Tensor, factor: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Return the factor of least squared error, with a penalty on its change.

    Args:
        products: Of the kernel with the other factors, `(size, rank)`.
        factor: What it is now.
        others: The other factors.
    """
    gram = _gram(others)
    damping = DAMPING * gram.diagonal().mean()
    gram.diagonal().add_(damping)
    root, failed = torch.linalg.cholesky_ex(gram)
    if failed:  # terms that cancel each other, or are zero: what there is stays
        return factor
    return torch.cholesky_solve((products + damping * factor).T, root).T


def _balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """Give the four vectors of each term equal norms; a term of zero is zero in all."""
    norms = torch.stack([factor.norm(dim=0) for factor in factors])
    equal = norms.prod(0).pow(1 / 4)
    return [factor * (equal / norm.clamp_min(1e-300)) for factor, norm in zip(factors, norms, strict=True)]
