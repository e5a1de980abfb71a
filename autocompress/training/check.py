"""Before hours of training: do loss, distillation and metric take what space and data give?"""

from collections.abc import Callable

import torch
from torch import Tensor

from autocompress.errors import DataError
from autocompress.network import build_network
from autocompress.recipe import FinetuneSettings
from autocompress.space import SearchSpace
from autocompress.training.auxiliary import with_auxiliary
from autocompress.training.data import DataSet, batches
from autocompress.training.drop_path import drop_paths
from autocompress.training.task import Task

CHECKED_IMAGES = 8


def check_task(data: DataSet, task: Task, space: SearchSpace) -> None:
    """Try a task on the outputs of the smallest network of a space.

    Raises:
        DataError: As `check_outputs`, or the networks take other channels than the data have.
    """
    blocks = space.operations(space.smallest())
    in_shape = blocks[0][1][0].in_shape
    if in_shape[0] != data.in_shape[0]:
        raise DataError(
            f"networks of space {space.name} take {in_shape[0]} channels, the images of {data.name} have "
            f"{data.in_shape[0]}"
        )
    with torch.no_grad():
        outputs = build_network(blocks, initialise=False).eval()(torch.zeros(1, *in_shape))
    check_outputs(data, task, tuple(outputs.shape[1:]))


def check_regularisers(data: DataSet, settings: FinetuneSettings, space: SearchSpace) -> None:
    """Refuse regularisers of finetuning for which the largest network of a space has no place.

    Raises:
        RecipeError: Paths shall be dropped, or an auxiliary classifier sit, where it has none.
    """
    blocks = space.operations(space.largest())
    network = build_network(blocks, initialise=False)
    drop_paths(network, settings)
    if settings.auxiliary:
        with_auxiliary(network, data, settings, blocks[0][1][0].in_shape[1:])


def check_outputs(data: DataSet, task: Task, out_shape: tuple[int, ...]) -> None:
    """Try a task on the first images of the training and the validation part; the test part is not read.

    Args:
        data: Where images and targets come from.
        task: Loss, distillation and metric.
        out_shape: Shape of one output of the networks, without the batch.

    Raises:
        DataError: An input or a target is not finite; or a function of the task does not take the outputs and
            the targets, or does not return what it should.
    """
    for part_name, part in {"training": data.train, "validation": data.validation}.items():
        images, targets = next(batches(part, CHECKED_IMAGES, seed=None))
        for what, values in {"inputs": images, "targets": targets}.items():
            if isinstance(values, Tensor) and not torch.isfinite(values).all():
                raise DataError(f"{what} of the {part_name} part hold nan or infinity; clean {data.name}")
        outputs = torch.zeros(len(images), *out_shape)
        rows = (len(images),)
        _try("task.loss", task.loss, outputs, targets, (), part_name)
        _try("task.distillation", task.distillation, outputs, outputs, (), part_name)
        _try("task.metric", task.score, outputs, targets, rows, part_name)


def _try(
    key: str,
    function: Callable[[Tensor, Tensor], Tensor],
    outputs: Tensor,
    targets: Tensor,
    shape: tuple[int, ...],
    part_name: str,
) -> None:
    given = (
        f"{key} ({getattr(function, '__name__', function)}) was given outputs {outputs.dtype} "
        f"{tuple(outputs.shape)} and targets {targets.dtype} {tuple(targets.shape)} of the {part_name} part"
    )
    try:
        found = function(outputs, targets)
    except Exception as error:
        raise DataError(
            f"{given} and failed: {error}; choose the task, or the outputs of the space, for these targets"
        ) from error
    if not isinstance(found, Tensor) or tuple(found.shape) != shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        wanted = "one number a sample, larger is better" if shape else "one number, the mean over the batch"
        raise DataError(f"{given} and must return a tensor {shape}, {wanted}, got {got}")
