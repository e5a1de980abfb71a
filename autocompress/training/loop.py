"""The training loop: schedule, checkpoints, resume, and roll-back when training collapses.

Everything random is a function of the seed, the epoch and the step, so that a run that was killed goes on
exactly as it would have.
"""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.errors import CheckpointError, TrainingError
from autocompress.progress import Progress, silent
from autocompress.recipe import OptimizerSettings
from autocompress.training.checkpoint import (
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from autocompress.training.data import Augmentation, DataSet, batches, order_of

# A checkpoint inside an epoch at most so often: writing it costs about as much as a few steps.
CHECKPOINT_SECONDS = 60.0
MAX_ROLLBACKS = 3
# A loss that was below two thirds of the first epoch's and then returns to it has lost what it had learned.
LEARNED, LOST = 0.67, 0.98
# The stream of what a network draws itself, apart from those of `paths`.
_NOISE = 4

Compute = Callable[[Tensor, Tensor, int], float]
"""Images, targets and step: forward and backward passes; returns the loss on the labels."""


@dataclass
class Position:
    """Where a run is, and what it has seen; all of it is in the checkpoint.

    Attributes:
        step: Optimizer steps done.
        rate: Factor on the learning rate, halved at each roll-back.
        rollbacks: How often training was rolled back.
        losses: Mean loss of each finished epoch.
        loss_sum: Sum of the losses of the epoch that is running.
        scores: `[epoch, name, value]` of each validation.
        choices: What was decided once for the run, such as the precision.
        seconds: Wall-clock time of the training, with that before a kill as far as its last checkpoint; not
            compared, since it differs from run to run.
    """

    step: int = 0
    rate: float = 1.0
    rollbacks: int = 0
    losses: list[float] = field(default_factory=list)
    loss_sum: float = 0.0
    scores: list[list[Any]] = field(default_factory=list)
    choices: dict[str, Any] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)


