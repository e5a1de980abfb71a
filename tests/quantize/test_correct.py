"""Corrected biases give the means of the floating-point network."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.errors import QuantizationError
from autocompress.quantize.correct import clipped_normal_mean, correct_bias, expected_shift
from autocompress.quantize.grid import weight_grid
from autocompress.quantize.layer import QuantizedLayer
from autocompress.quantize.quantizer import Quantizer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair() -> tuple[nn.Module, nn.Module]:
    plain = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(196, 5),
    )
    for seed, parameter in enumerate(plain.parameters()):
        parameter.data.copy_(0.2 * normal(*parameter.shape, seed=seed))
    rough = copy.deepcopy(plain)
    for at in (0, 2, 5):
        quantizer = Quantizer(weight_grid(2))
        quantizer.scale.data.fill_(0.25)
        rough[at] = QuantizedLayer(rough[at], weight=quantizer)
    return rough, plain


def test_every_channel_has_the_mean_of_the_floating_point_network() -> None:
    rough, plain = pair()
    x = normal(40, 3, 8, 8) + 1
    shifts = correct_bias(rough, plain, x, batch=16)
    assert list(shifts) == ["0", "2", "5"]
    assert all(shift > 1e-3 for shift in shifts.values())
    for at in (0, 2, 5):
        ours, theirs = rough[: at + 1](x), plain[: at + 1](x)
        axes = [0, 2, 3] if ours.dim() == 4 else [0]
        torch.testing.assert_close(ours.mean(axes), theirs.mean(axes), rtol=1e-4, atol=1e-4)
    again = correct_bias(rough, plain, x, batch=16)
    assert all(shift < 1e-5 for shift in again.values())
    assert not any(module._forward_hooks for module in (*rough.modules(), *plain.modules()))


def test_what_cannot_be_corrected_is_refused() -> None:
    rough, plain = pair()
    x = normal(4, 3, 8, 8)
    with pytest.raises(QuantizationError, match="'1' is no quantized layer, got ReLU"):
        correct_bias(rough, plain, x, names=["1"])
    with pytest.raises(QuantizationError, match="no module 'x'"):
        correct_bias(rough, plain, x, names=["x"])
    layer = nn.Linear(4, 4)
    twice = nn.Sequential(QuantizedLayer(layer))
    twice.append(twice[0])
    with pytest.raises(QuantizationError, match="runs 2 times"):
        correct_bias(twice, nn.Sequential(layer, layer), normal(4, 4))


@pytest.mark.parametrize(("low", "high"), [(0.0, math.inf), (0.0, 6.0), (-1.0, 0.5)])
def test_the_mean_of_clipped_normal_numbers_is_that_of_many(low: float, high: float) -> None:
    beta = torch.tensor([0.0, 1.0, -2.0, 5.5, 0.3], dtype=torch.float64)
    gamma = torch.tensor([1.0, -0.5, 1.5, 2.0, 0.0], dtype=torch.float64)
    # The mean over evenly spaced quantiles: no chance in it.
    points = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    expected = (beta + gamma.abs() * points[:, None]).clamp(low, high).mean(0)
    torch.testing.assert_close(clipped_normal_mean(beta, gamma, low, high), expected, rtol=1e-4, atol=1e-4)


def test_behind_relu_the_mean_is_that_of_the_paper() -> None:
    beta, gamma = torch.tensor([0.7]), torch.tensor([0.4])
    ratio = 0.7 / 0.4
    density = math.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)
    expected = 0.4 * density + 0.7 * (0.5 + 0.5 * math.erf(ratio / math.sqrt(2)))
    assert float(clipped_normal_mean(beta, gamma)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(4, 4, 3, groups=4), nn.Linear(4, 6)],
    ids=str,
)
def test_the_expected_shift_is_that_of_the_means(layer: nn.Module) -> None:
    weight, means = layer.get_parameter("weight"), normal(4, seed=1)
    rounded = (weight.detach() * 8).round() / 8
    x = means.reshape(1, 4, 1, 1).expand(1, 4, 3, 3) if isinstance(layer, nn.Conv2d) else means[None]
    call = (
        (lambda w: F.conv2d(x, w, groups=layer.groups))
        if isinstance(layer, nn.Conv2d)
        else lambda w: F.linear(x, w)
    )
    expected = (call(rounded) - call(weight.detach())).flatten()
    torch.testing.assert_close(expected_shift(layer, rounded, means), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(QuantizationError, match="not known, got ReLU"):
        expected_shift(nn.ReLU(), rounded, means)
