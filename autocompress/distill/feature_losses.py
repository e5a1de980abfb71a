"""Distillation losses between the maps of one pair of layers.

Maps are `(batch, channels, height, width)`. All take the student's first; give a scalar that does not
depend on the batch size; leave the teacher without gradient; and compute in at least 32 bits. Weights are
those with which RepDistiller (Tian et al., ICLR 2020) trains on CIFAR-100, unless said otherwise.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from autocompress.distill.pairs import in_full_precision, pooled_alike, precise, refusal, same_map, same_shape
from autocompress.errors import DistillationError


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of all elements.

    Source: Romero et al., "FitNets", ICLR 2015, equation 3, there half the sum. Weight: 100.

    Args:
        student: `(batch, ...)`, behind a regressor where the shapes differ.
        teacher: Same shape.

    Raises:
        DistillationError: The shapes differ.
    """
    student, teacher = same_shape(student, teacher)
    return (student - teacher).square().mean()


def attention_transfer(student: Tensor, teacher: Tensor, *, power: float = 2.0) -> Tensor:
    """Return the mean squared difference of `q = vec(A) / |vec(A)|`, `A` the mean over channels of `|F|^p`.

    Mean over pixels and batch. Scaling a map changes nothing, nor do its channels' number and order.

    Source: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1; their loss is
    the norm of the difference, RepDistiller's the mean square of it, to which the weight 1000 belongs.

    Args:
        student: A map; the larger of both is averaged to the size of the smaller.
        teacher: A map; any channels.
        power: `p`.

    Raises:
        DistillationError: They are no maps, or of other samples.
    """
    maps = same_map(student, teacher)
    own, other = (F.normalize(x.abs().pow(power).mean(dim=1).flatten(1), dim=1) for x in maps)
    return (own - other).square().mean()


def activation_boundary(student: Tensor, teacher: Tensor, *, margin: float = 1.0) -> Tensor:
    """Return the squared hinge that puts the student's neurons on the teacher's side of 0.

    `max(0, margin - s)^2` where the teacher's neuron is active (t > 0), `max(0, margin + s)^2` elsewhere;
    mean over all elements.

    Source: Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries", AAAI 2019;
    there a sum over neurons. Weight: 1, in a phase of its own before the student is trained on the task.

    Args:
        student: Before the activation function, `(batch, ...)`.
        teacher: Before the activation function, same shape.
        margin: Distance from 0 at which a neuron costs nothing any more.

    Raises:
        DistillationError: The shapes differ.
    """
    student, teacher = same_shape(student, teacher)
    return F.relu(margin - torch.where(teacher > 0, student, -student)).square().mean()


def factor_transfer(student: Tensor, teacher: Tensor, *, p: Literal[1, 2] = 1) -> Tensor:
    """Return the mean of `|f_s - f_t|^p` over elements and batch, factors scaled to length 1 a sample.

    Source: Kim et al., "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018;
    there a sum, with p 1. Weight: 200. Factors come from `factors.Factor`, or are given.

    Args:
        student: Factors of the student, `(batch, ...)`.
        teacher: Factors of the teacher, same shape.
        p: 1 or 2.

    Raises:
        DistillationError: The shapes differ.
    """
    student, teacher = same_shape(student, teacher)
    difference = F.normalize(student.flatten(1), dim=1) - F.normalize(teacher.flatten(1), dim=1)
    return difference.abs().pow(p).mean()


