"""Gradients of the architecture, in double precision, against all networks of a space of 64.

The space is linear: blocks are convolutions without norm and activation. What a mixture computes is then the
mean of what all networks compute, weighted by their probabilities, which can be enumerated.
"""

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress.budget import Budget, Constraints
from autocompress.cost import operation_cost
from autocompress.differentiable import Images, Moment
from autocompress.elastic.mixture import Gates, run_mixture
from autocompress.errors import BudgetError, RecipeError, SpaceError, TrainingError
from autocompress.ops import Conv2d, GlobalAvgPool, Linear, Ops
from autocompress.penalty import FORMS, make_penalty
from autocompress.relaxation import Relaxation, shape_changing
from autocompress.space import Block, Choice, Option, SearchSpace
from autocompress.testing.differentiable import MixedSupernet
from autocompress.testing.toys import every_network, toy_classifier_space, toy_width_space
from search_spaces.mobilenet_v3 import mobilenet_v3
from search_spaces.nas_bench_201 import nas_bench_201
from strategies.collapse import dominant_eigenvalue
from strategies.darts import Darts
from strategies.gumbel import GumbelSoftmax, sample, straight_through
from strategies.pc_darts import PcDarts, edge_groups
from strategies.proxyless import ProxylessNas, rescaled
from strategies.relaxed import RelaxedSearch

SIZE, WIDTH, CLASSES = 6, 2, 3
KERNELS = (1, 3, 5, 7)


def _conv(kernel: int) -> Ops:
    return (Conv2d(WIDTH, WIDTH, SIZE, SIZE, kernel=kernel, norm=False, activation="none"),)


def linear_space() -> SearchSpace:
    """Three convolutions of four kernels: 64 networks."""
    head = (GlobalAvgPool(WIDTH, SIZE, SIZE), Linear(WIDTH, CLASSES, bias=False))
    return SearchSpace(
        "linear",
        tuple(Choice(f"kernel{i}", KERNELS) for i in range(3)),
        (
            *(Block(f"conv{i}", (f"kernel{i}",), _conv) for i in range(3)),
            Block("head", (), partial(tuple, head)),
        ),
    )


class Network(MixedSupernet):
    """A supernet in double precision, with a loss of numbers."""

    def __init__(self, space: SearchSpace, *, linear: bool = False, channels: int = 1) -> None:
        super().__init__(space, channels=channels, dtype=torch.float64)
        self.linear = linear

    def of_outputs(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * targets).sum() if self.linear else ((outputs - targets) ** 2).mean()


def batch(seed: int) -> Images:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(5, WIDTH, SIZE, SIZE, dtype=torch.float64, generator=generator)
    return images, torch.randn(5, CLASSES, dtype=torch.float64, generator=generator)


def moment(step: int = 90, steps: int = 100, seed: int = 0) -> Moment:
    return Moment(step, steps, torch.Generator().manual_seed(seed))


def unlimited(space: SearchSpace) -> Constraints:
    return Constraints(space, {"macs": operation_cost(space, "macs")}, {})


def at_odds(strategy: RelaxedSearch) -> None:
    """Give the options clearly different probabilities."""
    with torch.no_grad():
        for at, vector in enumerate(strategy.relaxation.logits):
            # No two networks are equally probable.
            odds = torch.linspace(-1, 1, len(vector), dtype=torch.float64) ** 3 * (1 + 0.1 * at) + 0.3
            vector.copy_(odds.roll(at))


def enumerated(network: Network, space: SearchSpace, images: Tensor, weights: list[Tensor]) -> Tensor:
    """What all 64 networks compute, each times the product of its options' weights."""
    total = None
    for codes in itertools.product(range(len(KERNELS)), repeat=3):
        (arch,) = space.decode(np.array([codes]))
        weight = torch.stack([vector[code] for vector, code in zip(weights, codes, strict=True)]).prod()
        part = weight * network.supernet(images, arch)
        total = part if total is None else total + part
    assert total is not None
    return total


def gradients_of(strategy: RelaxedSearch) -> list[Tensor]:
    found = [vector.grad for vector in strategy.relaxation.logits]
    assert all(gradient is not None for gradient in found)
    return [gradient for gradient in found if gradient is not None]


