"""Grids and scales: zero is exact, rounding twice is rounding once, levels lie where they should."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autocompress.errors import QuantizationError
from autocompress.quantize.grid import WIDTHS, Grid, log_steps, quantized, scale_of, weight_grid


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    levels = draw(st.sampled_from(("uniform", "power_of_two_scale", "logarithmic")))
    signed = draw(st.booleans())
    symmetric = levels == "logarithmic" or draw(st.booleans())
    narrow = signed and symmetric and draw(st.booleans())
    return Grid(draw(st.sampled_from(WIDTHS)), signed, symmetric, narrow, levels)


bound = st.floats(-1e4, 1e4, width=32)


@given(grids(), bound, bound)
def test_zero_is_exact_on_every_grid(grid: Grid, first: float, second: float) -> None:
    low, high = torch.tensor([min(first, second)]), torch.tensor([max(first, second)])
    assert float(quantized(torch.zeros(1), *scale_of(low, high, grid), grid)) == 0.0


@given(grids(), bound, bound, st.lists(bound, min_size=1, max_size=20))
def test_rounding_twice_is_rounding_once(
    grid: Grid, first: float, second: float, values: list[float]
) -> None:
    low, high = torch.tensor([min(first, second)]), torch.tensor([max(first, second)])
    scale, zero_point = scale_of(low, high, grid)
    once = quantized(torch.tensor(values), scale, zero_point, grid)
    assert torch.equal(quantized(once, scale, zero_point, grid), once)


@given(grids(), bound, bound)
def test_values_inside_the_range_move_by_half_a_step_at_most(grid: Grid, first: float, second: float) -> None:
    low, high = min(first, second, 0.0), max(first, second, 0.0)
    if grid.levels == "logarithmic":
        return
    # Ranges without zero are widened to it.
    given = torch.tensor([min(first, second)]), torch.tensor([max(first, second)])
    scale, zero_point = scale_of(*given, grid)
    x = torch.linspace(0.0 if grid.symmetric and not grid.signed else low, high, 33)
    moved = (quantized(x, scale, zero_point, grid) - x).abs().max()
    # A zero point that is rounded takes up to half a step from either end.
    allowed = 0.5 if grid.symmetric else 1.0
    assert moved <= float(scale) * allowed * (1 + 1e-3)


def test_logarithmic_levels_are_halves_of_the_greatest() -> None:
    grid = Grid(3, levels="logarithmic")
    scale, zero_point = scale_of(torch.tensor([-8.0]), torch.tensor([4.0]), grid)
    x = torch.linspace(-9, 9, 2001)
    found = sorted(set(quantized(x, scale, zero_point, grid).tolist()))
    # 3 bits: a sign and four codes, one of which is zero.
    assert found == [-8, -4, -2, 0, 2, 4, 8]
    assert log_steps(grid) == 2


@given(st.floats(2.0**-20, 2.0**20, width=32), st.sampled_from(WIDTHS))
def test_power_of_two_scales_are_powers_of_two_and_do_not_cut_the_range(high: float, bits: int) -> None:
    grid = weight_grid(bits, "power_of_two_scale")
    scale, _ = scale_of(torch.tensor([-high]), torch.tensor([high]), grid)
    mantissa, _ = torch.frexp(scale)
    assert float(mantissa) == 0.5
    plain, _ = scale_of(torch.tensor([-high]), torch.tensor([high]), weight_grid(bits))
    assert float(plain) * (1 - 1e-5) <= float(scale) <= 2 * float(plain)


def test_what_is_no_grid_and_no_range_is_refused() -> None:
    with pytest.raises(QuantizationError, match="bits must be one of 2, 3"):
        Grid(9)
    with pytest.raises(QuantizationError, match="have no zero point"):
        Grid(4, symmetric=False, levels="logarithmic")
    with pytest.raises(QuantizationError, match="nan or infinity"):
        scale_of(torch.tensor([0.0]), torch.tensor([torch.inf]), Grid(4))
    with pytest.raises(QuantizationError, match="upside down"):
        scale_of(torch.tensor([1.0]), torch.tensor([0.0]), Grid(4))
