"""The roofline is what its formula says, its fit is the best one, and a stored one is read strictly."""

import json
import math
import pickle
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autocompress.cost import compile_cost
from autocompress.errors import CostError, TableError
from autocompress.latency.roofline import (
    MacsOnly,
    Roofline,
    activation_bytes,
    fit,
    fit_macs_only,
    held_out,
    nonnegative_least_squares,
)
from autocompress.ops import Add, Conv2d, GlobalAvgPool, Linear, Ops, OpSpec, Shape
from autocompress.space import SearchSpace

# 8 MACs take as long as 1 byte.
MODEL = Roofline({8: 4000.0, 32: 1000.0}, 125.0, 0.5)


@dataclass(frozen=True)
class Custom(OpSpec):
    """A user's own operation: only the four answers are known."""

    work: int
    elements: int = 1
    weights: int = 0

    @property
    def in_shape(self) -> Shape:
        return self.elements, 1, 1

    @property
    def out_shape(self) -> Shape:
        return 1, self.elements, 1

    @property
    def macs(self) -> int:
        return self.work

    @property
    def params(self) -> int:
        return self.weights

    def module(self) -> nn.Module:
        return nn.Identity()


def test_a_linear_layer_is_bound_by_its_weights() -> None:
    # 10 + 20 values and 220 parameters of 4 bytes: 1000 bytes, 8 ms; 200 MACs: 0.2 ms.
    assert MODEL.price((Linear(10, 20),)) == 0.5 + 8.0


def test_a_convolution_is_bound_by_its_macs() -> None:
    # 3x3x16x16 weights + 32 of the norm; on 8x8: 147456 MACs, 147.456 ms; 17,792 values... 4 bytes each.
    op = Conv2d(16, 16, 8, 8, kernel=3)
    moved = 4 * (2 * 16 * 64 + 2304 + 32)
    assert moved / 125 < 147.456
    assert MODEL.price((op,)) == pytest.approx(0.5 + 147.456)


def test_a_batch_shares_its_weights() -> None:
    # 10 images: 300 values and 220 parameters: 2080 bytes, 16.64 ms; 2000 MACs: 2 ms.
    assert MODEL.price((Linear(10, 20),), batch=10) == pytest.approx(0.5 + 16.64)


def test_addition_reads_two_operands_and_pooling_one() -> None:
    # 3 * 128 values against 128 + 2, without MACs.
    assert MODEL.price((Add(2, 8, 8),)) == pytest.approx(0.5 + 4 * 384 / 125)
    assert MODEL.price((GlobalAvgPool(2, 8, 8),)) == pytest.approx(0.5 + 4 * 130 / 125)


def test_bits_count_for_what_they_store_and_the_wider_one_for_the_rate() -> None:
    op = Linear(10, 20)
    assert activation_bytes(op, batch=3, bits=4) == 3 * 30 / 2
    compute = Custom(8000)
    assert MODEL.price((compute,), weight_bits=8, activation_bits=8) == 0.5 + 2
    assert MODEL.price((compute,), weight_bits=2, activation_bits=8) == 0.5 + 2
    assert MODEL.price((compute,), weight_bits=8, activation_bits=32) == 0.5 + 8
    assert MODEL.price((compute,), weight_bits=32, activation_bits=8) == 0.5 + 8
    # 10 + 20 values of 1 byte, 200 weights of half a byte and 20 biases of 4 bytes.
    assert MODEL.price((op,), weight_bits=4, activation_bits=8) == pytest.approx(0.5 + 210 / 125)
    # Of a user's own operation all parameters are weights.
    own = Custom(0, 15, 220)
    assert MODEL.price((own,), weight_bits=4, activation_bits=8) == pytest.approx(0.5 + 140 / 125)


def test_a_width_without_a_rate_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(
        CostError, match=r"no rate for 16 bits \(the wider of 4-bit .* 16-bit .*\); it has 8, 32"
    ):
        MODEL.price((Custom(1),), weight_bits=4, activation_bits=16)


