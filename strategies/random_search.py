"""Random search: feasible architectures in random order, none twice. The baseline of every comparison."""

from typing import final

import numpy as np

from autocompress.budget import Constraints
from autocompress.proposals import Asked, check_share, fresh_sample, random_generator
from autocompress.space import Codes
from autocompress.trial import Batch

# Drawn ahead: with a budget one draw costs nearly as much as a few thousand.
DRAWN_AHEAD = 256


@final
class RandomSearch:
    """Uniform over genes, given that the budget holds (see `Constraints.sample`), without repetition."""

    def __init__(
        self,
        constraints: Constraints,
        *,
        seed: int,
        objective: str = "accuracy",
        at_least: float = 0.0,
    ) -> None:
        """Make the search.

        Args:
            constraints: Space, costs and limits.
            seed: Equal seeds give equal sequences, whatever the sizes of the asks.
            objective: Not used; every strategy takes it.
            at_least: Ask only for networks that use at least this share, 0..1, of some limit, so that they
                are compared at the budget and not far below it.

        Raises:
            RecipeError: An option is out of its range.
            InfeasibleBudgetError: Nothing fits.
        """
        constraints.check_feasible()
        self._constraints = constraints
        self._rng = random_generator(seed)
        self._at_least = check_share("at_least", at_least)
        self._asked = Asked(constraints.space)
        self._ahead: Codes = np.zeros((0, len(constraints.space.choices)), dtype=np.int64)
        self._exhausted = False

    def ask(self, n: int) -> Codes:
        """Propose `n` architectures never proposed before, fewer where the feasible space is exhausted."""
        while len(self._ahead) < n and not self._exhausted:
            rows = fresh_sample(
                self._constraints, DRAWN_AHEAD, self._rng, self._asked, at_least=self._at_least
            )
            self._exhausted = len(rows) < DRAWN_AHEAD
            self._ahead = np.vstack([self._ahead, rows])
        rows, self._ahead = self._ahead[:n], self._ahead[n:]
        return rows

    def tell(self, batch: Batch) -> None:
        """Learn nothing."""
