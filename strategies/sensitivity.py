"""One choice at a time: what each option costs in quality, then the proven optimum of the sum that fits.

From one network every single change of a choice is evaluated; what changes do to the network is taken to add
up; integer programming finds the best sum that fits. For channels the start is the whole network, which needs
no training: it costs one evaluation an option, and no more whatever the budget is.

Sources: the sensitivity analysis of Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, section
3.2; the additive model and its integer program as in Yao et al., "HAWQ-V3", ICML 2021, there for bit widths;
outputs compared with those of the whole network (a KL divergence but for a constant) as in Cai et al.,
"ZeroQ", CVPR 2020, section 3.2.
"""

from collections.abc import Mapping
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from autocompress.budget import Constraints
from autocompress.cost import AdditiveCost
from autocompress.errors import RecipeError
from autocompress.exact import separable, solve
from autocompress.proposals import check_count, check_one_of, compared_by, qualities
from autocompress.space import Codes
from autocompress.strategy import DISTANCE
from autocompress.trial import Batch


@final
class Sensitivity:
    """Asks every network that differs from one in a single choice, then the best sum of what they lost.

    Attributes:
        beyond_budget: The changed networks are larger than the budget; they are evaluated all the same.
        compares: Evaluators that can also say how far the outputs are from the largest network's do so.
        evaluations: How many it asks for at most.
    """

    beyond_budget = True
    compares = True

    def __init__(
        self,
        constraints: Constraints,
        *,
        seed: int,
        objective: str = "accuracy",
        measure: str = "",
        points: int | None = None,
        rounds: int = 1,
        solver: str = "exact",
    ) -> None:
        """Start from the largest network.

        Args:
            constraints: Space, costs and limits.
            seed: Not used: nothing is random.
            objective: What the result of the search is ranked by; more is better.
            measure: Metric whose changes add up: `distance`, the loss of the outputs against those of the
                largest network, or the objective. By default the distance where evaluators say it: scores are
                shares of few images, and hardly move for one choice.
            points: Options of a choice that are evaluated, spread evenly; the others are interpolated. By
                default all are evaluated.
            rounds: After the first, the start is the network that was found last.
            solver: `exact` finds the proven optimum of the sum. `greedy` walks down from the start, each time
                by the option that loses least for what it takes off the excess over the budget.

        Raises:
            RecipeError: An option is out of its range.
            InfeasibleBudgetError: Nothing fits.
        """
        if measure not in ("", objective, DISTANCE):
            raise RecipeError(f"measure must be {DISTANCE} or {objective}, got {measure!r}")
        constraints.check_feasible()
        self._constraints, self._objective, self._measure = constraints, objective, measure
        self._points = None if points is None else check_count("points", points)
        self._rounds = check_count("rounds", rounds)
        self._greedy = check_one_of("solver", solver, ("exact", "greedy")) == "greedy"
        self._at = constraints.space.largest()
        self._values: dict[bytes, float] = {}
        self._notes: list[dict[str, Any]] = []
        self._found: Codes | None = None
        self._waiting: list[Codes] = []
        self._untold: set[bytes] = set()
        self._await(self._neighbours())
        self.evaluations = self._rounds * (len(self._waiting) + 1)

    @property
    def notes(self) -> Mapping[str, Any]:
        """By round: which metric was added up, what the sum says of the found network, and what it is."""
        return {"sensitivity": self._notes}

    def ask(self, n: int) -> Codes:
        """Propose changed networks; then the one that was found; none after the last round."""
        rows, self._waiting = self._waiting[:n], self._waiting[n:]
        return np.vstack(rows) if rows else self._at[:0]

    def tell(self, batch: Batch) -> None:
        """Remember what was measured; after the last of a round, solve for the best sum."""
        if batch.metrics and not self._measure:
            self._measure = compared_by(batch, self._objective)
        waited = len(self._untold)
        self._values |= qualities(batch, self._measure)
        self._untold -= {row.tobytes() for row in batch.codes}
        if self._untold or not waited:
            return
        if self._found is None:
            self._solve()
            return
        found, self._found = self._found, None
        measured = self._values.get(found.tobytes())
        self._notes[-1]["measured"] = None if measured is None else self._plain(measured)
        self._rounds -= 1
        if self._rounds and measured is not None and (found != self._at).any():
            self._at = found
            self._await(self._neighbours())

    def _await(self, rows: list[Codes]) -> None:
        self._waiting = rows
        self._untold = {row.tobytes() for row in rows}

    def _solve(self) -> None:
        tables, missing = [], []
        for position in range(len(self._constraints.space.choices)):
            values, failed = self._table(position)
            tables.append(values)
            missing += [(position, code) for code in failed]
        if self._at.tobytes() not in self._values:
            # The start itself failed, or everything: there is nothing to add up.
            return
        start = self._values[self._at.tobytes()]
        value = separable(self._constraints.space, [table - start for table in tables], "sensitivity")
        found = self._walked_down(value, missing) if self._greedy else None
        proven = False
        if found is None:
            choices = self._constraints.space.choices
            forbidden = [{choices[p].name: choices[p].options[code]} for p, code in missing]
            optimum = solve(value, self._constraints, sense="maximize", forbidden=forbidden)
            found, proven = optimum.codes, optimum.proven
        self._found = found
        sum_ = start + float(value.of(found)[0])
        self._notes.append({"measure": self._measure, "sum": self._plain(sum_), "proven": proven})
        self._await([found])

    def _walked_down(self, value: AdditiveCost, missing: list[tuple[int, int]]) -> Codes | None:
        """Return the first network that fits on the way down; `None` if the way ends above the budget."""
        space, at = self._constraints.space, self._at
        while (excess := self._excess(at)[0]) > 0:
            steps = [
                (position, code)
                for position in range(len(space.choices))
                for code in range(int(at[0, position]))
                if (position, code) not in missing
            ]
            rows = np.repeat(at, len(steps), axis=0)
            for row, (position, code) in zip(rows, steps, strict=True):
                row[position] = code
            rows = space.canonical(rows)
            saved = excess - self._excess(rows)
            # What takes nothing off the excess must not be walked by, whatever it gains.
            rows, saved = rows[saved > 0], saved[saved > 0]
            if not len(rows):
                return None
            at = rows[[int(((value.of(rows) - value.of(at)) / saved).argmax())]]
        return at

    def _excess(self, codes: Codes) -> NDArray[np.float64]:
        return np.maximum(self._constraints.violation(codes), 0.0)

    def _plain(self, value: float) -> float:
        return -value if self._measure == DISTANCE else value

    def _table(self, position: int) -> tuple[NDArray[np.float64], list[int]]:
        """Return the value of each option of a choice, and the options whose evaluation failed."""
        count = int(self._constraints.space.counts[position])
        codes = self._codes(position)
        found = [self._values.get(self._changed(position, code).tobytes(), np.nan) for code in codes]
        known = [code for code, value in zip(codes, found, strict=True) if np.isfinite(value)]
        missing = sorted(set(codes) - set(known))
        if not known:
            return np.zeros(count), missing
        values = np.interp(range(count), known, [value for value in found if np.isfinite(value)])
        return values, missing

    def _codes(self, position: int) -> list[int]:
        """Return the options of a choice that are evaluated, ascending, that of the start among them."""
        count = int(self._constraints.space.counts[position])
        points = min(self._points or count, count)
        spread = np.unique(np.linspace(0, count - 1, points).round().astype(int)).tolist()
        return sorted({*spread, int(self._at[0, position])})

    def _changed(self, position: int, code: int) -> Codes:
        row = self._at.copy()
        row[0, position] = code
        return self._constraints.space.canonical(row)

    def _neighbours(self) -> list[Codes]:
        """Return the start and all that differ from it in one choice, without repetition."""
        found = {self._at.tobytes(): self._at}
        for position in range(len(self._constraints.space.choices)):
            for code in self._codes(position):
                row = self._changed(position, code)
                found.setdefault(row.tobytes(), row)
        return list(found.values())


def greedy(
    constraints: Constraints,
    *,
    seed: int,
    objective: str = "accuracy",
    measure: str = "",
    points: int | None = None,
    rounds: int = 1,
) -> Sensitivity:
    """Make a `Sensitivity` that walks down instead of solving; `slimming` measures anew at every step.

    Raises:
        RecipeError: An option is out of its range.
        InfeasibleBudgetError: Nothing fits.
    """
    return Sensitivity(
        constraints,
        seed=seed,
        objective=objective,
        measure=measure,
        points=points,
        rounds=rounds,
        solver="greedy",
    )
