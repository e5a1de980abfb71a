"""Distillation losses between outputs.

All take logits, classes in axis 1, student first; give a scalar; leave the teacher without gradient; and
compute in at least 32 bits. Additive distillation needs no function: `loss on labels + weight * hinton(...)`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from autocompress.distill.pairs import precise, refusal, same_shape
from autocompress.errors import DistillationError


def hinton(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return `T^2 KL(softmax(teacher / T) || softmax(outputs / T))`, mean over the batch, classes in axis 1.

    Summed over classes and averaged over samples, so that it does not depend on the batch size; the factor
    keeps the gradient's scale as the temperature grows.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2.

    Args:
        outputs: Logits of the student, `(batch, classes, ...)`.
        teacher: Logits of the teacher, same shape.
        temperature: `T > 0`.

    Raises:
        DistillationError: The shapes differ.
    """
    outputs, teacher = same_shape(outputs, teacher)
    student = (outputs / temperature).log_softmax(dim=1)
    target = (teacher / temperature).log_softmax(dim=1)
    return temperature**2 * _divergence(student, target)


def top_k_targets(teacher: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """Return the teacher's probabilities of its k most probable classes, made to sum to 1; the others are 0.

    Args:
        teacher: Logits, `(batch, classes, ...)`.
        k: 1 to the number of classes. Of equal logits the choice is PyTorch's.
        temperature: `T > 0`.

    Raises:
        DistillationError: `k` is none of those.
    """
    classes = teacher.shape[1]
    if not 1 <= k <= classes:
        raise DistillationError(f"k must be in 1..classes ({classes}), got {k}")
    logits = precise(teacher.detach()) / temperature
    # The softmax over the chosen ones alone is the softmax over all, made to sum to 1.
    chosen = logits.topk(k, dim=1)
    return torch.zeros_like(logits).scatter(1, chosen.indices, chosen.values.softmax(dim=1))


def selective(outputs: Tensor, teacher: Tensor, temperature: float, k: int) -> Tensor:
    """Return `T^2 KL(top_k_targets(teacher) || softmax(outputs / T))`, mean over the batch.

    The divergence, not the cross-entropy: at k = classes it is `hinton`. The student's probabilities are over
    all classes, so that those not chosen are pushed down.

    Args:
        outputs: Logits of the student, `(batch, classes, ...)`.
        teacher: Logits of the teacher, same shape.
        temperature: `T > 0`.
        k: How many classes of the teacher count, 1 to their number.

    Raises:
        DistillationError: The shapes differ, or `k` is more than the classes or less than 1.
    """
    outputs, teacher = same_shape(outputs, teacher)
    student = (outputs / temperature).log_softmax(dim=1)
    targets = top_k_targets(teacher, k, temperature)
    divergence = F.kl_div(student, targets, reduction="none").sum(dim=1)
    return temperature**2 * divergence.mean()


def decoupled(
    outputs: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Return `T^2 (alpha TCKD + beta NCKD)`, mean over the batch (DKD).

    TCKD is the divergence of (p, 1 - p), p the probability of the label; NCKD is the divergence of the
    probabilities of all other classes among themselves. Hinton's loss is TCKD + (1 - p of the teacher) NCKD:
    a confident teacher silences its second part, which beta gives a weight of its own.

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, section 3. Weights: CIFAR-100
    T 4, alpha 1, beta 8; ImageNet T 1, alpha 1, beta .5.

    Args:
        outputs: Logits of the student, `(batch, classes)`, at least two classes.
        teacher: Logits of the teacher, same shape.
        labels: Classes, `(batch,)`.
        temperature: `T > 0`.
        alpha: Weight of the label against the rest.
        beta: Weight of the rest.

    Raises:
        DistillationError: The shapes differ, are of maps, or of one class; or the labels have another.
    """
    of_label, of_others = decoupled_parts(outputs, teacher, labels, temperature)
    return temperature**2 * (alpha * of_label + beta * of_others).mean()


def decoupled_parts(
    outputs: Tensor, teacher: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return TCKD and NCKD of `decoupled`, each `(batch,)`, without the factor `T^2`."""
    outputs, teacher = same_shape(outputs, teacher)
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        raise refusal("logits (batch, classes) of 2 classes or more", outputs, teacher)
    if labels.shape != outputs.shape[:1]:
        raise DistillationError(
            f"labels must be one class a sample ({outputs.shape[0]},), got {tuple(labels.shape)}"
        )
    is_label = F.one_hot(labels, outputs.shape[1]).bool()

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        logs = (logits / temperature).log_softmax(dim=1)
        others = logs[~is_label].reshape(len(logs), -1)
        rest = others.logsumexp(dim=1)  # log(1 - p) without cancellation
        return torch.stack([logs[is_label], rest], dim=1), others - rest[:, None]

    (one, among), (target, target_among) = split(outputs), split(teacher)
    return _divergences(one, target), _divergences(among, target_among)


def dist(
    outputs: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    between_classes: float = 1.0,
    within_classes: float = 1.0,
) -> Tensor:
    """Return `T^2` times 1 - Pearson's correlation of probabilities: of each sample's, and of each class's.

    Only the order and relative distances of probabilities must be those of the teacher, not the values. The
    first is a mean over samples; the second is the mean over classes of the correlation over the batch's
    samples, so it depends on which are in a batch.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher" (DIST), NeurIPS 2022. Weights: 1
    and 1 at T 1, the whole times 2 (ImageNet).

    Args:
        outputs: Logits of the student, `(batch, classes, ...)`, at least two of each.
        teacher: Logits of the teacher, same shape.
        temperature: `T > 0`.
        between_classes: Weight of the correlation of each sample's probabilities.
        within_classes: Weight of the correlation of each class's probabilities.

    Raises:
        DistillationError: The shapes differ, or have one sample or class, which has no correlation.
    """
    outputs, teacher = same_shape(outputs, teacher)
    rows = [(x / temperature).softmax(dim=1).movedim(1, -1).flatten(0, -2) for x in (outputs, teacher)]
    if min(rows[0].shape) < 2:
        raise refusal("2 samples and 2 classes or more, to correlate them", outputs, teacher)
    own, other = rows
    between = 1 - _correlation(own, other).mean()
    within = 1 - _correlation(own.T, other.T).mean()
    return temperature**2 * (between_classes * between + within_classes * within)


def ensemble(
    teachers: Sequence[Tensor], weights: Sequence[float] | None = None, temperature: float = 1.0
) -> Tensor:
    """Return logits whose softmax at T is the weighted mean of several teachers' softmaxes at T.

    They stand for one teacher in any loss at that temperature; at another one they are no mean.

    Args:
        teachers: Logits, `(batch, classes, ...)` each.
        weights: Not negative, made to sum to 1; equal ones without.
        temperature: `T > 0`.

    Raises:
        DistillationError: There is no teacher, their shapes differ, or the weights are not one each, are
            negative or all 0.
    """
    shapes = [tuple(logits.shape) for logits in teachers]
    if len(set(shapes)) != 1:
        raise DistillationError(f"an ensemble needs teachers of one shape, got {shapes}; leave some out")
    shares = [1.0] * len(teachers) if weights is None else list(weights)
    if len(shares) != len(teachers) or min(shares) < 0 or sum(shares) == 0:
        raise DistillationError(
            f"weights must be one a teacher ({len(teachers)}), 0 or more and not all 0, got {shares}"
        )
    logs = torch.stack([(precise(x.detach()) / temperature).log_softmax(dim=1) for x in teachers])
    share = torch.tensor(shares, dtype=logs.dtype, device=logs.device)
    of_each = (share / share.sum()).log().reshape(-1, *[1] * (logs.dim() - 1))
    return temperature * (logs + of_each).logsumexp(dim=0)


def _divergences(student: Tensor, target: Tensor) -> Tensor:
    """KL(target || student) of log-probabilities in axis 1, one number a sample."""
    return F.kl_div(student, target, reduction="none", log_target=True).sum(dim=1)


def _divergence(student: Tensor, target: Tensor) -> Tensor:
    return _divergences(student, target).mean()


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's correlation of the rows of both; 0 where a row does not vary."""
    first, second = (x - x.mean(dim=1, keepdim=True) for x in (one, other))
    return F.cosine_similarity(first, second, dim=1)