@pytest.mark.parametrize("setting", [{"batch": 0}, {"weight_bits": 8.0}, {"activation_bits": True}])
def test_a_wrong_setting_is_named(setting: dict[str, Any]) -> None:
    with pytest.raises(CostError, match=f"{next(iter(setting))} must be an integer >= 1"):
        MODEL.price((Custom(1),), **setting)


def test_the_bound_changes_at_the_ridge() -> None:
    # 1000 MACs per ms and 125 bytes per ms meet at 8 MACs per byte: 64 MACs on 8 bytes.
    assert MODEL.ridge() == 8
    assert MODEL.ridge(weight_bits=8, activation_bits=4) == 32
    assert MODEL.price((Custom(64),)) == 0.5 + 8 / 125
    assert MODEL.price((Custom(63),)) == 0.5 + 8 / 125
    assert MODEL.price((Custom(65),)) == 0.5 + 65 / 1000


numbers = st.integers(0, 10**6)
customs = st.builds(Custom, numbers, st.integers(1, 10**5), numbers)


@given(customs, numbers, st.sampled_from(["work", "elements", "weights"]))
def test_more_work_never_costs_less(op: Custom, more: int, name: str) -> None:
    larger = replace(op, **{name: getattr(op, name) + more})
    assert 0 < MODEL.price((op,)) <= MODEL.price((larger,))


@given(st.lists(customs, max_size=4), st.lists(customs, max_size=4))
def test_prices_add_up_over_operations(first: list[Custom], second: list[Custom]) -> None:
    separate = MODEL.price(tuple(first)) + MODEL.price(tuple(second))
    assert MODEL.price((*first, *second)) == pytest.approx(separate)


def test_it_compiles_to_a_cost_of_networks(space: SearchSpace) -> None:
    codes = space.sample(8, np.random.default_rng(0))
    cost = MODEL.cost(space, batch=2, weight_bits=4, activation_bits=8)
    assert cost.metric == "latency_ms"
    by_hand = [
        sum(
            MODEL.price(ops, batch=2, weight_bits=4, activation_bits=8)
            for _, ops in space.operations(row[None])
        )
        for row in codes
    ]
    assert cost.of(codes) == pytest.approx(by_hand)
    assert compile_cost(space, MODEL.price, "latency_ms").of(codes) == pytest.approx(
        MODEL.cost(space).of(codes)
    )


def mixed_blocks(seed: int, count: int = 24) -> list[Ops]:
    """Blocks of one to three operations, bound by either side when a byte takes as long as 1 to 8 MACs."""
    rng = np.random.default_rng(seed)

    def one() -> OpSpec:
        elements = int(rng.integers(10, 1000))
        intensity = float(rng.choice([0, 2, 0.2, 20, 60]))
        return Custom(int(intensity * 8 * elements * rng.uniform(0.5, 1)), elements)

    return [tuple(one() for _ in range(1 + index % 3)) for index in range(count)]


@settings(max_examples=30)
@given(st.floats(1, 8), st.floats(1e-2, 1e6), st.floats(0, 100), st.integers(0, 99), st.sampled_from([1, 4]))
def test_known_parameters_are_recovered(
    ridge: float, bytes_per_ms: float, per_op: float, seed: int, batch: int
) -> None:
    # per_op counts in the time of 100 bytes, so that no term drowns.
    truth = Roofline({8: ridge * bytes_per_ms}, bytes_per_ms, per_op * 100 / bytes_per_ms)
    blocks = mixed_blocks(seed)
    setting = {"batch": batch, "weight_bits": 4, "activation_bits": 8}
    found = fit(blocks, [truth.price(ops, **setting) for ops in blocks], **setting)
    assert found.macs_per_ms == pytest.approx(truth.macs_per_ms, rel=1e-6)
    assert found.bytes_per_ms == pytest.approx(truth.bytes_per_ms, rel=1e-6)
    assert found.per_op_ms == pytest.approx(truth.per_op_ms, rel=1e-6, abs=1e-6 / bytes_per_ms)


def loss(model: Roofline, blocks: list[Ops], times: list[float]) -> float:
    return sum((model.price(ops) / time - 1) ** 2 for ops, time in zip(blocks, times, strict=True))