def close(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        assert bool(other.any())
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * float(other.abs().max()))


# DARTS -----------------------------------------------------------------------------------------------------


def test_darts_has_the_gradient_of_the_loss_of_the_mean_network() -> None:
    space = linear_space()
    strategy, network = Darts(unlimited(space), seed=0), Network(space)
    at_odds(strategy)
    images, targets = batch(1)
    strategy.gradients(network, batch(0), (images, targets), moment())
    logits = [vector.detach().clone().requires_grad_() for vector in strategy.relaxation.logits]
    outputs = enumerated(network, space, images, [vector.softmax(0) for vector in logits])
    expected = torch.autograd.grad(network.of_outputs(outputs, targets), logits)
    close(gradients_of(strategy), list(expected))
    assert all(weight.grad is None for weight in network.supernet.parameters())


@pytest.mark.parametrize("nesterov", [False, True])
def test_second_order_darts_has_the_gradient_through_a_step_of_the_weights(nesterov: bool) -> None:
    space = linear_space()
    strategy, network = Darts(unlimited(space), seed=0, order=2), Network(space)
    network.group["nesterov"] = nesterov
    at_odds(strategy)
    train, held_out = batch(0), batch(1)
    before = {name: p.detach().clone() for name, p in network.supernet.named_parameters()}
    strategy.gradients(network, train, held_out, moment())
    for name, parameter in network.supernet.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None

    def after_a_step(vectors: list[Tensor]) -> Tensor:
        """The held-out loss after a step of PyTorch's own SGD on the training loss."""
        supernet = network.supernet
        supernet.load_state_dict(before)
        optimizer = torch.optim.SGD(supernet.parameters(), **network.group)  # type: ignore[arg-type]
        for weight in supernet.parameters():
            optimizer.state[weight]["momentum_buffer"] = network.velocities[id(weight)].clone()
        with torch.no_grad():
            for vector, value in zip(strategy.relaxation.logits, vectors, strict=True):
                vector.copy_(value)
        supernet.zero_grad()
        network.loss(train, strategy.soft_gates()).backward()
        optimizer.step()
        with torch.no_grad():
            return network.loss(held_out, strategy.soft_gates())

    base = [vector.detach().clone() for vector in strategy.relaxation.logits]
    found = [gradient.clone() for gradient in gradients_of(strategy)]
    step = 1e-4
    for at, vector in enumerate(base):
        for code in range(len(vector)):
            sides = []
            for sign in (1, -1):
                moved = [other.clone() for other in base]
                moved[at][code] += sign * step
                sides.append(float(after_a_step(moved)))
            slope = (sides[0] - sides[1]) / (2 * step)
            # The paper's own finite difference is off by less than a hundredth.
            assert float(found[at][code]) == pytest.approx(slope, abs=0.01 * float(found[at].abs().max()))


def test_second_order_darts_needs_the_step_of_sgd() -> None:
    strategy, network = Darts(unlimited(linear_space()), seed=0, order=2), Network(linear_space())
    network.group = {"lr": 0.05, "weight_decay": 0.01, "betas": (0.9, 0.999)}
    with pytest.raises(
        RecipeError, match=r"order 2 looks ahead by a step of SGD.*set train.optimizer to sgd"
    ):
        strategy.architecture_step(network, batch(0), batch(1), moment())


# Gumbel ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_softmax_has_the_gradient_of_its_sample(hard: bool) -> None:
    space = linear_space()
    strategy = GumbelSoftmax(unlimited(space), seed=0, hard=hard)
    network = Network(space)
    at_odds(strategy)
    images, targets = batch(1)
    strategy.gradients(network, batch(0), (images, targets), moment(50, 100, seed=4))
    logits = [vector.detach().clone().requires_grad_() for vector in strategy.relaxation.logits]
    generator = torch.Generator().manual_seed(4)
    soft = [sample(vector, 5.05, generator) for vector in logits]  # half way from 10 to 0.1
    if hard:  # the values of a one-hot vector, and of the drawn option the gradient of the soft sample
        weights = []
        for vector in soft:
            drawn = nn.functional.one_hot(vector.argmax(), len(vector)).double()
            weights.append(drawn + drawn * (vector - vector.detach()))
    else:
        weights = soft
    outputs = enumerated(network, space, images, weights)
    expected = torch.autograd.grad(network.of_outputs(outputs, targets), logits)
    close(gradients_of(strategy), list(expected))


