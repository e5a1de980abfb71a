"""What is learned: a loss, a distillation loss and a metric, by name or brought by the user."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from autocompress.errors import PluginError
from autocompress.recipe import TaskSettings

Loss = Callable[[Tensor, Tensor], Tensor]
"""Outputs and targets to a scalar, the mean over the batch."""
Score = Callable[[Tensor, Tensor], Tensor]
"""Outputs and targets to one number a sample, `(batch,)`, larger is better."""


@dataclass(frozen=True)
class Task:
    """How outputs are judged.

    Attributes:
        loss: On targets.
        distillation: On the outputs of a teacher, which come detached.
        score: The metric; its mean over the held-out images is what a search maximises.
        metric: Name of the metric.
        smoothed: Whether `label_smoothing` applies to the loss (cross-entropy only).
    """

    loss: Loss
    distillation: Loss
    score: Score
    metric: str
    smoothed: bool

    def training_loss(self, label_smoothing: float) -> Loss:
        """Return the loss that training uses."""
        if self.smoothed and label_smoothing:
            return lambda outputs, targets: F.cross_entropy(outputs, targets, label_smoothing=label_smoothing)
        return self.loss


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return 1 for each sample `(batch, classes)` whose largest output is the target, else 0."""
    return (outputs.argmax(dim=1) == targets).float()


def negative_mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return minus the mean squared error of each sample, so that larger is better."""
    return -(outputs - targets.view_as(outputs)).square().flatten(1).mean(dim=1)


def pixel_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the share of correct pixels of each sample: `(batch, classes, h, w)` against `(batch, h, w)`."""
    return (outputs.argmax(dim=1) == targets).float().flatten(1).mean(dim=1)


def soft_cross_entropy(outputs: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy to the teacher's softmax at temperature 1, classes in dimension 1.

    Source: Yu & Huang, Universally Slimmable Networks, ICCV 2019, section 3.2 (in-place distillation).
    """
    losses = -(teacher.softmax(dim=1) * outputs.log_softmax(dim=1)).sum(dim=1)
    return losses.mean()


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error; targets are brought to the shape of the outputs."""
    return F.mse_loss(outputs, targets.view_as(outputs).to(outputs.dtype))


_LOSSES: dict[str, Loss] = {"cross_entropy": F.cross_entropy, "mse": mean_squared_error}
_DISTILLATIONS: dict[str, Loss] = {"soft_cross_entropy": soft_cross_entropy, "mse": mean_squared_error}
_SCORES: dict[str, Score] = {
    "accuracy": accuracy,
    "pixel_accuracy": pixel_accuracy,
    "negative_mse": negative_mean_squared_error,
}


def load_task(settings: TaskSettings) -> Task:
    """Resolve the names of a task.

    Raises:
        PluginError: A name is neither known nor an importable `module:function`.
    """
    return Task(
        loss=_resolve("loss", settings.loss, _LOSSES),
        distillation=_resolve("distillation", settings.distillation, _DISTILLATIONS),
        score=_resolve("metric", settings.metric, _SCORES),
        metric=settings.metric.rpartition(":")[2],
        smoothed=settings.loss == "cross_entropy",
    )


def _resolve(what: str, name: str, known: dict[str, Any]) -> Any:
    if name in known:
        return known[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise PluginError(f"task.{what} must be one of {', '.join(known)} or module:function, got {name!r}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        # ValueError and TypeError: an empty or a relative name of a module.
        raise PluginError(f"task.{what} {name!r} cannot be imported: {error}") from None
    if not callable(found):
        raise PluginError(f"task.{what} {name!r} must be something to call, got {type(found).__name__}")
    return found