@settings(max_examples=20)
@given(st.integers(0, 999))
def test_no_other_roofline_fits_noisy_times_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = mixed_blocks(seed, 12)
    truth = Roofline({32: 3000.0}, 1000.0, 0.3)
    times = [truth.price(ops) * math.exp(0.5 * rng.standard_normal()) for ops in blocks]
    best = fit(blocks, times)
    least = loss(best, blocks, times)
    for centre in (best, truth):
        for spread in (0.01, 0.3, 2.0):
            for _ in range(20):
                shift = np.exp(spread * rng.standard_normal(3))
                other = Roofline(
                    {32: centre.macs_per_ms[32] * shift[0]},
                    centre.bytes_per_ms * shift[1],
                    centre.per_op_ms * shift[2],
                )
                assert loss(other, blocks, times) >= least * (1 - 1e-9)


@settings(max_examples=30)
@given(st.lists(customs, min_size=3, max_size=8, unique=True), st.integers(0, 999))
def test_any_positive_times_give_positive_prices(ops: list[Custom], seed: int) -> None:
    blocks: list[Ops] = [(op,) for op in ops]
    times = np.exp(5 * np.random.default_rng(seed).standard_normal(len(ops)))
    if not any(op.macs for op in ops):
        return
    model = fit(blocks, times)
    assert model.per_op_ms >= 0
    assert all(model.price(block) > 0 for block in blocks)
    assert model.price((Custom(1),)) > 0


def test_twice_the_times_are_twice_the_price() -> None:
    blocks = mixed_blocks(3)
    times = np.exp(np.random.default_rng(3).standard_normal(len(blocks)))
    once, twice = fit(blocks, times), fit(blocks, 2 * times)
    for ops in blocks:
        assert twice.price(ops) == pytest.approx(2 * once.price(ops), rel=1e-9)


def test_a_rate_that_nothing_is_bound_by_is_the_slowest_that_agrees() -> None:
    # All by memory, at 2 ms a byte; the greatest intensity is 3 MACs a byte: computing could be that slow.
    memory: list[Ops] = [(Custom(8 * n * k, n),) for n, k in ((1, 0), (5, 1), (20, 2), (70, 3))]
    model = fit(memory, [2.0 * 8 * n for n in (1, 5, 20, 70)])
    assert model.bytes_per_ms == pytest.approx(0.5)
    assert model.macs_per_ms[32] == pytest.approx(3 / 2)
    assert model.per_op_ms == pytest.approx(0, abs=1e-9)
    # All by computing, at 2 ms a MAC; the least intensity is 3 MACs a byte: memory could take 6 ms a byte.
    compute: list[Ops] = [(Custom(8 * n * k, n),) for n, k in ((1, 3), (5, 4), (20, 9))]
    model = fit(compute, [2.0 * 8 * n * k for n, k in ((1, 3), (5, 4), (20, 9))])
    assert model.macs_per_ms[32] == pytest.approx(0.5)
    assert model.bytes_per_ms == pytest.approx(1 / 6)


def test_one_intensity_is_enough_for_a_fit_of_its_own_rows() -> None:
    # 16 MACs on 8 bytes, again and again.
    blocks: list[Ops] = [(Custom(16 * n, n),) * n for n in (1, 2, 5)]
    times = [3.0 * n + 0.5 * 16 * n * n for n in (1, 2, 5)]
    model = fit(blocks, times)
    assert model.per_op_ms == pytest.approx(3)
    assert [model.price(block) for block in blocks] == pytest.approx(times)


def test_memory_can_come_out_as_good_as_infinitely_fast() -> None:
    # 3 ms an operation and 0.5 ms a MAC; 1000 bytes of an operation without MACs take nothing.
    blocks: list[Ops] = [
        (Custom(2, 10),),
        (Custom(6, 20), Custom(0, 125)),
        (Custom(10, 1),),
        (Custom(0, 125),),
    ]
    times = [4.0, 9.0, 8.0, 3.0]
    model = fit(blocks, times)
    assert [model.price(block) for block in blocks] == pytest.approx(times, rel=1e-7)
    assert model.per_op_ms == pytest.approx(3)
    assert model.macs_per_ms[32] == pytest.approx(2)


