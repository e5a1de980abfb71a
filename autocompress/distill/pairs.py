"""A student's tensor and its teacher's brought together: precision, gradients, shapes."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from autocompress.errors import DistillationError

_P = ParamSpec("_P")


def in_full_precision(loss: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Run a loss without autocast, which would multiply matrices in 16 bits whatever they are given in."""

    @wraps(loss)
    def run(*args: _P.args, **options: _P.kwargs) -> Tensor:
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return loss(*args, **options)

    return run


def precise(x: Tensor) -> Tensor:
    """Return 64-bit floats as they are, all else as 32-bit floats."""
    return x if x.dtype == torch.float64 else x.float()


def same_shape(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in at least 32 bits, the teacher's without gradient.

    Raises:
        DistillationError: Their shapes differ.
    """
    if student.shape != teacher.shape:
        raise refusal("one shape", student, teacher)
    return precise(student), precise(teacher.detach())


def same_batch(student: Tensor, teacher: Tensor, *, least: int = 2) -> tuple[Tensor, Tensor]:
    """Return both as `(batch, features)`, in at least 32 bits, the teacher's without gradient.

    Raises:
        DistillationError: One of them has no features, they are of other samples, or fewer than `least`.
    """
    if min(student.dim(), teacher.dim()) < 2 or student.shape[0] != teacher.shape[0]:
        raise refusal("(batch, features, ...) of the same samples", student, teacher)
    if student.shape[0] < least:
        raise refusal(f"at least {least} samples, which it compares with each other", student, teacher)
    return precise(student).flatten(1), precise(teacher.detach()).flatten(1)


def same_map(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return two maps `(batch, channels, height, width)` pooled to the smaller height and width.

    Channels may differ. Both are in at least 32 bits, the teacher's has no gradient.

    Raises:
        DistillationError: One is no map, or they are of other samples.
    """
    if student.dim() != 4 or teacher.dim() != 4 or student.shape[0] != teacher.shape[0]:
        raise refusal("maps (batch, channels, height, width) of the same samples", student, teacher)
    return pooled_alike(precise(student), precise(teacher.detach()))


def pooled_alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return both maps averaged down to the smaller of their heights and of their widths."""
    size = min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3])
    first, second = (x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (one, other))
    return first, second


def refusal(rule: str, student: Tensor, teacher: Tensor) -> DistillationError:
    """Return the error for tensors that a loss cannot compare: the rule, both shapes, the way out."""
    return DistillationError(
        f"this loss needs {rule}, got {tuple(student.shape)} of the student and {tuple(teacher.shape)} of "
        "the teacher; put a projector on the student's, or watch another layer"
    )
