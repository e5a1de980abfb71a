"""Bilevel training: a differentiable strategy and the supernet's weights, each on images of its own.

Source: Liu et al., DARTS, ICLR 2019, algorithm 1: before each step of the weights on one half of the training
images the architecture makes one on the other half.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from autocompress.describe import describe_epoch
from autocompress.differentiable import Differentiable, Moment, Phase, Sandwiched
from autocompress.differentiable import Images as Batch
from autocompress.elastic.mixture import Gates, run_mixture
from autocompress.elastic.supernet import Supernet
from autocompress.errors import DataError, RecipeError
from autocompress.progress import Progress, silent
from autocompress.recipe import TrainSettings
from autocompress.space import SearchSpace
from autocompress.training.data import DataSet, Images
from autocompress.training.loop import Position, run_epochs, steps_per_epoch, training_batches
from autocompress.training.task import Task

# What is random in a step depends on these two and on nothing before it.
_STRIDE = 1_000_003


def train_relaxed(
    supernet: Supernet,
    strategy: Differentiable,
    data: DataSet,
    task: Task,
    settings: TrainSettings,
    *,
    seed: int,
    share: float = 0.5,
    smaller: Callable[[Mapping[str, Any]], SearchSpace] | None = None,
    identity: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> Position:
    """Train a supernet and the architecture parameters of a strategy, from the checkpoint if there is one.

    Args:
        supernet: Trained in place.
        strategy: Likewise.
        data: The training part alone is read, and split in two.
        task: Losses.
        settings: Of the weights; `schedule` and `random_networks` have no meaning here.
        seed: Of what the strategy samples.
        share: Of the training part that goes to the weights.
        smaller: Makes the space, with the same choices, under other settings; for strategies that train
            smaller supernets first.
        identity: What a checkpoint must belong to, besides data, space and settings.
        checkpoint: Path of the checkpoint; none is written without. Phases before the last have their own
            beside it.
        progress: Told steps and losses.
        say: Told after every epoch what the strategy sees of its architecture parameters.

    Returns:
        The position of the last phase, with the seconds of all.

    Raises:
        DataError: A part of the split has no images.
        RecipeError: There are fewer epochs than phases, or phases in other sizes and no `smaller`.
        TrainingError: Training collapsed again after every roll-back, or the architecture parameters are not
            finite.
        CheckpointError: The checkpoint is damaged or belongs to another run.
    """
    parts = halves(data, share)
    phases = strategy.phases
    if settings.epochs < len(phases):
        raise RecipeError(
            f"this search trains in {len(phases)} phases, which need as many epochs, got {settings.epochs}"
        )
    seconds = 0.0
    for at, (phase, epochs) in enumerate(zip(phases, _epochs(phases, settings.epochs), strict=True)):
        last = at == len(phases) - 1
        strategy.begin(at)
        position = _train_phase(
            supernet if last else _smaller(supernet.space, phase.settings, smaller).supernet(),
            strategy,
            parts,
            task,
            settings.model_copy(update={"epochs": epochs}),
            seed=seed + at,
            identity={
                "data": data.fingerprint,
                "kind": "relaxed",
                "phase": [at, dict(phase.settings)],
                **(identity or {}),
            },
            checkpoint=checkpoint
            if last or checkpoint is None
            else checkpoint.with_stem(f"{checkpoint.stem}-phase{at + 1}"),
            progress=progress,
            say=say,
        )
        seconds += position.seconds
    return replace(position, seconds=seconds)


def _epochs(phases: Sequence[Phase], total: int) -> list[int]:
    """Return the epochs of each phase: its share, at least one, and as many as there are in all."""
    ends, share = [0], 0.0
    for at, phase in enumerate(phases):
        share += phase.share
        later = len(phases) - at - 1
        ends.append(min(max(round(total * share), ends[-1] + 1), total - later))
    return [end - start for start, end in itertools.pairwise(ends)]


def _smaller(
    space: SearchSpace,
    settings: Mapping[str, Any],
    make: Callable[[Mapping[str, Any]], SearchSpace] | None,
) -> SearchSpace:
    if not settings:
        return space
    if make is None:
        raise RecipeError(
            f"this search trains a supernet with {dict(settings)} first, which nothing here makes"
        )
    return make(settings)


def _train_phase(
    supernet: Supernet,
    strategy: Differentiable,
    parts: tuple[DataSet, DataSet],
    task: Task,
    settings: TrainSettings,
    *,
    seed: int,
    identity: Mapping[str, Any],
    checkpoint: Path | None,
    progress: Progress,
    say: Callable[[str], None],
) -> Position:
    """Train a supernet and the architecture parameters, from the checkpoint if there is one."""
    ours, theirs = parts
    per_epoch = steps_per_epoch(ours, settings)
    steps = settings.epochs * per_epoch
    (arch,) = supernet.space.decode(strategy.start)
    on_labels = task.training_loss(settings.label_smoothing)
    affine = isinstance(strategy, Sandwiched)
    network = _Network(supernet, arch, strategy.channels, on_labels, affine=affine)
    held_out = _Endless(theirs, settings)
    extra: dict[str, Any] = {"strategy": strategy.state_dict()}
    last: list[Any] = [extra["strategy"]]

    def compute(images: Tensor, targets: Tensor, step: int) -> float:
        if extra["strategy"] is not last[0]:  # resumed, or rolled back
            strategy.load_state_dict(extra["strategy"])
        generator = torch.Generator().manual_seed(seed * _STRIDE + step)
        moment = Moment(step, steps, generator, per_epoch)
        strategy.architecture_step(network, (images, targets), held_out.batch(step), moment)
        extra["strategy"] = last[0] = strategy.state_dict()
        with torch.no_grad():
            gates = strategy.weight_gates(moment)
            taught = strategy.taught_gates(moment) if isinstance(strategy, Sandwiched) else ()
        outputs = network.outputs(images, gates)
        loss = on_labels(outputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        for smaller in taught:
            lesson = task.distillation(network.outputs(images, smaller), outputs.detach())
            lesson.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def validate(epoch: int, position: Position) -> None:
        say(describe_epoch(strategy.notes["relaxation"]))

    def prepare(position: Position, optimizer: torch.optim.Optimizer) -> None:
        network.optimizer = optimizer

    position = run_epochs(
        supernet,
        ours,
        settings,
        compute,
        epochs=settings.epochs,
        identity={
            "space": supernet.space.describe(),
            "settings": settings.model_dump(mode="json"),
            **identity,
        },
        checkpoint=checkpoint,
        extra_state=extra,
        validate=validate,
        prepare=prepare,
        progress=progress,
    )
    strategy.load_state_dict(extra["strategy"])
    return position


def halves(data: DataSet, share: float) -> tuple[DataSet, DataSet]:
    """Split the training part: the first `share` of it and the rest, both stratified as the whole is.

    Raises:
        DataError: One of them has no images.
    """
    total = len(cast(Sized, data.train))
    count = round(share * total)
    if not 0 < count < total:
        raise DataError(
            f"a differentiable search splits the {total} training images in two; a share of {share} leaves "
            "one part without images"
        )
    return (
        replace(data, train=_part(data.train, 0, count)),
        replace(data, train=_part(data.train, count, total)),
    )


def _part(train: Dataset[Any], start: int, end: int) -> Dataset[Any]:
    if isinstance(train, Images):
        return Images(train.images[start:end], train.labels[start:end], train.mean, train.std, train.flip)
    return Subset(train, range(start, end))


class _Endless:
    """Batches of a training part by the number of a step: a function of settings and step alone."""

    def __init__(self, data: DataSet, settings: TrainSettings) -> None:
        self._data, self._settings = data, settings
        self._per_epoch = steps_per_epoch(data, settings)
        self._next = -1
        self._batches: Iterator[Batch] = iter(())

    def batch(self, step: int) -> Batch:
        epoch, inside = divmod(step, self._per_epoch)
        if step != self._next or inside == 0:
            # Another seed than the weights have: their images are augmented otherwise.
            self._batches = training_batches(
                self._data, self._settings, epoch=epoch, seed=self._settings.seed + 1, skip=inside
            )
        self._next = step + 1
        found: Batch = next(self._batches)
        return found


class _Network:
    """A supernet with its task, run as mixtures."""

    def __init__(self, supernet: Supernet, arch: Any, channels: int, loss: Any, *, affine: bool) -> None:
        self._supernet, self._arch = supernet, arch
        self._channels, self._loss, self._affine = channels, loss, affine
        self.optimizer: torch.optim.Optimizer | None = None

    def outputs(self, images: Tensor, gates: Gates) -> Tensor:
        """Return the outputs of a mixture, in 32-bit floats."""
        return run_mixture(
            self._supernet, images, self._arch, gates, affine=self._affine, channels=self._channels
        ).float()

    def loss(self, batch: Batch, gates: Gates) -> Tensor:
        """Return the loss on the labels."""
        images, targets = batch
        found: Tensor = self._loss(self.outputs(images, gates), targets)
        return found

    @property
    def weights(self) -> list[tuple[nn.Parameter, Mapping[str, Any]]]:
        """The weights with the settings of their optimizer."""
        return [(weight, group) for group in self._known.param_groups for weight in group["params"]]

    def velocity(self, weight: nn.Parameter) -> Tensor | None:
        """Return the momentum of a weight."""
        found: Tensor | None = self._known.state.get(weight, {}).get("momentum_buffer")
        return found

    @property
    def _known(self) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, self.optimizer)
