"""Online distillation: networks that are trained at the same time and teach each other.

Source: Zhang et al., "Deep Mutual Learning", CVPR 2018, equations 4 to 7: each learns from the labels, and
from the mean divergence of its outputs from those of each other one.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.distill.losses import hinton
from autocompress.elastic.supernet import resize
from autocompress.errors import DistillationError
from autocompress.progress import Progress, silent
from autocompress.recipe import FinetuneSettings
from autocompress.training.data import DataSet
from autocompress.training.evaluate import Scored, evaluate
from autocompress.training.loop import Position, run_epochs
from autocompress.training.task import Task


def train_mutually(
    networks: Sequence[nn.Module],
    data: DataSet,
    task: Task,
    settings: FinetuneSettings,
    *,
    resolutions: Sequence[tuple[int, int]],
    weight: float = 1.0,
    temperature: float = 1.0,
    identity: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> list[Scored]:
    """Train networks in place, from their checkpoint if there is one; the weights of the last epoch are kept.

    The loss of each is `loss on labels + weight * mean over the others of T^2 KL(other || own)`. All of them
    are updated at once; in the paper one after the other.

    Args:
        networks: Two or more of the same classes, of any architectures; left in evaluation mode.
        data: Train part for the weights, validation part for the scores.
        task: Loss on labels and metric.
        settings: Optimizer and schedule; what is said of distillation there does not count here.
        resolutions: Height and width of each network's input.
        weight: Of the divergence; 1 in the paper.
        temperature: Of the divergence; 1 in the paper.
        identity: What a checkpoint must belong to, besides data and settings.
        checkpoint: Path of the checkpoint; none is written without.
        progress: Told steps and losses.

    Returns:
        The validation score of each.

    Raises:
        DistillationError: There are fewer than two networks, or not one resolution each, or they are of
            different classes.
        TrainingError: Training collapsed again after every roll-back.
        CheckpointError: The checkpoint is damaged or belongs to another run.
    """
    if len(networks) < 2 or len(resolutions) != len(networks):
        raise DistillationError(
            "mutual learning needs two networks or more, and a resolution for each, got "
            f"{len(networks)} and {len(resolutions)}"
        )
    loss_on_labels = task.training_loss(settings.label_smoothing)

    def run(network: nn.Module, images: Tensor, size: tuple[int, int]) -> Tensor:
        outputs: Tensor = network(resize(images, size))
        return outputs.float()

    def compute(images: Tensor, targets: Tensor, step: int) -> float:
        outputs = [run(n, images, size) for n, size in zip(networks, resolutions, strict=True)]
        on_labels = torch.stack([loss_on_labels(own, targets) for own in outputs])
        others = len(outputs) - 1
        between = [
            hinton(own, other, temperature) / others
            for own in outputs
            for other in outputs
            if other is not own
        ]
        (on_labels.sum() + weight * torch.stack(between).sum()).backward()  # type: ignore[no-untyped-call]
        return float(on_labels.detach().mean())

    def scores() -> list[Scored]:
        found = []
        for network, size in zip(networks, resolutions, strict=True):
            outputs = partial(run, network.eval(), size=size)
            found.append(evaluate(outputs, data.validation, task.score))
        return found

    def validate(epoch: int, position: Position) -> None:
        for number, scored in enumerate(scores()):
            position.scores.append([epoch + 1, f"network {number}", scored.mean])

    run_epochs(
        nn.ModuleList(networks),
        data,
        settings,
        compute,
        epochs=settings.epochs,
        identity={
            "kind": "mutual",
            "data": data.fingerprint,
            "settings": settings.model_dump(mode="json"),
            "weight": weight,
            "temperature": temperature,
            **(identity or {}),
        },
        checkpoint=checkpoint,
        validate=validate,
        progress=progress,
    )
    return scores()
