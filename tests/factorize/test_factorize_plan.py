"""What of a model can be factorized, and the best ranks under a budget."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import images, small_network
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from autocompress.errors import FactorizationError, InfeasibleBudgetError
from autocompress.factorize.allocate import ranks_under
from autocompress.factorize.candidates import find
from autocompress.factorize.layers import factorized
from autocompress.factorize.plan import Offer, Plan, Site, make_plan


class Odd(nn.Module):
    """Layers that can be replaced, and those that cannot, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(8, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.alias = self.plain
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.functional = nn.Conv2d(8, 8, 3, padding=1)
        self.asked = nn.Linear(8, 8)
        self.normed = weight_norm(nn.Linear(8, 8))
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda *_: None)
        self.idle = nn.Linear(8, 8)
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.one.weight
        self.thin = nn.Linear(8, 1)
        self.transposed = nn.ConvTranspose2d(8, 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.twice(self.twice(self.plain(x))))
        x = F.conv2d(x, self.functional.weight, self.functional.bias, padding=1)
        x = self.transposed(x).mean((2, 3)).to(self.asked.weight.dtype)
        x = self.other(self.one(self.hooked(self.normed(self.asked(x)))))
        given: Tensor = self.thin(x)
        return given


def odd() -> Odd:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Odd()


def test_layers_that_stay_have_their_reasons() -> None:
    found = find(odd(), images(channels=8))
    reasons = {left.layer: left.reason for left in found.left}
    expected = {
        "grouped": "2 groups",
        "functional": "read elsewhere",
        "asked": "read elsewhere",
        "normed": "parametrizations",
        "hooked": "hooks",
        "idle": "does not run",
        "one": "shares a parameter",
        "other": "shares a parameter",
        "transposed": "ConvTranspose2d is neither",
    }
    assert reasons.keys() == expected.keys()
    assert all(expected[name] in reason for name, reason in reasons.items())
    assert [candidate.name for candidate in found.candidates] == ["plain", "twice", "thin"]


def test_a_module_that_runs_twice_costs_twice() -> None:
    plan = make_plan(odd(), images(3, 10, 8))
    assert (plan.site("plain").runs, plan.site("twice").runs) == (1, 2)
    assert plan.site("twice").macs == 2 * plan.site("plain").macs == 2 * 3 * 100 * 8 * 8 * 9
    assert plan.site("twice").params == 8 * 8 * 9 + 8
    (thin,) = (left for left in plan.left if left.layer == "thin")
    assert thin.reason == "it is too small: even the lowest rank of svd saves none of its 24 MACs"


def test_parts_of_fused_layers_stay() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    left = {left.layer: left.reason for left in find(model, torch.ones(1, 3, 8)).left}
    assert "TransformerEncoderLayer, which reads its weights" in left["linear1"]
    assert find(model, torch.ones(1, 3, 8)).candidates == ()


def test_the_plan_of_a_model_says_what_its_layers_really_cost() -> None:
    model, example = small_network(width=12), images(2)
    plan = make_plan(model, example, methods=("svd", "spatial", "depthwise", "tucker", "cp"), ranks=3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example)
    assert plan.macs == counter.get_total_flops() // 2
    assert plan.params == sum(p.numel() for p in model.parameters())
    site = plan.site("0")
    assert {offer.method for offer in site.offers} == {"svd", "spatial", "depthwise", "tucker", "cp"}
    for offer in plan.site("5").offers:  # a layer with a bias
        made = factorized(model[5], offer.method, offer.rank)
        assert offer.params == sum(p.numel() for p in made.parameters())
    for offer in site.offers:
        made = factorized(model[0], offer.method, offer.rank)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            made(example)
        assert offer.macs == counter.get_total_flops() // 2 < site.macs
        assert offer.params == sum(p.numel() for p in made.parameters())
        assert offer.output_error is None
        assert offer.error == offer.weight_error


def test_errors_of_outputs_are_measured_behind_the_bias() -> None:
    model, x = small_network(width=12).eval(), images(5)
    plan = make_plan(model, images(1), ranks=3, images=x)
    for name, read in (("0", x), ("5", model[:5](x))):
        layer, site = model.get_submodule(name), plan.site(name)
        bias = getattr(layer, "bias", None)
        shift = 0 if bias is None else bias
        whole = (layer(read) - shift).detach()
        assert site.energy == pytest.approx(float(whole.square().sum()) / 5, rel=1e-4)
        for offer in site.offers:
            wrong = (factorized(layer, offer.method, offer.rank)(read) - shift).detach() - whole
            assert offer.output_error == pytest.approx(float(wrong.norm() / whole.norm()), rel=1e-3)
            assert offer.error == offer.output_error != offer.weight_error


