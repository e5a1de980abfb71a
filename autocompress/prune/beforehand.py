"""What can be known of a model on its data before anything takes long."""

import math

import torch
from torch import nn

from autocompress.elastic.supernet import resize
from autocompress.errors import ConversionError
from autocompress.space import SearchSpace
from autocompress.training.data import DataSet, Images, batches
from autocompress.training.evaluate import Scored, evaluate
from autocompress.training.task import Task

TRIED_IMAGES = 4
ERRORS_ABOVE_CHANCE = 4
"""A score that is so many standard errors above chance is no chance."""


def check_trainable(network: nn.Module, side: tuple[int, int], data: DataSet, task: Task) -> None:
    """Take gradients once.

    Raises:
        ConversionError: Autograd refuses.
    """
    images, targets = next(batches(data.train, TRIED_IMAGES, seed=None))
    network.train()
    try:
        task.loss(network(resize(images, side)), targets).backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        text = next(iter(str(error).strip().splitlines()), "")
        raise ConversionError(
            f"the model cannot be finetuned: PyTorch takes no gradients through it ({text}); operations in "
            "place, such as relu_() and x[...] = y, are what usually stands in the way"
        ) from error
    finally:
        network.zero_grad(set_to_none=True)
        network.eval()


def describe_outputs(network: nn.Module, side: tuple[int, int], data: DataSet) -> list[str]:
    """Warn where a classifier has outputs that stand for no class of the data."""
    images = next(batches(data.train, TRIED_IMAGES, seed=None))[0]
    with torch.no_grad():
        outputs = network(resize(images, side))
    if not data.classes or outputs.dim() != 2 or outputs.shape[1] <= data.classes:
        return []
    return [
        f"WARNING: it has {outputs.shape[1]} outputs for {data.classes} classes: the first {data.classes} "
        "are taken for these, the others are never right. Give it a last layer for your own classes"
    ]


def score_of(network: nn.Module, side: tuple[int, int], data: DataSet, task: Task) -> Scored:
    """Return the score of a model, as it is, on the validation part."""
    network.eval()
    return evaluate(lambda images: network(resize(images, side)), data.validation, task.score)


def describe_score(scored: Scored, side: tuple[int, int], data: DataSet, task: Task) -> list[str]:
    """Say what a model scores as it was brought, on which images, and whether that is like guessing."""
    given = "values as your function gives them"
    if isinstance(data.train, Images):
        mean, std = (", ".join(f"{value:.3g}" for value in values) for values in (data.mean, data.std))
        given = f"values / 255, less the mean {mean}, over {std}"
    lines = [
        f"as you brought it: validation {task.metric} {scored.mean:.4f}, on images of {side[0]} x {side[1]}, "
        f"{given}"
    ]
    chance = 1 / data.classes if data.classes and task.metric == "accuracy" else -math.inf
    if scored.mean < chance + ERRORS_ABOVE_CHANCE * max(scored.standard_error, 1e-9):
        lines.append(
            f"WARNING: that is hardly better than guessing ({chance:.4f}). Was it trained on images of this "
            "size, normalised in this way, with classes in this order? See `Your data` in docs/shrink.md"
        )
    return lines


def in_shape_of(space: SearchSpace) -> tuple[int, int]:
    """Return height and width of the images of a space's networks."""
    ((_, (op,)),) = space.operations(space.largest())
    return op.in_shape[1], op.in_shape[2]


def report_of(space: SearchSpace, data: DataSet, task: Task, *, trained: bool) -> list[str]:
    """Check that a model can be trained; say what is odd about it, and what it scores if it was trained.

    Args:
        space: Of `search_spaces.channels`.
        data: Training part for gradients, validation part for the score.
        task: Loss and metric.
        trained: Whether the model brought its weights.

    Raises:
        ConversionError: Autograd refuses.
    """
    from autocompress.network import whole_network

    network, side = whole_network(space), in_shape_of(space)
    with torch.random.fork_rng(devices=[]):
        check_trainable(network, side, data, task)
    # Statistics of batch norm moved with the gradients.
    network = whole_network(space)
    found = describe_outputs(network, side, data)
    if not trained:
        return found
    return found + describe_score(score_of(network, side, data, task), side, data, task)
