"""Teachers that somebody brings: a trained model, or several as one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autocompress.distill.losses import ensemble
from autocompress.errors import DistillationError
from autocompress.prune.load import load_model_for
from autocompress.recipe import TeacherSettings
from autocompress.training.data import DataSet


class Ensemble(nn.Module):
    """Several teachers as one: the softmax of its outputs is the weighted mean of theirs.

    Source: You et al., "Learning from Multiple Teacher Networks", KDD 2017: the mean of softened outputs.
    Layers are named `teachers.0.NAME`.

    Args:
        teachers: Of the same classes.
        weights: One each, made to sum to 1.
        temperature: At which the mean is taken: that of the loss.
    """

    def __init__(self, teachers: Sequence[nn.Module], weights: Sequence[float], temperature: float) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self.weights, self.temperature = tuple(weights), temperature

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits, `(batch, classes)`."""
        return ensemble([teacher(x) for teacher in self.teachers], self.weights, self.temperature)


def load_teacher(settings: Sequence[TeacherSettings], data: DataSet, *, temperature: float) -> nn.Module:
    """Make the models of a recipe with their weights; several are one ensemble.

    Args:
        settings: One or more.
        data: Says classes and channels where a factory takes them.
        temperature: Of the soft targets.

    Raises:
        ConversionError: A model or its weights cannot be loaded.
        DistillationError: A model does not take the images of the data, or gives what is no tensor.
    """
    found = []
    for teacher in settings:
        network = load_model_for(data, teacher.model, teacher.arguments, teacher.weights).eval()
        try:
            with torch.no_grad():
                outputs = network(torch.zeros(1, *data.in_shape))
        except Exception as error:  # whatever the user's model raises
            raise DistillationError(
                f"teacher {teacher.model} does not take images {data.in_shape} of {data.name}: {error}"
            ) from error
        if not isinstance(outputs, Tensor):
            raise DistillationError(
                f"teacher {teacher.model} must give one tensor, got {type(outputs).__name__}; wrap it in a "
                "module whose forward() returns the tensor that is compared"
            )
        found.append(network)
    if len(found) == 1:
        return found[0]
    return Ensemble(found, [teacher.weight for teacher in settings], temperature).eval()
