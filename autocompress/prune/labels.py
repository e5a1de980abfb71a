"""Labels of channels: which channels of a network must be kept or removed together.

Every channel that a layer makes gets a label, a positive integer; 0 is what has to stay. Labels travel with
the channels through the network. An addition makes pairs of them one (a union); a concatenation puts them
side by side; flattening repeats them. In the end a unit is a set of joined labels, and units that some layer
makes side by side are a group: one width decides how many of them are kept.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]

FIXED = 0
"""The label of what cannot be removed: inputs, outputs, and what a layer that is not understood touches."""


class Unions:
    """Labels and which of them are the same (union-find); the root of what joins `FIXED` is `FIXED`."""

    def __init__(self) -> None:
        self._parents: list[int] = [FIXED]

    def fresh(self, count: int) -> Labels:
        """Return new labels."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return np.arange(first, first + count, dtype=np.int64)

    def root(self, label: int) -> int:
        """Return the smallest label that this one is the same as."""
        parents = self._parents
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    def roots(self, labels: Labels) -> Labels:
        """Return the root of every label, in the same shape."""
        unique, places = np.unique(labels, return_inverse=True)
        roots = np.array([self.root(int(label)) for label in unique], dtype=np.int64)
        return roots[places].reshape(labels.shape)

    def join(self, first: Iterable[int], second: Iterable[int]) -> None:
        """Make pairs of labels the same."""
        for a, b in zip(first, second, strict=True):
            a, b = sorted((self.root(int(a)), self.root(int(b))))
            self._parents[b] = a

    def fix(self, labels: Labels) -> None:
        """Make labels such that have to stay."""
        for label in np.unique(labels):
            self._parents[self.root(int(label))] = FIXED