def learning_rate(settings: OptimizerSettings, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return the learning rate of a step: linear warm-up, then half a cosine down to zero."""
    warmup = settings.warmup_epochs * steps_per_epoch
    total = epochs * steps_per_epoch
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total - warmup, 1)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Make SGD with Nesterov momentum, or AdamW; no weight decay on biases and batch norm."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    nesterov = settings.momentum > 0
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=nesterov)


def steps_per_epoch(data: DataSet, settings: OptimizerSettings) -> int:
    """Return the optimizer steps of one epoch; an incomplete last batch is left out if there are others."""
    return max(1, len(cast(Sized, data.train)) // settings.batch_size)


def training_batches(
    data: DataSet, settings: OptimizerSettings, *, epoch: int, seed: int, skip: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the batches of an epoch, a function of seed and epoch only, from number `skip` on."""
    augmentation = Augmentation(shift=settings.shift, cutout=settings.cutout)
    size = min(settings.batch_size, len(cast(Sized, data.train)))
    found = batches(data.train, size, seed=seed, epoch=epoch, augment=augmentation, drop_last=True)
    return itertools.islice(found, skip, None)


def samples_of_step(
    data: DataSet, settings: OptimizerSettings, epoch: int, inside: int, *, seed: int
) -> Tensor:
    """Return which samples of the training part the batch number `inside` of an epoch holds, `(batch,)`."""
    count = len(cast(Sized, data.train))
    size = min(settings.batch_size, count)
    return torch.from_numpy(order_of(count, seed=seed, epoch=epoch)[inside * size : (inside + 1) * size])


def seed_of(settings: OptimizerSettings, position: Position) -> int:
    """Return the seed of batches: after a roll-back the same ones might lead to the same end."""
    return settings.seed + 7919 * position.rollbacks


@contextmanager
def seeded(seed: int, step: int) -> Iterator[None]:
    """Seed PyTorch's global generator by seed and step, and put back its state at the end.

    Dropout and dropped paths draw from it: what they draw then depends neither on what ran before nor on
    whether a run was resumed.
    """
    with torch.random.fork_rng(devices=[]):
        (word,) = np.random.SeedSequence((seed, _NOISE, step)).generate_state(1)
        # Not `torch.manual_seed`, which asks every kind of device and takes 20 times as long.
        torch.default_generator.manual_seed(int(word))
        yield


def run_epochs(
    model: nn.Module,
    data: DataSet,
    settings: OptimizerSettings,
    compute: Compute,
    *,
    epochs: int,
    identity: Mapping[str, Any],
    checkpoint: Path | None = None,
    extra_state: dict[str, Any] | None = None,
    validate: Callable[[int, Position], None] | None = None,
    guard: Callable[[int, torch.optim.Optimizer], AbstractContextManager[None]] | None = None,
    prepare: Callable[[Position, torch.optim.Optimizer], None] | None = None,
    before_epoch: Callable[[int, torch.optim.Optimizer], None] | None = None,
    after_epoch: Callable[[int, Position], None] | None = None,
    progress: Progress = silent,
    clock: Callable[[], float] = time.monotonic,
) -> Position:
    """Train for `epochs` epochs, from the checkpoint if there is one.

    Args:
        model: Trained in place.
        data: The train part only is read here.
        settings: Optimizer, schedule, batch size.
        compute: One step's forward and backward passes. What it draws from PyTorch's global generator is a
            function of seed and step; the generator's state is the same afterwards.
        epochs: How many.
        identity: What a checkpoint must belong to.
        checkpoint: Where checkpoints are; none are written without.
        extra_state: Tensors that belong to the run besides the model; saved, and restored in place.
        validate: Called after each epoch with the epoch and the position, may add to its `scores`.
        guard: Called with step and optimizer; wraps the optimizer's step.
        prepare: Called with position and optimizer at the start of a new run, may fill `choices`; on resume
            called with those.
        before_epoch: Called with epoch and optimizer at the start of each epoch that is not resumed in its
            middle.
        after_epoch: Called with epoch and position when the checkpoint of an epoch is on disk.
        progress: Told steps and the loss.
        clock: For the interval of checkpoints only.

    Raises:
        TrainingError: The loss is not finite, or training collapsed, again after `MAX_ROLLBACKS` roll-backs.
        CheckpointError: The checkpoint is damaged or belongs to another run.
        StorageError: A checkpoint cannot be written.
    """
    optimizer = make_optimizer(model, settings)
    per_epoch = steps_per_epoch(data, settings)
    position = Position()
    extra_state = {} if extra_state is None else extra_state
    started, before = time.monotonic(), 0.0

    def content() -> dict[str, Any]:
        position.seconds = before + time.monotonic() - started
        return {
            "position": dict(vars(position)),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "extra": extra_state,
            "random": random_state(),
        }

    def restore(saved: Mapping[str, Any]) -> None:
        for key, value in saved["position"].items():
            setattr(position, key, value)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        extra_state.clear()
        extra_state.update(saved["extra"])
        set_random_state(saved["random"])

    def snapshot() -> dict[str, Any]:
        return copy.deepcopy(content())

    if checkpoint is not None and checkpoint.exists():
        saved = load_checkpoint(checkpoint, identity)
        try:
            restore(saved)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            # Its identity is right, its content is not: a damaged or forged file, or another network.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"checkpoint {checkpoint} does not fit this network: {reason}") from None
        before = position.seconds
    if prepare is not None:
        with seeded(settings.seed, position.step):
            prepare(position, optimizer)
    if checkpoint is not None and not checkpoint.exists():
        save_checkpoint(checkpoint, identity, content())
    good = snapshot()
    saved_at = clock()
    total = epochs * per_epoch
    while position.step < total:
        epoch, inside = divmod(position.step, per_epoch)
        if inside == 0 and before_epoch is not None:
            before_epoch(epoch, optimizer)
            good = snapshot()
        collapse = ""
        seed = seed_of(settings, position)
        model.train()
        for images, targets in training_batches(data, settings, epoch=epoch, seed=seed, skip=inside):
            rate = position.rate * learning_rate(settings, position.step, per_epoch, epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            with seeded(seed, position.step):
                loss = compute(images, targets, position.step)
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip))
            if not math.isfinite(loss) or not math.isfinite(norm):
                what = "loss" if not math.isfinite(loss) else "gradient"
                collapse = f"the {what} is {loss if what == 'loss' else norm} at step {position.step}"
                break
            with nullcontext() if guard is None else guard(position.step, optimizer):
                optimizer.step()
            position.step += 1
            position.loss_sum += loss
            progress(position.step, total, f"epoch {epoch + 1}/{epochs}, loss {loss:.3f}")
            if checkpoint is not None and clock() - saved_at > CHECKPOINT_SECONDS:
                save_checkpoint(checkpoint, identity, content())
                saved_at = clock()
        if not collapse:
            position.losses.append(position.loss_sum / per_epoch)
            position.loss_sum = 0.0
            collapse = _collapsed(position.losses)
        if collapse:
            rollbacks, rate = position.rollbacks + 1, position.rate / 2
            if rollbacks > MAX_ROLLBACKS:
                raise TrainingError(
                    f"training collapsed: {collapse}, after {MAX_ROLLBACKS} roll-backs with smaller learning "
                    f"rates (the last {position.rate * settings.learning_rate:g}); lower learning_rate "
                    f"({settings.learning_rate:g}) or gradient_clip ({settings.gradient_clip:g}), or check "
                    "the images and labels for values that are not finite"
                )
            restore(good)
            position.rollbacks, position.rate = rollbacks, rate
            good = snapshot()
            progress(position.step, total, f"rolled back: {collapse}")
            continue
        if validate is not None:
            validate(epoch, position)
        if checkpoint is not None:
            save_checkpoint(checkpoint, identity, content())
            saved_at = clock()
        if after_epoch is not None:
            after_epoch(epoch, position)
        good = snapshot()
    return position


def _collapsed(losses: list[float]) -> str:
    """Say why the last epoch's loss is a collapse; empty if it is none."""
    best = min(losses)
    if best < LEARNED * losses[0] and losses[-1] > LOST * losses[0]:
        return (
            f"the loss of epoch {len(losses)} is {losses[-1]:.3f} after {best:.3f}, as high as at the start"
        )
    return ""