@in_full_precision
def neuron_selectivity(
    student: Tensor, teacher: Tensor, *, kernel: Literal["polynomial", "linear"] = "polynomial"
) -> Tensor:
    """Return the squared maximum mean discrepancy between the channels of both maps; mean over the batch.

    A channel is its activations over all pixels, scaled to length 1; `MMD^2` is the mean of `k(s, s')` plus
    that of `k(t, t')` less twice that of `k(s, t)` over pairs of channels. `k(x, y)` is `(x y)^2`
    (polynomial), or `x y` (linear, which compares the mean channels only).

    Source: Huang & Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017;
    the polynomial kernel has d 2 and c 0. Weight: 50.

    Args:
        student: A map; the larger of both is averaged to the size of the smaller.
        teacher: A map; any channels.
        kernel: What compares two channels.

    Raises:
        DistillationError: They are no maps, or of other samples.
    """
    own, other = (F.normalize(x.flatten(2), dim=2) for x in same_map(student, teacher))

    def mean(first: Tensor, second: Tensor) -> Tensor:
        products = first @ second.transpose(1, 2)
        return (products.square() if kernel == "polynomial" else products).mean()

    return mean(own, own) + mean(other, other) - 2 * mean(own, other)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - the cosine of the features, mean over the batch; maps are averaged over pixels first.

    Source: Aghli & Ribeiro, "Combining Weight Pruning and Knowledge Distillation For CNN Compression", CVPR
    Workshops 2021. Weight: 1 to 5 (ours).

    Args:
        student: `(batch, features)` or a map.
        teacher: `(batch, features)` or a map, with as many features or channels.

    Raises:
        DistillationError: Samples or features differ, or a tensor is neither.
    """
    if not {student.dim(), teacher.dim()} <= {2, 4} or student.shape[:2] != teacher.shape[:2]:
        raise refusal("as many features or channels, (batch, features) or maps,", student, teacher)
    both = (precise(x) for x in (student, teacher.detach()))
    own, other = (x.mean(dim=(2, 3)) if x.dim() == 4 else x for x in both)
    return 1 - F.cosine_similarity(own, other, dim=1).mean()


@in_full_precision
def flow(
    first_student: Tensor, second_student: Tensor, first_teacher: Tensor, second_teacher: Tensor
) -> Tensor:
    """Return the mean squared difference of the matrices of flow between two layers (FSP).

    `G_ij` is the mean over pixels of channel i of the first layer times channel j of the second.

    Source: Yim et al., "A Gift from Knowledge Distillation", CVPR 2017, section 3. Weight: 50.

    Args:
        first_student: Map of the student where the flow begins.
        second_student: Map of the student where it ends; the larger of both is averaged to the smaller size.
        first_teacher: As many channels as the student's.
        second_teacher: As many channels as the student's.

    Raises:
        DistillationError: Something is no map, or samples or channels differ.
    """
    for student, teacher in ((first_student, first_teacher), (second_student, second_teacher)):
        if student.dim() != 4 or teacher.dim() != 4 or student.shape[:2] != teacher.shape[:2]:
            raise refusal("maps of as many channels", student, teacher)
    own = _gram(precise(first_student), precise(second_student))
    other = _gram(precise(first_teacher.detach()), precise(second_teacher.detach()))
    return (own - other).square().mean()


def self_attention(maps: Sequence[Tensor]) -> Tensor:
    """Return how far the attention of each map is from that of the map after it (SAD); there is no teacher.

    Attention is the softmax over pixels of the sum over channels of `F^2`. The deeper map of a pair is the
    target: it is brought to the other's size, bilinearly and before the softmax, and has no gradient. Squared
    differences are summed over pixels and pairs, and averaged over the batch.

    Source: Hou et al., "Learning Lightweight Lane Detection CNNs by Self Attention Distillation", ICCV 2019.
    Weight: .1, from two thirds of training on.

    Args:
        maps: Of successive layers of the student, the first one first; two or more.

    Raises:
        DistillationError: There are fewer than two, or something is no map of the same samples.
    """
    shapes = [tuple(x.shape) for x in maps]
    if len(maps) < 2 or any(len(shape) != 4 or shape[0] != shapes[0][0] for shape in shapes):
        raise DistillationError(
            "self-attention compares 2 or more maps (batch, channels, height, width) of the same samples, "
            f"got {shapes}; watch other layers"
        )
    energies = [precise(x).square().sum(dim=1, keepdim=True) for x in maps]

    def distance(own: Tensor, deeper: Tensor) -> Tensor:
        target = deeper.detach()
        if target.shape != own.shape:
            target = F.interpolate(target, own.shape[2:], mode="bilinear", align_corners=False)
        difference = own.flatten(1).softmax(dim=1) - target.flatten(1).softmax(dim=1)
        return difference.square().sum(dim=1).mean()

    pairs = pairwise(energies)
    return torch.stack([distance(own, deeper) for own, deeper in pairs]).sum()


def _gram(first: Tensor, second: Tensor) -> Tensor:
    """`(batch, channels of the first, channels of the second)`: means of products over pixels."""
    one, other = (x.flatten(2) for x in pooled_alike(first, second))
    return one @ other.transpose(1, 2) / one.shape[2]
