"""Calibration ranges against brute force, against PyTorch's observers, and laws of histograms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.ao.quantization import MinMaxObserver, MovingAverageMinMaxObserver, PerChannelMinMaxObserver

from autocompress.errors import QuantizationError
from autocompress.quantize.grid import Grid, activation_grid, quantized, scale_of, weight_grid
from autocompress.quantize.histogram import BINS, Histogram
from autocompress.quantize.observers import OBSERVERS, MinMax, observer, weight_range
from autocompress.quantize.ranges import kl_range, mse_range, percentile_range

SYMMETRIC = Grid(8)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(x: Tensor, low: Tensor, high: Tensor, grid: Grid) -> float:
    return float((quantized(x, *scale_of(low, high, grid), grid) - x).square().mean())


def seen(x: Tensor) -> Histogram:
    histogram = Histogram()
    histogram.observe(x)
    return histogram


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60), st.randoms())
def test_a_histogram_knows_neither_order_nor_batches(values: list[float], chance: object) -> None:
    whole = seen(torch.tensor(values))
    shuffled = list(values)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    parts = Histogram()
    for value in shuffled:
        parts.observe(torch.tensor([value]))
    assert torch.equal(whole.counts, parts.counts)
    assert whole.width == parts.width
    assert whole.counts.sum() == len(values)


def test_zeros_that_come_first_do_not_decide_the_width() -> None:
    one, other = Histogram(), Histogram()
    for value in (0.0, 0.25):
        one.observe(torch.tensor([value]))
    for value in (0.25, 0.0):
        other.observe(torch.tensor([value]))
    assert torch.equal(one.counts, other.counts)
    assert one.width == other.width


def test_growing_loses_no_counts_and_keeps_edges() -> None:
    histogram = seen(normal(1000))
    before = histogram.counts.sum(1)
    histogram.observe(torch.tensor([1e5, -3e3]))
    assert torch.equal(histogram.counts.sum(1), before + 1)
    assert histogram.width * BINS / 2 <= 1e5 < histogram.width * BINS


def test_zeros_count_as_not_negative() -> None:
    histogram = seen(torch.tensor([-1.0, 0.0, 0.0, -0.0, 2.0]))
    assert histogram.counts.sum(1).tolist() == [4, 1]


def test_minmax_and_moving_average_are_those_of_pytorch() -> None:
    ours, average = MinMax(), MinMax(momentum=0.9)
    channels = MinMax(axis=1)
    theirs, theirs_average = MinMaxObserver(), MovingAverageMinMaxObserver(averaging_constant=0.1)
    theirs_channels = PerChannelMinMaxObserver(ch_axis=1)
    for seed in range(5):
        x = (seed + 1) * normal(4, 3, 5, seed=seed)
        for each in (ours, average, channels):
            each.observe(x)
        for other in (theirs, theirs_average, theirs_channels):
            other(x)
    for each, other in ((ours, theirs), (average, theirs_average), (channels, theirs_channels)):
        low, high = each.range(SYMMETRIC)
        torch.testing.assert_close(low, other.min_val.reshape(-1))
        torch.testing.assert_close(high, other.max_val.reshape(-1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_percentiles_are_those_of_sorted_values(symmetric: bool) -> None:
    x = normal(20_000) + 0.5
    grid = Grid(8, symmetric=symmetric)
    low, high = percentile_range(seen(x), grid, 99)
    width = seen(x).width
    if symmetric:
        limit = float(torch.quantile(x.abs(), 0.99))
        assert float(high) == pytest.approx(limit, abs=2 * width)
        assert float(low) == max(-float(high), float(x.min()))
    else:
        assert float(high) == pytest.approx(float(torch.quantile(x, 0.99)), abs=2 * width)
        assert float(low) == pytest.approx(float(torch.quantile(x, 0.01)), abs=2 * width)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "relu", "outlier"])
def test_the_mse_range_is_as_good_as_brute_force(bits: int, kind: str) -> None:
    x = normal(20_000)
    x = {"normal": x, "relu": x.relu(), "outlier": torch.cat([x, torch.tensor([60.0])])}[kind]
    grid = activation_grid(bits, positive=kind == "relu", symmetric=True)
    low, high = mse_range(seen(x), grid)
    limits = [limit * float(x.abs().max()) / 1000 for limit in range(1, 1001)]
    best = min(
        error(x, torch.tensor([-limit if grid.signed else 0.0]), torch.tensor([limit]), grid)
        for limit in limits
    )
    assert error(x, low, high, grid) <= 1.02 * best


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [9, 27, 576])
def test_ranges_of_weights_are_as_good_as_all_shares_tried(size: int, bits: int) -> None:
    weight, grid = normal(64, size, seed=size), weight_grid(bits)
    low, high = weight.amin(1), weight.amax(1)

    def errors(low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = scale_of(low, high, grid)
        return (quantized(weight, scale, zero_point, grid, 0) - weight).square().sum(1)

    tried = torch.stack([errors((1 - step / 100) * low, (1 - step / 100) * high) for step in range(80)])
    ratio = errors(*weight_range(weight, grid, 0)) / tried.amin(0)
    assert ratio.mean() < 1.002
    assert ratio.max() < 1.05


def test_the_mse_range_of_an_asymmetric_grid_is_as_good_as_brute_force() -> None:
    x = normal(4000).exp() - 0.5
    grid = Grid(3, signed=False, symmetric=False)
    low, high = mse_range(seen(x), grid)
    best = min(
        error(x, torch.tensor([share * float(x.min())]), torch.tensor([other * float(x.max())]), grid)
        for share in torch.linspace(0, 1, 21).tolist()
        for other in torch.linspace(0.01, 1, 100).tolist()
    )
    assert error(x, low, high, grid) <= 1.05 * best


def slow_kl(counts: list[float], levels: int, start: int) -> int:
    """NVIDIA's search, written as it is told: bin by bin."""
    counts = [counts[1], *counts[1:]]
    best, chosen = math.inf, len(counts)
    for limit in range(start, len(counts) + 1):
        p = counts[:limit]
        q = [0.0] * limit
        for group in range(levels):
            members = [b for b in range(limit) if b * levels // limit == group and counts[b] > 0]
            for b in members:
                q[b] = sum(counts[m] for m in members) / len(members)
        p[-1] += sum(counts[limit:])
        if sum(q) == 0 or any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
            continue
        divergence = sum(
            a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True) if a > 0
        )
        if divergence <= best + 1e-12:
            best, chosen = divergence, limit
    return chosen


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_kl_range_is_that_of_the_slow_search(bits: int) -> None:
    x = torch.cat([normal(3000), 3 * normal(40, seed=1)]).abs()
    histogram = seen(x)
    # Coarse, or the slow search takes minutes: 256 bins in use instead of 4096.
    coarse = Histogram()
    coarse.counts[:, : BINS // 16] = histogram.counts.reshape(2, BINS // 16, 16).sum(2)
    coarse.width, coarse.least, coarse.greatest = 16 * histogram.width, histogram.least, histogram.greatest
    used = int(coarse.magnitude / coarse.width) + 1
    assert used > 140
    levels = 2**bits
    chosen = slow_kl(coarse.counts[0, :used].tolist(), levels, 128)
    _, high = kl_range(coarse, Grid(bits, signed=False))
    assert float(high) == pytest.approx(min(chosen * coarse.width, coarse.magnitude))


def test_kl_and_mse_clip_an_outlier_and_minmax_does_not() -> None:
    x = torch.cat([normal(50_000), torch.tensor([40.0])])
    histogram = seen(x)
    assert float(kl_range(histogram, Grid(4))[1]) < 20
    assert float(mse_range(histogram, Grid(4))[1]) < 20
    assert percentile_range(histogram, Grid(4), 100)[1].item() == 40.0


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_one_observation_gives_ranges_for_all_grids(name: str, bits: int) -> None:
    watch = observer(name)
    for seed in range(3):
        watch.observe(normal(50, 40, seed=seed))
    for signed in (True, False):
        for symmetric in (True, False):
            grid = Grid(bits, signed=signed, symmetric=symmetric)
            low, high = watch.range(grid)
            assert low.shape == high.shape == (1,)
            assert -5 < float(low) <= 0 < float(high) < 5
            scale_of(low, high, grid)


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_constant_tensors_have_a_range_that_holds_them(name: str, value: float) -> None:
    watch = observer(name)
    watch.observe(torch.full((4, 4), value))
    grid = Grid(8, symmetric=False)
    scale, zero_point = scale_of(*watch.range(grid), grid)
    assert float(quantized(torch.tensor([value]), scale, zero_point, grid)) == pytest.approx(value, rel=0.05)


@pytest.mark.parametrize("name", OBSERVERS)
def test_bad_calibration_data_are_refused(name: str) -> None:
    watch = observer(name)
    with pytest.raises(QuantizationError, match="nothing was observed"):
        watch.range(SYMMETRIC)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(QuantizationError, match="must be finite"):
            watch.observe(torch.tensor([0.0, bad]))
    with pytest.raises(QuantizationError, match="must not be empty"):
        watch.observe(torch.zeros(0, 3))
    with pytest.raises(QuantizationError, match="nothing was observed"):
        watch.range(SYMMETRIC)


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(QuantizationError, match="method must be one of minmax, moving_average"):
        observer("best")
    with pytest.raises(QuantizationError, match="method for weights must be one of minmax, percentile"):
        weight_range(normal(3, 3), SYMMETRIC, 0, "moving_average")
    with pytest.raises(QuantizationError, match="percentile must be"):
        percentile_range(seen(normal(5)), SYMMETRIC, 0.9999)
    with pytest.raises(QuantizationError, match="use mse for logarithmic"):
        kl_range(seen(normal(5)), Grid(4, levels="logarithmic"))
    watch = MinMax(axis=0)
    watch.observe(normal(3, 2))
    with pytest.raises(QuantizationError, match="must have 3 channels"):
        watch.observe(normal(4, 2))
    with pytest.raises(QuantizationError, match="momentum"):
        MinMax(momentum=1.0)


@pytest.mark.parametrize("method", ["minmax", "mse", "percentile", "kl"])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_weight_ranges_are_those_of_each_channel_alone(method: str, axis: int | None) -> None:
    weight, grid = normal(6, 4, 3, 3), weight_grid(4)
    low, high = weight_range(weight, grid, axis, method)
    channels = [weight] if axis is None else list(weight.unbind(axis))
    alone = [weight_range(channel, grid, None, method) for channel in channels]
    torch.testing.assert_close(low, torch.cat([a for a, _ in alone]))
    torch.testing.assert_close(high, torch.cat([b for _, b in alone]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_mse_range_of_weights_is_no_worse_than_minmax(bits: int) -> None:
    weight, grid = normal(8, 100), weight_grid(bits)
    errors = []
    for method in ("mse", "minmax"):
        scale, zero_point = scale_of(*weight_range(weight, grid, 0, method), grid)
        errors.append(float((quantized(weight, scale, zero_point, grid, 0) - weight).square().sum()))
    assert errors[0] <= errors[1] * (1 if bits == 8 else 0.95)


@pytest.mark.parametrize(
    "grid",
    [
        weight_grid(2),
        weight_grid(3, symmetric=False),
        weight_grid(4, "power_of_two_scale"),
        weight_grid(3, "logarithmic"),
    ],
    ids=str,
)
def test_the_mse_range_of_weights_is_about_the_best_of_all_shares(grid: Grid) -> None:
    weight = normal(4, 3, 50)
    low, high = weight_range(weight, grid, 1, "mse")
    for channel in range(3):
        x = weight[:, channel]
        shares = [1 - step / 100 for step in range(80)]
        best = min(float(error(x, share * x.min(), share * x.max(), grid)) for share in shares)
        assert error(x, low[channel], high[channel], grid) <= 1.05 * best
        # Both ends are one share of the extremes.
        torch.testing.assert_close(low[channel] / x.min(), high[channel] / x.max())


def test_zeros_of_relu_do_not_move_the_kl_range() -> None:
    x = normal(20_000).abs()
    with_zeros = torch.cat([x, torch.zeros(200_000)])
    grid = Grid(4, signed=False)
    assert torch.equal(kl_range(seen(with_zeros), grid)[1], kl_range(seen(x), grid)[1])
