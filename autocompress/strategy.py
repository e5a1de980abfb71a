"""What a black-box search strategy is.

A strategy is made as `strategy(constraints, seed=..., objective=..., **options)`. It is deterministic in
its arguments and the order of calls, can be pickled between calls, and touches no file, device or clock.
`autocompress.testing.strategy.StrategyContract` states these laws as tests.
"""

from typing import Protocol, runtime_checkable

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
        """Learn the outcome of architectures that were asked; each asked row is told exactly once."""
