"""Laws of additive costs, on random small ones against the definition, row by row."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from small_spaces import all_codes, costs, every_row, maxima, slow_cost, spaces

from autocompress.cost import (
    AdditiveCost,
    Cost,
    Factor,
    MaximumCost,
    compile_cost,
    compile_maximum,
    operation_cost,
)
from autocompress.errors import CostError
from autocompress.ops import Conv2d, GlobalAvgPool, Linear, Ops
from autocompress.space import Block, Choice, SearchSpace

SEEDS = st.integers(0, 2**32 - 1)


def linear(*features: int) -> Ops:
    """One layer that is as large as its two settings say; both at 10 and more."""
    return (Linear(features[0], features[1]),)


PAIR = SearchSpace(
    "pair",
    (Choice("first", (10, 20)), Choice("second", (30, 40, 50))),
    (
        # The order of a block's choices need not be that of the space.
        Block("mixed", ("second", "first"), linear),
        Block("pool", (), lambda: (GlobalAvgPool(8, 4, 4), Linear(8, 5))),
    ),
)


def distributions(counts: tuple[int, ...], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.dirichlet(np.ones(count)) for count in counts]


# Values ------------------------------------------------------------------------------------------------


def test_the_cost_of_a_row_by_hand() -> None:
    cost = operation_cost(PAIR, "macs")
    assert cost.of(np.array([[0, 0], [1, 2]])).tolist() == [30 * 10 + 40, 50 * 20 + 40]
    assert operation_cost(PAIR, "params").of(np.array([[1, 2]])).tolist() == [50 * 20 + 20 + 40 + 5]
    assert operation_cost(PAIR, "size_bytes").of(np.array([[1, 2]])).tolist() == [4 * (1020 + 45)]
    assert cost.constant == 40
    assert (cost.minimum, cost.maximum) == (340, 1040)
    assert cost.argmin().tolist() == [[0, 0]]


@given(spaces(), st.sampled_from(["macs", "params", "size_bytes"]))
def test_values_of_all_rows_at_once_are_the_sums_over_the_operations_of_each(
    space: SearchSpace, metric: str
) -> None:
    rows = every_row(space)
    by_operation = [
        sum(getattr(op, metric) for _, ops in space.operations(row) for op in ops) for row in rows
    ]
    cost = operation_cost(space, metric)
    assert cost.of(rows).tolist() == by_operation
    assert cost.minimum == min(by_operation)
    assert cost.maximum == max(by_operation)


@given(spaces(), SEEDS)
def test_a_price_of_one_s_own_is_paid_once_a_block_and_not_for_absent_ones(
    space: SearchSpace, seed: int
) -> None:
    prices: dict[Ops, float] = {}
    rng = np.random.default_rng(seed)

    def price(ops: Ops) -> float:
        assert ops not in prices  # a latency table may measure here
        assert ops
        prices[ops] = float(rng.exponential())
        return prices[ops]

    cost = compile_cost(space, price, "latency_ms")
    rows = every_row(space)
    slow = [sum(prices[ops] for _, ops in space.operations(row)) for row in rows]
    np.testing.assert_allclose(cost.of(rows), slow, rtol=1e-12)
    assert cost.metric == "latency_ms"


@given(st.one_of(costs(), maxima()))
def test_values_are_the_constant_and_one_entry_of_every_factor(cost: Cost) -> None:
    rows = all_codes(cost.counts)
    np.testing.assert_allclose(cost.of(rows), [slow_cost(cost, row) for row in rows.tolist()], rtol=1e-12)


def test_values_do_not_depend_on_how_many_rows_are_priced_together() -> None:
    rng = np.random.default_rng(0)
    factors = tuple(Factor((k, k + 1), rng.exponential(size=(3, 3))) for k in range(7))
    cost = AdditiveCost("latency_ms", (3,) * 8, 0.25, factors)
    rows = rng.integers(0, 3, (10_001, 8))  # more than two chunks, and not a multiple
    together = cost.of(rows)
    alone = [cost.of(row[None])[0] for row in rows[[0, 4095, 4096, 8191, 8192, 10_000]]]
    np.testing.assert_allclose(together[[0, 4095, 4096, 8191, 8192, 10_000]], alone, rtol=1e-15)
    assert cost.of(rows[:0]).shape == (0,)


def test_factors_over_the_same_choices_are_one() -> None:
    blocks = tuple(Block(f"b{k}", ("second", "first"), linear) for k in range(5))
    cost = operation_cost(SearchSpace("many", PAIR.choices, blocks), "macs")
    assert [factor.positions for factor in cost.factors] == [(0, 1)]
    assert cost.of(np.array([[1, 2]])).tolist() == [5 * 1000]


@given(st.one_of(costs(), maxima()), st.floats(0.5, 2), st.floats(-1, 1))
def test_a_scaled_cost_is_scaled_everywhere(cost: Cost, scale: float, constant: float) -> None:
    rows = all_codes(cost.counts)
    scaled = cost.scaled(scale, constant)
    np.testing.assert_allclose(scaled.of(rows), scale * cost.of(rows) + constant, rtol=1e-12, atol=1e-12)
    assert scaled.metric == cost.metric
    assert type(scaled) is type(cost)


# Bounds ------------------------------------------------------------------------------------------------


@given(st.one_of(costs(), maxima()))
def test_minimum_and_maximum_are_those_of_all_rows(cost: Cost) -> None:
    values = cost.of(all_codes(cost.counts))
    assert math.isclose(cost.minimum, values.min(), rel_tol=1e-12)
    assert math.isclose(cost.maximum, values.max(), rel_tol=1e-12)
    assert cost.of(cost.argmin()).tolist() == [cost.minimum]


@given(st.one_of(costs(), maxima()))
def test_the_lower_bound_of_a_prefix_is_the_cheapest_of_all_its_completions(cost: Cost) -> None:
    rows = all_codes(cost.counts)
    values = cost.of(rows)
    for length in range(len(cost.counts) + 1):
        prefixes = np.unique(rows[:, :length], axis=0) if length else rows[:1, :0]
        cheapest = [values[(rows[:, :length] == prefix).all(axis=1)].min() for prefix in prefixes]
        np.testing.assert_allclose(cost.lower_bound(prefixes), cheapest, rtol=1e-12)
        for prefix, least in zip(prefixes, cheapest, strict=True):
            completion = cost.argmin(prefix[None])
            assert completion[0, :length].tolist() == prefix.tolist()
            np.testing.assert_allclose(cost.of(completion), least, rtol=1e-12)


def test_bounds_need_small_tables_only_where_shared_choices_come_first() -> None:
    rng = np.random.default_rng(0)
    # A star: one choice of 40 options that five of 40 share; its table stays 40 x 40 if it comes first.
    star = [Factor((0, leaf), rng.exponential(size=(40, 40))) for leaf in range(1, 6)]
    cost = AdditiveCost("latency_ms", (40,) * 6, 0.0, tuple(star))
    by_hand = sum(factor.values.min(axis=1) for factor in star).min()  # type: ignore[union-attr]
    assert math.isclose(cost.minimum, by_hand)
    turned = [Factor((leaf, 5), rng.exponential(size=(40, 40))) for leaf in range(5)]
    with pytest.raises(
        CostError, match=r"bounding latency_ms joins choices \[0, 1, 2, 3, 4, 5\] .*share first"
    ):
        _ = AdditiveCost("latency_ms", (40,) * 6, 0.0, tuple(turned)).minimum


# Maxima ------------------------------------------------------------------------------------------------


@given(spaces(), st.sampled_from(["macs", "params"]))
def test_a_maximum_over_a_space_is_the_greatest_price_of_a_block_of_each_network(
    space: SearchSpace, metric: str
) -> None:
    def price(ops: Ops) -> float:
        return sum(getattr(op, metric) for op in ops)

    rows = every_row(space)
    by_block = [max([price(ops) for _, ops in space.operations(row)], default=0) for row in rows]
    cost = compile_maximum(space, price, "peak_activation_bytes")
    assert cost.of(rows).tolist() == by_block
    assert (cost.minimum, cost.maximum) == (min(by_block), max(by_block))
    assert cost.metric == "peak_activation_bytes"


def test_the_maximum_of_a_row_by_hand() -> None:
    cost = compile_maximum(PAIR, lambda ops: max(op.macs for op in ops), "peak_activation_bytes")
    assert cost.of(np.array([[0, 0], [1, 2]])).tolist() == [300, 1000]
    assert cost.constant == 40
    assert cost.argmin().tolist() == [[0, 0]]
    assert cost.lower_bound(np.array([[0], [1]])).tolist() == [300, 600]


def test_of_factors_over_the_same_choices_a_maximum_keeps_the_greater_entries() -> None:
    blocks = tuple(Block(f"b{k}", ("second", "first"), linear) for k in range(5))
    space = SearchSpace("many", PAIR.choices, blocks)
    cost = compile_maximum(space, lambda ops: ops[0].macs, "peak_activation_bytes")
    assert [factor.positions for factor in cost.factors] == [(0, 1)]
    assert cost.of(np.array([[1, 2]])).tolist() == [1000]


def test_the_expectation_of_a_maximum_is_refused_with_the_reason() -> None:
    cost = MaximumCost("peak_activation_bytes", (2,), 0.0, (Factor((0,), np.array([1.0, 2.0])),))
    with pytest.raises(CostError, match="peak_activation_bytes is a maximum over blocks, whose expectation"):
        cost.expected([np.array([0.5, 0.5])])


@pytest.mark.parametrize("scale", [-1.0, float("nan")])
def test_a_maximum_scaled_by_less_than_nothing_is_refused(scale: float) -> None:
    with pytest.raises(CostError, match="scale of a maximum must be 0 or more, got"):
        MaximumCost("peak_activation_bytes", (2,), 0.0, ()).scaled(scale, 0.0)


def test_a_maximum_of_negative_prices_is_refused() -> None:
    with pytest.raises(CostError, match=r"absent blocks are 0: prices must be 0 or more, got -1\.0"):
        compile_maximum(PAIR, lambda ops: -1.0, "peak_activation_bytes")


def test_costs_of_no_rows_and_of_no_factors_are_no_special_cases() -> None:
    for kind in (AdditiveCost, MaximumCost):
        constant = kind("macs", (2, 3), 3.0, ())
        assert constant.of(all_codes((2, 3))).tolist() == [3.0] * 6
        assert (constant.minimum, constant.maximum) == (3.0, 3.0)
        one = kind("macs", (2, 3), 3.0, (Factor((1,), np.ones(3)),))
        assert one.of(np.zeros((0, 2), dtype=np.int64)).shape == (0,)


# Expectation -------------------------------------------------------------------------------------------


def enumerated(cost: AdditiveCost, probabilities: Any) -> Any:
    """The definition: every row's cost times its probability."""
    return sum(
        slow_cost(cost, row) * math.prod(p[code] for p, code in zip(probabilities, row, strict=True))
        for row in all_codes(cost.counts).tolist()
    )


