"""A model that can be narrowed: its groups of channels, how many are kept, and the narrow model."""

import copy
import dataclasses
import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.errors import ConversionError
from autocompress.ops import OpSpec
from autocompress.prune import cut
from autocompress.prune.check import check
from autocompress.prune.group import Group, Kept, groups_of, kept_of
from autocompress.prune.labels import FIXED, Labels, Reason
from autocompress.prune.trace import Trace, trace
from autocompress.prune.trial import Trial

Widths = tuple[int, ...]
"""How many units of each group are kept."""

Table = tuple[int, Mapping[int, NDArray[np.int64]]]
"""Channels that always stay; group to how many more stay with so many units of it, `(units + 1,)`."""


class Source:
    """A model, and how its channels hang together.

    Args:
        model: Copied; the user's own is never changed.
        image: A batch it takes, `(batch, channels, height, width)`.
        ignore: Names of layers, or of modules that hold them, whose outputs stay as they are; `*` stands for
            any characters.

    Attributes:
        model: The copy, in evaluation mode.
        trace: What it does with its channels.
        groups: What can be narrowed.
        kept: The layers that keep channels whatever the widths are, with the reason.
        ranking: Units of each group, from the most to the least important.
        least: How many units of each group have to stay.
        origin: How the model is made again: `model`, the name of its factory, and `arguments`; empty if it
            was given as an object.

    Raises:
        ConversionError: The model cannot be traced, has a weight that is not finite, or nothing of it can be
            narrowed.
    """

    def __init__(self, model: nn.Module, image: Tensor, *, ignore: Sequence[str] = ()) -> None:
        """Trace the model, and try out that what is left of it computes the same."""
        self.origin: Mapping[str, Any] = {}
        self.model = check(model, image)
        self._hold(_ignoring(trace(self.model, image), ignore))
        trial = Trial(self.model, image)
        while (failure := trial.failure(self)) is not None:
            group = self.groups[failure.group]
            text = f"without some channels of {group.name} the model {failure.text}"
            reason = Reason(text, failure.advice)
            self._hold(self.trace.without(dict.fromkeys(group.units.tolist(), reason)))

    def _hold(self, found: Trace) -> None:
        self.trace = found
        self.groups: tuple[Group, ...] = groups_of(found)
        self.kept: tuple[Kept, ...] = tuple(kept_of(found, self.groups))
        if not self.groups:
            reasons = "; ".join(f"{kept.layer}: {kept.reason}" for kept in self.kept[:3])
            raise ConversionError(
                f"no channel of {type(self.model).__name__} can be removed: {reasons or 'it has no layers'}"
            )
        # A ranking says which channels matter; without one the first are kept.
        self._rank([group.order(np.zeros(len(group))) for group in self.groups])

    def _rank(self, orders: Sequence[tuple[Labels, int]]) -> None:
        for name in ("_places", "digest", "tables"):
            self.__dict__.pop(name, None)
        self.ranking: tuple[Labels, ...] = tuple(order for order, _ in orders)
        self.least: Widths = tuple(least for _, least in orders)

    def ranked(self, scores: Mapping[str, NDArray[np.float64]]) -> "Source":
        """Return the same model with its units in the order of importance.

        Args:
            scores: Name of a group to one number a unit; more matters more. Of equals the first is kept.

        Raises:
            ConversionError: A group has no scores, not one a unit, or one that is not a number.
        """
        for group in self.groups:
            given = scores.get(group.name)
            if given is None or np.shape(given) != (len(group),) or np.isnan(given).any():
                raise ConversionError(
                    f"scores of group {group.name} must be {len(group)} numbers, one a unit, got "
                    f"{'none' if given is None else given!r}"
                )
        other = copy.copy(self)
        other._rank([group.order(scores[group.name]) for group in self.groups])
        return other

    def untied(self) -> "Source":
        """Return the same model with channels left alone that several layers make, by additions and the like.

        Raises:
            ConversionError: No other channel can be removed.
        """
        makers = np.concatenate([np.unique(labels) for labels in self.trace.made.values()])
        units, counts = np.unique(makers, return_counts=True)
        reason = Reason("an addition or the like ties it to other layers, and tied ones are left alone")
        other = copy.copy(self)
        other._hold(
            self.trace.without(dict.fromkeys(units[(counts > 1) & (units != FIXED)].tolist(), reason))
        )
        return other

    def trying(self, model: nn.Module, ranking: Sequence[Labels]) -> "Source":
        """Return the same groups of another model of the same structure, for trials."""
        other = copy.copy(self)
        other.model = model
        other._rank([(order, least) for order, least in zip(ranking, self.least, strict=True)])
        return other

    # Counts ------------------------------------------------------------------------------------------

    @cached_property
    def _places(self) -> tuple[Labels, Labels]:
        """By label: the group it is a unit of, -1 if none, and its place in the ranking of that."""
        size = 1 + max(int(order.max()) for order in self.ranking)
        number, place = np.full(size, -1, dtype=np.int64), np.zeros(size, dtype=np.int64)
        for group, order in enumerate(self.ranking):
            number[order] = group
            place[order] = np.arange(len(order))
        return number, place

    def places(self, labels: Labels) -> tuple[Labels, Labels]:
        """Return the group of each channel, -1 for what always stays, and its place in the ranking."""
        number, place = self._places
        # Labels above those of all groups have to stay too.
        known = np.where(labels < len(number), labels, FIXED)
        return number[known], place[known]

    def counts(self, labels: Labels) -> Table:
        """Return how many of some channels are kept."""
        number, place = self.places(labels)
        found = {
            group: np.cumsum(np.bincount(place[number == group] + 1, minlength=len(self.ranking[group]) + 1))
            for group in np.unique(number[number >= 0]).tolist()
        }
        return int((number < 0).sum()), found

    @cached_property
    def tables(self) -> tuple[Mapping[str, Table], ...]:
        """`counts` of the widths of each operation of the trace."""
        return tuple(
            {field: self.counts(labels) for field, labels in priced.widths.items()}
            for priced in self.trace.priced
        )

    def operations(self, widths: Widths) -> tuple[OpSpec, ...]:
        """Return the operations that cost something, as the narrow model has them."""
        return tuple(
            dataclasses.replace(
                priced.op,
                **{
                    field: always + sum(int(table[widths[group]]) for group, table in added.items())
                    for field, (always, added) in tables.items()
                },
            )
            for priced, tables in zip(self.trace.priced, self.tables, strict=True)
        )

    def kept_positions(self, labels: Labels, widths: Widths) -> NDArray[np.int64]:
        """Return which of some channels are kept, ascending."""
        number, place = self.places(labels)
        found: NDArray[np.int64] = np.flatnonzero((number < 0) | (place < np.array(widths)[number]))
        return found

    @property
    def full(self) -> Widths:
        """All units of every group."""
        return tuple(len(group) for group in self.groups)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of the weights, the operations, the groups and the ranking."""
        digest = hashlib.sha256()
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        for priced in self.trace.priced:
            digest.update(f"{priced.name} {priced.op.key}".encode())
        for group, order in zip(self.groups, self.ranking, strict=True):
            digest.update(group.name.encode())
            digest.update(order.tobytes())
        return digest.hexdigest()[:16]

    # The narrow model --------------------------------------------------------------------------------

    def positions(self, widths: Widths) -> Iterator[cut.Cut]:
        """Yield name, axis and kept positions of every tensor that is cut at these widths."""
        for name, axes in self.trace.slices.items():
            for axis, labels in axes.items():
                kept = self.kept_positions(labels, widths)
                if len(kept) < len(labels):
                    yield name, axis, torch.from_numpy(kept)

    def masked(self, widths: Widths) -> nn.Module:
        """Return the whole model with the weights that read removed channels set to zero.

        It computes what the narrow model does: another way to the same, for tests and trials.
        """
        reads = self.trace.reads
        return cut.masked(self.model, (one for one in self.positions(widths) if one[:2] in reads))

    def narrowed(self, widths: Widths) -> nn.Module:
        """Return the model with so many units of each group: a plain PyTorch model, in evaluation mode.

        Forward hooks, buffers and shared modules are as they were; at full width it is a copy, bit for bit.
        """
        return cut.narrowed(self.model, self.positions(widths))

    def empty(self, widths: Widths) -> nn.Module:
        """Return the narrow model without values, on the meta device."""
        return cut.narrowed(self.model, self.positions(widths), meta=True)


def _ignoring(found: Trace, patterns: Sequence[str]) -> Trace:
    """Keep the channels of layers that the user names, by patterns like those of file names."""
    if isinstance(patterns, str):
        raise ConversionError(f"ignore must be a list of names, got the text {patterns!r}")
    reasons: dict[int, Reason] = {}
    for pattern in patterns:
        layers = [n for n in found.made if fnmatchcase(n, pattern) or n.startswith(f"{pattern}.")]
        if not layers:
            near = difflib.get_close_matches(pattern, found.made, n=5, cutoff=0) or list(found.made)[:5]
            raise ConversionError(
                f"ignore has {pattern!r}, which is no layer that makes channels; of the {len(found.made)} "
                f"there are, the nearest are {', '.join(near)}"
            )
        for layer in layers:
            reason = Reason("is on the list of those to ignore", layer=layer)
            for unit in found.made[layer].tolist():
                reasons.setdefault(unit, reason)
    reasons.pop(FIXED, None)
    return found.without(reasons)
