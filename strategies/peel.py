"""PEEL-style widths: an over-pruned backbone, then one round that gives what is left to layers that matter.

Source: the abstract and the figure of Hou et al., "Network Pruning via Resource Reallocation", arXiv
2103.01847. The formulas of the paper could not be read, and no code was released: each step is a
reconstruction, and says so. What the channels of a layer are worth says the space (`SearchSpace.worth`).
"""

from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import numpy as np
from numpy.typing import NDArray

from autocompress.budget import Constraints
from autocompress.errors import RecipeError
from autocompress.proposals import compared_by, qualities
from autocompress.space import Codes
from autocompress.trial import Batch
from strategies.importance import within, worth_of

Backbone = Literal["threshold", "uniform"]
Sharing = Literal["importance", "equal", "shift"]
Measure = Literal["worth", "loss"]


@final
class PeelStyle:
    """Proposes one network, found without evaluations, or with one a layer.

    Attributes:
        compares: Evaluators that can also say how far the outputs are from the largest network's do so.
    """

    compares = True

    def __init__(
        self,
        constraints: Constraints,
        *,
        seed: int,
        objective: str = "accuracy",
        backbone: Backbone = "threshold",
        share: float = 0.8,
        sharing: Sharing = "importance",
        importance: Measure = "worth",
        power: float = 1.0,
    ) -> None:
        """Find the network.

        Reconstructed (none of it could be checked against the paper's text): the backbone is what a global
        threshold on importance leaves of `share` of every limit (network slimming, which the authors
        acknowledge); a layer's importance is the mean worth of its kept channels, or what the backbone loses
        when the layer gets one option less; a layer's part of the pool
        is in proportion to a power of that; parts are spent in whole options, and what rounding leaves goes
        to the layers of the greatest importance for their cost, until no option of any layer fits.

        Args:
            constraints: Space, costs and limits; the pool is counted in these costs, latency from a table
                as well as MACs.
            seed: Not used: nothing is random.
            objective: What `importance: loss` compares where evaluators say no distance; more is better.
            backbone: `threshold`, or `uniform`: the same share of the options of every choice.
            share: Of the budget, that the backbone uses, above 0 and at most 1.
            sharing: `importance`; `equal`, the same part for every layer; or `shift`: the backbone uses all
                of the budget, layers below the mean importance give the step that is worth least, and those
                above take (the abstract says "shift").
            importance: `worth` of the kept channels, which costs nothing, or `loss`: the backbone is
                evaluated, and with one option less of each layer (one more where it has the least).
            power: Of the importance, 0 or more.

        Raises:
            RecipeError: An option is out of its range.
            SpaceError: The options of the space have no worth.
            InfeasibleBudgetError: Nothing fits.
        """
        for name, value, allowed in (
            ("backbone", backbone, get_args(Backbone)),
            ("sharing", sharing, get_args(Sharing)),
            ("importance", importance, get_args(Measure)),
        ):
            if value not in allowed:
                raise RecipeError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise RecipeError(f"share must be above 0 and at most 1, got {share!r}")
        if isinstance(power, bool) or not isinstance(power, int | float) or not power >= 0:
            raise RecipeError(f"power must be 0 or more, got {power!r}")
        constraints.check_feasible()
        self._objective, self._sharing = objective, sharing
        self._pool = _Pool(constraints, worth_of(constraints.space), float(power))
        self._start = self._pool.backbone(backbone, 1.0 if sharing == "shift" else float(share))
        self._told: dict[bytes, float] = {}
        self._waiting: list[Codes] = []
        self._untold: set[bytes] = set()
        if importance == "worth":
            self._await([self._network()])
        else:
            changed = self._pool.changed(self._start)
            self._await([self._start, *(row for row in changed if row is not None)])
        self._measuring = importance == "loss"

    def ask(self, n: int) -> Codes:
        """Propose the network once, after what it is measured by."""
        rows, self._waiting = self._waiting[:n], self._waiting[n:]
        return np.vstack(rows) if rows else self._start[:0]

    def tell(self, batch: Batch) -> None:
        """Learn what layers matter, where that is measured."""
        self._told |= qualities(batch, compared_by(batch, self._objective))
        self._untold -= {row.tobytes() for row in batch.codes}
        if self._measuring and not self._untold:
            self._measuring = False
            self._pool.measured = self._losses()
            self._await([self._network()])

    def _await(self, rows: list[Codes]) -> None:
        self._waiting = list({row.tobytes(): row for row in rows}.values())
        self._untold = {row.tobytes() for row in rows}

    def _network(self) -> Codes:
        if self._sharing == "shift":
            found = self._pool.shifted(self._start)
        else:
            found = self._pool.shared(self._start, equally=self._sharing == "equal")
        return self._pool.filled(found)

    def _losses(self) -> NDArray[np.float64]:
        """Return by how much one option of each choice moves what is measured; 0 where nothing is known."""
        whole = self._told.get(self._start.tobytes(), np.nan)
        rows = self._pool.changed(self._start)
        told = [np.nan if row is None else self._told.get(row.tobytes(), np.nan) for row in rows]
        return np.nan_to_num(np.abs(np.array(told) - whole))