@given(costs(), SEEDS)
def test_the_expectation_is_the_sum_over_all_rows_in_numpy_and_torch(cost: AdditiveCost, seed: int) -> None:
    probabilities = distributions(cost.counts, seed)
    expected = enumerated(cost, probabilities)
    assert math.isclose(cost.expected(probabilities), expected, rel_tol=1e-9)
    tensors = [torch.from_numpy(p) for p in probabilities]
    result = cost.expected(tensors)
    assert result.shape == ()
    assert math.isclose(result.item(), expected, rel_tol=1e-9)
    single = cost.expected([tensor.float() for tensor in tensors])
    assert single.dtype == torch.float32
    assert math.isclose(single.item(), expected, rel_tol=1e-5)


@given(costs(), SEEDS)
def test_the_gradient_of_the_expectation_is_that_of_the_sum_over_all_rows(
    cost: AdditiveCost, seed: int
) -> None:
    probabilities = [torch.from_numpy(p).requires_grad_() for p in distributions(cost.counts, seed)]
    assume(cost.factors)  # a constant alone has no gradient
    ours = torch.autograd.grad(
        cost.expected(probabilities), probabilities, allow_unused=True, materialize_grads=True
    )
    scope = {position for factor in cost.factors for position in factor.positions}
    for position, gradient in enumerate(ours):
        # What a choice adds when one option is taken for sure, up to what no option of it changes.
        for option in range(cost.counts[position]):
            vectors = [p.detach().numpy() for p in probabilities]
            vectors[position] = np.eye(cost.counts[position])[option]
            touching = AdditiveCost(
                cost.metric, cost.counts, 0.0, tuple(f for f in cost.factors if position in f.positions)
            )
            assert math.isclose(gradient[option].item(), enumerated(touching, vectors), rel_tol=1e-9)
        assert position in scope or not gradient.any()


