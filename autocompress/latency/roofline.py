"""Analytic latency: a roofline of three parameters, fitted to measured blocks, and a line on MACs to beat.

A roofline prices operations that no table has a row for. It knows how much an operation computes and moves,
not how well the runtime runs it: use it where nothing can be measured, and state the error of `held_out`.

Source: Williams, Waterman & Patterson, "Roofline: an insightful visual performance model for multicore
architectures", Communications of the ACM 52 (2009), 4; the time per operation is added here.
"""

import itertools
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from autocompress.cost import AdditiveCost, Price, compile_cost
from autocompress.errors import CostError, TableError
from autocompress.latency.correction import Figures, figures
from autocompress.latency.strict import Node
from autocompress.ops import Add, Ops, OpSpec
from autocompress.quantize.ops import bits_of
from autocompress.space import SearchSpace
from autocompress.weight_bytes import weight_bytes

Vector = NDArray[np.float64]

SCHEMA: Final = "autocompress.roofline"
VERSION: Final = 1
METRIC: Final = "latency_ms"
PARAMETERS: Final = {"roofline": 3, "macs_only": 2}

AnalyticForm = Literal["roofline", "macs_only"]

Effort = Callable[[int, int], float]
"""Bits of weights and of activations to what a multiply-accumulate takes at them."""

# What a rate may be worth, relative to the rest, where the best fit would make it infinite.
NEGLIGIBLE: Final = 1e-9


def activation_bytes(op: OpSpec, *, batch: int = 1, bits: int = 32) -> float:
    """Return the bytes of input and output of `batch` images; `Add` reads a second operand like its input.

    Each is counted once, in packed values of `bits`: what an operation reads again, or keeps between two of
    its steps (squeeze-excite), is taken for cached.
    """
    inputs = 2 if isinstance(op, Add) else 1
    return batch * (inputs * math.prod(op.in_shape) + math.prod(op.out_shape)) * bits / 8


def check_setting(*, batch: int, weight_bits: int, activation_bits: int) -> None:
    """Refuse a batch or a number of bits that is not an integer of at least 1.

    Raises:
        CostError: Names the argument.
    """
    given = {"batch": batch, "weight_bits": weight_bits, "activation_bits": activation_bits}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CostError(f"{name} must be an integer >= 1, got {value!r}")


