"""Units of a network while it is trained: scales of batch norm, filters, and what a unit is zero by."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autocompress.errors import ConversionError
from autocompress.prune.labels import FIXED, Labels
from autocompress.prune.layers import is_depthwise, leaving, tensors_of
from autocompress.prune.scores import Given, Scores
from autocompress.sparse.method import Work


@dataclass(frozen=True)
class Entries:
    """A parameter, and whose channels lie along one of its axes.

    Attributes:
        name: Of the parameter.
        tensor: The parameter.
        axis: Of the channels.
        labels: Units of the channels; 0 where they belong to no group.
    """

    name: str
    tensor: Tensor
    axis: int
    labels: Tensor

    def of(self, units: Tensor) -> Tensor:
        """Return the positions of some units."""
        return torch.isin(self.labels, units).nonzero().flatten()


def scales(work: Work, method: str) -> list[Entries]:
    """Return the scales of batch norm with channels that can be removed; all of them can be trained.

    Raises:
        ConversionError: There is none.
    """
    found = []
    for norm in work.structure.norms:
        axes = work.source.trace.slices.get(norm.scale, {})
        if 0 in axes and (entries := _entries(work, norm.scale, 0, axes[0])).labels.any():
            found.append(entries)
    trained = [entries for entries in found if entries.tensor.requires_grad]
    if not trained:
        what = "all of them have requires_grad=False" if found else "no channel that can be removed has one"
        raise ConversionError(
            f"method {method!r} trains scales of batch norm, and of those of {type(work.network).__name__} "
            f"{what}; methods without batch norm are soft, play-and-prune and magnitude"
        )
    return trained


def filters(work: Work) -> list[Entries]:
    """Return the filters of all layers that make channels that can be removed, along their outputs."""
    return [
        _entries(work, layer.weight, 0, leaving(work.source, layer))
        for layer in work.structure.layers
        if not is_depthwise(work.source, layer)
    ]


def parts(work: Work) -> list[Entries]:
    """Return all by which units are made and read: filters, biases, batch norms, weights that read them.

    A unit that is zero in all of these adds nothing to the network, whatever comes between: without its
    readers an activation that is not 0 at 0, without its norm's shift a ReLU would pass something on. Other
    parameters (slopes of PReLU, a user's own) are left out: one might divide by them.
    """
    source = work.source
    made = [(name, 0) for layer in work.structure.layers for name in layer.filters]
    made += [(name, 0) for norm in work.structure.norms for name in (norm.scale, norm.shift)]
    places = dict.fromkeys((*made, *sorted(source.trace.reads)))
    return [
        _entries(work, name, axis, source.trace.slices[name][axis])
        for name, axis in places
        if axis in source.trace.slices.get(name, {})
    ]


def clear(entries: Iterable[Entries], units: Tensor) -> None:
    """Set what belongs to some units to zero."""
    with torch.no_grad():
        for one in entries:
            one.tensor.index_fill_(one.axis, one.of(units), 0.0)


def dead(work: Work) -> set[int]:
    """Return the units that are zero in all `parts`."""
    alive: set[int] = set()
    for one in parts(work):
        rows = one.tensor.detach().movedim(one.axis, 0).reshape(one.tensor.shape[one.axis], -1)
        alive |= set(one.labels[rows.ne(0).any(1)].tolist())
    return {unit for group in work.source.groups for unit in group.units.tolist()} - alive


def zero_units(work: Work) -> dict[str, int]:
    """Return how many units of each group are zero in all `parts`."""
    gone = dead(work)
    return {group.name: len(gone & set(group.units.tolist())) for group in work.source.groups}


def scored(work: Work, criterion: Callable[[Given], Scores]) -> Scores:
    """Return the scores of the units by the weights as they are now.

    Raises:
        ConversionError: A group has none.
    """
    found = criterion(work.given)
    for group in work.source.groups:
        if group.name not in found:
            raise ConversionError(
                f"group {group.name!r} has no filters to compare: no convolution or linear layer was seen to "
                "make all of its channels; put its layers on the list of those to ignore"
            )
    return found


def lowest(
    work: Work, scores: Scores, share: float, *, gone: Iterable[int] = (), at_least: int = 0
) -> Iterator[int]:
    """Yield the lowest units of each group: a share, rounded down, of those that are not gone.

    Each layer keeps a channel.
    """
    gone = set(gone)
    for group in work.source.groups:
        order, least = group.order(scores[group.name])
        left = [unit for unit in order.tolist() if unit not in gone]
        # 0.3 * 10 is just below 3.
        count = min(max(at_least, int(share * len(left) + 1e-9)), len(left) - least)
        yield from left[len(left) - max(count, 0) :]


def _entries(work: Work, name: str, axis: int, labels: Labels) -> Entries:
    numbers, _ = work.source.places(labels)
    own = torch.from_numpy(np.where(numbers >= 0, labels, FIXED))
    return Entries(name, tensors_of(work.network)[name], axis, own)
