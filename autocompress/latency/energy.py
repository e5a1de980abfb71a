"""Analytic energy: what arithmetic and memory of a network take in a 45 nm chip, by published figures.

An estimate from counts, not a measurement: it has no control, no leakage and no runtime in it. It ranks
networks by what they compute and move; `fitted` scales it to measurements where there are some.

Source of all figures: Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014,
figure 1.1.9: 45 nm, 0.9 V.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal

import numpy as np

from autocompress.cost import AdditiveCost, compile_cost
from autocompress.errors import CostError, TableError
from autocompress.latency.roofline import (
    Vector,
    activation_bytes,
    check_rows,
    check_setting,
    nonnegative_least_squares,
)
from autocompress.ops import Ops
from autocompress.quantize.ops import bits_of
from autocompress.space import SearchSpace
from autocompress.weight_bytes import weight_bytes

METRIC: Final = "energy_mj"
PJ_PER_MJ: Final = 1e9
# Memory is read in words of 64 bits.
BYTES_PER_READ: Final = 8
PARAMETERS: Final = 2
KIB: Final = 1024
MIB: Final = 1024**2


@dataclass(frozen=True)
class Arithmetic:
    """Energy of one addition and one multiplication of a number format, in pJ."""

    add_pj: float
    multiply_pj: float

    @property
    def mac_pj(self) -> float:
        """Energy of a multiply-accumulate, in pJ."""
        return self.add_pj + self.multiply_pj


@dataclass(frozen=True)
class EnergyEstimate:
    """What one run takes, in mJ, and where it goes.

    Attributes:
        compute_mj: Multiply-accumulates.
        sram_mj: Activations of operations whose activations fit the SRAM.
        dram_mj: Parameters, and all other activations, at the middle of the range of DRAM.
        low_mj: All of it, with DRAM at the low end of its range.
        high_mj: All of it, with DRAM at the high end.
        assumed: What is not from the published figures but from a rule of this module.
        method: What kind of number this is, wherever it is shown.
    """

    compute_mj: float
    sram_mj: float
    dram_mj: float
    low_mj: float
    high_mj: float
    assumed: tuple[str, ...]
    method: Literal["analytic estimate"] = "analytic estimate"

    @property
    def energy_mj(self) -> float:
        """All of it, with DRAM at the middle of its range."""
        return self.compute_mj + self.sram_mj + self.dram_mj


@dataclass(frozen=True)
class EnergyModel:
    """Energy of arithmetic and of memory; the defaults are the figures of Horowitz (2014).

    The rules:

    - A multiply-accumulate is one multiplication and one addition in the format of the wider of weights and
      activations. Operations without MACs (pooling, addition) take energy for memory only.
    - 8 bits are int8, 16 bits fp16, 32 bits fp32. Without `floating`, 32 bits are int32.
    - Assumed: any other integer width scales int8, the multiplier with the square of the bits, the adder in
      proportion. The rule gives 3.2 and 0.12 pJ at 32 bits, where 3.1 and 0.1 are published. With `floating`
      it holds up to 15 bits; wider formats other than fp16 and fp32 have no energy.
    - Parameters are read from DRAM once a run, whatever the batch: nothing is kept between runs.
    - Activations, each once in and once out, are read from and written to SRAM if those of the operation, for
      the whole batch, fit it together; otherwise to DRAM, all of them. A write takes as much as a read.
    - Assumed: between the published sizes the energy of SRAM is a straight line in logarithms; beyond them it
      goes with the square root of the size (below: as the least size), up to the low end of DRAM.

    Attributes:
        int8: Energy of 8-bit integers.
        int32: Of 32-bit integers.
        fp16: Of 16-bit floats.
        fp32: Of 32-bit floats.
        sram_read_pj: Sizes in bytes, ascending, and pJ of a 64-bit read.
        dram_read_pj: pJ of a 64-bit read: low end, middle and high end. Published is the range from 1300 to
            2600; the middle is their mean.
        floating: Whether 16 and 32 bits are floats.
        compute_scale: Factor on the energy of arithmetic, from `fitted`.
        memory_scale: Factor on the energy of memory, from `fitted`.

    Raises:
        CostError: A number is not positive and finite (a scale: at least 0, not both 0), sizes do not ascend,
            or the range of DRAM is not in order.
    """

    int8: Arithmetic = Arithmetic(0.03, 0.2)
    int32: Arithmetic = Arithmetic(0.1, 3.1)
    fp16: Arithmetic = Arithmetic(0.4, 1.1)
    fp32: Arithmetic = Arithmetic(0.9, 3.7)
    sram_read_pj: tuple[tuple[int, float], ...] = ((8 * KIB, 10.0), (32 * KIB, 20.0), (MIB, 100.0))
    dram_read_pj: tuple[float, float, float] = (1300.0, 1950.0, 2600.0)
    floating: bool = True
    compute_scale: float = 1.0
    memory_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers once, here."""
        for name in ("int8", "int32", "fp16", "fp32"):
            arithmetic = getattr(self, name)
            _positive(f"{name}.add_pj", arithmetic.add_pj)
            _positive(f"{name}.multiply_pj", arithmetic.multiply_pj)
        for size, energy in self.sram_read_pj:
            _positive("a size in sram_read_pj", size)
            _positive(f"sram_read_pj of {size} bytes", energy)
        sizes = [size for size, _ in self.sram_read_pj]
        if not sizes or sizes != sorted(set(sizes)):
            raise CostError(f"sram_read_pj must have at least one size, ascending, got {sizes}")
        for energy in self.dram_read_pj:
            _positive("dram_read_pj", energy)
        if len(self.dram_read_pj) != 3 or list(self.dram_read_pj) != sorted(self.dram_read_pj):
            raise CostError(f"dram_read_pj must be low <= middle <= high, got {self.dram_read_pj}")
        scales = (self.compute_scale, self.memory_scale)
        if not all(math.isfinite(scale) and scale >= 0 for scale in scales) or not any(scales):
            raise CostError(
                f"compute_scale and memory_scale must be finite, at least 0 and not both 0, got {scales}"
            )

    def mac_pj(self, *, weight_bits: int = 32, activation_bits: int = 32) -> float:
        """Return the energy of a multiply-accumulate in pJ, in the format of the wider of both widths.

        Raises:
            CostError: There is no figure and no rule for this width.
        """
        check_setting(batch=1, weight_bits=weight_bits, activation_bits=activation_bits)
        bits = max(weight_bits, activation_bits)
        published = {8: self.int8, **({16: self.fp16, 32: self.fp32} if self.floating else {32: self.int32})}
        if bits in published:
            return self.compute_scale * published[bits].mac_pj
        if bits > (15 if self.floating else 31):
            raise CostError(
                f"there is no energy of {bits}-bit {'floats' if self.floating else 'integers'} (the wider of "
                f"{weight_bits}-bit weights and {activation_bits}-bit activations); "
                f"use {'1 to 16 or 32' if self.floating else '1 to 32'} bits"
            )
        scale = bits / 8
        return self.compute_scale * (scale**2 * self.int8.multiply_pj + scale * self.int8.add_pj)

    def sram_pj_per_byte(self, sram_bytes: int) -> float:
        """Return the energy of a byte from an SRAM of a size, in pJ; never more than from DRAM.

        Raises:
            CostError: The size is not an integer of at least 1.
        """
        _check_size(sram_bytes)
        sizes, energies = np.log(np.array(self.sram_read_pj)).T
        beyond = max(0.0, math.log(sram_bytes) - sizes[-1]) / 2
        energy = math.exp(float(np.interp(math.log(sram_bytes), sizes, energies)) + beyond)
        return self.memory_scale * min(energy, self.dram_read_pj[0]) / BYTES_PER_READ

    def estimate(
        self,
        ops: Ops,
        *,
        batch: int = 1,
        weight_bits: int = 32,
        activation_bits: int = 32,
        sram_bytes: int = MIB,
    ) -> EnergyEstimate:
        """Estimate the energy of one run of `batch` images.

        Args:
            ops: What runs.
            batch: Images a run.
            weight_bits: Bits of weights; biases and norms have 4 bytes (`autocompress.weight_bytes`).
                Operations of `autocompress.quantize.ops` have bits of their own.
            activation_bits: Bits of every activation.
            sram_bytes: Size of the memory on the chip that holds activations.

        Raises:
            CostError: A setting is not an integer >= 1, or there is no energy for these bits.
        """
        self.mac_pj(weight_bits=weight_bits, activation_bits=activation_bits)
        sram_pj = self.sram_pj_per_byte(sram_bytes)
        check_setting(batch=batch, weight_bits=weight_bits, activation_bits=activation_bits)
        arithmetic_pj, near, far, widest = 0.0, 0.0, 0.0, 0
        for given in ops:
            op, weights, activations = bits_of(given, weight_bits, activation_bits)
            arithmetic_pj += batch * op.macs * self.mac_pj(weight_bits=weights, activation_bits=activations)
            far += weight_bytes((op,), weight_bits=weights)
            widest = max(widest, weights, activations)
            moved = activation_bytes(op, batch=batch, bits=activations)
            if moved <= sram_bytes:
                near += moved
            else:
                far += moved
        compute, sram = arithmetic_pj / PJ_PER_MJ, near * sram_pj / PJ_PER_MJ
        low, middle, high = (
            far * self.memory_scale * read_pj / BYTES_PER_READ / PJ_PER_MJ for read_pj in self.dram_read_pj
        )
        return EnergyEstimate(
            compute_mj=compute,
            sram_mj=sram,
            dram_mj=middle,
            low_mj=compute + sram + low,
            high_mj=compute + sram + high,
            assumed=self._assumed(widest or max(weight_bits, activation_bits), sram_bytes),
        )

    def _assumed(self, bits: int, sram_bytes: int) -> tuple[str, ...]:
        result = []
        if bits not in ((8, 16, 32) if self.floating else (8, 32)):
            result.append(
                f"{bits}-bit arithmetic scaled from int8: multiplier quadratic, adder linear in bits"
            )
        if sram_bytes not in dict(self.sram_read_pj):
            result.append(
                f"SRAM of {sram_bytes} bytes from other sizes: linear in logarithms, or square root"
            )
        return tuple(result)

    def price(
        self,
        ops: Ops,
        *,
        batch: int = 1,
        weight_bits: int = 32,
        activation_bits: int = 32,
        sram_bytes: int = MIB,
    ) -> float:
        """Return the energy of `estimate` in mJ, with DRAM at the middle of its range: an analytic estimate.

        Raises:
            CostError: A setting is not an integer >= 1, or there is no energy for these bits.
        """
        return self.estimate(
            ops,
            batch=batch,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            sram_bytes=sram_bytes,
        ).energy_mj

    def cost(
        self,
        space: SearchSpace,
        *,
        batch: int = 1,
        weight_bits: int = 32,
        activation_bits: int = 32,
        sram_bytes: int = MIB,
    ) -> AdditiveCost:
        """Compile the estimated energy of every architecture of a space, in mJ.

        Raises:
            CostError: As `price`, or a block of the space depends on too many options.
        """
        price = partial(
            self.price,
            batch=batch,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            sram_bytes=sram_bytes,
        )
        return compile_cost(space, price, METRIC)

    def fitted(
        self,
        networks: Sequence[Ops],
        measured_mj: Sequence[float] | Vector,
        *,
        batch: int = 1,
        weight_bits: int = 32,
        activation_bits: int = 32,
        sram_bytes: int = MIB,
    ) -> "EnergyModel":
        """Return this model with scales of arithmetic and memory that fit measured energies.

        Least squares of relative errors over both scales, neither negative; scales that the model has already
        do not matter. The range of DRAM keeps its proportions, though its middle is now measured.

        Args:
            networks: All operations of what was measured.
            measured_mj: `(n,)`, one energy each, for a run of `batch` images.
            batch: Images a run.
            weight_bits: At which it was measured.
            activation_bits: At which it was measured.
            sram_bytes: Of the device.

        Raises:
            TableError: Fewer than 2 different networks, or all of one ratio of arithmetic to memory, or other
                data that carry no fit (see `check_rows`).
            CostError: A setting is not an integer >= 1, or there is no energy for these bits.
        """
        values = check_rows(networks, measured_mj, PARAMETERS)
        plain = replace(self, compute_scale=1.0, memory_scale=1.0)
        parts = [
            plain.estimate(
                ops,
                batch=batch,
                weight_bits=weight_bits,
                activation_bits=activation_bits,
                sram_bytes=sram_bytes,
            )
            for ops in networks
        ]
        design = (
            np.array([[part.compute_mj, part.sram_mj + part.dram_mj] for part in parts]) / values[:, None]
        )
        if np.linalg.matrix_rank(design / np.linalg.norm(design, axis=0), tol=1e-9) < PARAMETERS:
            raise TableError(
                "all networks have one ratio of arithmetic to memory, which says nothing about either; "
                "measure networks of other shapes"
            )
        solution, _ = nonnegative_least_squares(design, np.ones(len(values)))
        compute_scale, memory_scale = solution.tolist()
        return replace(self, compute_scale=compute_scale, memory_scale=memory_scale)


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise CostError(f"{name} must be positive and finite, got {value!r}")


def _check_size(sram_bytes: int) -> None:
    if isinstance(sram_bytes, bool) or not isinstance(sram_bytes, int) or sram_bytes < 1:
        raise CostError(f"sram_bytes must be an integer >= 1, got {sram_bytes!r}")
