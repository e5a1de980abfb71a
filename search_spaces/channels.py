"""The channels of a user's own model: how many of each group are kept.

A group is what has to be cut together: the outputs of one layer, or of several that additions and the like
tie (`autocompress.prune`). An option is how many units of it are kept, the most important ones first. Nothing
is built to price a network; what is built is the user's own model with fewer channels.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from autocompress.errors import SpaceError
from autocompress.ops import Ops, OpSpec
from autocompress.prune.check import check_buffers
from autocompress.prune.load import load_model, takes
from autocompress.prune.network import NarrowNetwork
from autocompress.prune.source import Source, Table
from autocompress.space import Block, Choice, Option, SearchSpace

MAX_SETTINGS = 20_000
"""Settings of one operation that are priced together; a concatenation of more is priced part by part."""


def channels(
    model: str,
    *,
    image: Sequence[int] = (3, 32, 32),
    weights: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    classes: int | None = None,
    steps: int = 10,
    align: int = 1,
    ignore: Sequence[str] = (),
) -> SearchSpace:
    """Make the space of a model that a recipe names.

    Args:
        model: `file.py:factory` or `module:factory`.
        image: Channels, height and width of the images it takes.
        weights: File of its trained weights.
        arguments: Of the factory.
        classes: Given to the factory if it takes `classes` or `num_classes` and `arguments` has none.
        steps: See `channel_space`.
        align: See `channel_space`.
        ignore: See `channel_space`.

    Raises:
        ConversionError: The model cannot be made, traced or narrowed.
        SpaceError: An argument is out of its range.
    """
    if len(image) != 3 or not all(isinstance(size, int) and size > 0 for size in image):
        raise SpaceError(f"image must be channels, height and width, integers >= 1, got {image!r}")
    given = dict(arguments or {})
    taken = takes(model)
    for name, value in {"classes": classes, "num_classes": classes, "in_channels": image[0]}.items():
        if name in taken and name not in given and value is not None:
            given[name] = value
    found = load_model(model, given, weights)
    source = Source(found, torch.zeros(1, *image), ignore=ignore)
    source.origin = {"model": model, "arguments": given}
    space = channel_space(source, steps=steps, align=align)
    settings = {
        "model": model,
        "image": list(image),
        "weights": weights,
        "arguments": given,
        "steps": steps,
        "align": align,
        "ignore": list(ignore),
    }
    return SearchSpace(space.name, space.choices, space.blocks, settings=settings)


def channel_space(source: Source, *, steps: int = 10, align: int = 1) -> SearchSpace:
    """Make the space of a model that is at hand.

    Args:
        source: The model; its ranking says which channels stay.
        steps: Options of a group: shares 1/steps, 2/steps, ... of its units.
        align: Options are rounded to multiples of so many units, but for all of them.

    Raises:
        SpaceError: `steps` or `align` is below 1.
        ConversionError: The model has buffers that networks of different widths cannot share.
    """
    check_buffers(source.model)
    for name, value in {"steps": steps, "align": align}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SpaceError(f"{name} must be an integer >= 1, got {value!r}")
    choices = tuple(
        Choice(group.name, _options(len(group), least, steps, align))
        for group, least in zip(source.groups, source.least, strict=True)
    )
    parts = [part for number in range(len(source.trace.priced)) for part in _parts(source, number, choices)]
    names = tuple(choice.name for choice in choices)
    whole = NarrowNetwork(type(source.model).__name__, source.digest, source.full, source)
    block = Block("network", names, partial(_network, whole), tuple(parts))
    return SearchSpace("channels", choices, (block,))


def _options(units: int, least: int, steps: int, align: int) -> tuple[int, ...]:
    rounded = (max(least, align * round(units * step / steps / align)) for step in range(1, steps + 1))
    return tuple(sorted({*(count for count in rounded if 0 < count < units), units}))


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
