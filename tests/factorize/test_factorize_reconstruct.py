"""Last parts fitted on images: the normal equations hold, and what could be exact is."""

from typing import Any

import pytest
import torch
from small_networks import images
from torch import nn

from autocompress.errors import FactorizationError
from autocompress.factorize.apply import factorize
from autocompress.factorize.methods import METHODS
from autocompress.factorize.reconstruct import reconstruct_last


def network(**options: Any) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = nn.Conv2d(3, 6, 3, **{"padding": 1, **options})
        return nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "dilation": 2}, {"padding": "same", "padding_mode": "reflect"}, {"bias": False}],
)
def test_the_error_of_a_layer_is_at_right_angles_to_all_that_its_last_part_reads(
    method: Any, options: dict[str, Any]
) -> None:
    model, x = network(**options), images(16)
    made = factorize(model, {"0": (method, (2, 2) if method == "tucker" else 2)}, x[:1])
    sequence: Any = made.model.get_submodule("0")
    before = float((sequence(x) - model[0](x)).detach().square().sum())
    reconstruct_last(model, made, x, ridge=1e-12)
    sequence = made.model.get_submodule("0")
    rest = (sequence(x) - model[0](x)).square().sum()
    rest.backward()
    assert rest.item() < before
    # Of a least-squares solution the gradient is zero.
    last = sequence[-1]
    assert float(last.weight.grad.norm()) < 1e-4 * before
    if last.bias is not None:
        assert float(last.bias.grad.norm()) < 1e-4 * before


def test_inputs_of_low_rank_leave_no_error() -> None:
    """The first factor sees all there is, though the SVD of the weights knows nothing of inputs."""
    model = nn.Sequential(nn.Linear(6, 6)).eval()
    directions = torch.linalg.svd(model[0].weight.detach()).Vh[:2]
    x = images(8)[:, 0, 0, :2] @ directions
    made = factorize(model, {"0": ("svd", 2)}, x)
    with torch.no_grad():
        made.model.get_parameter("0.expand.weight").mul_(3)
    reconstruct_last(model, made, x, ridge=1e-12)
    torch.testing.assert_close(made.model(x), model(x), atol=1e-5, rtol=1e-5)


def test_later_layers_are_fitted_behind_earlier_ones() -> None:
    model, x = network(), images(16)
    made = factorize(model, {"0": ("svd", 2), "4": ("svd", 1)}, x[:1])
    reconstruct_last(model, made, x, ridge=1e-12)
    rest = (made.model(x) - model(x)).square().sum()
    rest.backward()
    assert float(made.model.get_parameter("4.expand.weight").grad.norm()) < 1e-4  # type: ignore[union-attr]


def test_only_some_positions_are_taken_where_there_are_many() -> None:
    model, x = network(), images(40)
    settings: Any = {"0": ("svd", 2)}
    made, again, other = (factorize(model, settings, x[:1]) for _ in range(3))
    reconstruct_last(model, made, x)
    reconstruct_last(model, again, x)
    reconstruct_last(model, other, x, seed=1)
    weights = [one.model.get_parameter("0.expand.weight") for one in (made, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_inputs_of_zeros_leave_weights_without_a_bias_as_they_are() -> None:
    model = network(bias=False)
    made = factorize(model, {"0": ("svd", 2)}, images(1))
    before = made.model.get_parameter("0.expand.weight").clone()
    reconstruct_last(model, made, torch.zeros(2, 3, 8, 8))
    assert torch.equal(made.model.get_parameter("0.expand.weight"), before)


def test_what_cannot_be_fitted_is_refused() -> None:
    model = network()
    made = factorize(model, {"0": ("svd", 2)}, images(1))
    for ridge in (0, -1, float("inf"), True):
        with pytest.raises(FactorizationError, match="ridge must be a finite number > 0, got"):
            reconstruct_last(model, made, images(1), ridge=ridge)
    with pytest.raises(FactorizationError, match="nan or infinity"):
        reconstruct_last(model, made, images(1) * float("nan"))
