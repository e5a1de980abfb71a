"""A space under a budget as decisions in turn: one action in 0..1 a choice, no end over the budget.

What AMC and HAQ do layer by layer, for any space whose options are numbers and any costs with a lower bound.
For AMC an action is the share of the largest option to keep, for HAQ one of equal slices, an option each.

Source: He et al., AMC, ECCV 2018, section 3.1 and algorithm 1: an action is cut to what leaves room for all
later layers at their smallest. There the room is a formula for the MACs of a chain of layers; here it is
`Cost.lower_bound`, exact for every cost, of which that formula is a special case (tests compare them).
"""

from collections.abc import Callable
from functools import cached_property
from typing import final

import numpy as np
from numpy.typing import NDArray

from autocompress.budget import Constraints
from autocompress.cost import AdditiveCost, Cost, merged
from autocompress.errors import SpaceError
from autocompress.space import Choice, Codes

State = NDArray[np.float32]
"""`(features,)`, all in 0..1."""

Actions = Callable[[Choice, str], NDArray[np.float64]]
"""Given a choice and the name of its space: the action of each option, ascending in 0..1, `(options,)`."""


@final
class RatioProcess:
    """The process of a space and its limits.

    A state has, each in 0..1: of the choice to be decided its index, number of options, largest option and
    least ratio; of each metric what the choice can save of it, what was saved so far (`reduced`), what the
    undecided choices can save (`rest`), and how much of the limit is free while these are at their cheapest;
    and the last action. Costs are shares of the largest network's; what is known of choices beforehand is
    spread over 0..1 among them.

    Attributes:
        constraints: Space, costs and limits.
        ratios: The action of each option of each choice; AMC's are ratios.
        features: Length of a state; with one limit 9 and one more for each column of `also`.
    """

    def __init__(
        self,
        constraints: Constraints,
        *,
        actions: Actions | None = None,
        also: NDArray[np.float64] | None = None,
    ) -> None:
        """Price the choices.

        Args:
            constraints: Space, costs and limits.
            actions: By default `shares_of_largest`.
            also: More that is known of each choice beforehand, `(choices, columns)`.

        Raises:
            SpaceError: Options of a choice are not positive numbers in ascending order.
            InfeasibleBudgetError: Nothing fits.
        """
        constraints.check_feasible()
        self.constraints = constraints
        space, actions = constraints.space, actions or shares_of_largest
        self.ratios = [actions(choice, space.name) for choice in space.choices]
        self._also = np.zeros((len(space.choices), 0)) if also is None else also
        # Without limits, costs are still something to see: a reward may speak of them.
        metrics = tuple(constraints.limits) or tuple(constraints.costs)
        self._seen = [constraints.costs[metric] for metric in metrics]
        self._limits = [constraints.limits.get(metric, np.inf) for metric in metrics]
        self._largest = constraints.space.largest()
        self._full = [float(cost.of(self._largest)[0]) or 1.0 for cost in self._seen]
        self._known = self._of_choices()
        self.features = self._known.shape[1] + 3 * len(metrics) + 1

    def start(self) -> "Walk":
        """Return an episode at its first decision."""
        return Walk(self)

    def _of_choices(self) -> NDArray[np.float64]:
        """Return what is known of each choice beforehand, `(choices, features)`, each column 0..1."""
        count = len(self.ratios)
        choices = self.constraints.space.choices
        largest = [float(choice.options[-1]) if len(choice.options) > 1 else 0.0 for choice in choices]
        columns = [
            np.arange(count, dtype=np.float64),
            np.array([len(ratios) for ratios in self.ratios], dtype=np.float64),
            np.array(largest),
            np.array([ratios[0] for ratios in self.ratios]),
            *self._also.T,
        ]
        alone = np.where(np.eye(count, dtype=np.bool_), 0, self._largest)
        for cost, full in zip(self._seen, self._full, strict=True):
            columns.append((full - cost.of(alone)) / full)
        table = np.stack(columns, axis=1)
        low, high = table.min(axis=0), table.max(axis=0)
        spread: NDArray[np.float64] = (table - low) / np.where(high > low, high - low, 1.0)
        return spread

    def state(self, prefix: Codes, last: float) -> State:
        """Return the state after the choices of a prefix `(1, p)`, p < choices, and a last action."""
        position = prefix.shape[1]
        upper = np.hstack([prefix, self._largest[:, position:]])
        numbers = [*self._known[position]]
        for cost, limit, full in zip(self._seen, self._limits, self._full, strict=True):
            most, least = float(cost.of(upper)[0]), float(cost.lower_bound(prefix)[0])
            numbers += [(full - most) / full, (most - least) / full, (limit - least) / full]
        state: State = np.clip(np.array([*numbers, last]), 0.0, 1.0).astype(np.float32)
        return state

    def nearest(self, prefix: Codes, action: float, witness: Codes | None) -> tuple[int, Codes | None]:
        """Return the option nearest to an action among those from which every limit can still be met.

        Args:
            prefix: `(1, p)`.
            action: The wished ratio.
            witness: A feasible row `(1, choices)` that begins with the prefix; only for several limits.

        Returns:
            The option, of two equally near the smaller; a witness that begins with it.
        """
        position = prefix.shape[1]
        distances = np.abs(self.ratios[position] - action)
        extended = self._extended(prefix)
        open_ = self._open(extended)
        order = [int(option) for option in np.argsort(distances, kind="stable") if open_[option]]
        if witness is None:
            return order[0], None
        for option in order:
            if option == witness[0, position]:
                return option, witness
            found = self._completion(extended[[option]])
            if found is not None:
                return option, found
        return int(witness[0, position]), witness

    def witness(self) -> Codes | None:
        """Return a feasible row; `None` under at most one limit, whose bounds need none."""
        return self.constraints.witness if len(self.constraints.limits) > 1 else None

    def _extended(self, prefix: Codes) -> Codes:
        """Return the prefix with each option of the next choice, `(options, p + 1)`."""
        count = len(self.ratios[prefix.shape[1]])
        return np.hstack([np.repeat(prefix, count, axis=0), np.arange(count, dtype=np.int64)[:, None]])

    def _open(self, extended: Codes) -> NDArray[np.bool_]:
        """Return which prefixes `(options, p)` can still meet each limit for itself, `(options,)`."""
        open_, shares = np.ones(len(extended), dtype=np.bool_), np.zeros(len(extended))
        for metric, limit in self.constraints.limits.items():
            bound = self.constraints.costs[metric].lower_bound(extended)
            open_ &= bound <= limit
            shares = np.maximum(shares, bound / limit)
        # Bounds are added up in another order than costs: what meets a limit exactly may miss a last bit.
        return open_ if open_.any() else shares == shares.min()

    def _completion(self, prefix: Codes) -> Codes | None:
        """Return a row with this beginning that meets all limits together; `None` if none was found.

        Looked at are the cheapest completions of each cost and of their sum. Each limit for itself may be
        within reach of a prefix and all together not; to be sure would take an integer program a decision.
        """
        for cost in self._guides:
            row = self.constraints.space.canonical(cost.argmin(prefix))
            if self.constraints.feasible(row)[0]:
                return row
        return None

    @cached_property
    def _guides(self) -> list[Cost]:
        """The limited costs; first, if all of them are sums, their sum, each relative to its limit."""
        limits = self.constraints.limits
        costs: list[Cost] = [self.constraints.costs[metric] for metric in limits]
        sums = [cost for cost in costs if isinstance(cost, AdditiveCost)]
        if len(sums) < len(costs):
            return costs
        shares = [cost.scaled(1 / limits[cost.metric], 0.0) for cost in sums]
        factors = merged([factor for share in shares for factor in share.factors], np.add)
        constant = sum(share.constant for share in shares)
        return [AdditiveCost("all limits", shares[0].counts, constant, tuple(factors)), *costs]


