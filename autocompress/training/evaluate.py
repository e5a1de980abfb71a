"""Scores on held-out images, with their uncertainty."""

import math
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from autocompress.errors import EvaluationError
from autocompress.training.data import DataSet, batches
from autocompress.training.task import Score

EVALUATION_BATCH = 250


@dataclass(frozen=True)
class Scored:
    """A mean over independent samples.

    Attributes:
        mean: Of the score, larger is better.
        standard_error: Of the mean.
        count: Samples.
    """

    mean: float
    standard_error: float
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval: Wilson's for shares in 0..1, else normal (E. B. Wilson, 1927)."""
        z = 1.959964
        if not 0 <= self.mean <= 1:
            return self.mean - z * self.standard_error, self.mean + z * self.standard_error
        n = self.count
        centre = (self.mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(self.mean * (1 - self.mean) / n + z * z / (4 * n * n))
        return centre - half, centre + half


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor], Tensor],
    dataset: Dataset[Any],
    score: Score,
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Scored:
    """Score a network on every sample of a part of a data set.

    Args:
        forward: Images to outputs, in evaluation mode.
        dataset: `data.validation` or, once at the very end, `data.test`.
        score: One number a sample.
        memory_format: Of the images.

    Raises:
        EvaluationError: A score is not finite.
    """
    scores = []
    for images, targets in batches(dataset, EVALUATION_BATCH, seed=None):
        if images.dim() == 4:
            images = images.contiguous(memory_format=memory_format)
        outputs = forward(images).float()
        # An accuracy is finite even if the outputs are not.
        finite = torch.isfinite(outputs).reshape(len(outputs), -1).all(dim=1)
        scores.append(score(outputs, targets).double().where(finite, torch.nan))
    values = torch.cat(scores)
    wrong = (~torch.isfinite(values)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        inputs = next(batches(Subset(dataset, [first]), 1, seed=None))
        cause = "an output of the network, or the metric of it, is not finite there"
        if not all(torch.isfinite(part).all() for part in inputs):
            cause = "its input or target holds nan or infinity"
        raise EvaluationError(
            f"the score of {len(wrong)} of {len(values)} held-out samples is not finite, first of sample "
            f"{first}: {cause}"
        )
    deviation = float(values.std()) if len(values) > 1 else 0.0
    return Scored(float(values.mean()), deviation / math.sqrt(len(values)), len(values))


def calibration_batches(data: DataSet, images: int, *, seed: int = 0) -> list[Tensor]:
    """Return fixed training images for batch-norm statistics, in few equal batches, not augmented."""
    count = min(images, len(cast(Sized, data.train)))
    size = max(1, count // max(1, math.ceil(count / 256)))
    found = []
    taken = 0
    for batch, _ in batches(data.train, size, seed=seed):
        found.append(batch[: count - taken])
        taken += len(found[-1])
        if taken >= count:
            break
    return found
