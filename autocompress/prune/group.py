"""Groups of channels of which some can be removed, and an account of the layers that keep theirs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autocompress.prune.labels import FIXED, Labels, Reason
from autocompress.prune.trace import Trace


@dataclass(frozen=True)
class Group:
    """Units of which some are kept; of one layer, or of several that an addition or the like ties together.

    Attributes:
        name: That of the first layer.
        layers: The layers that make its channels, each with the labels of these.
        units: Labels of the units, in the order of the channels of those layers.
    """

    name: str
    layers: Mapping[str, Labels]
    units: Labels = field(repr=False)

    def __len__(self) -> int:
        """Return the number of units."""
        return len(self.units)

    def order(self, scores: NDArray[np.float64]) -> tuple[Labels, int]:
        """Return the units from the most to the least important, and how many at least have to stay.

        The first ones are such that each layer keeps a channel.

        Args:
            scores: One number a unit; more matters more. Of equals the first comes first.
        """
        order = self.units[np.argsort(-scores, kind="stable")].tolist()
        first: dict[int, None] = {}
        for labels in self.layers.values():
            own = set(labels.tolist())
            if FIXED not in own and not own & first.keys():
                first[next(unit for unit in order if unit in own)] = None
        return np.array([*first, *(u for u in order if u not in first)], dtype=np.int64), max(len(first), 1)


@dataclass(frozen=True)
class Kept:
    """Channels that have to stay, and why.

    Attributes:
        layer: Name of the layer that makes them.
        channels: How many of its channels.
        reason: What stands against it.
        advice: What the user can do; empty where that is nothing.
    """

    layer: str
    channels: int
    reason: str
    advice: str


def groups_of(trace: Trace) -> tuple[Group, ...]:
    """Return the groups of which something can be removed, in the order of their first layers."""
    joined: dict[int, int] = {}
    members: dict[int, list[str]] = {}
    for number, (layer, labels) in enumerate(trace.made.items()):
        units = [unit for unit in dict.fromkeys(labels.tolist()) if unit != FIXED]
        known = sorted({joined[unit] for unit in units if unit in joined})
        members[number] = [name for other in known for name in members.pop(other)] + [layer]
        merged = {unit for unit, other in joined.items() if other in known} if known else set()
        joined.update(dict.fromkeys((*merged, *units), number))
    order = {layer: number for number, layer in enumerate(trace.made)}
    found = []
    for layers in sorted(members.values(), key=lambda names: min(order[name] for name in names)):
        made = {layer: trace.made[layer] for layer in sorted(layers, key=order.__getitem__)}
        own = dict.fromkeys(unit for labels in made.values() for unit in labels.tolist() if unit != FIXED)
        group = Group(next(iter(made)), made, np.array(list(own), dtype=np.int64))
        if len(group) > 1 and group.order(np.zeros(len(group)))[1] < len(group):
            found.append(group)
    return tuple(found)


def kept_of(trace: Trace, groups: tuple[Group, ...]) -> Iterator[Kept]:
    """Yield one entry for each layer that keeps some or all of its channels whatever the widths are."""
    narrowed = {layer for group in groups for layer in group.layers}
    for layer, units in trace.units.items():
        stays = [unit for unit in units.tolist() if unit in trace.stays]
        if stays or layer not in narrowed:
            reason = trace.stays[stays[0]] if stays else _whole(units)
            text = reason.text
            if reason.layer:
                text = f"{'it' if reason.layer == layer else f'{reason.layer}, tied to it,'} {text}"
            yield Kept(layer, len(stays) or len(units), text, reason.advice)


def _whole(units: Labels) -> Reason:
    if len(units) == 1:
        return Reason("it makes a single channel")
    if len(set(units.tolist())) == 1:
        return Reason(
            "its channels can only be removed all together, since a later layer reads them as positions of a "
            "map, or an operation needs the same number in each of several parts",
        )
    return Reason("it and the layers tied to it have too few channels to remove any")
