"""The accuracy of a slice of a trained supernet."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autocompress.cost import Values
from autocompress.elastic.layers import memory_format
from autocompress.elastic.recalibrate import recalibrate
from autocompress.elastic.supernet import Supernet
from autocompress.space import Codes
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
    """

    supernet: Supernet
    data: DataSet
    task: Task
    calibration: list[Tensor]
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
        means, errors = [], []
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
        return {self.task.metric: np.array(means), f"{self.task.metric}_error": np.array(errors)}
