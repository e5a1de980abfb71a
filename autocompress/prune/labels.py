"""Labels of channels: which channels of a network must be kept or removed together.

Every channel that a layer makes gets a label, a positive integer; 0 is what has to stay. Labels travel with
the channels through the network. An addition makes pairs of them one (a union); a concatenation puts them
side by side; flattening repeats them. In the end a unit is a set of joined labels, and units that some layer
makes side by side are a group: one width decides how many of them are kept.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]

FIXED = 0
"""The label of what cannot be removed: inputs, outputs, and what a layer that is not understood touches."""


class Reason(NamedTuple):
    """Why channels have to stay.

    Attributes:
        text: What stands against removing them.
        advice: What the user can do; empty where that is nothing.
        layer: The layer that the text is the predicate of; empty if it is a sentence.
    """

    text: str
    advice: str = ""
    layer: str = ""


class Unions:
    """Labels, which of them are the same (union-find), and which have to stay."""

    def __init__(self) -> None:
        self._parents: list[int] = [FIXED]
        self._stays: dict[int, Reason] = {}

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

    def join(self, first: Labels, second: Labels, reason: Reason) -> None:
        """Make pairs of labels the same.

        Args:
            first: Labels, of any shape.
            second: As many.
            reason: Why those that are paired with `FIXED` have to stay.
        """
        pairs = np.unique(np.stack([first.reshape(-1), second.reshape(-1)]), axis=1)
        for one, other in pairs.T.tolist():
            a, b = sorted((self.root(one), self.root(other)))
            if a == b:
                continue
            if a == FIXED:
                self._stays.setdefault(b, reason)
                continue
            self._parents[b] = a
            if b in self._stays:
                self._stays.setdefault(a, self._stays.pop(b))

    def fix(self, labels: Labels, reason: Reason) -> None:
        """Make labels such that have to stay; those that have to already keep their first reason."""
        for label in np.unique(self.roots(labels)).tolist():
            if label != FIXED:
                self._stays.setdefault(label, reason)

    @property
    def stays(self) -> Mapping[int, Reason]:
        """The roots that have to stay, with the reason."""
        return dict(self._stays)
