"""Costs: a space compiled with a price into small dense tables, one for each block.

Every strategy works on these objects: the cost of many architectures is a sum of gathers (`AdditiveCost`:
time, size) or their maximum (`MaximumCost`: peak memory), bounds and minima come from variable elimination,
expectations from tensor contractions. No module is built to price anything.

Longer than other files: both kinds share the machinery, and neither makes sense without it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from autocompress.errors import CostError
from autocompress.ops import Ops
from autocompress.space import Block, Codes, SearchSpace

Values = NDArray[np.float64]
Price = Callable[[Ops], float]

MAX_FACTOR_ENTRIES = 1_000_000
MAX_ELIMINATION_ENTRIES = 10_000_000
# Rows priced at once: their index matrix then stays in the second-level cache.
CHUNK_ROWS = 4096

METRIC_UNITS = {
    "latency_ms": "ms",
    "macs": "MACs",
    "params": "parameters",
    "size_bytes": "bytes",
    "bops": "bit operations",
    "peak_activation_bytes": "bytes",
    "energy_mj": "mJ",
}
"""Every metric a budget can limit, and its unit. `macs` counts a multiply-accumulate once."""

OPERATION_METRICS = ("macs", "params", "size_bytes", "bops")
"""The metrics that operations know of themselves and that add up; latency comes from a table."""


@dataclass(frozen=True, eq=False)
class Factor:
    """A dense table over a few choices.

    Attributes:
        positions: Positions of the choices in the space, ascending; one axis each.
        values: Shape `(options of each choice...)`.
    """

    positions: tuple[int, ...]
    values: Values

    def aligned(self, positions: tuple[int, ...]) -> Values:
        """Return the values with axes for `positions`, a superset of its own, length 1 where it has none."""
        sizes = dict(zip(self.positions, self.values.shape, strict=True))
        return self.values.reshape([sizes.get(position, 1) for position in positions])


@dataclass(frozen=True, eq=False)
class Cost(ABC):
    """A constant and factors, joined by a sum or by the maximum, in the unit of the metric.

    Attributes:
        metric: Name with unit, such as `latency_ms`.
        counts: Options of each choice of the space.
        constant: What does not depend on any choice.
        factors: The rest; no two over the same choices.
    """

    metric: str
    counts: tuple[int, ...]
    constant: float
    factors: tuple[Factor, ...]

    join: ClassVar[np.ufunc]
    """How constant and factors become one number: minima over a choice must distribute over it."""

    @cached_property
    def _gather(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """One flat table, strides that turn codes into positions in it, and where each factor starts."""
        strides = np.zeros((len(self.counts), len(self.factors)))
        offsets = np.zeros(len(self.factors), dtype=np.int64)
        start = 0
        for column, factor in enumerate(self.factors):
            step = 1
            for position, size in zip(factor.positions[::-1], factor.values.shape[::-1], strict=True):
                strides[position, column] = step
                step *= size
            offsets[column] = start
            start += step
        flat = np.concatenate([factor.values.ravel() for factor in self.factors])
        return flat, strides, offsets

    def of(self, codes: Codes) -> Values:
        """Return the cost of every row of `codes (n, choices)`, shape `(n,)`; codes must be valid."""
        if not self.factors:
            return np.full(len(codes), self.constant)
        flat, strides, offsets = self._gather
        # Positions below 2^53 are exact in floating point, and BLAS multiplies those much faster.
        strides = strides[: codes.shape[1]]
        result = np.empty(len(codes))
        for start in range(0, len(codes), CHUNK_ROWS):
            chunk = codes[start : start + CHUNK_ROWS].astype(np.float64)
            index = (chunk @ strides).astype(np.int64) + offsets
            result[start : start + CHUNK_ROWS] = self.join.reduce(flat.take(index), axis=1)
        joined: Values = self.join(result, self.constant)
        return joined

    @cached_property
    def _bounds(self) -> tuple["Cost", ...]:
        """Entry p is the exact minimum over the choices from p on, as a cost of the choices before p."""
        factors = list(self.factors)
        constant = self.constant
        bounds: list[Cost] = [self]
        for position in range(len(self.counts) - 1, -1, -1):
            joined, factors = eliminated(
                factors, position, self.join, at_most=MAX_ELIMINATION_ENTRIES, what=self.metric
            )
            if joined is not None:
                axis = joined.positions.index(position)
                values = joined.values.min(axis=axis)
                rest = (*joined.positions[:axis], *joined.positions[axis + 1 :])
                if rest:
                    factors = merged([*factors, Factor(rest, values)], self.join)
                else:
                    constant = float(self.join(constant, values))
            bounds.append(
                replace(self, counts=self.counts[:position], constant=constant, factors=tuple(factors))
            )
        return tuple(reversed(bounds))

    def lower_bound(self, prefix: Codes) -> Values:
        """Return the least cost any completion of each prefix can have: exact, not only a bound.

        Args:
            prefix: `(n, p)`: the codes of the first p choices.

        Returns:
            Shape `(n,)`.

        Raises:
            CostError: The space's order of choices makes the tables too large.
        """
        return self._bounds[prefix.shape[1]].of(prefix)

    @cached_property
    def minimum(self) -> float:
        """The least cost of any architecture, exactly as `of` prices it."""
        return float(self.of(self.argmin())[0])

    def argmin(self, prefix: Codes | None = None) -> Codes:
        """Return one architecture of minimal cost among those that begin with a prefix.

        Args:
            prefix: `(1, p)`; by default empty.

        Returns:
            Shape `(1, choices)`.
        """
        prefix = np.zeros((1, 0), dtype=np.int64) if prefix is None else prefix
        for count in self.counts[prefix.shape[1] :]:
            options = np.arange(count, dtype=np.int64)[:, None]
            candidates = np.hstack([np.repeat(prefix, count, axis=0), options])
            prefix = candidates[[int(self.lower_bound(candidates).argmin())]]
        return prefix

    @property
    @abstractmethod
    def maximum(self) -> float:
        """The greatest cost of any architecture, exactly as `of` prices it."""

    @abstractmethod
    def expected(self, probabilities: Sequence[Any]) -> Any:
        """Return the expected cost when every choice is drawn on its own.

        Args:
            probabilities: One vector a choice, `(options,)`.

        Raises:
            CostError: A vector is missing or has a wrong length, or the expectation cannot be computed.
        """

    @abstractmethod
    def scaled(self, scale: float, constant: float) -> "Cost":
        """Return `scale * cost + constant` as a cost of the same metric."""


@dataclass(frozen=True, eq=False)
class AdditiveCost(Cost):
    """The constant plus one entry of every factor: MACs, bytes of weights, latency."""

    join = np.add

    @cached_property
    def maximum(self) -> float:
        """The greatest cost of any architecture, exactly as `of` prices it."""
        return float(self.of(self.scaled(-1.0, 0.0).argmin())[0])

    def expected(self, probabilities: Sequence[Any]) -> Any:
        """Return the expected cost when every choice is drawn on its own.

        Exact for independent choices, and differentiable where the probabilities are torch tensors.

        Args:
            probabilities: One vector a choice, `(options,)`; numpy arrays, or torch tensors all on one
                device and of one floating-point type.

        Returns:
            A number, or a tensor of shape `()`.

        Raises:
            CostError: A vector is missing or has a wrong length.
        """
        lengths = [len(vector) for vector in probabilities]
        if lengths != list(self.counts):
            raise CostError(f"probabilities must have lengths {list(self.counts)}, got {lengths}")
        total: Any = self.constant
        convert: Callable[[Any], Any] = np.asarray
        if not isinstance(probabilities[0], np.ndarray):
            import torch

            first = probabilities[0]
            convert = partial(torch.as_tensor, dtype=first.dtype, device=first.device)
            total = convert(total)
        for factor in self.factors:
            value = convert(factor.values)
            for position in reversed(factor.positions):
                value = value @ probabilities[position]
            total = total + value
        return total

    def scaled(self, scale: float, constant: float) -> "AdditiveCost":
        """Return `scale * cost + constant` as a cost of the same metric."""
        factors = tuple(Factor(factor.positions, scale * factor.values) for factor in self.factors)
        return AdditiveCost(self.metric, self.counts, scale * self.constant + constant, factors)


@dataclass(frozen=True, eq=False)
class MaximumCost(Cost):
    """The greatest of the constant and one entry of every factor: peak memory.

    Minimum and `lower_bound` are exact here too: the least over a choice of the greater of two factors, of
    which one does not depend on it, is the greater of that one and the other's least.
    """

    join = np.maximum

    @cached_property
    def maximum(self) -> float:
        """The greatest cost of any architecture, exactly as `of` prices it."""
        return max([self.constant, *(float(factor.values.max()) for factor in self.factors)])

    def expected(self, probabilities: Sequence[Any]) -> Any:
        """Refuse: the expectation of a maximum is not made of expectations of its parts.

        Raises:
            CostError: Always.
        """
        raise CostError(
            f"{self.metric} is a maximum over blocks, whose expectation does not follow from the factors one "
            "by one; limit it by a budget, or take the expectation of a sum such as macs"
        )

    def scaled(self, scale: float, constant: float) -> "MaximumCost":
        """Return `scale * cost + constant` as a cost of the same metric.

        Raises:
            CostError: `scale` is negative: that would be a minimum.
        """
        if not scale >= 0:
            raise CostError(f"scale of a maximum must be 0 or more, got {scale}")
        factors = tuple(Factor(factor.positions, scale * factor.values + constant) for factor in self.factors)
        return MaximumCost(self.metric, self.counts, scale * self.constant + constant, factors)


def merged(factors: Sequence[Factor], join: np.ufunc) -> list[Factor]:
    """Join factors over the same choices."""
    known: dict[tuple[int, ...], Factor] = {}
    for factor in factors:
        same = known.get(factor.positions)
        known[factor.positions] = (
            factor if same is None else Factor(factor.positions, join(same.values, factor.values))
        )
    return list(known.values())


def eliminated(
    factors: Sequence[Factor], position: int, join: np.ufunc, *, at_most: int, what: str
) -> tuple[Factor | None, list[Factor]]:
    """Take the factors over one choice out, joined into one: a step of variable elimination.

    Args:
        factors: No two over the same choices.
        position: Of the choice.
        join: How factors become one.
        at_most: Entries that the joined factor may have.
        what: What is eliminated, for the error.

    Returns:
        The joined factor, `None` if there is none over the choice, and the other factors.

    Raises:
        CostError: The joined factor would have more than `at_most` entries.
    """
    touching = [factor for factor in factors if position in factor.positions]
    if not touching:
        return None, list(factors)
    sizes = {
        p: size for factor in touching for p, size in zip(factor.positions, factor.values.shape, strict=True)
    }
    scope = tuple(sorted(sizes))
    if (entries := math.prod(sizes.values())) > at_most:
        raise CostError(
            f"bounding {what} joins choices {list(scope)} in one table of {entries} entries; at most "
            f"{at_most}: put choices that many blocks share first in the space"
        )
    joined = reduce(join, (factor.aligned(scope) for factor in touching))
    others = [factor for factor in factors if position not in factor.positions]
    return Factor(scope, joined), others


def compile_cost(space: SearchSpace, price: Price, metric: str) -> AdditiveCost:
    """Enumerate the settings of every priced block once and price them; a network costs the sum.

    Args:
        space: Where the blocks come from.
        price: The cost of the operations of one active block; blocks without operations cost nothing.
        metric: What the price is, with its unit.

    Raises:
        CostError: A block depends on so many options that its table would have over 10^6 entries, or a
            price is not a finite number.
    """
    factors = _priced(space, space.priced_blocks, price, metric)
    constant = sum((float(factor.values) for factor in factors if not factor.positions), 0.0)
    scoped = merged([factor for factor in factors if factor.positions], np.add)
    return AdditiveCost(metric, tuple(space.counts.tolist()), constant, tuple(scoped))


def compile_maximum(space: SearchSpace, price: Price, metric: str) -> MaximumCost:
    """Enumerate the settings of every block once and price them; a network costs the greatest.

    Args:
        space: Where the blocks come from.
        price: The cost of the operations of one active block, 0 or more; blocks without operations cost 0.
        metric: What the price is, with its unit.

    Raises:
        CostError: A block depends on so many options that its table would have over 10^6 entries, or a
            price is negative or not a finite number.
    """
    factors = _priced(space, space.blocks, price, metric)
    least = min((float(factor.values.min()) for factor in factors), default=0.0)
    if least < 0:
        raise CostError(
            f"{metric} is a maximum, in which absent blocks are 0: prices must be 0 or more, got {least}"
        )
    constant = max((float(factor.values) for factor in factors if not factor.positions), default=0.0)
    scoped = merged([factor for factor in factors if factor.positions], np.maximum)
    return MaximumCost(metric, tuple(space.counts.tolist()), constant, tuple(scoped))


def _priced(space: SearchSpace, blocks: Sequence[Block], price: Price, metric: str) -> list[Factor]:
    """Return one factor a block, in order; without axes if the block depends on no choice."""
    factors = []
    # Blocks of a stage share their operations, and so their price, under most settings.
    known: dict[Ops, float] = {(): 0.0}
    for block in blocks:
        positions = tuple(space.positions[name] for name in block.choices)
        shape = tuple(int(space.counts[position]) for position in positions)
        entries = math.prod(shape)
        if entries > MAX_FACTOR_ENTRIES:
            raise CostError(
                f"block {block.name!r} has {entries} settings over choices {list(block.choices)}; at most "
                f"{MAX_FACTOR_ENTRIES}: split the block so that each part depends on fewer choices"
            )
        prices = np.empty(entries)
        for index, setting in enumerate(space.block_settings(block)):
            ops = block.operations(*setting)
            if ops not in known:
                known[ops] = float(price(ops))
                if not math.isfinite(known[ops]):
                    given = dict(zip(block.choices, setting, strict=True))
                    raise CostError(
                        f"{metric} of block {block.name!r} at {given} must be finite, got {known[ops]}"
                    )
            prices[index] = known[ops]
        order = np.argsort(positions).astype(np.int64)
        factors.append(Factor(tuple(sorted(positions)), prices.reshape(shape).transpose(order)))
    return factors


def operation_cost(space: SearchSpace, metric: str) -> AdditiveCost:
    """Compile MACs, parameters or bytes, which operations know of themselves.

    Raises:
        CostError: The metric is another one.
    """
    if metric not in OPERATION_METRICS:
        raise CostError(f"operations know {', '.join(OPERATION_METRICS)}, not {metric!r}")
    return compile_cost(space, lambda ops: sum(getattr(op, metric) for op in ops), metric)
