"""A search strategy of your own, and the contract it passes.

    python examples/04_own_strategy.py        # compare it with random search
    pytest examples/04_own_strategy.py        # its laws: equal seeds, feasible, never twice, ends, ...

In a recipe it is `search.strategy: my_module:HillClimbing`.
"""

import sys

import numpy as np

from autocompress.budget import Constraints
from autocompress.proposals import Asked, fresh_sample, random_generator
from autocompress.space import Codes
from autocompress.testing.strategy import StrategyContract
from autocompress.trial import Batch

# The strategy -----------------------------------------------------------------------------------------------


class HillClimbing:
    """Asks neighbours of the best network so far, and random ones where it has no new neighbours."""

    def __init__(self, constraints: Constraints, *, seed: int, objective: str = "accuracy") -> None:
        """Make the search; what a recipe has under `search.options` would be further keywords."""
        self.constraints, self.objective = constraints, objective
        self.rng = random_generator(seed)
        self.asked = Asked(constraints.space)
        self.best: Codes | None = None
        self.value = -np.inf

    def ask(self, n: int) -> Codes:
        """Propose up to `n` networks that fit the budget and were never proposed before."""
        if self.best is not None:
            neighbours = self.constraints.space.mutate(np.repeat(self.best, 20 * n, axis=0), self.rng, rate=0)
            fitting = neighbours[self.constraints.feasible(neighbours)]
            if len(rows := self.asked.fresh(fitting, at_most=n)):
                return rows
        return fresh_sample(self.constraints, n, self.rng, self.asked)

    def tell(self, batch: Batch) -> None:
        """Move to the best network that was measured."""
        for row in np.flatnonzero(batch.measured):
            if (value := float(batch.metrics[self.objective][row])) > self.value:
                self.best, self.value = batch.codes[row : row + 1], value


# Its contract -----------------------------------------------------------------------------------------------


class TestHillClimbing(StrategyContract):
    """Every law of a strategy, for three lines."""

    def make(self, constraints: Constraints, seed: int) -> HillClimbing:
        """Return a new strategy."""
        return HillClimbing(constraints, seed=seed)


# Against random search, on a problem whose optimum is known -------------------------------------------------

if __name__ == "__main__":
    from autocompress.cli import app

    smoke = "--smoke" in sys.argv
    problem = ["--problem", "autocompress.testing.toys:toy_problem", "--set", "blocks=7"]
    ours = ["--strategies", "random,evolution:population=10:sample_size=4,04_own_strategy:HillClimbing"]
    size = ["--seeds", "2" if smoke else "10", "--evaluations", "10" if smoke else "40", "--jobs", "1"]
    app(["compare", *problem, *ours, *size])
