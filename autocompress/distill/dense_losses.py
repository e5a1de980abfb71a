"""Distillation losses for dense tasks: segmentation and detection.

All take the student's first; give a scalar that does not depend on the batch size; leave the teacher without
gradient; and compute in at least 32 bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from autocompress.distill.pairs import in_full_precision, precise, refusal, same_shape
from autocompress.errors import DistillationError

# Keeps the skewness of a region without variance finite.
LEAST_VARIANCE = 1e-6


@in_full_precision
def inter_region_affinity(student: Tensor, teacher: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the mean squared difference of both graphs of affinity between the regions of an image.

    Each class in an image is a region, a node for each moment of its features: mean, variance, skewness (a
    number a channel). Edges are the cosines between two regions' nodes of one moment. The difference is
    `sum (C_s - C_t)^2 / (3 n^2)`, n the classes in the image; classes that are not there have no node. Mean
    over images; one without any class counts 0. A position of a map belongs to each class that has a pixel
    under it, so that thin regions stay.

    Source: Hou et al., "Inter-Region Affinity Distillation for Road Marking Segmentation", CVPR 2020, section
    3; their regions are widened by averaging, which ours are by the stride of the map only.

    Args:
        student: A map `(batch, channels, height, width)`.
        teacher: A map; any channels, height and width.
        labels: Classes of pixels, `(batch, height, width)`, of the size of the maps or larger; what is
            not in 0..classes - 1 is ignored.
        classes: Their number.

    Raises:
        DistillationError: Maps or labels are none, or of other images; or no pixel has a class.
    """
    shapes = student.dim(), teacher.dim(), labels.dim()
    if shapes != (4, 4, 3) or not len(student) == len(teacher) == len(labels):
        rule = f"maps, and labels (batch, height, width) of the same images, which are {tuple(labels.shape)}"
        raise refusal(rule, student, teacher)
    areas = torch.stack([labels == k for k in range(classes)], dim=1)
    present = areas.flatten(2).any(dim=2)
    if not bool(present.any()):
        raise DistillationError(f"no pixel has a label in 0..{classes - 1}; check labels and classes")
    own, other = precise(student), precise(teacher.detach())
    losses = []
    for image in present.any(dim=1).nonzero().flatten().tolist():
        regions = areas[image, present[image]]
        difference = _affinities(own[image], regions) - _affinities(other[image], regions)
        losses.append(difference.square().mean())
    return torch.stack(losses).sum() / len(labels)


def _affinities(features: Tensor, regions: Tensor) -> Tensor:
    """Cosines between the regions of an image, `(3 moments, regions, regions)`."""
    places = F.adaptive_max_pool2d(regions.to(features.dtype), features.shape[1:]).bool()
    # One region after another: all at once would be a copy of the map for each.
    moments = torch.stack([_moments(features[:, place]) for place in places], dim=1)
    nodes = F.normalize(moments, dim=2)
    return nodes @ nodes.transpose(1, 2)


def _moments(values: Tensor) -> Tensor:
    """Mean, variance and skewness of each row, `(3, rows)`."""
    mean = values.mean(dim=1, keepdim=True)
    centred = values - mean
    variance = centred.square().mean(dim=1)
    skewness = centred.pow(3).mean(dim=1) / (variance + LEAST_VARIANCE).pow(1.5)
    return torch.stack([mean.squeeze(1), variance, skewness])


def channelwise(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return `T^2 KL(softmax(F_t / T) || softmax(F_s / T))` over the pixels of a channel (CWD).

    Mean over channels and batch.

    Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021.
    Weight: per task.

    Args:
        student: A map of features or logits, `(batch, channels, height, width)`.
        teacher: Same shape.
        temperature: `T > 0`.

    Raises:
        DistillationError: The shapes differ, or they are no maps.
    """
    if student.dim() != 4:
        raise refusal("maps (batch, channels, height, width)", student, teacher)
    own, other = ((x.flatten(2) / temperature).log_softmax(dim=2) for x in same_shape(student, teacher))
    divergence = F.kl_div(own, other, reduction="none", log_target=True).sum(dim=2)
    return temperature**2 * divergence.mean()


def bounded_regression(student: Tensor, teacher: Tensor, targets: Tensor, *, margin: float = 0.0) -> Tensor:
    """Return the student's squared error where it is not better than the teacher's by a margin, else 0.

    `e_s` if `e_s + margin > e_t`, e the sum of a box's squared errors; mean over boxes. The teacher's box is
    no target but a bound: what it predicts can point away from the truth.

    Source: Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation", NeurIPS
    2017, section 3.3. Weight: .5, added to the smooth L1 loss on the truth.

    Args:
        student: Predicted boxes, `(boxes, numbers)`.
        teacher: Predicted boxes, same shape.
        targets: True boxes, same shape.
        margin: By how much less than the teacher's the student's error must be to cost nothing; a negative
            one lets it be so much more.

    Raises:
        DistillationError: The shapes differ, or are not of boxes.
    """
    student, teacher = same_shape(student, teacher)
    if student.dim() != 2 or targets.shape != student.shape or not len(student):
        rule = f"boxes (boxes, numbers) of the shape of the targets, which is {tuple(targets.shape)}"
        raise refusal(rule, student, teacher)
    own, other = ((x - targets.to(x.dtype)).square().sum(dim=1) for x in (student, teacher))
    return torch.where(own + margin > other, own, 0).mean()


def weighted_cross_entropy(
    outputs: Tensor, teacher: Tensor, temperature: float = 1.0, *, background: int = 0, weight: float = 1.5
) -> Tensor:
    """Return `-sum over classes of w p_t log p_s`, mean over the batch, w of the background `weight`, else 1.

    To take a detector's background for an object is another error than to take one object for another.

    Source: Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation", NeurIPS
    2017, section 3.2: 1.5 for the background, 1 for the others, at T 1. Weight: 1.

    Args:
        outputs: Logits of the student, `(batch, classes, ...)`.
        teacher: Logits of the teacher, same shape.
        temperature: Of both; the loss has no factor `T^2`.
        background: Which class it is.
        weight: Of the background.

    Raises:
        DistillationError: The shapes differ, or there is no such class.
    """
    outputs, teacher = same_shape(outputs, teacher)
    classes = outputs.shape[1]
    if not 0 <= background < classes:
        raise DistillationError(f"background must be a class, 0..{classes - 1}, got {background}")
    losses = -(teacher / temperature).softmax(dim=1) * (outputs / temperature).log_softmax(dim=1)
    return losses.sum(dim=1).mean() + (weight - 1) * losses.select(1, background).mean()
