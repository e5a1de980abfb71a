import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress.engine import search
from autocompress.errors import EvaluationError, RecipeError
from autocompress.evaluation.zero_cost import (
    PROXIES,
    Naswot,
    Proxy,
    Synflow,
    best_of,
    naswot,
    synaptic_flow,
    zero_cost_proxy,
)
from autocompress.network import Residual, build_network
from autocompress.ops import Linear
from autocompress.space import Block, Choice, SearchSpace
from autocompress.testing.toys import every_network, toy_classifier_space, toy_constraints, toy_space
from autocompress.trial import Outcome
from strategies.random_search import RandomSearch

SPACE = toy_classifier_space()
ROWS = every_network(SPACE)
SHAPE = (3, 12, 12)


def network_of(row: np.ndarray) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return build_network(SPACE.operations(row))


# Synaptic flow ---------------------------------------------------------------------------------------------


def test_in_a_chain_of_matrices_every_layer_carries_the_whole_flow() -> None:
    first = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]])
    last = torch.tensor([[-4.0, 2.0]])
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        network[1].weight.copy_(first)
        network[3].weight.copy_(last)
    # |W2| |W1| 1 = 4 (1 + 2 + 3) + 2 (.5 + 0 + 1) = 27
    assert synaptic_flow(network, (3, 1, 1)) == {
        "1.weight": 27.0,
        "1.bias": 0.0,
        "3.weight": 27.0,
        "3.bias": 0.0,
    }
    assert Synflow()(network, (3, 1, 1)) == pytest.approx(np.log(54.0), rel=1e-12)


def test_in_a_chain_of_convolutions_with_norms_and_hard_swish_the_flow_is_conserved() -> None:
    space = toy_space(4)
    network = build_network(space.operations(space.largest()))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 5.0)
            nn.init.normal_(module.bias)
    flows = synaptic_flow(network, (4, 12, 12))
    layers = [flow for name, flow in flows.items() if name.endswith("conv.weight")]
    assert len(layers) == 4
    np.testing.assert_allclose(layers, layers[0], rtol=1e-12)
    assert layers[0] > 0
    assert all(flow == 0 for name, flow in flows.items() if "bn" in name)


