"""DMCP: published expectations, gates that are slices at their ends, gradients, and where it lands."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.budget import Budget, Constraints
from autocompress.cost import AdditiveCost, operation_cost
from autocompress.differentiable import Moment, Sandwiched
from autocompress.elastic.mixture import Gate, run_mixture
from autocompress.errors import RecipeError
from autocompress.models.mobilenet_v2 import mobilenet_v2
from autocompress.prune.source import Source
from autocompress.space import SearchSpace
from search_spaces.channels import channel_space
from strategies.dmcp import Dmcp


def published_widths(units: int) -> list[int]:
    """Groups of a fifteenth, 14 of them over a base (`models/dmcp/alpha_op.py` of Zx55/dmcp, 0.1 to 1.5)."""
    group = units // 15
    return [units - group * left for left in range(14, -1, -1)]


class Residual(nn.Module):
    """A residual block, a depthwise convolution and a head, on 6x6 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.deep, self.bn3 = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6, eps=1e-3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(batch, 1, 6, 6)` to `(batch, 3)`."""
        x = self.bn(self.stem(x)).relu()
        x = (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()
        return self.head(self.bn3(self.deep(x)).relu().mean((2, 3)))


@cache
def small_space() -> SearchSpace:
    torch.manual_seed(0)
    model = Residual()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return channel_space(Source(model, torch.zeros(1, 1, 6, 6)), widths=lambda units: range(1, units))


def limited(budget: str = "macs=50%") -> Constraints:
    space = small_space()
    return Budget.parse(budget).resolve(space, [operation_cost(space, "macs")])


def test_the_published_expectations_of_mobilenet_v2() -> None:
    """MobileNetV2 1.5x: 29.183 M at transitions of 0.5, 672.833 M at 1 (ALGORITHMS.md, A3.5: Zx55/dmcp)."""
    space = channel_space(
        Source(mobilenet_v2(width=1.5), torch.zeros(1, 3, 224, 224)), widths=published_widths
    )
    macs = operation_cost(space, "macs")
    strategy = Dmcp(Constraints(space, {"macs": macs}, {}), seed=0)
    for logit, published in ((0.0, 29.183e6), (40.0, 672.833e6)):
        with torch.no_grad():
            for vector in strategy.relaxation.logits:
                vector.fill_(logit)
        expected = float(strategy.relaxation.expected(macs).detach())
        assert expected == pytest.approx(published, abs=600)
    assert macs.maximum == pytest.approx(672.833e6, abs=600)


def test_a_chain_ends_at_each_option_with_the_product_of_its_steps() -> None:
    strategy = Dmcp(limited(), seed=0)
    relaxation = strategy.relaxation
    name = relaxation.relaxed[0]
    steps = [0.9, 0.5, 0.2, 0.7, 0.4]
    with torch.no_grad():
        for position, p in enumerate(steps):
            relaxation.logits[0][position] = math.log(p / (1 - p))
    found = relaxation.probabilities()[name].tolist()
    by_hand = [math.prod(steps[:k]) * (1 - steps[k] if k < 5 else 1) for k in range(6)]
    assert found == pytest.approx(by_hand)
    assert sum(found) == pytest.approx(1)


def test_gates_of_probability_one_are_the_very_slice() -> None:
    """Every width of one group, the others at an inner width: gated outputs equal those of the slice."""
    space = small_space()
    supernet = space.supernet().double().eval()
    x = torch.randn(5, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (largest,) = space.decode(space.largest())
    for codes in space.sample(12, np.random.default_rng(0)):
        (arch,) = space.decode(codes[None])
        gates = {}
        for position, choice in enumerate(space.choices):
            weights = torch.zeros(len(choice.options), dtype=torch.float64)
            weights[codes[position]] = 1.0
            gates[choice.name] = Gate.all(weights)
        gated = run_mixture(supernet, x, largest, gates)
        torch.testing.assert_close(gated, supernet(x, arch), rtol=1e-9, atol=1e-9)
        one = torch.ones(1, dtype=torch.float64)
        sliced = {c.name: Gate((int(codes[p]),), one) for p, c in enumerate(space.choices)}
        torch.testing.assert_close(run_mixture(supernet, x, largest, sliced), supernet(x, arch))


def test_the_gradient_of_the_gated_loss_is_that_of_a_difference() -> None:
    space = small_space()
    supernet = space.supernet().double().eval()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 1, 6, 6, dtype=torch.float64, generator=generator)
    (largest,) = space.decode(space.largest())
    strategy = Dmcp(limited(), seed=0)

    def loss() -> torch.Tensor:
        return run_mixture(supernet, x, largest, strategy.soft_gates()).square().sum()

    vector = strategy.relaxation.logits[1]
    (gradient,) = torch.autograd.grad(loss(), [vector])
    assert bool((gradient[:-1] != 0).all())
    assert float(gradient[-1]) == 0.0
    for position in range(len(vector) - 1):
        with torch.no_grad():
            vector[position] += 1e-5
            high = float(loss())
            vector[position] -= 2e-5
            low = float(loss())
            vector[position] += 1e-5
        assert float(gradient[position]) == pytest.approx((high - low) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("percent", [30, 50, 80])
def test_chains_start_where_the_expected_cost_is_the_budget(percent: int) -> None:
    constraints = limited(f"macs={percent}%")
    strategy = Dmcp(constraints, seed=0)
    (ratio,) = strategy.ratios().values()
    assert float(ratio.detach()) == pytest.approx(1.0, abs=1e-6)


def test_what_is_derived_fits_and_is_nearest_to_the_expected_widths() -> None:
    constraints = limited("macs=60%")
    strategy = Dmcp(constraints, seed=0, at_least=0.0)
    rng = np.random.default_rng(3)
    with torch.no_grad():
        for vector in strategy.relaxation.logits:
            vector += torch.from_numpy(rng.normal(size=len(vector)))
    found = strategy.ask(1)
    assert constraints.feasible(found).all()
    space = constraints.space
    networks = np.array(np.meshgrid(*[range(c) for c in space.counts])).reshape(len(space.counts), -1).T
    fitting = networks[constraints.feasible(networks)]
    distance = np.zeros(len(fitting))
    best = 0.0
    for position, choice in enumerate(space.choices):
        widths = np.array(choice.options, dtype=float)
        p = strategy.relaxation.probabilities()[choice.name].detach().numpy()
        expected = p @ widths
        distance += ((widths[fitting[:, position]] - expected) / widths[-1]) ** 2
        best += ((widths[found[0, position]] - expected) / widths[-1]) ** 2
    assert best == pytest.approx(distance.min())


def test_slices_go_from_uniform_to_drawn() -> None:
    """At the end of the training all drawn slices are of the chains, here steep ones."""
    strategy = Dmcp(limited(), seed=0, random_share=0.0, drawn=4)
    assert isinstance(strategy, Sandwiched)
    with torch.no_grad():
        for vector in strategy.relaxation.logits:
            vector.fill_(-40.0)
    smallest = [0] * len(strategy.relaxation.relaxed)

    def codes(progress: float, seed: int) -> list[list[int]]:
        moment = Moment(round(1000 * progress), 1000, torch.Generator().manual_seed(seed))
        return [[g.codes[0] for g in gates.values()] for gates in strategy.taught_gates(moment)]

    for seed in range(5):
        drawn = codes(0.999, seed)
        assert len(drawn) == 5
        assert all(row == smallest for row in drawn[:2])
    assert sum(row != smallest for seed in range(5) for row in codes(0.999, seed)) <= 1
    assert sum(row != smallest for seed in range(5) for row in codes(0.3, seed)[1:]) >= 15
    largest = strategy.weight_gates(Moment(0, 10, torch.Generator()))
    space = strategy.relaxation.space
    assert [g.codes[0] for g in largest.values()] == (space.counts - 1).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drawn": 0}, "drawn must be"),
        ({"random_share": 2}, "random_share"),
        ({"learning_rate": -1}, "learning_rate must be"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Dmcp(limited(), seed=0, **options)


def test_latency_can_be_expected_as_well_as_macs() -> None:
    """Any sums: here parameters and MACs together; the chains start where the tighter one is met."""
    space = small_space()
    costs: list[AdditiveCost] = [operation_cost(space, metric) for metric in ("macs", "params")]
    strategy = Dmcp(Budget.parse("macs=50%,params=60%").resolve(space, costs), seed=0)
    ratios = [float(ratio.detach()) for ratio in strategy.ratios().values()]
    assert max(ratios) == pytest.approx(1.0, abs=1e-6)