@dataclass
class _Pool:
    """What the budget leaves, and who gets it."""

    constraints: Constraints
    worth: list[NDArray[np.float64]]
    power: float
    measured: NDArray[np.float64] | None = None

    def changed(self, at: Codes) -> list[Codes | None]:
        """Return for each choice the network with one option less of it, or one more where it has the least.

        Nothing for a choice that has one option, and where one more does not fit.
        """
        found: list[Codes | None] = []
        for position, count in enumerate(self.constraints.space.counts.tolist()):
            row = at.copy()
            row[0, position] += -1 if at[0, position] else 1
            row = self.constraints.space.canonical(row) if count > 1 else row
            found.append(row if count > 1 and self.constraints.feasible(row)[0] else None)
        return found

    def backbone(self, kind: Backbone, share: float) -> Codes:
        """Return the over-pruned network, `(1, choices)`."""
        limits = self.constraints.limits
        smaller = {
            metric: max(share * limit, self.constraints.costs[metric].minimum)
            for metric, limit in limits.items()
        }
        tighter = Constraints(self.constraints.space, self.constraints.costs, smaller)
        if not tighter.feasible(tighter.space.smallest())[0]:
            # Several limits at once may leave nothing at this share.
            return self.constraints.space.smallest()
        if kind == "threshold":
            return within(tighter, self.worth)
        counts = self.constraints.space.counts
        steps = np.linspace(0, 1, 101)[:, None]
        rows = self.constraints.space.canonical(np.floor(steps * (counts - 1) + 0.5).astype(np.int64))
        return rows[[int(np.flatnonzero(tighter.feasible(rows)).max())]]

    def importance(self, at: Codes) -> NDArray[np.float64]:
        """Return the mean worth of the kept units of each choice, or what was measured, to the power."""
        if self.measured is not None:
            return np.asarray(self.measured**self.power, dtype=np.float64)
        found = []
        for choice, worth, code in zip(
            self.constraints.space.choices, self.worth, at[0].tolist(), strict=True
        ):
            option: Any = choice.options[code]
            units = float(option) if isinstance(option, int | float) and option > 0 else code + 1.0
            found.append(max(float(worth[code]), 0.0) / units)
        return np.array(found) ** self.power

    def used(self, rows: Codes) -> NDArray[np.float64]:
        """Return the share of the budget that networks use, `(n,)`: of the limit that binds most."""
        return 1.0 + np.asarray(self.constraints.violation(rows), dtype=np.float64)

    def shared(self, start: Codes, *, equally: bool) -> Codes:
        """Give each choice its part of the pool, in whole options; what one cannot take the others get."""
        at = start.copy()
        importance = np.ones(len(self.worth)) if equally else self.importance(start)
        open_ = np.ones(len(importance), dtype=np.bool_)
        while open_.any():
            pool = 1.0 - float(self.used(at)[0])
            total = float(importance[open_].sum())
            if pool <= 0 or total <= 0:
                break
            before = at.copy()
            for position in np.flatnonzero(open_):
                part = pool * importance[position] / total
                at[0, position] = self._bought(before, int(position), part)
                # What is at its largest takes no part in the next round (water-filling).
                open_[position] = at[0, position] < self.constraints.space.counts[position] - 1
            if not self.constraints.feasible(self.constraints.space.canonical(at))[0]:
                # Parts were priced one by one; a layer and the next one cost more than their sum.
                return self._reduced(before, at)
            if (at == before).all():
                break
        return at

    def _bought(self, at: Codes, position: int, part: float) -> int:
        """Return the largest option that a choice gets for a part of the budget."""
        count = int(self.constraints.space.counts[position])
        rows = np.repeat(at, count, axis=0)
        rows[:, position] = np.arange(count)
        more = self.used(self.constraints.space.canonical(rows)) - float(self.used(at)[0])
        code = int(at[0, position])
        payable = [option for option in range(code, count) if more[option] <= part]
        return max(payable, default=code)

    def _reduced(self, low: Codes, high: Codes) -> Codes:
        """Return the furthest network on the way from one to the other that fits, all choices alike."""
        steps = np.linspace(0, 1, 101)[:, None]
        rows = self.constraints.space.canonical(np.floor(low + steps * (high - low)).astype(np.int64))
        return rows[[int(np.flatnonzero(self.constraints.feasible(rows)).max())]]

    def shifted(self, start: Codes) -> Codes:
        """Take one option of each choice below the mean importance; `filled` gives to the others."""
        at = start.copy()
        importance = self.importance(start)
        below = importance < importance.mean()
        at[0] = np.where(below, np.maximum(at[0] - 1, 0), at[0])
        given = at.copy()
        for position in np.argsort(-importance, kind="stable"):
            if not below[position]:
                given = self._step(given, int(position))
        return given

    def _step(self, at: Codes, position: int) -> Codes:
        """Return a network with one option more, or itself where that does not fit."""
        more = at.copy()
        more[0, position] += 1
        fits = more[0, position] < self.constraints.space.counts[position]
        return more if fits and self.constraints.feasible(self.constraints.space.canonical(more))[0] else at

    def filled(self, start: Codes) -> Codes:
        """Spend what is left, each time on the choice of the greatest importance for its cost."""
        space, at = self.constraints.space, self.constraints.space.canonical(start)
        importance = self.importance(start)
        while True:
            rows, positions = [], []
            for position in range(len(space.choices)):
                row = self._step(at, position)
                if (row != at).any():
                    rows.append(row)
                    positions.append(position)
            if not rows:
                return at
            more = np.maximum(self.used(np.vstack(rows)) - float(self.used(at)[0]), 1e-12)
            at = rows[int(np.argmax(importance[positions] / more))]