def test_a_branch_carries_what_is_lost_without_it() -> None:
    """R is linear in every layer, so its flow is R minus R with the layer set to zero."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        Residual(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.Conv2d(4, 4, 1, bias=False)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2, bias=False),
    ]
    network = nn.Sequential(*layers)

    @torch.no_grad()
    def whole(without: str = "") -> float:
        positive = copy.deepcopy(network).double()
        for name, parameter in positive.named_parameters():
            parameter.copy_(parameter.abs() * (name != without))
        output: Tensor = positive(torch.ones(1, 3, 5, 5, dtype=torch.float64))
        return float(output.sum())

    flows = synaptic_flow(network, (3, 5, 5))
    assert len(flows) == 4
    for name, flow in flows.items():
        assert flow == pytest.approx(whole() - whole(name), rel=1e-10)
    assert flows["1.0.weight"] == pytest.approx(flows["1.1.weight"], rel=1e-10)
    assert flows["1.0.weight"] < flows["0.weight"] == pytest.approx(flows["4.weight"], rel=1e-10)


def test_a_network_without_flow_has_no_score() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    nn.init.zeros_(network[1].weight)
    with pytest.raises(EvaluationError, match=r"the synaptic flow of the network is 0\.0"):
        Synflow()(network, (3, 1, 1))
    nn.init.constant_(network[1].weight, float("inf"))
    with pytest.raises(EvaluationError, match=r"the synaptic flow of the network is (inf|nan)"):
        Synflow()(network, (3, 1, 1))


def test_flows_too_large_for_32_bits_are_scored() -> None:
    layers = [nn.Linear(10, 10, bias=False) for _ in range(60)]
    for layer in layers:
        nn.init.constant_(layer.weight, 1.0)
    # 60 layers of 10^60 * 10 each.
    score = Synflow()(nn.Sequential(nn.Flatten(), *layers), (10, 1, 1))
    assert score == pytest.approx(np.log(60) + 61 * np.log(10), rel=1e-12)


# NASWOT ----------------------------------------------------------------------------------------------------


def codes_network(*rectifiers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), *rectifiers)


def images(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows)[:, :, None, None]


@pytest.mark.parametrize("rectifier", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU])
def test_the_kernel_counts_the_units_on_the_same_side(rectifier: Callable[[], nn.Module]) -> None:
    # Codes 101, 110, 000: agreements 1, 1 and 1 of three units.
    given = images([[1.0, -1.0, 2.0], [0.5, 3.0, -1.0], [-2.0, 0.0, -0.1]])
    matrix = np.array([[3.0, 1.0, 1.0], [1.0, 3.0, 1.0], [1.0, 1.0, 3.0]])
    assert naswot(codes_network(rectifier()), given) == pytest.approx(np.log(np.linalg.det(matrix)))


def test_all_rectifiers_count_and_gates_do_not() -> None:
    given = images([[1.0, -1.0], [1.0, 1.0]])
    # The threshold turns what the gate makes of 0 into -1: codes 10 and 11 twice, 2 + 2 units, 1 + 1 agree.
    twice = codes_network(nn.ReLU(), nn.Hardsigmoid(), nn.Threshold(0.6, -1.0), nn.ReLU())
    assert naswot(twice, given) == pytest.approx(np.log(4 * 4 - 2 * 2))


def test_images_with_the_same_codes_are_minus_infinity() -> None:
    given = images([[1.0, -1.0], [2.0, -3.0]])
    assert naswot(codes_network(nn.ReLU()), given) == -np.inf


def test_batch_norm_centres_by_the_batch() -> None:
    # All inputs are positive; centred on their mean 2 they differ.
    given = images([[1.0], [3.0]])
    assert naswot(codes_network(nn.ReLU()), given) == -np.inf
    assert naswot(codes_network(nn.BatchNorm1d(1), nn.ReLU()), given) == pytest.approx(np.log(1.0))


def test_naswot_needs_units_and_images() -> None:
    with pytest.raises(
        EvaluationError, match="counts the units of ReLU, ReLU6, Hardswish, SiLU; the network"
    ):
        naswot(codes_network(nn.Sigmoid()), images([[1.0], [2.0]]))
    with pytest.raises(EvaluationError, match="there must be 2 or more, got 1"):
        naswot(codes_network(nn.ReLU()), images([[1.0]]))


# Both ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [Synflow(), Naswot(count=4)])
def test_neither_the_network_nor_the_global_generator_changes(score: Synflow | Naswot) -> None:
    network = network_of(ROWS[-1]).train()
    network[0].eval()
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    state = torch.get_rng_state()
    score(network, SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == modes
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("name", PROXIES)
def test_a_row_scores_the_same_whatever_stands_beside_it(name: Proxy) -> None:
    proxy = zero_cost_proxy(name, SPACE, seed=3)
    rows = ROWS[[0, 30, 60, 83]]
    state = torch.get_rng_state()
    together = proxy(rows)[name]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again = pickle.loads(pickle.dumps(proxy))
    alone = np.array([again(row[None])[name][0] for row in rows[::-1]])[::-1]
    np.testing.assert_array_equal(together, alone)
    assert together.shape == (4,)
    assert np.isfinite(together).all()
    assert len(set(together)) == 4
    assert not proxy.paid


@pytest.mark.parametrize("name", ["synflow", "naswot"])
def test_the_seed_has_an_effect(name: Proxy) -> None:
    first, second = (zero_cost_proxy(name, SPACE, seed=seed)(ROWS[-1:])[name] for seed in (0, 1))
    assert first != second


def test_given_images_are_resized_to_the_input_of_each_network() -> None:
    given = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    proxy = zero_cost_proxy("naswot", SPACE, images=given, seed=2)
    small, large = ROWS[0], ROWS[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        assert proxy(large[None])["naswot"][0] == naswot(build_network(SPACE.operations(large)), given)
        torch.manual_seed(2)
        eight = nn.functional.interpolate(given, (8, 8), mode="bilinear", antialias=True)
        assert proxy(small[None])["naswot"][0] == naswot(build_network(SPACE.operations(small)), eight)


@pytest.mark.parametrize("metric", ["params", "macs"])
def test_costs_are_proxies_too(metric: Proxy) -> None:
    blocks = SPACE.operations(ROWS[50])
    expected = sum(getattr(op, metric) for _, ops in blocks for op in ops)
    assert zero_cost_proxy(metric, SPACE)(ROWS[50:51])[metric] == expected


def test_an_unknown_proxy_is_an_error() -> None:
    with pytest.raises(RecipeError, match="one of synflow, naswot, params, macs, got 'snip'"):
        zero_cost_proxy("snip", SPACE)  # type: ignore[arg-type]


def test_the_best_of_all_rows_are_the_best_of_the_feasible_space() -> None:
    constraints = toy_constraints(blocks=3)
    rows = every_network(constraints.space)
    rows = rows[constraints.feasible(rows)]
    macs = constraints.costs["macs"]
    proxy = zero_cost_proxy("macs", constraints.space)
    found = best_of(proxy, constraints, 5, draws=1000, seed=0, metric="macs")
    np.testing.assert_array_equal(macs.of(found), np.sort(macs.of(rows))[::-1][:5])
    assert constraints.feasible(found).all()
    assert len(np.unique(found, axis=0)) == 5
    few = best_of(proxy, constraints, 5, draws=5, seed=0, metric="macs")
    assert len(few) == 5
    assert macs.of(few).min() < macs.of(found).min()


def test_rows_without_a_score_are_not_among_the_best() -> None:
    constraints = toy_constraints(blocks=2)
    best = best_of(_Broken(), constraints, 20, draws=1000, seed=0, metric="score")
    rows = every_network(constraints.space)
    sums = rows[constraints.feasible(rows)].sum(axis=1)
    assert sorted(best.sum(axis=1), reverse=True) == list(best.sum(axis=1))
    assert len(best) == min(20, int((sums % 2 == 0).sum())) > 3


class _Broken:
    paid = False

    def __call__(self, codes: np.ndarray) -> dict[str, np.ndarray]:
        sums = codes.sum(axis=1)
        return {"score": np.where(sums % 2 == 0, sums, np.nan)}


def test_wishes_that_cannot_be_met_are_errors() -> None:
    constraints = toy_constraints(blocks=2)
    with pytest.raises(RecipeError, match=r"n must be in 1\.\.3, got 4"):
        best_of(_Broken(), constraints, 4, draws=3, seed=0, metric="score")
    with pytest.raises(EvaluationError, match="the proxy gives score, not 'accuracy'"):
        best_of(_Broken(), constraints, 2, draws=3, seed=0, metric="accuracy")


def test_the_engine_searches_a_proxy_and_counts_networks_without_a_score_as_failed() -> None:
    constraints = toy_constraints("macs=100%", blocks=2)
    # These networks have no squeeze-excite and no head, only rectified convolutions.
    proxy = zero_cost_proxy("naswot", constraints.space)
    result = search(
        RandomSearch(constraints, seed=0), constraints, proxy, evaluations=5, objective="naswot", batch=5
    )
    assert result.candidates is not None
    assert (result.candidates.outcomes == Outcome.MEASURED).all()
    without_units = zero_cost_proxy("naswot", _linear_space())
    assert without_units(np.zeros((2, 1), dtype=np.int64))["naswot"].tolist() == [-np.inf, -np.inf]


def _linear_space() -> SearchSpace:
    block = Block("head", ("size",), lambda size: (Linear(3, int(size)),))
    return SearchSpace("linear", (Choice("size", (2, 3)),), (block,), settings={})
