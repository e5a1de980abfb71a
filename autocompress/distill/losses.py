"""Distillation losses."""

import torch.nn.functional as F
from torch import Tensor


def hinton(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return `T^2 KL(softmax(teacher / T) || softmax(outputs / T))`, mean over the batch, classes in axis 1.

    Summed over classes and averaged over samples, so that it does not depend on the batch size; the factor
    keeps the gradient's scale as the temperature grows.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2.

    Args:
        outputs: Logits of the student, `(batch, classes, ...)`.
        teacher: Logits of the teacher, same shape, without gradient.
        temperature: `T > 0`.
    """
    student = (outputs / temperature).log_softmax(dim=1)
    target = (teacher / temperature).log_softmax(dim=1)
    divergence = F.kl_div(student, target, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * divergence.mean()
