"""Supernet training: sandwich rule with in-place distillation, progressive shrinking, single paths.

Sources: Yu & Huang, Universally Slimmable Networks, ICCV 2019 (sandwich rule, in-place distillation);
Yu et al., BigNAS, ECCV 2020; Cai et al., Once-for-All, ICLR 2020 (progressive shrinking); Guo et al., Single
Path One-Shot, ECCV 2020 (uniform single path); Chu et al., FairNAS, ICCV 2021 (strict fairness).
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autocompress.elastic.extract import active_masks, only_active
from autocompress.elastic.importance import sort_channels
from autocompress.elastic.recalibrate import recalibrate
from autocompress.elastic.supernet import Supernet
from autocompress.progress import Progress, silent
from autocompress.recipe import Phase, TrainSettings
from autocompress.space import Architecture
from autocompress.training.data import DataSet
from autocompress.training.evaluate import calibration_batches, evaluate
from autocompress.training.loop import Position, run_epochs, steps_per_epoch, training_batches
from autocompress.training.paths import networks_of_step, phases_of
from autocompress.training.speed import autocast, choose_formats
from autocompress.training.task import Task

VALIDATIONS = 10
CALIBRATION_IMAGES = 512

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def train_supernet(
    supernet: Supernet,
    data: DataSet,
    task: Task,
    settings: TrainSettings,
    *,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> Position:
    """Train a supernet in place, from its checkpoint if there is one.

    Sandwich rule, each step: the largest network on the labels, whose detached outputs then teach some random
    networks and the smallest; gradients are summed. Progressive shrinking: first the largest network alone;
    then phases in which more and more choices vary, random networks only, taught by the labels and by the
    largest network as it was after the first phase. Single path: one network, uniform over genes, on the
    labels. Fair: as many networks as the choice with the most options has, which together hold each option of
    a choice equally often (`paths.fair_draws`), on the labels.

    Gradients of the networks of a step are summed, not averaged, as in FairNAS (algorithm 1): what serves one
    option alone moves as far as in single-path training. What several networks share, here slices too, gets
    a gradient from each of them: the more networks a step, the lower the learning rate should be. Weight
    decay and momentum leave alone what no network of a step used.

    Args:
        supernet: Trained in place; its memory format may change.
        data: Train part for the weights, validation part for the scores that are reported.
        task: Losses and metric.
        settings: Schedule and optimizer.
        checkpoint: Path of the checkpoint; none is written without.
        progress: Told steps and losses.

    Returns:
        The final position: losses, validation scores, roll-backs, precision.

    Raises:
        TrainingError: Training collapsed again after every roll-back.
        CheckpointError: The checkpoint is damaged or belongs to another space or settings.
        RecipeError: A phase names a choice the space does not have.
    """
    space = supernet.space
    largest, smallest = space.decode(np.vstack([space.largest(), space.smallest()]))
    phases = phases_of(space, settings)
    epochs = sum(phase.epochs for phase in phases)
    starts = np.cumsum([0] + [phase.epochs for phase in phases])[:-1].tolist()
    per_epoch = steps_per_epoch(data, settings)
    # Kernel transforms are not: they serve the smaller kernels only.
    used = active_masks(supernet, [largest])
    largest_is_all = all(name in used and bool(used[name].all()) for name, _ in supernet.named_parameters())
    calibration = calibration_batches(data, CALIBRATION_IMAGES, seed=settings.seed)
    loss_on_labels = task.training_loss(settings.label_smoothing)
    formats: dict[str, str] = {}
    # The largest network after the first phase of progressive shrinking, by parameter name.
    frozen: dict[str, Any] = {}

    def phase_of(epoch: int) -> Phase:
        return phases[max(i for i, start in enumerate(starts) if start <= epoch)]

    def forward(images: Tensor, arch: Architecture) -> Tensor:
        with autocast(formats["precision"]):
            outputs: Tensor = supernet(images, arch)
        return outputs.float()

    def networks(step: int) -> list[Architecture]:
        return networks_of_step(space, settings, phase_of(step // per_epoch), step)

    def sandwich(images: Tensor, targets: Tensor, step: int) -> float:
        images = images.contiguous(memory_format=FORMATS[formats["memory_format"]])
        outputs = forward(images, largest)
        loss = loss_on_labels(outputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        teacher = outputs.detach()
        for arch in networks(step)[1:]:
            task.distillation(forward(images, arch), teacher).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def on_labels(images: Tensor, targets: Tensor, step: int) -> float:
        images = images.contiguous(memory_format=FORMATS[formats["memory_format"]])
        teacher: Tensor | None = None
        if frozen:
            with torch.no_grad():
                teacher = torch.func.functional_call(supernet, frozen, (images, largest)).float()
        total = 0.0
        archs = networks(step)
        for arch in archs:
            outputs = forward(images, arch)
            loss = loss_on_labels(outputs, targets)
            taught = loss if teacher is None else loss + task.distillation(outputs, teacher)
            taught.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total / len(archs)

    def before_epoch(epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if settings.schedule == "progressive" and epoch == starts[1]:
            sort_channels(supernet)
            # Its momentum belongs to channels that now stand elsewhere.
            optimizer.state.clear()
            frozen.update({name: p.detach().clone() for name, p in supernet.named_parameters()})

    def guard(step: int, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        archs = networks(step)
        if largest_is_all and largest in archs:
            return nullcontext()
        return only_active(supernet, optimizer, archs)

    def validate(epoch: int, position: Position) -> None:
        every = max(1, epochs // VALIDATIONS)
        if (epoch + 1) % every and epoch + 1 != epochs:
            return
        supernet.eval()
        for name, arch in (("largest", largest), ("smallest", smallest)):
            statistics = recalibrate(supernet, arch, calibration)
            scored = evaluate(
                lambda x, a=arch, s=statistics: supernet(x, a, statistics=s),  # type: ignore[misc]
                data.validation,
                task.score,
                memory_format=FORMATS[formats["memory_format"]],
            )
            position.scores.append([epoch + 1, name, scored.mean])

    compute = sandwich if settings.schedule == "sandwich" else on_labels

    def prepare(position: Position, _: torch.optim.Optimizer) -> None:
        if not position.choices:
            images, targets = next(training_batches(data, settings, epoch=0, seed=settings.seed))

            def timed(precision: str, memory: str) -> None:
                formats.update(precision=precision, memory_format=memory)
                supernet.to(memory_format=FORMATS[memory])  # type: ignore[call-overload]
                compute(images, targets, 0)
                supernet.zero_grad(set_to_none=True)

            position.choices = dict(choose_formats(settings, timed, steps=epochs * per_epoch))
        formats.update(position.choices)
        supernet.to(memory_format=FORMATS[formats["memory_format"]])  # type: ignore[call-overload]

    return run_epochs(
        supernet,
        data,
        settings,
        compute,
        epochs=epochs,
        identity=supernet_identity(supernet, data, settings),
        checkpoint=checkpoint,
        extra_state=frozen,
        validate=validate,
        guard=guard,
        prepare=prepare,
        before_epoch=before_epoch,
        progress=progress,
    )


def supernet_identity(supernet: Supernet, data: DataSet, settings: TrainSettings) -> Mapping[str, Any]:
    """Return what a checkpoint of a supernet must belong to."""
    return {
        "kind": "supernet",
        "space": supernet.space.describe(),
        "data": data.fingerprint,
        "settings": settings.model_dump(mode="json"),
    }
