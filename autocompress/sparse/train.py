"""Sparse training of a user's model, through the house's training loop."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.errors import ConversionError
from autocompress.progress import Progress, silent
from autocompress.prune.check import check
from autocompress.recipe import OptimizerSettings
from autocompress.sparse.account import account_of
from autocompress.sparse.method import Options, Work
from autocompress.sparse.methods import method_of
from autocompress.training.check import check_outputs
from autocompress.training.checkpoint import weights_fingerprint
from autocompress.training.data import DataSet
from autocompress.training.evaluate import Scored, calibration_batches, evaluate
from autocompress.training.loop import Position, run_epochs, steps_per_epoch, training_batches
from autocompress.training.speed import autocast, choose_formats
from autocompress.training.statistics import CALIBRATION_IMAGES, recalibrate
from autocompress.training.supernet import FORMATS
from autocompress.training.task import Task


@dataclass(frozen=True)
class Sparsified:
    """What sparse training gives.

    Attributes:
        network: A copy of the user's model with the new weights, in evaluation mode.
        before: Score of the weights that it began with, on the validation part.
        after: Score of the new ones.
        account: Of the method and of what is zero: plain values.
    """

    network: nn.Module
    before: Scored
    after: Scored
    account: dict[str, Any]


class _EndedError(Exception):
    """A method needs no further epoch."""


def sparsify(
    model: nn.Module,
    data: DataSet,
    task: Task,
    settings: OptimizerSettings,
    *,
    method: str,
    options: Options,
    ignore: tuple[str, ...] = (),
    identity: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> Sparsified:
    """Train a copy of a model so that much of it is zero or near zero, from the checkpoint if there is one.

    Args:
        model: Not changed.
        data: Train part for the weights, validation part for scores and what a method decides by them.
        task: Loss and metric.
        settings: Optimizer and schedule.
        method: One of `METHODS`.
        options: Of the method.
        ignore: Layers whose channels are left alone, by name or pattern.
        identity: What a checkpoint must belong to, besides data and settings.
        checkpoint: Path of the checkpoint; none is written without.
        progress: Told steps and losses.

    Raises:
        RecipeError: There is no such method.
        ConversionError: The model cannot be worked on: weights that are not finite, and for most methods, no
            channels that can be removed.
        TrainingError: Training collapsed again after every roll-back.
        CheckpointError: The checkpoint is damaged or belongs to another run.
    """
    chosen = method_of(method)
    image = torch.zeros(1, *data.in_shape)
    network = check(model, image)
    weights = weights_fingerprint(network)
    formats: dict[str, str] = {}
    loss_on_labels = task.training_loss(settings.label_smoothing)

    def placed(images: Tensor) -> Tensor:
        return images.contiguous(memory_format=FORMATS[formats["memory_format"]])

    def plain() -> nn.Module:
        # The format in which the weights are written: rounding must not decide on a tolerance.
        found: nn.Module = network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return found.eval()

    def fast() -> None:
        network.train().to(memory_format=FORMATS[formats["memory_format"]])  # type: ignore[call-overload]

    def score() -> Scored:
        scored = evaluate(plain(), data.validation, task.score)
        fast()
        return scored

    def renew() -> None:
        recalibrate(plain(), calibration_batches(data, CALIBRATION_IMAGES, seed=settings.seed))
        fast()

    check_outputs(data, task, _out_shape(network, image))
    work = Work(network, image, settings, steps_per_epoch(data, settings), score, renew, ignore)
    hooks = chosen.start(work, options)
    state = work.state

    def backward(images: Tensor, targets: Tensor) -> float:
        with autocast(formats["precision"]):
            outputs = network(placed(images))
        loss = loss_on_labels(outputs.float(), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def compute(images: Tensor, targets: Tensor, _: int) -> float:
        loss = backward(images, targets)
        hooks.gradients()
        return loss

    @contextmanager
    def guard(_: int, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        yield
        hooks.after_step(optimizer.param_groups[0]["lr"])

    def prepare(position: Position, _: torch.optim.Optimizer) -> None:
        if not position.choices:
            position.choices = dict(_formats(network, data, settings, backward, formats, work.steps))
        formats.update(position.choices)
        fast()
        if not state:
            state["before"] = dataclasses.asdict(score())
            hooks.begin()

    def before_epoch(epoch: int, _: torch.optim.Optimizer) -> None:
        if state.get("ended"):
            raise _EndedError
        hooks.begin_epoch(epoch)

    def validate(epoch: int, _: Position) -> None:
        hooks.end_epoch(epoch)

    with suppress(_EndedError):
        run_epochs(
            network,
            data,
            settings,
            compute,
            epochs=settings.epochs,
            identity={
                "kind": "sparse",
                "data": data.fingerprint,
                "weights": weights,
                "settings": settings.model_dump(mode="json"),
                "method": method,
                "options": options.model_dump(mode="json"),
                "ignore": list(ignore),
                **(identity or {}),
            },
            checkpoint=checkpoint,
            extra_state=state,
            validate=validate,
            guard=guard,
            prepare=prepare,
            before_epoch=before_epoch,
            progress=progress,
        )
    hooks.finish()
    after = score()
    account = account_of(work, hooks.account(), channels=chosen.channels)
    return Sparsified(plain(), Scored(**state["before"]), after, account)


def _out_shape(network: nn.Module, image: Tensor) -> tuple[int, ...]:
    with torch.no_grad():
        try:
            found = network(image)
        except Exception as error:
            raise ConversionError(
                f"{type(network).__name__} does not run on an image {tuple(image.shape[1:])} of the data: "
                f"{type(error).__name__}: {error}"
            ) from error
    if not isinstance(found, Tensor):
        raise ConversionError(f"{type(network).__name__} must return a tensor, got {type(found).__name__}")
    return tuple(found.shape[1:])


def _formats(
    network: nn.Module,
    data: DataSet,
    settings: OptimizerSettings,
    backward: Any,
    formats: dict[str, str],
    steps: int,
) -> dict[str, str]:
    """Time a few steps for precision and memory format, and leave the network as it was."""
    images, targets = next(training_batches(data, settings, epoch=0, seed=settings.seed))
    before = copy.deepcopy(network.state_dict())

    def timed(precision: str, memory: str) -> None:
        formats.update(precision=precision, memory_format=memory)
        network.to(memory_format=FORMATS[memory])  # type: ignore[call-overload]
        backward(images, targets)
        network.zero_grad(set_to_none=True)

    network.train()
    found = choose_formats(settings, timed, steps=settings.epochs * steps)
    # Timing must not move the statistics of batch norm.
    network.load_state_dict(before)
    return found