def test_gumbel_samples_are_drawn_by_the_probabilities_and_sharpen_as_it_gets_colder() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([sample(logits, 0.1, generator) for _ in range(4000)])
    shares = torch.bincount(drawn.argmax(1), minlength=3) / 4000
    torch.testing.assert_close(shares.double(), logits.softmax(0), atol=0.03, rtol=0)
    assert drawn.max(1).values.mean() > 0.9
    warm = torch.stack([sample(logits, 10.0, generator) for _ in range(200)])
    assert warm.max(1).values.mean() < 0.5
    gate = straight_through(torch.tensor([0.2, 0.5, 0.3]))
    assert gate.codes == (1,)
    assert gate.weights.tolist() == [1.0]


def test_a_hard_sample_of_widths_hears_of_channels_that_were_not_drawn() -> None:
    space = toy_width_space(CLASSES)
    supernet = Network(space).supernet
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=generator)
    targets = torch.randn(5, CLASSES, dtype=torch.float64, generator=generator)
    (largest,) = space.decode(space.largest())
    name, at = "block1.expand", space.positions["block1.expand"]
    gradients = {}
    for every in (True, False):
        vector = torch.tensor([0.6, 0.4], dtype=torch.float64, requires_grad=True)
        gate = straight_through(vector, every=every)
        found = run_mixture(supernet, images, largest, {name: gate})
        (arch,) = space.decode(np.where(np.arange(len(space.choices)) == at, 0, space.largest()))
        torch.testing.assert_close(found, supernet(images, arch))
        ((found * targets).sum()).backward()  # type: ignore[no-untyped-call]
        assert vector.grad is not None
        gradients[every] = float(vector.grad.abs().max())
    # A common factor of all channels is lost in the batch norm that follows, but for its epsilon.
    assert gradients[True] > 1000 * gradients[False]
    strategy = GumbelSoftmax(unlimited(space), seed=0)
    gates = strategy.weight_gates(moment())
    assert all(len(gate.codes) == 1 for gate in gates.values())
    seen: list[Gates] = []
    network = Network(space)
    network.loss = lambda _, gates: (seen.append(gates), sum(g.weights.sum() for g in gates.values()))[1]  # type: ignore[assignment, method-assign]
    strategy.gradients(network, batch(0), batch(1), moment())
    computed = {name: len(gate.codes) for name, gate in seen[0].items()}
    assert computed == {
        "depth": 1, "stem.width": 2, "stage.width": 3, "block1.expand": 2, "block2.kernel": 1,
        "block2.expand": 2, "head.width": 2,
    }  # fmt: skip


def test_an_edge_whose_drawn_operation_is_none_teaches_nothing() -> None:
    space = nas_bench_201(channels=4, cells=1, resolution=8, in_channels=WIDTH, classes=CLASSES)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, WIDTH, 8, 8, dtype=torch.float64, generator=generator)
    held_out = images, torch.randn(5, CLASSES, dtype=torch.float64, generator=generator)
    for make in (GumbelSoftmax, ProxylessNas):
        strategy = make(unlimited(space), seed=0)
        with torch.no_grad():  # none or skip, and nothing else
            for vector in strategy.relaxation.logits:
                vector.copy_(torch.tensor([40.0, 39.0, 0.0, 0.0, 0.0]))
        for seed in range(4):
            strategy.architecture_step(Network(space), held_out, held_out, moment(seed=seed))
        assert all(bool(torch.isfinite(vector).all()) for vector in strategy.relaxation.logits)


# ProxylessNAS ----------------------------------------------------------------------------------------------