def test_times_that_only_count_operations_leave_rates_that_cost_nothing() -> None:
    ops = (Custom(100, 3), Custom(7, 9), Custom(0, 5), Custom(50, 50))
    blocks: list[Ops] = [ops[:1], ops[:2], ops[1:4], ops]
    model = fit(blocks, [2.0 * len(block) for block in blocks])
    assert model.per_op_ms == pytest.approx(2)
    assert all(model.price(block) == pytest.approx(2 * len(block), rel=1e-7) for block in blocks)


def test_data_that_carry_no_fit_are_refused() -> None:
    blocks: list[Ops] = [(Custom(n, n),) for n in (1, 2, 3)]
    with pytest.raises(TableError, match="at least 3 different rows, got 2"):
        fit(blocks[:2], [1.0, 2.0])
    with pytest.raises(TableError, match="at least 3 different rows, got 2"):
        fit([*blocks[:2], *blocks[:2]], [1.0, 2.0, 1.0, 2.0])
    with pytest.raises(TableError, match="each of 3 rows needs one measurement, got shape \\(2,\\)"):
        fit(blocks, [1.0, 2.0])
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(TableError, match="measurement 1 must be positive and finite"):
            fit(blocks, [1.0, wrong, 2.0])
    with pytest.raises(TableError, match="row 2 has no operations"):
        fit([*blocks[:2], ()], [1.0, 2.0, 3.0])
    with pytest.raises(TableError, match="no row has an operation with MACs"):
        fit([(Custom(0, n),) for n in (1, 2, 3)], [1.0, 2.0, 3.0])
    with pytest.raises(CostError, match="batch must be an integer"):
        fit(blocks, [1.0, 2.0, 3.0], batch=0)


def test_a_line_on_macs_is_recovered_and_never_negative(space: SearchSpace) -> None:
    networks: list[Ops] = [(Custom(n), Custom(2 * n)) for n in (10, 20, 50)]
    line = fit_macs_only(networks, [7 + 0.1 * 3 * n for n in (10, 20, 50)])
    assert (line.ms_per_mac, line.constant_ms) == (pytest.approx(0.1), pytest.approx(7))
    assert line.network_ms(networks[0]) == pytest.approx(10)
    # Larger networks that are faster: the best line without a negative slope is flat.
    falling = fit_macs_only(networks, [4.0, 2.0, 1.0])
    assert falling.ms_per_mac == 0
    # Minimum of sum (c / t - 1)^2: c = sum(1 / t) / sum(1 / t^2) = 1.75 / 1.3125.
    assert falling.constant_ms == pytest.approx(4 / 3)
    with pytest.raises(TableError, match="at least 2 different rows, got 1"):
        fit_macs_only(networks[:1], [1.0])
    codes = space.sample(5, np.random.default_rng(0))
    by_hand = [
        7 + 0.1 * sum(op.macs for _, ops in space.operations(row[None]) for op in ops) for row in codes
    ]
    assert MacsOnly(0.1, 7.0).cost(space).of(codes) == pytest.approx(by_hand)


def test_held_out_errors_vanish_on_exact_times_and_tell_the_models_apart() -> None:
    blocks = mixed_blocks(1, 40)
    times = [Roofline({32: 3000.0}, 1000.0, 0.3).price(ops) for ops in blocks]
    exact = held_out("roofline", blocks, times)
    assert exact.mape_percent == pytest.approx(0, abs=1e-6)
    assert exact.kendall == pytest.approx(1)
    assert held_out("macs_only", blocks, times).mape_percent > 10


def test_held_out_predictions_do_not_know_their_measurement() -> None:
    blocks: list[Ops] = [(Custom(n),) for n in (10, 20, 30, 40)]
    times = [10.0, 20.0, 30.0, 80.0]
    errors = []
    for index, time in enumerate(times):
        others = [other for other in range(4) if other != index]
        line = fit_macs_only([blocks[other] for other in others], [times[other] for other in others])
        errors.append(100 * abs(line.network_ms(blocks[index]) / time - 1))
    # Those on the line through zero predict 40 ms.
    assert errors[3] == pytest.approx(50)
    assert held_out("macs_only", blocks, times, folds=4).mape_percent == pytest.approx(sum(errors) / 4)