class Spoiling(nn.Module):
    """What its layer has read is written over."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        read: Tensor = self.fc(x)
        x.zero_()
        return read


def test_what_a_layer_has_read_is_kept_though_it_is_written_over() -> None:
    model, x = Spoiling(), torch.ones(1, 8)
    whole = nn.functional.linear(x + 1, model.fc.weight).detach()
    energy = make_plan(model, x, images=x).site("fc").energy
    assert energy == pytest.approx(float(whole.square().sum()), rel=1e-5)


def test_looking_changes_nothing() -> None:
    # Its batch norm would learn from what it sees in training mode.
    model = small_network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_plan(model, images(), images=images())
    assert model.training
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_offer_saves_and_the_greatest_that_saves_is_offered() -> None:
    layer = nn.Linear(20, 30)
    plan = make_plan(layer, torch.ones(1, 20), ranks=4)
    # rank * 50 < 600
    assert [offer.rank for offer in plan.site("").offers] == [3, 6, 9, 11]
    assert [offer.rank for offer in make_plan(layer, torch.ones(1, 20), ranks=99).site("").offers] == [
        *range(1, 12)
    ]


def test_models_and_arguments_that_cannot_be_are_refused() -> None:
    model = small_network()
    with pytest.raises(FactorizationError, match=r"must be a torch.nn.Module, got str"):
        find("model", images())  # type: ignore[arg-type]
    with pytest.raises(FactorizationError, match="Sequential cannot run on inputs of 4x3x12: "):
        find(model, images()[..., 0])
    with pytest.raises(FactorizationError, match="inputs must be a tensor or a tuple of them, got list"):
        find(model, [images()])  # type: ignore[arg-type]
    with pytest.raises(FactorizationError, match="ranks must be an integer >= 1, got 0"):
        make_plan(model, images(), ranks=0)
    for methods in ((), "svd", ("svd", "lu")):
        with pytest.raises(FactorizationError, match="methods must be some of svd"):
            make_plan(model, images(), methods=methods)  # type: ignore[arg-type]
    with pytest.raises(FactorizationError, match=r"no layer 'x' can be factorized; those that can: 0"):
        make_plan(model, images()).site("x")
    with pytest.raises(FactorizationError, match="layer '0' reads on the images holds nan"):
        make_plan(model, images(), images=images() * math.nan)
    holding = small_network()
    holding.cache = torch.ones(1, requires_grad=True) * 2  # type: ignore[assignment]
    with pytest.raises(FactorizationError, match="cannot be copied"):
        find(holding, images())


# Budgets -----------------------------------------------------------------------------------------------


def site_of(name: str, macs: int, offers: list[tuple[int, float]], energy: float | None = None) -> Site:
    made = tuple(Offer("svd", at + 1, cost, cost, error) for at, (cost, error) in enumerate(offers))
    return Site(name, "Linear", (1, 1), 1, macs, macs, energy, made)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    sites = []
    energetic = draw(st.booleans())
    for number in range(draw(st.integers(1, 4))):
        macs = draw(st.integers(10, 60))
        offers = st.tuples(st.integers(1, macs - 1), st.floats(0, 1))
        energy = draw(st.floats(0.1, 10)) if energetic else None
        sites.append(site_of(str(number), macs, draw(st.lists(offers, min_size=1, max_size=4)), energy))
    total = sum(site.macs for site in sites) + draw(st.integers(0, 30))
    return Plan(tuple(sites), (), total, total)


@settings(max_examples=150)
@given(plans(), st.floats(0.05, 1), st.sampled_from(["macs", "params"]), st.booleans())
def test_ranks_are_the_best_of_all(plan: Plan, share: float, metric: Any, weighted: bool) -> None:
    total = sum(site.energy or 0 for site in plan.sites)
    best, least = math.inf, math.inf
    for chosen in itertools.product(*((None, *site.offers) for site in plan.sites)):
        cost = plan.macs + sum(
            offer.macs - site.macs for site, offer in zip(plan.sites, chosen, strict=True) if offer
        )
        least = min(least, cost)
        loss = sum(
            offer.error**2 * ((site.energy or 0) / total if weighted and total else 1)
            for site, offer in zip(plan.sites, chosen, strict=True)
            if offer
        )
        if cost <= share * plan.macs:
            best = min(best, loss)
    if best == math.inf:
        with pytest.raises(InfeasibleBudgetError) as caught:
            ranks_under(plan, share, metric, weighted=weighted)
        assert caught.value.nearest == {metric: least}
        return
    found = ranks_under(plan, share, metric, weighted=weighted)
    assert found.proven
    assert found.loss == pytest.approx(best, abs=1e-12)
    assert found.macs == found.params <= share * plan.macs
    loss = 0.0
    for site in plan.sites:
        if site.name in found.settings:
            method, rank = found.settings[site.name]
            (offer,) = (offer for offer in site.offers if (offer.method, offer.rank) == (method, rank))
            loss += offer.error**2 * ((site.energy or 0) / total if weighted and total else 1)
    assert loss == pytest.approx(best, abs=1e-12)


def test_nothing_is_lost_where_all_may_stay() -> None:
    plan = make_plan(small_network(width=12), images())
    found = ranks_under(plan, 1.0)
    assert (found.settings, found.loss, found.macs) == ({}, 0, plan.macs)


def test_budgets_that_cannot_be_are_refused() -> None:
    plan = make_plan(small_network(width=12), images())
    with pytest.raises(InfeasibleBudgetError, match=r"the least is .*, a share of 0") as caught:
        ranks_under(plan, 0.01)
    nearest = caught.value.nearest["macs"]
    assert ranks_under(plan, nearest / plan.macs + 1e-9).macs == nearest
    with pytest.raises(FactorizationError, match=r"budget_share must be a number in \(0, 1\], got 0"):
        ranks_under(plan, 0)
    with pytest.raises(FactorizationError, match="metric must be one of macs, params, got 'ms'"):
        ranks_under(plan, 0.5, "ms")  # type: ignore[arg-type]
    with pytest.raises(FactorizationError, match="no layer can be factorized: 0: it is too small"):
        ranks_under(make_plan(nn.Sequential(nn.Linear(1, 1)), torch.ones(1, 1)), 0.5)
