"""Distillation losses between samples: what must agree is how the samples of a batch lie to each other.

Features are `(batch, ...)`, flattened; the student's may be of another width than the teacher's. All take the
student's first; give a scalar; leave the teacher without gradient; and compute in at least 32 bits. Each is a
mean over pairs (or triples) of samples: its scale does not grow with the batch, its value depends on who
is in it.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from autocompress.distill.pairs import (
    in_full_precision,
    pooled_alike,
    precise,
    same_batch,
    same_shape,
)
from autocompress.errors import DistillationError

# Keeps quotients and logarithms of distances that are 0 finite.
EPSILON = 1e-7


@in_full_precision
def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Return `|G_t - G_s|_F^2 / batch^2`, `G = F F^T` with rows scaled to length 1 (SP).

    Rotating or scaling all features of a network changes nothing.

    Source: Tung & Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, section 3. Weight: 3000.

    Args:
        student: `(batch, ...)`.
        teacher: `(batch, ...)`.

    Raises:
        DistillationError: They are of other samples, or of fewer than 2.
    """
    own, other = (F.normalize(x @ x.T, dim=1) for x in same_batch(student, teacher))
    return (own - other).square().mean()


@in_full_precision
def correlation(student: Tensor, teacher: Tensor, *, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Return the mean squared difference of both matrices of correlation between samples (CC).

    An entry is a Gaussian kernel of two samples' features, scaled to length 1, by its Taylor series:
    `exp(-2 gamma) * sum over p up to order of (2 gamma)^p / p! * (x y)^p`.

    Source: Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, section 3. The weight
    .02 of RepDistiller belongs to another formula, which goes by the same name.

    Args:
        student: `(batch, ...)`.
        teacher: `(batch, ...)`.
        gamma: Inverse width of the kernel.
        order: Last power of the series.

    Raises:
        DistillationError: They are of other samples, or of fewer than 2.
    """

    def kernel(x: Tensor) -> Tensor:
        unit = F.normalize(x, dim=1)
        terms = [(2 * gamma * (unit @ unit.T)).pow(p) / math.factorial(p) for p in range(order + 1)]
        return math.exp(-2 * gamma) * torch.stack(terms).sum(dim=0)

    own, other = (kernel(x) for x in same_batch(student, teacher))
    return (own - other).square().mean()


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Huber loss (delta 1) of distances between samples, each network's divided by their mean.

    Mean over pairs of samples. Moving, rotating or scaling all features of a network changes nothing.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019, section 3.2.1. Weight: 25.

    Args:
        student: `(batch, ...)`.
        teacher: `(batch, ...)`.

    Raises:
        DistillationError: They are of other samples, or of fewer than 2.
    """
    own, other = (_relative(F.pdist(x)) for x in same_batch(student, teacher))
    return F.huber_loss(own, other)


@in_full_precision
def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Huber loss (delta 1) of the cosines of the angles that samples form in threes.

    Mean over triples of distinct samples, `batch * (batch - 1) * (batch - 2)` of them; memory is that and
    `batch^2 * features`: it is meant for embeddings. Moving, rotating or scaling all features of a network
    changes nothing.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019, section 3.2.2. Weight: 50.

    Args:
        student: `(batch, ...)`.
        teacher: `(batch, ...)`.

    Raises:
        DistillationError: They are of other samples, or of fewer than 3.
    """
    pair = same_batch(student, teacher, least=3)
    same = torch.eye(len(student), dtype=torch.bool, device=student.device)
    distinct = ~(same[:, :, None] | same[:, None, :] | same[None, :, :])

    def cosines(x: Tensor) -> Tensor:
        directions = F.normalize(x[None] - x[:, None], dim=2)  # (corner, end, features)
        return (directions @ directions.transpose(1, 2))[distinct]

    own, other = (cosines(x) for x in pair)
    return F.huber_loss(own, other)


def relational(student: Tensor, teacher: Tensor, *, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Return `distance * rkd_distance + angle * rkd_angle` (RKD), with the paper's weights. Weight: 1.

    Args:
        student: `(batch, ...)`, at least 3 samples.
        teacher: `(batch, ...)`.
        distance: Weight of the distances.
        angle: Weight of the angles.

    Raises:
        DistillationError: They are of other samples, or of fewer than 3.
    """
    return distance * rkd_distance(student, teacher) + angle * rkd_angle(student, teacher)


@in_full_precision
def probabilistic(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence of each sample's probabilities to have the others for neighbours (PKT).

    The probability is proportional to `(1 + cosine) / 2`. Mean over ordered pairs of samples, so that the
    divergence of a row is divided by the number of the others.

    Source: Passalis & Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV
    2018. Weight: 30000, with the mean over pairs.

    Args:
        student: `(batch, ...)`.
        teacher: `(batch, ...)`.

    Raises:
        DistillationError: They are of other samples, or of fewer than 2.
    """

    def neighbours(x: Tensor) -> Tensor:
        unit = F.normalize(x, dim=1)
        others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
        nearness = ((unit @ unit.T)[others].reshape(len(x), -1) + 1) / 2
        return (nearness + EPSILON) / (nearness + EPSILON).sum(dim=1, keepdim=True)

    own, other = (neighbours(x) for x in same_batch(student, teacher))
    divergence: Tensor = other * (other / own).log()
    return divergence.mean()


@in_full_precision
def instance_relation_graph(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    vertices: float = 1.0,
    edges: float = 1.0,
    transformation: float = 1.0,
) -> Tensor:
    """Return the weighted differences of vertices, edges and transformations of two graphs (IRG).

    - Vertices are the features of the last layer: their mean squared difference.
    - Edges of a layer are the squared distances between its samples: their mean squared difference over
      pairs of samples, mean over layers.
    - The transformation between a layer and the next is how far each sample moves (squared) and how much
      each edge changes: the mean squared differences of both, added, mean over the steps between layers. To
      subtract layers of one network, the larger map is averaged to the smaller, and its channels in groups.

    Squared distances of a layer and moves of a step are divided by their mean, so that neither width nor
    scale of a network matters; this is ours, as is the mean over pairs.

    Source: Liu et al., "Knowledge Distillation via Instance Relationship Graph", CVPR 2019, section 3.
    The weights 1 are ours.

    Args:
        student: Features of layers, first to last, `(batch, ...)` each; the last one is commonly the logits.
        teacher: As many; the last one of the shape of the student's.
        vertices: Weight of the vertices.
        edges: Weight of the edges.
        transformation: Weight of the transformations; 0 where layers cannot be subtracted.

    Raises:
        DistillationError: Layers are missing, of other samples or of fewer than 2, last layers have not one
            shape, or successive layers cannot be subtracted.
    """
    if len(student) != len(teacher) or not student:
        raise DistillationError(
            "a graph needs one layer or more of the student, and as many of the teacher, got "
            f"{len(student)} and {len(teacher)}"
        )
    own_last, other_last = same_shape(student[-1], teacher[-1])
    loss = vertices * (own_last - other_last).square().mean()
    layers = [same_batch(own, other) for own, other in zip(student, teacher, strict=True)]
    own_edges, other_edges = ([_relative(F.pdist(pair[side]).square()) for pair in layers] for side in (0, 1))
    loss = loss + edges * _difference(own_edges, other_edges)
    if transformation and len(student) > 1:
        own_moves, other_moves = _moves(student), _moves([x.detach() for x in teacher])
        changes = ([b - a for a, b in pairwise(e)] for e in (own_edges, other_edges))
        steps = _difference(own_moves, other_moves) + _difference(*changes)
        loss = loss + transformation * steps
    return loss


def _relative(distances: Tensor) -> Tensor:
    """Distances divided by their mean; all 0 where all samples are one."""
    return distances / distances.mean().clamp_min(EPSILON)


def _difference(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean squared difference, mean over layers."""
    both = zip(student, teacher, strict=True)
    return torch.stack([(own - other).square().mean() for own, other in both]).mean()


def _moves(layers: Sequence[Tensor]) -> list[Tensor]:
    """Squared distance of each sample between a layer and the next, `(batch,)`, divided by its mean."""
    moves = []
    for first, second in pairwise(layers):
        one, other = _subtractable(precise(first), precise(second))
        moves.append(_relative((one - other).flatten(1).square().sum(dim=1)))
    return moves


def _subtractable(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Bring two layers of one network to one shape: pixels and groups of channels are averaged."""
    if first.dim() == second.dim() == 4:
        first, second = pooled_alike(first, second)
    channels = min(first.shape[1], second.shape[1])
    if first.shape[2:] != second.shape[2:] or first.shape[1] % channels or second.shape[1] % channels:
        raise DistillationError(
            "the transformation between layers needs two maps or two vectors, one with a multiple of the "
            f"other's channels, got {tuple(first.shape)} and {tuple(second.shape)}; set transformation to 0, "
            "or choose other layers"
        )
    one, other = (x.reshape(len(x), channels, -1, *x.shape[2:]).mean(dim=2) for x in (first, second))
    return one, other
