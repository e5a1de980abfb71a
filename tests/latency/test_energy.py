"""Energy is what the published figures give by hand, and its range, rules and labels hold."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.errors import CostError, TableError
from autocompress.latency.energy import Arithmetic, EnergyModel
from autocompress.ops import Add, Conv2d, GlobalAvgPool, Linear, Ops
from autocompress.space import SearchSpace

MODEL = EnergyModel()
CONV = Conv2d(16, 32, 8, 8, kernel=3)


def test_one_convolution_by_hand() -> None:
    # 3x3x16x32 weights: 4608; on 8x8: 294,912 MACs of 0.9 + 3.7 pJ.
    compute = 294_912 * 4.6
    # (16 + 32) * 64 values of 4 bytes fit 1 MB: 12,288 bytes of 100 / 8 pJ.
    near = 12_288 * 12.5
    # 4608 weights and 64 of the norm, 18,688 bytes, from DRAM: 2336 reads.
    estimate = MODEL.estimate((CONV,))
    assert estimate.compute_mj == pytest.approx(compute / 1e9)
    assert estimate.sram_mj == pytest.approx(near / 1e9)
    assert estimate.dram_mj == pytest.approx(2336 * 1950 / 1e9)
    assert estimate.low_mj == pytest.approx((compute + near + 2336 * 1300) / 1e9)
    assert estimate.energy_mj == pytest.approx((compute + near + 2336 * 1950) / 1e9)
    assert estimate.high_mj == pytest.approx((compute + near + 2336 * 2600) / 1e9)
    assert MODEL.price((CONV,)) == estimate.energy_mj
    assert estimate.method == "analytic estimate"
    assert estimate.assumed == ()


def test_the_same_convolution_in_8_bits_by_hand() -> None:
    # A quarter of the bytes but for the norm, 0.23 pJ a MAC, and 20 pJ a read of 32 KB.
    expected = 294_912 * 0.23 + 3072 * 20 / 8 + (4608 + 4 * 64) * 1950 / 8
    estimate = MODEL.estimate((CONV,), weight_bits=8, activation_bits=8, sram_bytes=32 * 1024)
    assert estimate.energy_mj == pytest.approx(expected / 1e9)
    assert estimate.assumed == ()


def test_a_batch_reads_its_weights_once() -> None:
    one, ten = MODEL.estimate((CONV,)), MODEL.estimate((CONV,), batch=10)
    assert ten.compute_mj == pytest.approx(10 * one.compute_mj)
    assert ten.sram_mj == pytest.approx(10 * one.sram_mj)
    assert ten.dram_mj == one.dram_mj


def test_activations_that_do_not_fit_go_to_dram_all_of_them() -> None:
    # 12,288 bytes of activations: exactly the memory, and one byte less.
    weights = 18_688 * 1950 / 8 / 1e9
    fits = MODEL.estimate((CONV,), sram_bytes=12_288)
    spills = MODEL.estimate((CONV,), sram_bytes=12_287)
    assert fits.sram_mj > 0
    assert fits.dram_mj == pytest.approx(weights)
    assert spills.sram_mj == 0
    assert spills.dram_mj == pytest.approx(weights + 12_288 * 1950 / 8 / 1e9)
    # Each operation on its own: the batch of a large one does not push out a small one.
    both = MODEL.estimate((CONV, GlobalAvgPool(16, 8, 8)), sram_bytes=12_287)
    assert both.sram_mj > 0
    assert MODEL.estimate((CONV,), batch=2, sram_bytes=12_288).sram_mj == 0


def test_operations_without_macs_take_memory_only() -> None:
    # Three operands of 2 * 64 values.
    estimate = MODEL.estimate((Add(2, 8, 8),))
    assert estimate.compute_mj == estimate.dram_mj == 0
    assert estimate.sram_mj == pytest.approx(3 * 128 * 4 * 12.5 / 1e9)


def test_arithmetic_by_width() -> None:
    def mac(bits: int, model: EnergyModel = MODEL) -> float:
        return model.mac_pj(weight_bits=bits, activation_bits=bits)

    assert mac(8) == pytest.approx(0.23)
    assert mac(16) == pytest.approx(1.5)
    assert mac(32) == pytest.approx(4.6)
    assert mac(4) == pytest.approx(0.2 / 4 + 0.03 / 2)
    assert mac(12) == pytest.approx(0.2 * 2.25 + 0.03 * 1.5)
    integers = EnergyModel(floating=False)
    assert mac(32, integers) == pytest.approx(3.2)
    assert mac(16, integers) == pytest.approx(0.2 * 4 + 0.03 * 2)
    # A fitted scale holds for published and for assumed widths.
    assert mac(8, EnergyModel(compute_scale=3)) == pytest.approx(3 * 0.23)
    assert mac(4, EnergyModel(compute_scale=3)) == pytest.approx(3 * 0.065)
    # The wider one counts.
    assert MODEL.mac_pj(weight_bits=2, activation_bits=8) == pytest.approx(0.23)
    assert MODEL.mac_pj(weight_bits=32, activation_bits=8) == pytest.approx(4.6)


def test_widths_without_a_figure_are_refused() -> None:
    for bits in (17, 24, 31, 33, 64):
        with pytest.raises(CostError, match=f"no energy of {bits}-bit floats .* use 1 to 16 or 32 bits"):
            MODEL.price((CONV,), weight_bits=8, activation_bits=bits)
    with pytest.raises(CostError, match=r"no energy of 33-bit integers .* use 1 to 32 bits"):
        EnergyModel(floating=False).mac_pj(weight_bits=33, activation_bits=1)


def test_sram_by_size() -> None:
    per_byte = {size: MODEL.sram_pj_per_byte(size) for size in (1, 8192, 16_384, 32_768, 2**20, 2**22, 2**40)}
    assert per_byte[8192] == pytest.approx(10 / 8)
    assert per_byte[32_768] == pytest.approx(20 / 8)
    assert per_byte[2**20] == pytest.approx(100 / 8)
    assert per_byte[1] == per_byte[8192]
    # Half way in logarithms; four times the size, twice the energy; never above DRAM.
    assert per_byte[16_384] == pytest.approx(math.sqrt(200) / 8)
    assert per_byte[2**22] == pytest.approx(200 / 8)
    assert per_byte[2**40] == 1300 / 8


def test_what_is_assumed_is_said() -> None:
    estimate = MODEL.estimate((CONV,), weight_bits=4, activation_bits=4, sram_bytes=50_000)
    assert len(estimate.assumed) == 2
    assert "4-bit arithmetic scaled from int8" in estimate.assumed[0]
    assert "SRAM of 50000 bytes" in estimate.assumed[1]
    assert EnergyModel(floating=False).estimate((CONV,), weight_bits=16, activation_bits=16).assumed


widths = st.sampled_from([*range(1, 17), 32])
channels = st.integers(1, 64)
convs = st.builds(
    lambda i, o, k: Conv2d(i, o, 9, 7, kernel=k), channels, channels, st.sampled_from([1, 3, 5])
)
operations = st.one_of(
    convs, st.builds(Linear, channels, channels), st.builds(Add, channels, channels, channels)
)
blocks = st.lists(operations, max_size=4).map(tuple)


@given(blocks, blocks, widths, widths, st.integers(1, 10**5))
def test_energies_add_up_over_operations(
    first: Ops, second: Ops, weight: int, activation: int, sram: int
) -> None:
    setting = {"weight_bits": weight, "activation_bits": activation, "sram_bytes": sram}
    separate = MODEL.price(first, **setting) + MODEL.price(second, **setting)
    assert MODEL.price(first + second, **setting) == pytest.approx(separate)


@given(blocks, widths, widths, st.integers(1, 10**5), st.integers(1, 8))
def test_the_middle_lies_in_the_range(ops: Ops, weight: int, activation: int, sram: int, batch: int) -> None:
    estimate = MODEL.estimate(
        ops, batch=batch, weight_bits=weight, activation_bits=activation, sram_bytes=sram
    )
    assert 0 <= estimate.low_mj <= estimate.energy_mj <= estimate.high_mj
    if any(op.params for op in ops):
        assert 0 < estimate.low_mj < estimate.energy_mj < estimate.high_mj


@given(operations, widths, widths, widths, widths, st.integers(1, 10**5), st.booleans())
def test_more_bits_never_take_less(
    op: Any, weight: int, activation: int, other_weight: int, other_activation: int, sram: int, floating: bool
) -> None:
    model = EnergyModel(floating=floating)
    less, more = (
        model.price(
            (op,),
            weight_bits=pick(weight, other_weight),
            activation_bits=pick(activation, other_activation),
            sram_bytes=sram,
        )
        for pick in (min, max)
    )
    assert less <= more


def test_8_bits_take_less_than_16_and_these_less_than_32() -> None:
    energies = [MODEL.price((CONV,), weight_bits=bits, activation_bits=bits) for bits in (8, 16, 32)]
    assert energies == sorted(set(energies))


def test_it_compiles_to_a_cost_of_networks(space: SearchSpace) -> None:
    codes = space.sample(8, np.random.default_rng(0))
    setting = {"batch": 2, "weight_bits": 4, "activation_bits": 8, "sram_bytes": 1000}
    cost = MODEL.cost(space, **setting)
    assert cost.metric == "energy_mj"
    by_hand = [sum(MODEL.price(ops, **setting) for _, ops in space.operations(row[None])) for row in codes]
    assert cost.of(codes) == pytest.approx(by_hand)


NETWORKS: list[Ops] = [(CONV,), (CONV, Linear(64, 500)), (Linear(100, 100),), (CONV, CONV, Add(8, 8, 8))]


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(0.1, 10))
def test_known_scales_are_recovered_from_any_start(compute: float, memory: float, start: float) -> None:
    setting = {"batch": 2, "weight_bits": 8, "activation_bits": 8, "sram_bytes": 4000}
    truth = replace(MODEL, compute_scale=compute, memory_scale=memory)
    measured = [truth.price(ops, **setting) for ops in NETWORKS]
    found = replace(MODEL, compute_scale=start).fitted(NETWORKS, measured, **setting)
    assert found.compute_scale == pytest.approx(compute, rel=1e-6)
    assert found.memory_scale == pytest.approx(memory, rel=1e-6)
    assert [found.price(ops, **setting) for ops in NETWORKS] == pytest.approx(measured)


def test_scales_are_never_negative() -> None:
    # Twice the energy of memory less once that of arithmetic: without the bound the scales were -1 and 2.
    parts = [MODEL.estimate(ops) for ops in NETWORKS]
    measured = [2 * (part.sram_mj + part.dram_mj) - part.compute_mj for part in parts]
    found = MODEL.fitted(NETWORKS, measured)
    assert found.compute_scale == 0
    assert 0 < found.memory_scale < 2


def test_data_that_carry_no_scales_are_refused() -> None:
    with pytest.raises(TableError, match="at least 2 different rows, got 1"):
        MODEL.fitted(NETWORKS[:1], [1.0])
    with pytest.raises(TableError, match="measurement 1 must be positive and finite, got 0"):
        MODEL.fitted(NETWORKS[:2], [1.0, 0.0])
    with pytest.raises(TableError, match="one ratio of arithmetic to memory"):
        MODEL.fitted([(CONV,), (CONV, CONV)], [1.0, 2.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"int8": Arithmetic(0.0, 1.0)}, "int8.add_pj must be positive and finite, got 0.0"),
        ({"fp32": Arithmetic(1.0, math.nan)}, "fp32.multiply_pj must be positive and finite, got nan"),
        ({"sram_read_pj": ()}, "at least one size, ascending, got"),
        ({"sram_read_pj": ((2, 1.0), (1, 2.0))}, r"at least one size, ascending, got \[2, 1\]"),
        ({"sram_read_pj": ((2, -1.0),)}, "sram_read_pj of 2 bytes must be positive"),
        ({"dram_read_pj": (3.0, 2.0, 4.0)}, "dram_read_pj must be low <= middle <= high"),
        ({"dram_read_pj": (0.0, 2.0, 4.0)}, "dram_read_pj must be positive"),
        ({"compute_scale": -1.0}, "at least 0 and not both 0"),
        ({"compute_scale": 0.0, "memory_scale": 0.0}, "at least 0 and not both 0"),
        ({"memory_scale": math.inf}, "at least 0 and not both 0"),
    ],
)
def test_a_wrong_model_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CostError, match=message):
        replace(MODEL, **change)


@pytest.mark.parametrize(
    "setting", [{"batch": 0}, {"weight_bits": 8.0}, {"activation_bits": True}, {"sram_bytes": 0}]
)
def test_a_wrong_setting_is_named(setting: dict[str, Any]) -> None:
    with pytest.raises(CostError, match=f"{next(iter(setting))} must be an integer >= 1"):
        MODEL.price((CONV,), **setting)
