"""A user's model with factorized layers: the same where it should be, smaller where it says."""

import copy
from typing import Any

import pytest
import torch
from small_networks import assert_equal, images, small_network, weights
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autocompress.errors import FactorizationError
from autocompress.factorize.allocate import ranks_under
from autocompress.factorize.apply import Rule, factorize
from autocompress.factorize.methods import METHODS, Rank, full_rank, geometry_of
from autocompress.factorize.plan import make_plan
from autocompress.models.resnet_cifar import resnet20


def shaken(model: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics of batch norm that are not those of a new one."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


def macs_run(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def raised(rank: Rank, most: Rank) -> Rank:
    """The next rank on both sides, if there is one."""
    if isinstance(rank, tuple) and isinstance(most, tuple):
        return min(rank[0] + 1, most[0]), min(rank[1] + 1, most[1])
    assert isinstance(rank, int)
    assert isinstance(most, int)
    return min(rank + 1, most)


class Shared(nn.Module):
    """One module under two names, and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.inner = nn.ModuleList([nn.ReLU(), self.first])
        self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        given: Tensor = self.second(self.inner[1](self.second(self.first(x))))
        return given


@pytest.mark.parametrize("method", METHODS)
def test_a_residual_network_at_full_rank_gives_the_same(method: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = shaken(resnet20())
    names = ("conv1", "layer1.0.conv1", "layer2.0.conv1")
    settings = {name: (method, full_rank(geometry_of(model.get_submodule(name)), method)) for name in names}
    before = weights(model)
    made = factorize(model, settings, images(1, 16))
    assert_equal(before, weights(model))
    assert [layer.name for layer in made.layers] == list(names)
    x = images(2, 16)
    torch.testing.assert_close(made.model(x), model(x), atol=1e-3, rtol=1e-3)
    assert made.macs_after == macs_run(made.model, images(1, 16))
    assert made.macs_before == macs_run(model, images(1, 16))


def test_a_residual_network_under_a_budget_is_as_small_as_said_and_exports_and_trains() -> None:
    model = shaken(resnet20())
    plan = make_plan(model, images(1, 16), methods=("svd",), ranks=4)
    ranks = ranks_under(plan, 0.6)
    made = factorize(model, ranks.settings, images(1, 16))
    assert made.macs_after == ranks.macs == macs_run(made.model, images(1, 16)) <= 0.6 * plan.macs
    assert made.params_after == ranks.params == sum(p.numel() for p in made.model.parameters())
    assert made.macs_before - made.macs_after == sum(one.macs_before - one.macs_after for one in made.layers)
    assert made.params_before - made.params_after == sum(
        one.params_before - one.params_after for one in made.layers
    )
    for one in made.layers:
        (offer,) = (o for o in plan.site(one.name).offers if o.rank == one.rank)
        assert one.weight_error == pytest.approx(offer.weight_error)
    x = images(1, 16)
    program = torch.export.export(made.model, (x,))
    torch.testing.assert_close(program.module()(x), made.model(x))
    made.model.train()(images(4, 16)).square().sum().backward()
    assert all(p.grad is not None for p in made.model.parameters())


def test_shared_modules_stay_shared() -> None:
    model = Shared()
    made = factorize(model, {"inner.1": ("svd", 2), "second": ("svd", 3)}, torch.ones(1, 8))
    copied: Any = made.model
    assert copied.first is copied.inner[1]
    assert isinstance(copied.first, nn.Sequential)
    assert [(one.name, one.rank, one.macs_after) for one in made.layers] == [
        ("first", 2, 2 * 2 * 16),
        ("second", 3, 2 * 3 * 16),
    ]
    assert made.params_after == 2 * 16 + 8 + 3 * 16 + 8
    full: Any = factorize(model, {"first": ("svd", 8), "second": ("svd", 8)}, torch.ones(1, 8)).model
    x = images(1)[0, 0, :, :8]
    torch.testing.assert_close(full(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_model_that_is_a_layer_is_replaced() -> None:
    made = factorize(nn.Linear(8, 8), {"": ("svd", 2)}, torch.ones(1, 8))
    assert isinstance(made.model, nn.Sequential)
    assert made.macs_after == 32


def test_a_rule_by_energy_keeps_it_where_it_saves() -> None:
    model = small_network(width=12)
    with torch.no_grad():
        model[0].weight[2:] = model[0].weight[:1]  # of rank 2
    made = factorize(model, Rule("svd", energy=1.0), images())
    assert [(one.name, one.rank) for one in made.layers] == [("0", 2)]
    assert made.layers[0].weight_error < 1e-6
    (left,) = made.left
    assert left.layer == "5"
    assert left.reason == "rank 3 of svd would need 180 MACs, not fewer than its 144"


@pytest.mark.parametrize("method", METHODS)
def test_a_rule_by_ratio_uses_what_it_may(method: Any) -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 9, (1, 3)))
    example = images(1, 10, 8)
    made = factorize(model, Rule(method, ratio=0.6), example)
    assert [one.name for one in made.layers] == ["0", "1", "2"]
    assert all(one.macs_after <= 0.6 * one.macs_before for one in made.layers)
    assert [one.method for one in made.layers][:2] == [method, "svd"]
    for one in made.layers:
        geometry = geometry_of(model.get_submodule(one.name))
        greatest = full_rank(geometry, one.method)
        more = raised(one.rank, greatest)
        if more != one.rank:
            again = factorize(model, {one.name: (one.method, more)}, example)
            assert again.layers[0].macs_after > 0.6 * one.macs_before


def test_layers_are_skipped_by_name_and_by_channels() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 16))
    made = factorize(model, Rule(ratio=0.5, least_channels=9, skip=("2",)), torch.ones(1, 8))
    assert made.layers == ()
    assert {left.layer: left.reason for left in made.left} == {
        "0": "it has 8 inputs and 8 outputs, fewer than 9",
        "1": "it has 8 inputs and 16 outputs, fewer than 9",
        "2": "it is to be skipped",
    }
    assert made.macs_after == made.macs_before
    exact = factorize(nn.Linear(8, 8), Rule(ratio=0.5), torch.ones(1, 8))
    assert exact.layers[0].rank == 2  # 2 * 16 of 64
    tight = factorize(model, Rule(ratio=0.1, skip=("2",)), torch.ones(1, 8))
    assert tight.left[0].reason == "even the lowest rank of svd needs more than 0.1 of its 64 MACs"


def test_the_copy_is_in_the_mode_of_the_model_and_has_its_own_weights() -> None:
    model = small_network(width=12).train()
    model[5].weight.requires_grad_(False)
    made = factorize(model, {"5": ("svd", 1)}, images())
    assert all(module.training for module in made.model.modules())
    assert not made.model.get_parameter("5.reduce.weight").requires_grad
    before = copy.deepcopy(weights(model))
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.zero_()
    assert_equal(before, weights(model))


class Asking(nn.Module):
    """Its forward() wants to know how wide its layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        given: Tensor = self.fc(x) / self.fc.in_features
        return given


def test_models_that_ask_their_layers_are_refused_with_the_way_out() -> None:
    with pytest.raises(FactorizationError, match=r"does not run with its layers replaced.*skip that layer"):
        factorize(Asking(), {"fc": ("svd", 2)}, torch.ones(1, 8))


def test_wrong_settings_are_refused() -> None:
    model, x = small_network(width=12), images()
    with pytest.raises(FactorizationError, match="settings: Sequential has no module '50'; near are '5'"):
        factorize(model, {"50": ("svd", 2)}, x)
    with pytest.raises(FactorizationError, match="layer '1' cannot be factorized: BatchNorm2d is no layer"):
        factorize(model, {"1": ("svd", 2)}, x)
    with pytest.raises(FactorizationError, match=r"layer '5': rank of svd must .* 1\.\.3, got 9"):
        factorize(model, {"5": ("svd", 9)}, x)
    with pytest.raises(FactorizationError, match=r"setting of '5' must be \(method, rank\), got 2"):
        factorize(model, {"5": 2}, x)  # type: ignore[dict-item]
    with pytest.raises(FactorizationError, match="skip: Sequential has no module 'fc'"):
        factorize(model, Rule(ratio=0.5, skip=("fc",)), x)
    with pytest.raises(FactorizationError, match=r"'inner\.1' and 'first' are one module"):
        factorize(Shared(), {"first": ("svd", 2), "inner.1": ("svd", 2)}, torch.ones(1, 8))
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(FactorizationError, match="layer '0' cannot be factorized: it has 2 groups"):
        factorize(grouped, {"0": ("svd", 2)}, torch.ones(1, 4, 5, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either an energy or a ratio"),
        ({"energy": 0.5, "ratio": 0.5}, "either an energy or a ratio"),
        ({"energy": 1.5}, r"energy must be a number in \(0, 1\], got 1.5"),
        ({"ratio": 0}, r"ratio must be a number in \(0, 1\], got 0"),
        ({"method": "qr", "ratio": 0.5}, "method must be one of svd"),
        ({"method": "cp", "energy": 0.5}, "cp has no singular values"),
        ({"ratio": 0.5, "least_channels": 1.5}, "least_channels must be an integer, got 1.5"),
        ({"ratio": 0.5, "skip": "fc"}, "skip must be a tuple of names, got 'fc'"),
    ],
)
def test_rules_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FactorizationError, match=message):
        Rule(**arguments)
