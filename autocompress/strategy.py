"""What a black-box search strategy is, and one that starts from given architectures.

A strategy is made as `strategy(constraints, seed=..., objective=..., **options)`. It is deterministic in
its arguments and the order of calls, can be pickled between calls, and touches no file, device or clock.
`autocompress.testing.strategy.StrategyContract` states these laws as tests.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from autocompress.space import Codes
from autocompress.trial import Batch


@runtime_checkable
class Strategy(Protocol):
    """Proposes architectures and learns from their evaluation."""

    def ask(self, n: int) -> Codes:
        """Propose up to `n` canonical architectures of the space, shape `(m, choices)`, m <= n.

        Fewer than `n` says that the strategy has to be told first, or has nothing new; none at all, after
        everything asked was told, says that it is finished.
        """

    def tell(self, batch: Batch) -> None:
        """Learn the outcome of architectures; each asked row is told exactly once.

        Before its first ask a strategy may be told rows that it did not ask for (`WarmStart`).
        """


@runtime_checkable
class Noted(Protocol):
    """A strategy that has something to say of its search, which then stands in `SearchResult.notes`.

    Attributes:
        notes: Plain values.
    """

    @property
    def notes(self) -> Mapping[str, Any]:
        """What is worth knowing of the search, such as the quality of a predictor."""


DISTANCE = "distance"
"""Metric of evaluators that are asked to compare: how far outputs are from those of the largest network."""


def compares(strategy: object) -> bool:
    """Whether a strategy, or a class of them, reads `DISTANCE`; it says so by an attribute of this name."""
    return bool(getattr(strategy, "compares", False))


def at_most(strategy: Strategy, evaluations: int) -> int:
    """Return how many evaluations are to be expected of as many as are allowed.

    A strategy that knows how many it will ask for says so by an attribute `evaluations`.
    """
    while (inner := getattr(strategy, "wrapped", None)) is not None:
        strategy = inner
    return min(evaluations, int(getattr(strategy, "evaluations", evaluations)))


def beyond_budget(strategy: Strategy) -> bool:
    """Whether paid evaluations of a strategy may be of networks that are larger than the budget.

    It says so by an attribute of this name: a strategy that starts from the largest network has to see what
    lies between. Such networks are trials, and never the result.
    """
    while (inner := getattr(strategy, "wrapped", None)) is not None:
        strategy = inner
    return bool(getattr(strategy, "beyond_budget", False))


def name_of(strategy: Strategy) -> str:
    """Return the name of a strategy's class, or of that of the one it wraps (its attribute `wrapped`)."""
    while (inner := getattr(strategy, "wrapped", None)) is not None:
        strategy = inner
    return type(strategy).__name__


class WarmStart:
    """A strategy that asks given rows first, then goes on as another one, which is told them too.

    A search that starts from what one would pick without searching never returns less than that.

    Attributes:
        wrapped: The other strategy.
    """

    def __init__(self, strategy: Strategy, first: Codes) -> None:
        """Start with the rows `(n, choices)`, canonical and distinct."""
        self.wrapped, self._first, self._untold = strategy, first, len(first)

    def ask(self, n: int) -> Codes:
        """Propose the given rows; after all of them were told, what the other strategy proposes."""
        if self._untold:
            rows, self._first = self._first[:n], self._first[n:]
            return rows
        return self.wrapped.ask(n)

    @property
    def notes(self) -> Mapping[str, Any]:
        """What the other strategy says of the search."""
        return self.wrapped.notes if isinstance(self.wrapped, Noted) else {}

    def tell(self, batch: Batch) -> None:
        """Let the other strategy learn."""
        self._untold = max(0, self._untold - len(batch))
        self.wrapped.tell(batch)
