"""Labels for a separable value under several separable limits: the multidimensional multiple-choice knapsack.

Costs and values that a prefix of the choices can reach are extended choice by choice, as in `knapsack`. With
several limits few of them dominate others, so that everything hangs on the bound of what is left. Any prices
of the limits give one (the Lagrangian bound, in which every choice takes its cheapest option); the best
prices for a label are the dual solution of its linear relaxation. Those are solved for a few labels of each
stage and used for all.

Which labels can be left out depends on the optimum, which is not known: it is approached from below. A round
looks for all networks below a cutoff; if there is none, the cutoff is a proven bound, and the next is higher.

Source: the Lagrangian bound and the reduction of options by it are standard (Kellerer, Pferschy, Pisinger,
"Knapsack Problems", 2004, chapters 9 and 11). Prices from samples of the labels are ours: without them there
are ten times as many labels, measured on `benchmarks/exact.py`.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocompress.cost import Values
from autocompress.knapsack import Found, traced

# How scipy's linprog ends.
OPTIMAL, INFEASIBLE = 0, 2

# Labels after one choice: some 100 MB.
MAX_LABELS = 1_000_000
# Pairs of label and option that are bounded at once: some 10 MB.
CHUNK = 200_000
# Prices that are tried on every label, and those that are tried first on every extension of a label.
PRICES, FIRST_PRICES, PRICES_AROUND = 24, 4, 8
# New prices are looked for while there are more labels than this, so many at a time, and as long as they
# leave out at least that share.
ENOUGH_LABELS, SAMPLES, WORTH = 2_000, 4, 0.1
# Each round looks this much farther above the linear relaxation than the last.
GROWTH = 1.25


@dataclass(frozen=True, eq=False)
class _Choice:
    """The options of one choice: codes and values `(options,)`, costs `(limits, options)`."""

    codes: NDArray[np.int64]
    costs: Values
    values: Values

    def charged(self, prices: Values) -> Values:
        """Return value and priced costs, `(prices, options)`, for `prices (prices, limits)`."""
        charged: Values = self.values + prices @ self.costs
        return charged


@dataclass(frozen=True, eq=False)
class _Labels:
    """What prefixes reach, costs `(limits, n)` and values `(n,)`, and the parent and option of each."""

    costs: Values
    values: Values
    parents: NDArray[np.int64]
    options: NDArray[np.int64]

    def only(self, kept: NDArray[np.bool_]) -> "_Labels":
        return _Labels(self.costs[:, kept], self.values[kept], self.parents[kept], self.options[kept])

    def charged(self, prices: Values) -> Values:
        """Return value and priced costs, `(prices, n)`."""
        charged: Values = self.values + prices @ self.costs
        return charged


def search(values: Sequence[Values], costs: Sequence[Values], room: Values, deadline: float) -> Found:
    """Find the options of least value in sum whose costs in sum leave no limit's room.

    Args:
        values: Of the options of each choice, `(options,)`.
        costs: Likewise, `(limits, options)`, 0 or more.
        room: What the costs of each limit may be in sum, `(limits,)`, 0 or more.
        deadline: Of `time.monotonic`, when to stop with what there is.

    Returns:
        Options, a lower bound of all values, and whether the options are proven; not if the time or
        `MAX_LABELS` ran out, perhaps without options then.
    """
    # In units of the room, prices and the tolerances of the relaxation mean the same for every limit.
    scale = np.where(room > 0, room, 1.0)
    choices = [
        _Choice(np.arange(len(value)), cost / scale[:, None], value)
        for value, cost in zip(values, costs, strict=True)
    ]
    return _search(choices, room / scale, deadline)


def _search(choices: Sequence[_Choice], room: Values, deadline: float) -> Found:
    """Raise the cutoff until a network is below it."""
    price = _best_prices(choices, room)
    if price is None:
        return None, math.inf, True
    charged = [choice.charged(price[None])[0] for choice in choices]
    bound = sum(float(charges.min()) for charges in charged) - float(price @ room)
    ceiling = sum(float(choice.values.max()) for choice in choices)
    # The first round has two options a choice, on average.
    losses = np.sort(np.concatenate([charges - charges.min() for charges in charged]))
    above = max(float(losses[min(2 * len(choices), len(losses)) - 1]), 1e-6 * ceiling) or 1.0
    prices = np.vstack([price, *_prices_around(choices, room)])
    best, codes = _greedy(choices, room, price)
    relaxed = bound
    while True:
        cutoff = min(best, relaxed + above)
        found = _Round(choices, room, cutoff, prices, deadline).run()
        if found is None:
            return codes, bound, False
        if found[0] < best:
            best, codes = found
        if best <= cutoff:
            return codes, best, True
        if cutoff > ceiling:
            return None, math.inf, True
        bound, above = cutoff, GROWTH * above


def _best_prices(choices: Sequence[_Choice], room: Values) -> Values | None:
    """Return the limits' prices at the optimum of the relaxation, `(limits,)`; `None` if nothing fits.

    Any prices give a valid bound: those of a relaxation that HiGHS cannot solve are zero.
    """
    from scipy import optimize, sparse

    sizes = [len(choice.codes) for choice in choices]
    owners = np.repeat(np.arange(len(choices)), sizes)
    result = optimize.linprog(
        np.concatenate([choice.values for choice in choices]),
        A_ub=np.hstack([choice.costs for choice in choices]),
        b_ub=room,
        A_eq=sparse.csr_array((np.ones(len(owners)), (owners, np.arange(len(owners))))),
        b_eq=np.ones(len(choices)),
        method="highs-ds",
    )
    if result.status == INFEASIBLE:
        return None
    solved = result.status == OPTIMAL
    return np.maximum(-np.asarray(result.ineqlin.marginals), 0.0) if solved else np.zeros(len(room))


def _greedy(choices: Sequence[_Choice], room: Values, price: Values) -> tuple[float, list[int] | None]:
    """Return value and codes of the best solution at multiples of prices; infinity if none of those fits."""
    # Limits that do not bind cost nothing, but must not be broken at high multiples.
    prices = np.outer(np.geomspace(1.0, 100.0, 100), price + 0.01 * price.max())
    taken = np.stack([choice.charged(prices).argmin(axis=1) for choice in choices])
    pairs = list(zip(choices, taken, strict=True))
    costs = np.sum([choice.costs[:, options] for choice, options in pairs], axis=0)
    values = np.sum([choice.values[options] for choice, options in pairs], axis=0)
    fitting = (costs <= room[:, None]).all(axis=0)
    values[~fitting] = np.inf
    best = int(values.argmin())
    return float(values[best]), taken[:, best].tolist() if fitting[best] else None


def _prices_around(choices: Sequence[_Choice], room: Values) -> list[Values]:
    """Return the best prices where one option of a choice replaces another, for some of those."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(PRICES_AROUND):
        costs = choices[int(rng.integers(len(choices)))].costs
        one, other = rng.integers(costs.shape[1], size=2)
        found.append(_best_prices(choices, room + costs[:, one] - costs[:, other]))
    return [prices for prices in found if prices is not None]