def test_the_mean_proxyless_gradient_over_all_draws_is_that_of_the_expected_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space = linear_space()
    strategy, network = ProxylessNas(unlimited(space), seed=0), Network(space, linear=True)
    at_odds(strategy)
    pairs = [(0, 2), (1, 3), (0, 3)]
    images, targets = batch(1)
    mean = [torch.zeros(4, dtype=torch.float64) for _ in range(3)]
    shares = [
        vector.detach()[list(pair)].softmax(0)
        for vector, pair in zip(strategy.relaxation.logits, pairs, strict=True)
    ]
    for active in itertools.product((0, 1), repeat=3):
        draws = [
            torch.tensor(drawn)
            for pair, one in zip(pairs, active, strict=True)
            for drawn in (pair[::-1], [one])
        ]
        monkeypatch.setattr(torch, "multinomial", lambda *_, draws=draws, **__: draws.pop(0))
        strategy.gradients(network, batch(0), (images, targets), moment())
        weight = torch.stack([share[one] for share, one in zip(shares, active, strict=True)]).prod()
        for total, gradient in zip(mean, gradients_of(strategy), strict=True):
            total += weight * gradient
    logits = [vector.detach().clone().requires_grad_() for vector in strategy.relaxation.logits]
    weights = []
    for vector, pair in zip(logits, pairs, strict=True):
        of_pair = torch.zeros(4, dtype=torch.float64)
        weights.append(of_pair.scatter(0, torch.tensor(pair), vector[list(pair)].softmax(0)))
    outputs = enumerated(network, space, images, weights)
    expected = torch.autograd.grad(network.of_outputs(outputs, targets), logits)
    close(mean, list(expected))


def test_proxyless_runs_one_path_for_weights_and_two_for_the_logits() -> None:
    space = linear_space()
    strategy, network = ProxylessNas(unlimited(space), seed=0), Network(space)
    assert all(len(gate.codes) == 1 for gate in strategy.weight_gates(moment()).values())
    seen: list[Gates] = []
    original = network.loss
    network.loss = lambda images, gates: (seen.append(gates), original(images, gates))[1]  # type: ignore[method-assign]
    at_odds(strategy)
    for seed in range(8):  # exactly 0 and 1 whatever the shares are: else both parts are kept in memory
        strategy.gradients(network, batch(0), batch(1), moment(seed=seed))
    for gate in (gate for gates in seen for gate in gates.values()):
        assert len(gate.codes) == 2
        assert sorted(gate.weights.tolist()) == [0.0, 1.0]


def test_a_proxyless_step_leaves_the_probabilities_of_options_that_were_not_drawn() -> None:
    space = linear_space()
    strategy, network = ProxylessNas(unlimited(space), seed=0, learning_rate=0.5), Network(space)
    at_odds(strategy)
    before = [p.detach().clone() for p in strategy.relaxation.probabilities().values()]
    strategy.architecture_step(network, batch(0), batch(1), moment(seed=2))
    for old, new in zip(before, strategy.relaxation.probabilities().values(), strict=True):
        still = (old - new).abs() <= 1e-12
        assert int(still.sum()) == 2  # of four options two were drawn
        new = new.detach()
        assert float(old[~still].sum()) == pytest.approx(float(new[~still].sum()), abs=1e-12)
        assert float((old - new).abs().max()) > 0.01
    moved = rescaled(torch.tensor([3.0, -1.0]).double(), torch.tensor([0.5, 0.25]).double())
    assert float(moved.logsumexp(0)) == pytest.approx(float(torch.tensor([0.5, 0.25]).double().logsumexp(0)))


# PC-DARTS --------------------------------------------------------------------------------------------------


def test_edges_of_pc_darts_are_normalised_node_by_node() -> None:
    space = nas_bench_201(channels=4, cells=1, resolution=8)
    assert edge_groups(space) == (
        ("edge_0_1",), ("edge_0_2", "edge_1_2"), ("edge_0_3", "edge_1_3", "edge_2_3"),
    )  # fmt: skip
    strategy = PcDarts(unlimited(space), seed=0)
    gates = strategy.weight_gates(moment())
    for group in edge_groups(space):
        scales = [gates[name].scale for name in group]
        assert sum(float(scale.detach()) for scale in scales if scale is not None) == pytest.approx(1.0)
    with pytest.raises(SpaceError, match="has no cells"):
        PcDarts(unlimited(linear_space()), seed=0)


