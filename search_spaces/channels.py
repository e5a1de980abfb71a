"""The channels of a user's own model: how many of each group are kept.

A group is what has to be cut together: the outputs of one layer, or of several that additions and the like
tie (`autocompress.prune`). An option is how many units of it are kept, the most important ones first. Nothing
is built to price a network; what is built is the user's own model with fewer channels.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocompress.errors import SpaceError
from autocompress.ops import Ops, OpSpec
from autocompress.prune.check import check_buffers
from autocompress.prune.importance import CRITERIA, comparable
from autocompress.prune.importance import importance as importance_of
from autocompress.prune.load import arguments_of, load_model
from autocompress.prune.network import NarrowNetwork
from autocompress.prune.source import Source, Table
from autocompress.space import Block, Choice, Option, SearchSpace

Sample = tuple[Iterable[tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], Tensor]]
"""Batches of training images with their targets, and the loss of the task."""

MAX_SETTINGS = 20_000
"""Settings of one operation that are priced together; a concatenation of more is priced part by part."""


def channels(
    model: str,
    *,
    image: Sequence[int] = (3, 32, 32),
    weights: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    classes: int | None = None,
    importance: str = "l2",
    sample: Callable[[], Sample] | None = None,
    steps: int = 10,
    align: int = 1,
    ignore: Sequence[str] = (),
    tied: bool = True,
) -> SearchSpace:
    """Make the space of a model that a recipe names.

    Args:
        model: `file.py:factory` or `module:factory`.
        image: Channels, height and width of the images it takes.
        weights: File of its trained weights.
        arguments: Of the factory.
        classes: Given to the factory if it takes `classes` or `num_classes` and `arguments` has none.
        importance: Which channels stay: a criterion of `autocompress.prune.importance`.
        sample: Gives training images with their targets, and the loss, to criteria that look at some; a
            recipe leaves it out.
        steps: See `channel_space`.
        align: See `channel_space`.
        ignore: Layers that keep their channels, by name or pattern.
        tied: Whether channels are narrowed that several layers make, tied by shortcuts and the like.

    Raises:
        ConversionError: The model cannot be made, traced or narrowed.
        SpaceError: An argument is out of its range.
    """
    if len(image) != 3 or not all(type(size) is int and size > 0 for size in image):
        raise SpaceError(f"image must be channels, height and width, integers >= 1, got {image!r}")
    given = arguments_of(model, arguments or {}, classes=classes, in_channels=image[0])
    found = load_model(model, given, weights)
    source = Source(found, torch.zeros(1, *image), ignore=ignore)
    if not tied:
        source = source.untied()
    source.origin = {"model": model, "arguments": given}
    looks = importance in CRITERIA and CRITERIA[importance].batches
    batches, loss = sample() if sample is not None and looks else (None, None)
    scores = comparable(importance_of(source, importance, batches=batches, loss=loss), importance)
    space = channel_space(source, steps=steps, align=align, scores=scores)
    if all(len(choice.options) == 1 for choice in space.choices):
        raise SpaceError(
            f"no group of {type(source.model).__name__} has more than its full width with align {align} and "
            f"steps {steps}: the widest has {max(source.full)} units; take a smaller align"
        )
    settings = {
        "model": model,
        "image": list(image),
        "weights": weights,
        "arguments": given,
        "importance": importance,
        "steps": steps,
        "align": align,
        "ignore": list(ignore),
        "tied": tied,
    }
    return dataclasses.replace(space, settings=settings)


def channel_space(
    source: Source,
    *,
    steps: int = 10,
    align: int = 1,
    scores: Mapping[str, NDArray[np.float64]] | None = None,
    widths: Callable[[int], Iterable[int]] | None = None,
) -> SearchSpace:
    """Make the space of a model that is at hand.

    Args:
        source: The model; without scores its ranking says which channels stay.
        steps: Options of a group: shares 1/steps, 2/steps, ... of its units.
        align: Options are rounded to multiples of so many units, but for all of them.
        scores: Name of a group to one number a unit, 0 or more; what matters more stays longer. The options
            are worth the sum of what they keep (`SearchSpace.worth`).
        widths: Gives the options of a group of so many units, instead of `steps` and `align`.

    Raises:
        SpaceError: `steps` or `align` is below 1.
        ConversionError: The model has buffers that networks of different widths cannot share.
    """
    check_buffers(source.model)
    for name, value in {"steps": steps, "align": align}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SpaceError(f"{name} must be an integer >= 1, got {value!r}")
    if scores is not None:
        source = source.ranked(scores)
    choices = tuple(
        Choice(group.name, _options(len(group), least, widths or partial(_shares, steps=steps, align=align)))
        for group, least in zip(source.groups, source.least, strict=True)
    )
    worth = {}
    for group, order, choice in zip(source.groups, source.ranking, choices, strict=True):
        if scores is not None:
            of_unit = dict(zip(group.units.tolist(), scores[group.name].tolist(), strict=True))
            kept = np.cumsum([of_unit[unit] for unit in order.tolist()])
            worth[choice.name] = tuple(float(kept[int(option) - 1]) for option in choice.options)
    parts = [part for number in range(len(source.trace.priced)) for part in _parts(source, number, choices)]
    names = tuple(choice.name for choice in choices)
    whole = NarrowNetwork(type(source.model).__name__, source.digest, source.full, source)
    block = Block("network", names, partial(_network, whole), tuple(parts))
    return SearchSpace("channels", choices, (block,), worth=worth)


def _options(units: int, least: int, widths: Callable[[int], Iterable[int]]) -> tuple[int, ...]:
    """Return the options of a group, ascending; all of its units are one of them."""
    return tuple(sorted({*(count for count in widths(units) if least <= count < units), units}))


def _shares(units: int, *, steps: int, align: int) -> list[int]:
    return [align * max(1, round(units * step / steps / align)) for step in range(1, steps)]


def _network(whole: NarrowNetwork, *widths: Option) -> Ops:
    return (whole.at(tuple(int(width) for width in widths)),)


Counts = tuple[int, tuple[tuple[int, tuple[int, ...]], ...]]
"""Channels that always stay; place of a choice of the block, and how many more each number of units adds."""


def _parts(source: Source, number: int, choices: Sequence[Choice]) -> list[Block]:
    """Return the blocks that price an operation: one, or of a wide concatenation one a group."""
    priced, found = source.trace.priced[number], source.tables[number]
    name = f"{number}.{priced.name}"
    groups = sorted({group for _, added in found.values() for group in added})
    settings = math.prod(len(choices[group].options) for group in groups)
    # Each channel adds the same to the cost, which is the sum over the groups that channels come from. Inputs
    # and outputs of a depthwise convolution come from the same ones.
    wide = [field for field, (_, added) in found.items() if len(added) > 1]
    if settings <= MAX_SETTINGS or not (len(wide) == 1 or "groups" in wide):
        return [_block(source, name, priced.op, found)]
    blocks: list[Block] = []
    for group in sorted({group for field in wide for group in found[field][1]}):
        own: dict[str, Table] = {}
        for field, (always, added) in found.items():
            own[field] = (
                (0 if blocks else always, {group: added[group]}) if field in wide else (always, added)
            )
        # Bias and norm of a layer that reads several groups belong to none of them: they are counted once.
        once = {"bias", "norm"} if blocks and "groups" not in wide else set()
        fields = {field.name for field in dataclasses.fields(priced.op)}
        op = dataclasses.replace(priced.op, **dict.fromkeys(once & fields, False))
        blocks.append(_block(source, f"{name}.{len(blocks)}", op, own))
    return blocks


def _block(source: Source, name: str, op: OpSpec, found: Mapping[str, Table]) -> Block:
    groups = sorted({group for _, added in found.values() for group in added})
    places = {group: place for place, group in enumerate(groups)}
    counts = {
        field: (always, tuple((places[group], tuple(table.tolist())) for group, table in added.items()))
        for field, (always, added) in found.items()
    }
    return Block(name, tuple(source.groups[group].name for group in groups), partial(_narrow, op, counts))


def _narrow(op: OpSpec, counts: Mapping[str, Counts], *widths: Option) -> Ops:
    """Return an operation at some widths; none where no channel enters or leaves."""
    values = {
        field: always + sum(table[int(widths[place])] for place, table in added)
        for field, (always, added) in counts.items()
    }
    if not all(values.values()):
        return ()
    return (dataclasses.replace(op, **values),)
