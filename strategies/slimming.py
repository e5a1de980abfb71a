"""Greedy slimming: from the largest network down, each time the step that costs least accuracy.

Source: Yu & Huang, "AutoSlim: Towards One-Shot Architecture Search for Channel Numbers", arXiv 1903.11728,
section 3.2. The released code cannot run with the released layers; the text is followed. There a layer loses
a block of channels; here a choice goes to its next smaller option.
"""

from typing import final

import numpy as np

from autocompress.budget import Constraints
from autocompress.errors import RecipeError
from autocompress.space import Codes
from autocompress.trial import Batch


@final
class GreedySlimming:
    """Asks all networks one step smaller than the last one, and goes on from the best of them.

    Attributes:
        beyond_budget: Networks on the way are larger than the budget; they are evaluated all the same.
        evaluations: How many it asks for at most: every step of the way looks at a step of each choice.
    """

    beyond_budget = True

    def __init__(
        self,
        constraints: Constraints,
        *,
        seed: int,
        objective: str = "accuracy",
        per_cost: bool = False,
    ) -> None:
        """Start from the largest network.

        Args:
            constraints: Space, costs and limits.
            seed: Not used: nothing is random.
            objective: What is compared; more is better.
            per_cost: Compare the loss for each part of the excess over the budget that a step takes away,
                instead of the score alone as published: steps differ in what they save.

        Raises:
            RecipeError: `per_cost` is no truth value.
            InfeasibleBudgetError: Nothing fits.
        """
        if not isinstance(per_cost, bool):
            raise RecipeError(f"per_cost must be true or false, got {per_cost!r}")
        constraints.check_feasible()
        self._constraints, self._objective, self._per_cost = constraints, objective, per_cost
        self._at = constraints.space.largest()
        self._score: float | None = None
        self._waiting = [self._at]
        self._untold = {self._at.tobytes()}
        self._told: list[tuple[Codes, float]] = []
        steps = int((constraints.space.counts - 1).sum())
        self.evaluations = 1 + steps * len(constraints.space.choices)

    def ask(self, n: int) -> Codes:
        """Propose steps from where the search is; none once the network fits."""
        rows, self._waiting = self._waiting[:n], self._waiting[n:]
        return np.vstack(rows) if rows else self._at[:0]

    def tell(self, batch: Batch) -> None:
        """Remember scores; after the last of a round, take the best step."""
        scores = np.where(batch.measured, batch.metrics[self._objective], -np.inf)
        for row, score in zip(batch.codes, scores, strict=True):
            if row.tobytes() in self._untold:
                self._untold.remove(row.tobytes())
                self._told.append((row[None], float(score)))
        if self._untold or not self._told:
            return
        self._at, self._score = max(self._told, key=lambda told: self._worth(*told))
        self._told = []
        if not self._constraints.feasible(self._at)[0]:
            self._waiting = self._steps()
            self._untold = {row.tobytes() for row in self._waiting}

    def _worth(self, row: Codes, score: float) -> float:
        if not self._per_cost or self._score is None or not np.isfinite(score):
            return score
        saved = self._excess(self._at) - self._excess(row)
        return (score - self._score) / max(saved, 1e-12)

    def _excess(self, row: Codes) -> float:
        return float(np.maximum(self._constraints.violation(row), 0.0)[0])

    def _steps(self) -> list[Codes]:
        """Return every network with one choice a step smaller that takes something off the excess."""
        space, found = self._constraints.space, {}
        for position in range(len(space.choices)):
            if self._at[0, position] > 0:
                row = self._at.copy()
                row[0, position] -= 1
                row = space.canonical(row)
                if self._excess(row) < self._excess(self._at):
                    found[row.tobytes()] = row
        return list(found.values())