def test_the_gradient_of_pc_darts_is_that_of_finite_differences() -> None:
    space = nas_bench_201(channels=4, cells=1, resolution=8, in_channels=WIDTH, classes=CLASSES)
    strategy = PcDarts(unlimited(space), seed=0)
    network = Network(space, channels=4)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, WIDTH, 8, 8, dtype=torch.float64, generator=generator)
    held_out = images, torch.randn(5, CLASSES, dtype=torch.float64, generator=generator)
    at_odds(strategy)
    strategy.gradients(network, held_out, held_out, moment())
    for vector in (strategy.relaxation.logits[4], strategy._edges[2]):
        gradient = vector.grad
        assert gradient is not None
        step = 1e-5
        for code in range(len(vector)):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    vector[code] += sign * step
                    sides.append(float(network.loss(held_out, strategy.weight_gates(moment()))))
                    vector[code] -= sign * step
            slope = (sides[0] - sides[1]) / (2 * step)
            assert float(gradient[code]) == pytest.approx(slope, rel=1e-4, abs=1e-9)


# Signs of a collapse ---------------------------------------------------------------------------------------


def test_the_dominant_eigenvalue_is_that_of_the_enumerated_hessian() -> None:
    space = linear_space()
    strategy, network = Darts(unlimited(space), seed=0), Network(space)
    at_odds(strategy)
    images, targets = batch(1)
    logits = list(strategy.relaxation.logits)

    def loss(flat: Tensor) -> Tensor:
        weights = [vector.softmax(0) for vector in flat.split(len(KERNELS))]
        return network.of_outputs(enumerated(network, space, images, weights), targets)

    hessian = torch.autograd.functional.hessian(loss, torch.cat([v.detach() for v in logits]))  # type: ignore[no-untyped-call]
    values = torch.linalg.eigvalsh(hessian)
    expected = float(values[values.abs().argmax()])
    found = dominant_eigenvalue(lambda: network.loss((images, targets), strategy.soft_gates()), logits)
    assert found == pytest.approx(expected, rel=0.03)
    strategy.architecture_step(network, batch(0), (images, targets), moment())
    (seen,) = strategy.notes["relaxation"]["epochs"]
    assert seen["eigenvalue"] == pytest.approx(expected, rel=0.05)  # a step of Adam later


# The relaxation --------------------------------------------------------------------------------------------


def test_the_expected_cost_is_the_mean_over_all_networks() -> None:
    space = linear_space()
    strategy = Darts(unlimited(space), seed=0)
    at_odds(strategy)
    macs = operation_cost(space, "macs")
    vectors = [p.detach().numpy() for p in strategy.relaxation.probabilities().values()]
    codes = np.array(list(itertools.product(range(4), repeat=3)))
    weights = np.prod([vector[codes[:, at]] for at, vector in enumerate(vectors)], axis=0)
    assert float(strategy.relaxation.expected(macs).detach()) == pytest.approx(
        float(weights @ macs.of(codes)), rel=1e-9
    )


@pytest.mark.parametrize("percent", [40, 60, 80, 100])
def test_the_most_probable_network_within_the_budget_is_derived(percent: int) -> None:
    space = linear_space()
    macs = operation_cost(space, "macs")
    constraints = Budget.parse(f"macs={percent}%").resolve(space, [macs])
    strategy = Darts(constraints, seed=0, candidates=1000, at_least=0.0)
    at_odds(strategy)
    codes = np.array(list(itertools.product(range(4), repeat=3)))
    logs = [p.detach().log().numpy() for p in strategy.relaxation.probabilities().values()]
    values = sum(log[codes[:, at]] for at, log in enumerate(logs))
    fits = constraints.feasible(codes)
    order = np.argsort(-np.where(fits, values, -np.inf), kind="stable")
    # The next ones are the next most probable ones; all that fit come in the end, each once.
    rows = strategy.ask(3)
    assert rows.tolist() == codes[order[:3]].tolist()
    rest = strategy.ask(100)
    assert len(rest) == fits.sum() - 3
    assert len(strategy.ask(1)) == 0
    two = Darts(constraints, seed=0, candidates=2)
    assert len(two.ask(100)) == 2


