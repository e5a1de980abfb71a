"""Training of one plain network: finetuning with distillation, or training alone."""

import copy
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from autocompress.distill.distiller import PROBES, Distiller, Probe
from autocompress.distill.methods import method_of
from autocompress.elastic.supernet import resize
from autocompress.network import DropPath
from autocompress.progress import Progress, silent
from autocompress.quantize.layer import has_quantizers
from autocompress.quantize.quantizer import learned_scales, limit_gradients
from autocompress.recipe import FinetuneSettings
from autocompress.training.auxiliary import with_auxiliary
from autocompress.training.data import DataSet, batches
from autocompress.training.drop_path import drop_paths, rate_of_epoch
from autocompress.training.evaluate import Scored, calibration_batches, evaluate
from autocompress.training.loop import (
    Position,
    run_epochs,
    samples_of_step,
    seed_of,
    steps_per_epoch,
    training_batches,
)
from autocompress.training.speed import autocast, choose_formats
from autocompress.training.statistics import CALIBRATION_IMAGES, lags, recalibrate
from autocompress.training.supernet import FORMATS
from autocompress.training.task import Task, soft_cross_entropy


@dataclass(frozen=True)
class Finetuned(Scored):
    """The validation score of the weights that were kept.

    Attributes:
        epoch: After which they were as they are; 0 where no epoch was better than what was given.
    """

    epoch: int | None = None