class _Round:
    """One search for all networks below a cutoff.

    Attributes:
        prices: Those that bound, `(prices, limits)`, the latest first.
    """

    def __init__(
        self, choices: Sequence[_Choice], room: Values, cutoff: float, prices: Values, deadline: float
    ) -> None:
        self.prices = prices
        self._room, self._cutoff, self._deadline = room, cutoff, deadline
        base = self._base(choices, prices)
        reduced = []
        for choice in choices:
            charged = choice.charged(prices)
            losses = charged - charged.min(axis=1, keepdims=True)
            kept = (base[:, None] + losses < cutoff).all(axis=0)
            reduced.append(_Choice(choice.codes[kept], choice.costs[:, kept], choice.values[kept]))
        # Choices that are nearly decided come first: there are fewer labels then for longer.
        self._order = sorted(range(len(choices)), key=lambda choice: len(reduced[choice].codes))
        self._choices = [reduced[choice] for choice in self._order]

    def run(self) -> tuple[float, list[int] | None] | None:
        """Return the best value found and its codes, infinity if none; `None` if it could not be completed.

        If it is not below the cutoff, no solution is.
        """
        if not len(self._choices[0].codes):
            return math.inf, None
        nothing = np.zeros(1, dtype=np.int64)
        labels = _Labels(np.zeros((len(self._room), 1)), np.zeros(1), nothing, nothing)
        stages = []
        for stage, choice in enumerate(self._choices):
            rest = self._choices[stage + 1 :]
            labels = self._pruned(self._extended(labels, choice, rest), rest)
            if not len(labels.values):
                return math.inf, None
            if len(labels.values) > MAX_LABELS or time.monotonic() > self._deadline:
                return None
            stages.append((labels.parents, labels.options))
        best = int(labels.values.argmin())
        codes = dict(zip(self._order, traced([c.codes for c in self._choices], stages, best), strict=True))
        return float(labels.values[best]), [codes[choice] for choice in range(len(codes))]

    def _base(self, choices: Sequence[_Choice], prices: Values) -> Values:
        """Return the Lagrangian bound of these choices under each of the prices, `(prices,)`."""
        base = -(prices @ self._room)
        for choice in choices:
            base = base + choice.charged(prices).min(axis=1)
        return base

    def _extended(self, labels: _Labels, choice: _Choice, rest: Sequence[_Choice]) -> _Labels:
        """Return every label with every option, as far as the rest can still be below the cutoff and fit."""
        base = self._base(rest, self.prices)[:, None]
        room = self._room - sum(other.costs.min(axis=1) for other in rest)
        # The label's own value and costs are in the first term already.
        added = choice.charged(self.prices)
        parts = []
        step = max(1, CHUNK // len(choice.codes))
        for start in range(0, len(labels.values), step):
            some = slice(start, start + step)
            costs, values = labels.costs[:, some], labels.values[some]
            before = base + values + self.prices @ costs
            low = (before[:FIRST_PRICES, :, None] + added[:FIRST_PRICES, None, :]).max(axis=0)
            parents, options = np.nonzero(low < self._cutoff)
            low = (before[:, parents] + added[:, options]).max(axis=0)
            costs = costs[:, parents] + choice.costs[:, options]
            kept = (low < self._cutoff) & (costs <= room[:, None]).all(axis=0)
            extended = _Labels(costs, values[parents] + choice.values[options], parents + start, options)
            parts.append(extended.only(kept))
        return _Labels(
            np.hstack([part.costs for part in parts]),
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.parents for part in parts]),
            np.concatenate([part.options for part in parts]),
        )

    def _pruned(self, labels: _Labels, rest: Sequence[_Choice]) -> _Labels:
        """Leave out labels by new prices, best for a few of them."""
        while rest and len(labels.values) > ENOUGH_LABELS:
            sampled = np.linspace(0, len(labels.values) - 1, SAMPLES + 2).astype(np.int64)[1:-1]
            best = [_best_prices(rest, self._room - labels.costs[:, label]) for label in sampled]
            new = np.array([prices for prices in best if prices is not None])
            if not len(new):
                break
            base = self._base(rest, new)[:, None]
            kept = (base + labels.charged(new)).max(axis=0) < self._cutoff
            labels = labels.only(kept)
            self.prices = np.vstack([new, self.prices[: PRICES - len(new)]])
            if kept.mean() > 1 - WORTH:
                break
        return labels