def test_the_gradient_through_a_softmax_passes_finite_differences() -> None:
    rng = np.random.default_rng(0)
    cost = AdditiveCost(
        "latency_ms",
        (2, 3, 2),
        0.5,
        (Factor((0, 1), rng.exponential(size=(2, 3))), Factor((0, 1, 2), rng.exponential(size=(2, 3, 2)))),
    )
    logits = [torch.from_numpy(rng.normal(size=count)).requires_grad_() for count in cost.counts]

    def expected(*logits: torch.Tensor) -> Any:
        return cost.expected([logit.softmax(0) for logit in logits])

    assert torch.autograd.gradcheck(expected, tuple(logits))


def test_at_certainty_the_expectation_is_the_value() -> None:
    cost = operation_cost(PAIR, "macs")
    assert cost.expected([np.array([0.0, 1.0]), np.array([0.0, 0.0, 1.0])]) == 1040
    uniform = [np.full(2, 1 / 2), np.full(3, 1 / 3)]
    assert math.isclose(cost.expected(uniform), 15 * 40 + 40)  # means of independent choices multiply


def test_the_expectation_of_a_constant_is_a_tensor_for_tensors() -> None:
    cost = AdditiveCost("macs", (2,), 3.0, ())
    result = cost.expected([torch.tensor([0.5, 0.5])])
    assert isinstance(result, torch.Tensor)
    assert (result.shape, result.item()) == ((), 3.0)


# Errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(2,), (2, 2), (3, 2), (2, 3, 1)])
def test_probabilities_of_wrong_lengths_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(CostError, match=r"probabilities must have lengths \[2, 3\], got \[.*\]"):
        operation_cost(PAIR, "macs").expected([np.ones(length) for length in lengths])


def test_a_block_of_more_than_a_million_settings_is_refused_before_any_is_priced() -> None:
    def never(*setting: object) -> Ops:
        raise AssertionError("priced")

    options = tuple(range(1001))
    space = SearchSpace(
        "big", (Choice("a", options), Choice("b", options)), (Block("huge", ("a", "b"), never),)
    )
    with pytest.raises(
        CostError,
        match=r"block 'huge' has 1002001 settings over choices \['a', 'b'\]; at most 1000000: split",
    ):
        operation_cost(space, "macs")


@pytest.mark.parametrize("price", [float("nan"), float("inf"), -float("inf")])
def test_a_price_that_is_not_finite_is_refused_with_the_block_and_its_setting(price: float) -> None:
    with pytest.raises(
        CostError, match=r"latency_ms of block 'mixed' at \{'second': 30, 'first': 10\} must be finite, got"
    ):
        compile_cost(PAIR, lambda ops: price, "latency_ms")


def test_a_metric_that_operations_do_not_know_is_refused() -> None:
    with pytest.raises(CostError, match="operations know macs, params, size_bytes, bops, not 'latency_ms'"):
        operation_cost(PAIR, "latency_ms")


def test_no_module_is_built_to_price_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: object) -> None:
        raise AssertionError("built")

    monkeypatch.setattr(Conv2d, "module", never)
    block = Block("conv", ("channels",), partial(Conv2d, 8, height=4, width=4))

    def operations(channels: int) -> Ops:
        return (block.operations(channels),)  # type: ignore[return-value]

    space = SearchSpace("s", (Choice("channels", (8, 16)),), (Block("conv", ("channels",), operations),))
    assert operation_cost(space, "macs").of(np.array([[1]])).tolist() == [8 * 16 * 16]