def finetune(
    network: nn.Module,
    data: DataSet,
    task: Task,
    settings: FinetuneSettings,
    *,
    resolution: tuple[int, int],
    teacher: nn.Module | None = None,
    teacher_resolution: tuple[int, int] | None = None,
    identity: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    keep_best: bool = True,
    after_epoch: Callable[[int, float], None] | None = None,
    progress: Progress = silent,
) -> Finetuned:
    """Train a network in place, from its checkpoint if there is one.

    With a teacher the loss is what `settings.distill` says, by default `(1 - alpha) * loss on labels +
    alpha * distillation` (Hinton et al., 2015); for tasks whose distillation is not soft cross-entropy, the
    task's own distillation loss takes the place of Hinton's. Without one, only losses that need none count.
    `settings.auxiliary` adds so many times the loss on labels of an auxiliary classifier. It is trained along
    and stands in the checkpoint; the network knows nothing of it. Statistics of batch norm that lag behind an
    epoch of few steps are computed anew before its score.

    Args:
        network: A plain network; left in evaluation mode.
        data: Train part for the weights, validation part for the choice of the epoch.
        task: Losses and metric.
        settings: Optimizer, schedule, temperature and alpha, regularisers.
        resolution: Height and width of the network's input; images are resized to it.
        teacher: Run in evaluation mode; `None` trains on the labels alone.
        teacher_resolution: Height and width of the teacher's input.
        identity: What a checkpoint must belong to, besides data and settings.
        checkpoint: Path of the checkpoint; none is written without.
        keep_best: Whether the weights of the best epoch on the validation part are kept, the latest of equal
            ones; otherwise those of the last. The weights before the first epoch are kept where every epoch
            is worse by more than a standard error: a searched network was chosen for its score on this part,
            which therefore flatters it, so that what is really better would seldom beat it.
        after_epoch: Told each finished epoch, counted from 1, and its validation score, when its checkpoint
            is on disk.
        progress: Told steps and losses.

    Returns:
        The validation score of the weights that were kept.

    Raises:
        RecipeError: Paths shall be dropped, or an auxiliary classifier sit, where the network has no place.
        DistillationError: A loss or a layer of `settings.distill` is unknown, or does not fit the networks.
        TrainingError: Training collapsed again after every roll-back.
        CheckpointError: The checkpoint is damaged or belongs to another run.
    """
    paths = drop_paths(network, settings)
    auxiliary = with_auxiliary(network, data, settings, resolution) if settings.auxiliary else None
    trained = network if auxiliary is None else auxiliary
    sizes = resolution, teacher_resolution or resolution
    distiller = _distiller(trained, network, teacher, data, task, settings, sizes)
    trained = distiller or trained
    per_epoch = steps_per_epoch(data, settings)
    loss_on_labels = task.training_loss(settings.label_smoothing)
    scales = learned_scales(network)
    formats: dict[str, str] = {}
    best: dict[str, Any] = {}
    reached = Position()
    if teacher is not None:
        teacher.eval()

    def placed(images: Tensor, size: tuple[int, int]) -> Tensor:
        return resize(images, size).contiguous(memory_format=FORMATS[formats["memory_format"]])

    def drop(rate: float) -> None:
        for path in paths:
            path.rate = rate

    def compute(images: Tensor, targets: Tensor, step: int) -> float:
        drop(rate_of_epoch(settings, step // per_epoch))
        with autocast(formats["precision"]):
            found = trained(placed(images, resolution))
        outputs = (found if auxiliary is None else found[0]).float()
        on_labels = loss_on_labels(outputs, targets)
        loss = on_labels
        if distiller is not None:
            share, taught = step / (settings.epochs * per_epoch), None
            if teacher is not None and distiller.asks_teacher(share):
                with torch.no_grad(), autocast(formats["precision"]):
                    taught = teacher(placed(images, sizes[1])).float()
            epoch, inside = divmod(step, per_epoch)
            indices = samples_of_step(data, settings, epoch, inside, seed=seed_of(settings, reached))
            loss = distiller.loss(on_labels, outputs, taught, targets, indices=indices, share=share)
        if auxiliary is not None:
            loss = loss + settings.auxiliary * loss_on_labels(found[1].float(), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        limit_gradients(scales)
        return float(on_labels.detach())

    def score() -> Scored:
        network.eval()
        scored = evaluate(lambda x: network(placed(x, resolution)), data.validation, task.score)
        network.train()
        return scored

    def remember(scored: Scored, epoch: int, *, flattery: float = 0.0) -> None:
        if not best or scored.mean >= best["mean"] - best["flattery"] or not keep_best:
            best.update(
                epoch=epoch,
                flattery=flattery,
                mean=scored.mean,
                standard_error=scored.standard_error,
                count=scored.count,
                weights=copy.deepcopy(network.state_dict()),
            )

    def validate(epoch: int, position: Position) -> None:
        if lags(network, per_epoch):
            images = calibration_batches(data, CALIBRATION_IMAGES, seed=settings.seed)
            recalibrate(network, (placed(batch, resolution) for batch in images))
        scored = score()
        position.scores.append([epoch + 1, "network", scored.mean])
        remember(scored, epoch + 1)

    def told(epoch: int, position: Position) -> None:
        if after_epoch is not None:
            after_epoch(epoch + 1, position.scores[-1][2])

    def prepare(position: Position, _: torch.optim.Optimizer) -> None:
        nonlocal reached
        reached = position
        if not position.choices:
            images, targets = next(training_batches(data, settings, epoch=0, seed=settings.seed))
            # Timing must not move the statistics of batch norm.
            before = copy.deepcopy(trained.state_dict())

            def timed(precision: str, memory: str) -> None:
                formats.update(precision=precision, memory_format=memory)
                trained.to(memory_format=FORMATS[memory])  # type: ignore[call-overload]
                compute(images, targets, 0)
                trained.zero_grad(set_to_none=True)

            trained.train()
            steps = settings.epochs * per_epoch
            position.choices = dict(choose_formats(settings, timed, steps=steps))
            trained.load_state_dict(before)
        formats.update(position.choices)
        for module in (trained, teacher):
            if module is not None:
                module.to(memory_format=FORMATS[formats["memory_format"]])  # type: ignore[call-overload]
        if not best and keep_best:
            start = score()
            remember(start, 0, flattery=start.standard_error)

    try:
        run_epochs(
            trained,
            data,
            settings,
            compute,
            epochs=settings.epochs,
            identity={
                "kind": "network",
                "data": data.fingerprint,
                "settings": settings.model_dump(mode="json"),
                **(identity or {}),
            },
            checkpoint=checkpoint,
            extra_state=best,
            validate=validate,
            prepare=prepare,
            after_epoch=told,
            progress=progress,
        )
    finally:
        drop(0.0)
        if distiller is not None:
            distiller.close()
    network.load_state_dict(best["weights"])
    network.eval()
    return Finetuned(best["mean"], best["standard_error"], best["count"], best.get("epoch"))


def suited(settings: FinetuneSettings, network: nn.Module) -> FinetuneSettings:
    """Return settings of many networks as they are for one of them."""
    updates: dict[str, Any] = {}
    if not any(isinstance(module, DropPath) for module in network.modules()):
        # A cell of identities alone has no path to drop, though others of its space have.
        updates["drop_path"] = 0.0
    if has_quantizers(network):
        # Levels are numbers of 32 bits: rounded to bfloat16 on the way they would be others.
        updates["precision"] = "fp32"
    return settings.model_copy(update=updates)


def _distiller(
    trained: nn.Module,
    network: nn.Module,
    teacher: nn.Module | None,
    data: DataSet,
    task: Task,
    settings: FinetuneSettings,
    sizes: tuple[tuple[int, int], tuple[int, int]],
) -> Distiller | None:
    """Return what is trained instead, where something is distilled."""
    terms = [term for term in settings.distill if teacher is not None or not method_of(term.loss).taught]
    if not terms:
        return None
    images, targets = next(batches(data.train, PROBES, seed=None))
    probe = Probe(
        resize(images, sizes[0]),
        resize(images, sizes[1]),
        targets,
        len(cast(Sized, data.train)),
        data.classes,
    )
    return Distiller(
        trained,
        network,
        teacher,
        terms,
        probe,
        alpha=settings.alpha,
        temperature=settings.temperature,
        seed=settings.seed,
        distillation=None if task.distillation is soft_cross_entropy else task.distillation,
    )
