"""The accuracy of a slice of a trained supernet after a short training with distillation."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from autocompress.cost import Values
from autocompress.distill.finetune import finetune, suited
from autocompress.elastic.extract import inherited
from autocompress.elastic.supernet import Supernet
from autocompress.errors import DistillationError, EvaluationError, RecipeError, TrainingError
from autocompress.recipe import FinetuneSettings
from autocompress.space import Architecture, Codes
from autocompress.training.checkpoint import weights_fingerprint
from autocompress.training.data import DataSet
from autocompress.training.evaluate import Scored
from autocompress.training.task import Task


@dataclass
class DistilledEvaluator:
    """Scores networks on the held-out validation images after a few epochs of learning from the teacher.

    Which student is best depends on the teacher: networks of equal accuracy learn differently much from it.
    Every network starts from the weights of its slice and is trained in the same way, on a copy: supernet,
    teacher and data may be in memory that is read-only. A network of few bits starts from rounding to the
    nearest level.

    Source: Liu et al., "Search to Distill: Pearls are Everywhere but not the Eyes", CVPR 2020: distilled
    accuracy as the reward. There students are trained from random weights.

    Attributes:
        supernet: Trained.
        data: Its training part is learned from, its validation part scored; the test part is not read.
        task: Says the losses, and the metric, which is the name of the score.
        calibration: Training images for the batch-norm statistics from which training starts.
        settings: Of the training, `epochs` included; its formats must not be `auto`. The score is that of the
            last epoch, be it worse than an earlier one.
        teacher: `None` where `settings.distill` needs none.
        teacher_resolution: Height and width of the teacher's input; by default the student's.
        brought: Whether the weights are of a model that somebody brought, and not trained since.
    """

    supernet: Supernet
    data: DataSet
    task: Task
    calibration: list[Tensor]
    settings: FinetuneSettings
    teacher: nn.Module | None = None
    teacher_resolution: tuple[int, int] | None = None
    brought: bool = False
    paid: bool = True

    def __post_init__(self) -> None:
        """Put the supernet into evaluation mode.

        Raises:
            RecipeError: A format is left to timing.
        """
        for name in ("precision", "memory_format"):
            if getattr(self.settings, name) == "auto":
                raise RecipeError(
                    f"{name} of the training in an evaluation must be named, got 'auto': which is faster "
                    "differs from network to network, and scores with it"
                )
        self.supernet.eval()

    @property
    def identity(self) -> dict[str, Any]:
        """What scores depend on besides the supernet, the data and the seed of the calibration images."""
        return {
            "kind": "distilled",
            "finetune": self.settings.model_dump(mode="json"),
            "teacher": "" if self.teacher is None else weights_fingerprint(self.teacher),
            "calibration_images": sum(len(batch) for batch in self.calibration),
        }

    def __call__(self, codes: Codes) -> Mapping[str, Values]:
        """Return the mean score and its standard error, each `(n,)`.

        Raises:
            EvaluationError: A score is not finite, training collapsed, or a loss does not fit the network.
        """
        scores = [self._distilled(arch) for arch in self.supernet.space.decode(codes)]
        return {
            self.task.metric: np.array([scored.mean for scored in scores]),
            f"{self.task.metric}_error": np.array([scored.standard_error for scored in scores]),
        }

    def _distilled(self, arch: Architecture) -> Scored:
        space = self.supernet.space
        network = inherited(self.supernet, arch, self.calibration, brought=self.brought)
        try:
            return finetune(
                network,
                self.data,
                self.task,
                suited(self.settings, network),
                resolution=space.operations(space.encode([arch]))[0][1][0].in_shape[1:],
                # It is watched by hooks, and brought to the memory format of the training.
                teacher=copy.deepcopy(self.teacher),
                teacher_resolution=self.teacher_resolution,
                # Otherwise weights that training made worse would be scored as they were before it.
                keep_best=False,
            )
        except (DistillationError, TrainingError) as error:
            raise EvaluationError(f"{arch.key} cannot be distilled: {error}") from error