@pytest.mark.parametrize("percent", [40, 60, 80])
def test_a_network_that_uses_the_budget_is_preferred_where_there_is_one(percent: int) -> None:
    space = linear_space()
    macs, params = (operation_cost(space, metric) for metric in ("macs", "params"))
    codes = np.array(list(itertools.product(range(4), repeat=3)))
    for text in (f"macs={percent}%", f"macs={percent}%,params=90%"):
        constraints = Budget.parse(text).resolve(space, [macs, params])
        strategy = Darts(constraints, seed=0, candidates=1000, at_least=0.9)
        with torch.no_grad():  # small kernels are far more probable
            for vector in strategy.relaxation.logits:
                vector.copy_(torch.tensor([4.0, 2.0, 1.0, 0.0]))
        logs = [p.detach().log().numpy() for p in strategy.relaxation.probabilities().values()]
        values = sum(log[codes[:, at]] for at, log in enumerate(logs))
        uses = np.max([c.of(codes) / limit for m, limit in constraints.limits.items()
                       for c in [constraints.costs[m]]], axis=0)  # fmt: skip
        fits = constraints.feasible(codes)
        band = fits & (uses >= 0.9)
        rows = strategy.ask(1000)
        assert len(rows) == fits.sum()
        if band.any():
            best = float(values[band].max())
            assert sum(log[rows[0, at]] for at, log in enumerate(logs)) == pytest.approx(best)
        assert sorted(map(tuple, rows[: band.sum()].tolist())) == sorted(map(tuple, codes[band].tolist()))


def test_choices_that_change_shapes_are_fixed_and_others_can_be() -> None:
    space = toy_classifier_space(blocks=2)
    assert shape_changing(space) == ("resolution",)
    relaxation = Relaxation(space, seed=0)
    assert relaxation.fixed == {"resolution": 12}
    assert "depth" in relaxation.relaxed
    other = Relaxation(space, seed=0, fixed={"resolution": 8, "depth": 1})
    constraints = unlimited(space)
    (arch,) = space.decode(other.derive(constraints).codes)
    assert (arch["resolution"], arch["depth"]) == (8, 1)
    assert shape_changing(mobilenet_v3()) == ()
    assert shape_changing(mobilenet_v3(resolutions=(160, 192))) == ("resolution",)
    with pytest.raises(SpaceError, match="has no choice 'width' to fix"):
        Relaxation(space, seed=0, fixed={"width": 1})
    with pytest.raises(SpaceError, match="there is nothing to relax"):
        Relaxation(space, seed=0, fixed={c.name: c.options[0] for c in space.choices})


def test_widths_are_relaxed_with_the_mean_cost_of_all_networks() -> None:
    space = toy_width_space()
    assert shape_changing(space) == ()
    strategy = Darts(unlimited(space), seed=0)
    relaxation = strategy.relaxation
    assert relaxation.relaxed == tuple(choice.name for choice in space.choices)
    at_odds(strategy)
    macs = operation_cost(space, "macs")
    vectors = [p.detach().numpy() for p in relaxation.probabilities().values()]
    rows = np.array(list(itertools.product(*(range(len(vector)) for vector in vectors))))
    weights = np.prod([vector[rows[:, at]] for at, vector in enumerate(vectors)], axis=0)
    mean = float(weights @ macs.of(space.canonical(rows)))
    assert float(relaxation.expected(macs).detach()) == pytest.approx(mean, rel=1e-9)
    assert relaxation.derive(unlimited(space)).codes.tolist() in every_network(space)[:, None].tolist()
    assert Relaxation(space, seed=0, fixed={"stage.width": 4}).fixed == {"stage.width": 4}


def _scaled(part: str, scale: Option) -> Ops:
    side, width = 2 * int(scale), int(scale)
    if part == "stem":
        return (Conv2d(WIDTH, width, side, side),)
    return (GlobalAvgPool(width, side, side), Linear(width, CLASSES))


def test_a_choice_of_widths_and_size_at_once_stays_fixed_and_the_error_says_why() -> None:
    blocks = tuple(Block(part, ("scale",), partial(_scaled, part)) for part in ("stem", "head"))
    space = SearchSpace("scaled", (Choice("scale", (2, 4)),), blocks)
    assert shape_changing(space) == ("scale",)
    with pytest.raises(SpaceError, match=r"changes more of the shapes of blocks than channels \(scale\)"):
        Relaxation(space, seed=0)