@dataclass(frozen=True)
class Roofline:
    """A device that computes at one rate and moves bytes at another, whichever takes longer, per operation.

    Attributes:
        macs_per_ms: Number of bits to multiply-accumulates per ms at these bits. With weights and activations
            of different widths the wider one counts: the narrower operand is widened before it is multiplied.
        bytes_per_ms: Bytes of activations and parameters moved per ms (`activation_bytes`, and
            `autocompress.weight_bytes`: biases and norms have 4 bytes at any width of the weights).
        per_op_ms: What each operation takes besides, at least 0.

    Raises:
        CostError: A rate is not positive and finite, or there is no rate of computing.
    """

    macs_per_ms: Mapping[int, float] = field(hash=False)
    bytes_per_ms: float
    per_op_ms: float

    def __post_init__(self) -> None:
        """Check the numbers once, here, and keep a copy of the rates."""
        if not self.macs_per_ms:
            raise CostError("macs_per_ms must have a rate for at least one number of bits")
        for bits, rate in self.macs_per_ms.items():
            check_setting(batch=1, weight_bits=bits, activation_bits=bits)
            _check_number(f"macs_per_ms[{bits}]", rate, zero=False)
        _check_number("bytes_per_ms", self.bytes_per_ms, zero=False)
        _check_number("per_op_ms", self.per_op_ms, zero=True)
        object.__setattr__(self, "macs_per_ms", dict(sorted(self.macs_per_ms.items())))

    def rate(self, *, weight_bits: int = 32, activation_bits: int = 32) -> float:
        """Return the multiply-accumulates per ms of the wider of both widths.

        Raises:
            CostError: There is no rate for it.
        """
        check_setting(batch=1, weight_bits=weight_bits, activation_bits=activation_bits)
        bits = max(weight_bits, activation_bits)
        if bits not in self.macs_per_ms:
            known = ", ".join(map(str, self.macs_per_ms))
            raise CostError(
                f"the roofline has no rate for {bits} bits (the wider of {weight_bits}-bit weights and "
                f"{activation_bits}-bit activations); it has {known}: fit it to times at {bits} bits, or add "
                "a rate to macs_per_ms"
            )
        return self.macs_per_ms[bits]

    def ridge(self, *, weight_bits: int = 32, activation_bits: int = 32) -> float:
        """Return the MACs per byte above which operations are bound by computing, below by memory.

        Raises:
            CostError: There is no rate for these bits.
        """
        return self.rate(weight_bits=weight_bits, activation_bits=activation_bits) / self.bytes_per_ms

    def price(self, ops: Ops, *, batch: int = 1, weight_bits: int = 32, activation_bits: int = 32) -> float:
        """Return the predicted ms of one run of `batch` images, the sum over the operations.

        Operations without MACs, pooling and addition, are bound by memory.

        Raises:
            CostError: A setting is not an integer >= 1, or there is no rate for these bits.
        """
        check_setting(batch=batch, weight_bits=weight_bits, activation_bits=activation_bits)
        self.rate(weight_bits=weight_bits, activation_bits=activation_bits)
        total = 0.0
        for given in ops:
            op, weights, activations = bits_of(given, weight_bits, activation_bits)
            rate = self.rate(weight_bits=weights, activation_bits=activations)
            moved = activation_bytes(op, batch=batch, bits=activations)
            moved += weight_bytes((op,), weight_bits=weights)
            total += self.per_op_ms + max(batch * op.macs / rate, moved / self.bytes_per_ms)
        return total

    def cost(
        self, space: SearchSpace, *, batch: int = 1, weight_bits: int = 32, activation_bits: int = 32
    ) -> AdditiveCost:
        """Compile the predicted latency of every architecture of a space, in ms.

        Raises:
            CostError: As `price`, or a block of the space depends on too many options.
        """
        price = partial(self.price, batch=batch, weight_bits=weight_bits, activation_bits=activation_bits)
        return compile_cost(space, price, METRIC)

    def to_json(self) -> dict[str, Any]:
        """Return the model as it stands in a file."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "macs_per_ms": {str(bits): rate for bits, rate in self.macs_per_ms.items()},
            "bytes_per_ms": self.bytes_per_ms,
            "per_op_ms": self.per_op_ms,
        }

    @staticmethod
    def from_json(payload: Any) -> "Roofline":
        """Read what `to_json` returned.

        Raises:
            TableError: It is of another schema or version, a key is missing or not known, or a number is not
                finite, positive (`per_op_ms`: at least 0) or not a number; names the key.
        """
        node = Node(payload, "")
        # Before the names: another version may have other ones.
        node.object()
        node.member("schema").equal(SCHEMA)
        node.member("version").equal(VERSION)
        members = node.object(("schema", "version", *(entry.name for entry in fields(Roofline))))
        rates = members["macs_per_ms"].object()
        for bits in rates:
            # One spelling of a number: '08' beside '8' would hide one of two rates.
            if not (isinstance(bits, str) and re.fullmatch("[1-9][0-9]{0,3}", bits)):
                raise members["macs_per_ms"].wrong("an object with numbers of bits as keys")
        try:
            return Roofline(
                {int(bits): rate.value for bits, rate in rates.items()},
                members["bytes_per_ms"].value,
                members["per_op_ms"].value,
            )
        except CostError as error:
            raise TableError(str(error)) from None


@dataclass(frozen=True)
class MacsOnly:
    """Latency of a whole network as a line on its MACs: `ms_per_mac * MACs + constant_ms`.

    The baseline that says what a roofline or a table is worth. It holds for the batch it was fitted at.
    """

    ms_per_mac: float
    constant_ms: float

    def __post_init__(self) -> None:
        """Check the numbers once, here."""
        _check_number("ms_per_mac", self.ms_per_mac, zero=True)
        _check_number("constant_ms", self.constant_ms, zero=True)

    def price(self, ops: Ops) -> float:
        """Return the ms of one block within a network; the constant of a network comes apart."""
        return self.ms_per_mac * sum(op.macs for op in ops)

    def network_ms(self, ops: Ops) -> float:
        """Return the ms of a whole network, given as all of its operations."""
        return self.price(ops) + self.constant_ms

    def cost(self, space: SearchSpace) -> AdditiveCost:
        """Compile the predicted latency of every architecture of a space, in ms.

        Raises:
            CostError: A block of the space depends on too many options.
        """
        return compile_cost(space, self.price, METRIC).scaled(1.0, self.constant_ms)


def _check_number(name: str, value: float, *, zero: bool) -> None:
    rule = "at least 0" if zero else "positive"
    # Integers of JSON can have hundreds of digits: comparing them is exact where `math.isfinite` raises.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and abs(value) <= sys.float_info.max):
        raise CostError(f"{name} must be a finite number, got {value!r}")
    if value < 0 or (value == 0 and not zero):
        raise CostError(f"{name} must be {rule}, got {value!r}")


def check_rows(rows: Sequence[Ops], measured: Sequence[float] | Vector, parameters: int) -> Vector:
    """Return the measurements as a vector, `(n,)`, after a check that they can carry a fit.

    Raises:
        TableError: Both have different lengths, a measurement is not positive and finite, a row has no
            operations, no row has MACs, or fewer different rows than parameters.
    """
    values = np.asarray(measured, dtype=np.float64)
    if values.shape != (len(rows),):
        raise TableError(f"each of {len(rows)} rows needs one measurement, got shape {values.shape}")
    different = len(set(rows))
    if different < parameters:
        raise TableError(f"a fit needs at least {parameters} different rows, got {different}")
    for index, (ops, value) in enumerate(zip(rows, values.tolist(), strict=True)):
        if not (math.isfinite(value) and value > 0):
            raise TableError(f"measurement {index} must be positive and finite, got {value}")
        if not ops:
            raise TableError(f"row {index} has no operations; leave blocks out that do not run")
    if not any(op.macs for ops in rows for op in ops):
        raise TableError("no row has an operation with MACs: they say nothing about computing")
    return values


def nonnegative_least_squares(design: NDArray[np.float64], target: Vector) -> tuple[Vector, float]:
    """Minimise `|design x - target|` over `x >= 0`, exactly, for a few columns.

    Every set of columns is tried: the minimum is the unconstrained one of the set that is not at zero.
    Unlike an active-set method it neither cycles nor warns when columns are nearly the same.

    Args:
        design: `(n, k)`, k small: there are `2^k - 1` sets.
        target: `(n,)`.

    Returns:
        x, shape `(k,)`, and the sum of squares that is left.
    """
    norms = np.linalg.norm(design, axis=0)
    columns = [index for index in range(design.shape[1]) if norms[index] > 0]
    best = np.zeros(design.shape[1])
    least = float(target @ target)
    for size in range(1, len(columns) + 1):
        for chosen in map(list, itertools.combinations(columns, size)):
            # Columns of length 1: MACs and counts of operations differ by a factor of 10^8.
            part = design[:, chosen] / norms[chosen]
            solution = np.linalg.lstsq(part, target, rcond=None)[0]
            rest = part @ solution - target
            if (solution >= 0).all() and float(rest @ rest) < least:
                best = np.zeros(design.shape[1])
                best[chosen] = solution / norms[chosen]
                least = float(rest @ rest)
    return best, least


def fit(
    blocks: Sequence[Ops],
    measured_ms: Sequence[float] | Vector,
    *,
    batch: int = 1,
    weight_bits: int = 32,
    activation_bits: int = 32,
    effort: Effort | None = None,
) -> Roofline:
    """Fit time per operation, rate of computing and rate of memory by least squares of relative errors.

    The global optimum, without starting points. Let `ridge` be the MACs per byte where an operation takes as
    long to compute as to move. Between two neighbours among the intensities (MACs per byte) of all operations
    each operation is bound by the same thing, so times are linear in the parameters there, and those with a
    ridge in the interval are the non-negative combinations of the models at its two ends: one small linear
    problem an interval.

    A rate that the rows say nothing about, since nothing is bound by it, comes out as the slowest one that
    agrees with them. A rate of which the best fit wants none at all comes out as good as infinite.

    Args:
        blocks: What was measured: the rows of a latency table, or whole networks. Rows are slower alone than
            in a network: to price networks, fit to `LatencyTable.price` of the rows, not to their medians.
        measured_ms: `(n,)`, one time each, for a run of `batch` images.
        batch: Images a run.
        weight_bits: At which it was measured.
        activation_bits: At which it was measured.
        effort: Says what a multiply-accumulate takes at bits of weights and activations, where operations of
            `autocompress.quantize.ops` have bits of their own; the rate is then of effort 1.

    Returns:
        A roofline with one rate of computing, for the wider of both widths.

    Raises:
        TableError: Fewer than 3 different blocks, or other data that carry no fit (see `check_rows`).
        CostError: A setting is not an integer >= 1.
    """
    times = check_rows(blocks, measured_ms, PARAMETERS["roofline"])
    check_setting(batch=batch, weight_bits=weight_bits, activation_bits=activation_bits)
    work = _Work.of(blocks, batch, weight_bits, activation_bits, effort)
    counts = np.bincount(work.row) / times
    best, least = (0.0, 0.0, 0.0), math.inf
    ridges = work.ridges()
    left = right = work.macs_at(ridges[0]) / times
    for low, high in itertools.pairwise([*ridges, ridges[-1]]):
        left, right = right, work.macs_at(high) / times
        # An orthogonal reduction from (n, 4) to (4, 4) keeps every sum of squares.
        reduced = np.linalg.qr(np.column_stack([counts, left, right, np.ones(len(times))]))[1]
        (per_op, lower, upper), rest = nonnegative_least_squares(reduced[:, :3], reduced[:, 3])
        if rest < least:
            least = rest
            best = float(per_op), float(lower + upper), float(lower * low + upper * high)
    per_op_ms, ms_per_mac, ms_per_byte = best
    if ms_per_mac == 0:
        ms_per_mac = NEGLIGIBLE / float(right.max())
        ms_per_byte = ms_per_mac * ridges[-1]
    return Roofline({max(weight_bits, activation_bits): 1 / ms_per_mac}, 1 / ms_per_byte, per_op_ms)


@dataclass(frozen=True, eq=False)
class _Work:
    """What the operations of all rows compute and move: MACs, bytes and the row of each, `(operations,)`."""

    macs: Vector
    moved: Vector
    row: NDArray[np.int64]

    @staticmethod
    def of(
        rows: Sequence[Ops], batch: int, weight_bits: int, activation_bits: int, effort: Effort | None
    ) -> "_Work":
        ops = [bits_of(op, weight_bits, activation_bits) for row in rows for op in row]
        moved = [
            activation_bytes(op, batch=batch, bits=activations) + weight_bytes((op,), weight_bits=weights)
            for op, weights, activations in ops
        ]
        efforts = [1.0 if effort is None else effort(weights, inputs) for _, weights, inputs in ops]
        macs = batch * np.array([op.macs for op, _, _ in ops], dtype=np.float64) * np.array(efforts)
        return _Work(macs, np.array(moved), np.repeat(np.arange(len(rows)), [len(row) for row in rows]))

    def ridges(self) -> list[float]:
        """Return the intensities of the operations, ascending: where one changes sides."""
        result: list[float] = np.unique((self.macs / self.moved)[self.macs > 0]).tolist()
        # Operations without MACs tell memory as good as infinitely fast from the least intensity.
        return [NEGLIGIBLE * result[0], *result] if (self.macs == 0).any() else result

    def macs_at(self, ridge: float) -> Vector:
        """Return the time of each row, without time per operation, in the time of one MAC; `(rows,)`."""
        return np.bincount(self.row, weights=np.maximum(self.macs, ridge * self.moved)).astype(np.float64)


def fit_macs_only(networks: Sequence[Ops], measured_ms: Sequence[float] | Vector) -> MacsOnly:
    """Fit a line on MACs to whole networks, by least squares of relative errors; nothing negative.

    Args:
        networks: All operations of each network.
        measured_ms: `(n,)`, one time each.

    Raises:
        TableError: Fewer than 2 different networks, or other data that carry no fit (see `check_rows`).
    """
    times = check_rows(networks, measured_ms, PARAMETERS["macs_only"])
    macs = np.array([sum(op.macs for op in ops) for ops in networks], dtype=np.float64)
    solution, _ = nonnegative_least_squares(
        np.column_stack([macs, np.ones(len(macs))]) / times[:, None], np.ones(len(macs))
    )
    return MacsOnly(*solution.tolist())


def held_out(
    form: AnalyticForm,
    blocks: Sequence[Ops],
    measured_ms: Sequence[float] | Vector,
    *,
    folds: int = 5,
    seed: int = 0,
    batch: int = 1,
    weight_bits: int = 32,
    activation_bits: int = 32,
) -> Figures:
    """Compare each measurement with a model that was fitted without its fold.

    Args:
        form: Which model.
        blocks: Blocks or whole networks.
        measured_ms: `(n,)`, one time each.
        folds: Parts that are held out in turn, from 2 to n.
        seed: Of the assignment to folds.
        batch: As in `fit`; a line on MACs does not need it.
        weight_bits: Likewise.
        activation_bits: Likewise.

    Returns:
        Figures over all n predictions; `mape_percent` is the mean absolute error.

    Raises:
        TableError: Wrong folds, or what is left of the data without a fold carries no fit.
        CostError: A setting is not an integer >= 1.
    """
    times = check_rows(blocks, measured_ms, PARAMETERS[form])
    if not 2 <= folds <= len(times):
        raise TableError(f"folds must be in 2..{len(times)} (measurements), got {folds}")

    def fitted(rows: list[Ops], values: Vector) -> Price:
        if form == "macs_only":
            return fit_macs_only(rows, values).network_ms
        model = fit(rows, values, batch=batch, weight_bits=weight_bits, activation_bits=activation_bits)
        return partial(model.price, batch=batch, weight_bits=weight_bits, activation_bits=activation_bits)

    predicted = np.empty(len(times))
    order = np.random.default_rng(seed).permutation(len(times))
    for out in np.array_split(order, folds):
        kept = np.setdiff1d(order, out)
        price = fitted([blocks[index] for index in kept], times[kept])
        predicted[out] = [price(blocks[index]) for index in out]
    return figures(predicted, times)
