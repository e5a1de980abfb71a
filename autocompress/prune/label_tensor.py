"""Tensors of labels: one label for each element of a tensor that flows through a network.

Along axes on which nothing depends they are expanded (stride 0), so that a map of any size takes no more
memory than its channels; `compact` brings them to that form, and all others here rely on it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from autocompress.prune.labels import FIXED, Labels


def fixed(shape: Sequence[int]) -> Tensor:
    """Return labels of what has to stay."""
    return torch.full((), FIXED, dtype=torch.long).expand(tuple(shape))


def spread(labels: Labels, axis: int, shape: Sequence[int]) -> Tensor:
    """Return labels of one axis for a whole tensor."""
    view = [1] * len(shape)
    view[axis] = len(labels)
    return torch.from_numpy(labels).view(view).expand(tuple(shape))


def compact(labels: Tensor) -> Tensor:
    """Return the same labels, expanded along each axis on which they do not depend."""
    for axis, size in enumerate(labels.shape):
        if size > 1 and labels.stride(axis) != 0:
            first = labels.narrow(axis, 0, 1)
            if bool((labels == first).all()):
                labels = first.expand(labels.shape)
    return labels


def axes_of(labels: Tensor) -> list[int]:
    """Return the axes on which compact labels depend."""
    return [axis for axis, size in enumerate(labels.shape) if size > 1 and labels.stride(axis) != 0]


def rows(labels: Tensor, axis: int) -> Labels:
    """Return the different labels at each position of an axis, `(size of the axis, others)`."""
    for other in range(labels.dim()):
        if other != axis and other not in axes_of(labels):
            labels = labels.narrow(other, 0, 1)
    return np.array(labels.movedim(axis, 0).reshape(labels.shape[axis], -1).numpy(), dtype=np.int64)


def values(labels: Tensor) -> Labels:
    """Return the labels that occur."""
    for axis in range(labels.dim()):
        if axis not in axes_of(labels):
            labels = labels.narrow(axis, 0, min(1, labels.shape[axis]))
    return np.unique(labels.numpy())


def resized(labels: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Return the labels of a tensor of other sizes; `None` if an axis that changes holds channels."""
    held = axes_of(labels)
    for axis, (before, after) in enumerate(zip(labels.shape, shape, strict=True)):
        if before != after:
            if axis in held:
                return None
            labels = labels.narrow(axis, 0, 1)
    return labels.expand(tuple(shape))


def concatenated(parts: Sequence[Tensor], axis: int, shape: Sequence[int]) -> Tensor:
    """Return the labels of a concatenation, without copying axes on which no part depends."""
    axis %= len(shape)
    free = [a for a in range(len(shape)) if a != axis and not any(a in axes_of(part) for part in parts)]
    for a in free:
        parts = [part.narrow(a, 0, 1) for part in parts]
    return torch.cat(list(parts), dim=axis).expand(tuple(shape))