def test_a_logit_that_is_not_finite_is_an_error_that_names_the_choice() -> None:
    strategy = Darts(unlimited(linear_space()), seed=0)
    with torch.no_grad():
        strategy.relaxation.logits[1][2] = float("nan")
    with pytest.raises(TrainingError, match=r"architecture parameters of 'kernel1' are .*nan"):
        strategy.ask(1)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Darts, {"order": 3}, "order must be 1 or 2, got 3"),
        (Darts, {"learning_rate": -1}, "learning_rate must be a number >= 0, got -1"),
        (Darts, {"betas": (0.5,)}, "betas must be two numbers"),
        (Darts, {"betas": 0.5}, r"betas must be two numbers in 0..1, 1 left out, got 0.5"),
        (Darts, {"penalty": "maybe"}, "penalty must be one of none, product_log"),
        (Darts, {"penalty_options": {"rho": 0}}, "lagrangian.rho must be a positive number, got 0"),
        (Darts, {"penalty_options": {"gamma": 1}}, "penalty_options of 'lagrangian' are"),
        (Darts, {"warmup": 2}, "warmup must be in 0..1, got 2"),
        (GumbelSoftmax, {"last_temperature": 0}, "last_temperature must be a positive number, got 0"),
        (PcDarts, {"channels": 0}, "channels must be an integer >= 1, got 0"),
    ],
)
def test_wrong_options_are_refused(make: Any, options: dict[str, Any], message: str) -> None:
    space = nas_bench_201(channels=4, cells=1, resolution=8)
    with pytest.raises(RecipeError, match=message):
        make(unlimited(space), seed=0, **options)


def test_fixed_options_that_leave_nothing_within_the_budget_are_refused() -> None:
    space = linear_space()
    constraints = Budget.parse("macs=40%").resolve(space, [operation_cost(space, "macs")])
    with pytest.raises(BudgetError, match="nothing fits the budget with fixed options"):
        Darts(constraints, seed=0, fixed={"kernel0": 7, "kernel1": 7})


# Budgets in the loss ---------------------------------------------------------------------------------------


def test_budget_forms_are_their_formulas() -> None:
    loss, ratio = torch.tensor(2.0), torch.tensor(1.5)
    values = {form: float(make_penalty(form)(loss, {"macs": ratio})) for form in FORMS}
    assert values == pytest.approx(
        {
            "none": 2.0,
            "product_log": 2.0 * (1 + np.log(1.5)) ** 0.3,
            "additive": 2.0 + 0.1 * 0.5,
            "hinge": 2.0 + 0.5,
            "lagrangian": 2.0 + (10 * 0.5) ** 2 / 20,
        }
    )
    below = {form: float(make_penalty(form)(loss, {"macs": torch.tensor(0.5)})) for form in FORMS}
    assert below["hinge"] == below["lagrangian"] == below["none"] == 2.0
    assert below["product_log"] < 2.0
    assert below["additive"] == pytest.approx(1.95)
    assert float(make_penalty("hinge", bound=0.2)(loss, {"macs": ratio})) == pytest.approx(2.2)
    with pytest.raises(RecipeError, match="got 'soft'"):
        make_penalty("soft")


@pytest.mark.parametrize(
    "percent", [pytest.param(40, marks=pytest.mark.slow), 60, pytest.param(80, marks=pytest.mark.slow)]
)
def test_the_lagrangian_lands_on_the_budget_where_the_loss_wants_more(percent: int) -> None:
    space = linear_space()
    macs = operation_cost(space, "macs")
    constraints = Budget.parse(f"macs={percent}%").resolve(space, [macs])

    class Greedy(Network):
        def loss(self, batch: Images, gates: Gates) -> Tensor:
            """The larger the kernels the better."""
            return -sum(  # type: ignore[return-value]
                (gate.weights * torch.arange(4, dtype=torch.float64)).sum() for gate in gates.values()
            )

    strategy = Darts(constraints, seed=0, learning_rate=0.05, weight_decay=0.0)
    for step in range(500):
        strategy.architecture_step(Greedy(space), batch(0), batch(1), moment(step, 500))
    assert float(strategy.ratios()["macs"].detach()) == pytest.approx(1.0, abs=0.02)
    rows = strategy.ask(1)
    assert constraints.feasible(rows).all()
