"""Clip and quantize: how many weights are zero, which levels there are, and what is chosen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.errors import QuantizationError
from autocompress.quantize.clip import ClippedWeights, choose_clipping, clip_and_quantize, clippings
from autocompress.quantize.layer import QuantizedLayer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_levels_by_hand() -> None:
    weight = torch.tensor([-4.0, -3.0, -0.1, 0.1, 0.2, 1.0, 2.0, 3.0])
    rounded, index = clip_and_quantize(weight, 0.4, 2)
    # Clipped: one of three negative, two of five positive ones. Left are -4..-3 and 1..3: of three intervals
    # one is negative.
    assert index.tolist() == [1, 1, 0, 0, 0, 2, 3, 3]
    assert rounded.tolist() == [-3.5, -3.5, 0, 0, 0, 1, 2.5, 2.5]


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=80, unique=True),
    st.floats(0, 0.99),
    st.integers(2, 8),
)
def test_the_share_of_zeros_the_signs_and_the_number_of_levels_are_as_asked(
    values: list[float], rate: float, bits: int
) -> None:
    weight = torch.tensor(values)
    rounded, index = clip_and_quantize(weight, rate, bits)
    for sign in (-1, 1):
        side = weight * sign > 0
        assert int((side & (index == 0)).sum()) == int(rate * int(side.sum()))
        assert (rounded[side] * sign >= 0).all()
    assert len(rounded.unique()) <= 2**bits
    assert 0 <= int(index.min()) <= int(index.max()) < 2**bits
    assert rounded.abs().max() <= weight.abs().max() * (1 + 1e-6)


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3])
def test_constant_weights_stay(value: float) -> None:
    weight = torch.full((3, 3), value)
    assert torch.equal(clip_and_quantize(weight, 0.0, 2)[0], weight)


def test_more_bits_and_lower_rates_lose_less_and_take_more() -> None:
    found = {(o.rate, o.bits): o for o in clippings(normal(64, 100), rates=(0.0, 0.5, 0.8), bits=(2, 4, 6))}
    for rate in (0.0, 0.5, 0.8):
        assert found[rate, 2].error > found[rate, 4].error > found[rate, 6].error
        assert found[rate, 2].size_bytes < found[rate, 4].size_bytes < found[rate, 6].size_bytes
    for bits in (4, 6):
        assert found[0.0, bits].error < found[0.5, bits].error < found[0.8, bits].error
        assert found[0.0, bits].size_bytes > found[0.5, bits].size_bytes > found[0.8, bits].size_bytes


def test_a_higher_price_chooses_a_smaller_layer() -> None:
    options = clippings(normal(64, 100))
    sizes = [choose_clipping(options, 6400, price).size_bytes for price in (0, 0.1, 1, 10, 1e6)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == min(option.size_bytes for option in options)
    assert choose_clipping(options, 6400, 0).error == min(option.error for option in options)


def test_gradients_pass_to_clipped_weights_too() -> None:
    layer = nn.Linear(20, 5)
    layer.weight.data.copy_(normal(5, 20))
    quantized = QuantizedLayer(layer, weight=ClippedWeights(0.5, 3))  # type: ignore[arg-type]
    x = normal(7, 20, seed=1)
    quantized(x).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(5, 20))
    expected = nn.functional.linear(x, clip_and_quantize(layer.weight, 0.5, 3)[0], layer.bias)
    torch.testing.assert_close(quantized(x), expected)


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"rate must be .* got 1\.0"):
        ClippedWeights(1.0, 4)
    with pytest.raises(QuantizationError, match=r"bits must be 2\.\.8, got 1"):
        clip_and_quantize(normal(3), 0.5, 1)
    with pytest.raises(QuantizationError, match="there must be options"):
        choose_clipping((), 1, 0.5)
