"""The accuracy of a slice of a trained supernet."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from autocompress.cost import Values
from autocompress.elastic.layers import memory_format
from autocompress.elastic.recalibrate import recalibrate
from autocompress.elastic.supernet import Statistics, Supernet
from autocompress.space import Architecture, Codes
from autocompress.strategy import DISTANCE
from autocompress.training.data import DataSet
from autocompress.training.evaluate import evaluate
from autocompress.training.task import Task


@dataclass
class SupernetEvaluator:
    """Scores slices on the held-out validation images, each with statistics of its own.

    Attributes:
        supernet: Trained.
        data: Only its validation part is scored.
        task: Says the metric, which is the name of the score.
        calibration: Training images for the batch-norm statistics, the same for every slice.
        compared: Whether `DISTANCE` is computed as well: the task's distillation loss of the outputs for the
            calibration images against those of the largest network (for classes the KL divergence but for a
            constant). It is smoother than a score of few images.
    """

    supernet: Supernet
    data: DataSet
    task: Task
    calibration: list[Tensor]
    compared: bool = False
    paid: bool = True

    def __post_init__(self) -> None:
        """Put the supernet into evaluation mode: operations of a space's own may have dropout."""
        self.supernet.eval()

    @torch.no_grad()
    def __call__(self, codes: Codes) -> Mapping[str, Values]:
        """Return the mean score and its standard error, each `(n,)`.

        Raises:
            EvaluationError: A score is not finite.
        """
        keep = memory_format(self.supernet.parameters())
        means, errors, distances = [], [], []
        for arch in self.supernet.space.decode(codes):
            statistics = recalibrate(self.supernet, arch, self.calibration)
            scored = evaluate(
                lambda x, a=arch, s=statistics: self.supernet(x, a, statistics=s),  # type: ignore[misc]
                self.data.validation,
                self.task.score,
                memory_format=keep,
            )
            means.append(scored.mean)
            errors.append(scored.standard_error)
            if self.compared:
                distances.append(self._distance(arch, statistics))
        found = {self.task.metric: np.array(means), f"{self.task.metric}_error": np.array(errors)}
        return {**found, DISTANCE: np.array(distances)} if self.compared else found

    def _distance(self, arch: Architecture, statistics: Statistics) -> float:
        """Return the mean distillation loss against the largest network."""
        total, count, keep = 0.0, 0, memory_format(self.supernet.parameters())
        for batch, expected in zip(self.calibration, self._expected, strict=True):
            outputs = self.supernet(batch.contiguous(memory_format=keep), arch, statistics=statistics)
            total += float(self.task.distillation(outputs.float(), expected)) * len(batch)
            count += len(batch)
        return total / count

    @cached_property
    def _expected(self) -> list[Tensor]:
        """Outputs of the largest network for each calibration batch."""
        largest = self.supernet.space.decode(self.supernet.space.largest())[0]
        statistics = recalibrate(self.supernet, largest, self.calibration)
        keep = memory_format(self.supernet.parameters())
        batches = (batch.contiguous(memory_format=keep) for batch in self.calibration)
        return [self.supernet(batch, largest, statistics=statistics).float() for batch in batches]
