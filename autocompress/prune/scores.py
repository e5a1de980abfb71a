"""What criteria of importance look at, and scores of units out of numbers of channels."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from autocompress.errors import DataError
from autocompress.prune.labels import Labels
from autocompress.prune.layers import Structure
from autocompress.prune.source import Source

Scores = dict[str, NDArray[np.float64]]
"""Name of a group to one number a unit, in the order of the group's units; more matters more."""

Batch = tuple[Tensor, Tensor]
"""Images `(batch, channels, height, width)`, and what `Loss` compares the outputs for them with."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of outputs and targets, the mean over the batch."""


@dataclass(frozen=True)
class Given:
    """What a criterion looks at.

    Attributes:
        source: The model and its groups.
        structure: What the model is made of.
        data: Batches, for criteria that need them.
        loss: Its derivatives are taken, for criteria that need it.
        seed: Of all that is drawn.
    """

    source: Source
    structure: Structure
    data: Iterable[Batch] | None
    loss: Loss | None
    seed: int

    def batches(self) -> Iterator[Batch]:
        """Yield the batches, on the device of the model.

        Raises:
            DataError: There is none, or one is no pair.
        """
        yield from batches_of(self.source, self.data or ())


def batches_of(source: Source, data: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches, on the device of a model.

    Raises:
        DataError: There is none, or one is no pair.
    """
    device = next(source.model.parameters()).device
    number = -1
    for number, batch in enumerate(data):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise DataError(
                f"batch {number} must be a pair of images and targets, got {type(batch).__name__}"
            )
        yield batch[0].to(device), batch[1].to(device)
    if number < 0:
        raise DataError("at least one batch of images is needed, got none")


class Tally:
    """Means of units over the channels that carry their labels.

    Args:
        source: The model and its groups.
    """

    def __init__(self, source: Source) -> None:
        self.groups = source.groups
        size = 1 + max(int(labels.max()) for axes in source.trace.slices.values() for labels in axes.values())
        self.sums = np.zeros(size)
        self.counts = np.zeros(size)

    def add(self, labels: Labels, sums: NDArray[np.float64], count: int = 1) -> None:
        """Add a sum of so many numbers for each channel, `(channels,)`."""
        size = len(self.sums)
        self.sums += np.bincount(labels, sums, size)
        self.counts += np.bincount(labels, minlength=size) * count

    def means(self) -> Scores:
        """Return the means, of those groups alone of which every unit has had a channel."""
        return {
            group.name: self.sums[group.units] / self.counts[group.units]
            for group in self.groups
            if self.counts[group.units].all()
        }


def over_units(source: Source, values: Iterable[tuple[Labels, NDArray[np.float64]]]) -> Scores:
    """Return the mean of each unit over the channels with its label.

    Args:
        source: The model and its groups.
        values: Labels of channels, and a number of each.

    Returns:
        Only groups of which every unit has a channel among these.
    """
    tally = Tally(source)
    for labels, numbers in values:
        tally.add(labels, numbers)
    return tally.means()