def test_held_out_folds_come_from_a_seed() -> None:
    rng = np.random.default_rng(0)
    noisy = np.exp(rng.standard_normal(24))
    blocks = mixed_blocks(2)
    assert held_out("roofline", blocks, noisy) == held_out("roofline", blocks, noisy)
    assert held_out("roofline", blocks, noisy) != held_out("roofline", blocks, noisy, seed=1)
    for folds in (1, 25):
        with pytest.raises(TableError, match=f"folds must be in 2..24 \\(measurements\\), got {folds}"):
            held_out("roofline", blocks, noisy, folds=folds)


def test_held_out_prices_at_the_setting_it_fits_at() -> None:
    blocks = mixed_blocks(5)
    setting = {"batch": 4, "weight_bits": 4, "activation_bits": 8}
    times = [MODEL.price(ops, **setting) for ops in blocks]
    assert held_out("roofline", blocks, times, **setting).mape_percent == pytest.approx(0, abs=1e-6)


@given(st.integers(0, 999), st.integers(1, 3))
def test_nonnegative_least_squares_agrees_with_scipy(seed: int, columns: int) -> None:
    from scipy.optimize import nnls

    rng = np.random.default_rng(seed)
    design = rng.standard_normal((6, columns)) * 10.0 ** rng.integers(-6, 6, columns)
    target = rng.standard_normal(6)
    solution, rest = nonnegative_least_squares(design, target)
    expected, norm = nnls(design, target)
    assert solution == pytest.approx(expected, rel=1e-6, abs=1e-12 / np.abs(design).max())
    assert rest == pytest.approx(norm**2)


def test_a_stored_roofline_is_the_same() -> None:
    text = json.dumps(MODEL.to_json(), allow_nan=False)
    assert Roofline.from_json(json.loads(text)) == MODEL
    assert pickle.loads(pickle.dumps(MODEL)) == MODEL
    assert hash(Roofline.from_json(json.loads(text))) == hash(MODEL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "autocompress.latency_table"}, "schema must be 'autocompress.roofline'"),
        ({"version": 2}, "version must be 1, got 2"),
        ({"version": True}, "version must be 1, got True"),
        ({"threads": 1}, "threads is not known; allowed: schema, version, macs_per_ms"),
        ({"per_op_ms": None}, "per_op_ms must be a finite number, got None"),
        ({"per_op_ms": -0.1}, "per_op_ms must be at least 0, got -0.1"),
        ({"bytes_per_ms": 0}, "bytes_per_ms must be positive, got 0"),
        ({"bytes_per_ms": math.inf}, "bytes_per_ms must be a finite number, got inf"),
        ({"bytes_per_ms": 10**400}, "bytes_per_ms must be a finite number, got 1000"),
        ({"bytes_per_ms": True}, "bytes_per_ms must be a finite number, got True"),
        ({"macs_per_ms": {}}, "macs_per_ms must have a rate"),
        ({"macs_per_ms": [1]}, r"macs_per_ms must be a JSON object, got \[1\]"),
        ({"macs_per_ms": {"8": "fast"}}, r"macs_per_ms\[8\] must be a finite number, got 'fast'"),
        ({"macs_per_ms": {"8": math.nan}}, r"macs_per_ms\[8\] must be a finite number, got nan"),
        (
            {"macs_per_ms": {"08": 1.0, "8": 1.0}},
            "macs_per_ms must be an object with numbers of bits as keys, got {'08': 1.0",
        ),
        ({"macs_per_ms": {"int8": 1.0}}, "an object with numbers of bits as keys, got {'int8'"),
        ({"macs_per_ms": {"0": 1.0}}, "an object with numbers of bits as keys, got {'0'"),
    ],
)
def test_a_damaged_roofline_is_refused_with_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TableError, match=message):
        Roofline.from_json(MODEL.to_json() | change)


def test_a_roofline_that_lacks_a_key_is_refused() -> None:
    payload = MODEL.to_json()
    del payload["bytes_per_ms"]
    with pytest.raises(TableError, match="bytes_per_ms is missing"):
        Roofline.from_json(payload)
    with pytest.raises(TableError, match="the file must be a JSON object, got None"):
        Roofline.from_json(None)