@final
class Walk:
    """One episode: decisions in the order of the choices, without those that have no effect or one option.

    Attributes:
        position: Of the choice to be decided.
        state: What an agent sees of it; after the last decision, what it saw then.
        done: Whether all is decided.
    """

    def __init__(self, process: RatioProcess) -> None:
        """Start with nothing decided."""
        self._process = process
        self._row = np.zeros((1, len(process.ratios)), dtype=np.int64)
        self._witness = process.witness()
        self.position, self._last = -1, 1.0
        self.state: State = np.zeros(process.features, dtype=np.float32)
        self._advance()

    @property
    def done(self) -> bool:
        """Whether all choices are decided."""
        return self.position == self._row.shape[1]

    @property
    def row(self) -> Codes:
        """The canonical row, `(1, choices)`; undecided choices are at their first option."""
        return self._row.copy()

    def act(self, action: float) -> float:
        """Decide by the wished ratio; return the one that was possible."""
        prefix = self._row[:, : self.position]
        option, self._witness = self._process.nearest(prefix, action, self._witness)
        return self.take(option)

    def take(self, option: int) -> float:
        """Decide by the option, whether or not it fits; return its ratio.

        For rows that someone else proposed: do not mix it with `act`, which counts on its own decisions.
        """
        self._row[0, self.position] = option
        self._last = float(self._process.ratios[self.position][option])
        self._advance()
        return self._last

    def _advance(self) -> None:
        """Go to the next choice that has an effect and more than one option."""
        active = self._process.constraints.space.active(self._row)[0]
        self.position += 1
        while not self.done and not (active[self.position] and len(self._process.ratios[self.position]) > 1):
            self.position += 1
        if not self.done:
            self.state = self._process.state(self._row[:, : self.position], self._last)


def shares_of_largest(choice: Choice, space: str) -> NDArray[np.float64]:
    """Return each option as a share of the largest; 1 where there is only one option, whatever it is.

    Raises:
        SpaceError: They are not positive numbers in ascending order.
    """
    values = _numbers(choice, space)
    ratios: NDArray[np.float64] = values / values[-1]
    return ratios


def equal_slices(choice: Choice, space: str) -> NDArray[np.float64]:
    """Return the middle of the slice of 0..1 that each option has, all of one length.

    The nearest middle to an action is that of its slice; 0 and 1 are in the first and the last.

    Raises:
        SpaceError: They are not positive numbers in ascending order.
    """
    count = len(_numbers(choice, space))
    middles: NDArray[np.float64] = (np.arange(count) + 0.5) / count
    return middles


def _numbers(choice: Choice, space: str) -> NDArray[np.float64]:
    """Return the options as numbers; a single one, whatever it is, as 1."""
    if len(choice.options) == 1:
        return np.ones(1)
    numbers = [option for option in choice.options if not isinstance(option, str)]
    values = np.array(numbers, dtype=np.float64)
    if len(numbers) < len(choice.options) or values[0] <= 0 or (np.diff(values) <= 0).any():
        raise SpaceError(
            f"options of choice {choice.name!r} of space {space!r} must be positive, ascending numbers "
            f"to be decided by ratios, got {list(choice.options)}; take a strategy for any options, such as "
            "'reinforce' or 'evolution'"
        )
    return values
