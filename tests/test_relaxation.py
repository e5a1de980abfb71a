"""The relaxation: options that were dropped, edges and their validation, what is derived of them."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from autocompress.budget import Budget, Constraints
from autocompress.cost import operation_cost
from autocompress.differentiable import Moment
from autocompress.errors import BudgetError, SpaceError
from autocompress.ops import Conv2d, Ops
from autocompress.relaxation import Relaxation
from autocompress.space import Block, Choice, Option, SearchSpace
from autocompress.testing.toys import every_network
from search_spaces.darts import darts
from search_spaces.nas_bench_201 import CHOICES, nas_bench_201
from strategies.proxyless import ProxylessNas

KERNELS = (1, 3, 5, 7)


def _kernel(kernel: Option) -> Ops:
    return (Conv2d(2, 2, 6, 6, kernel=int(kernel)),)


def chain(length: int = 3) -> SearchSpace:
    names = [f"kernel{at}" for at in range(length)]
    return SearchSpace(
        "chain",
        tuple(Choice(name, KERNELS) for name in names),
        tuple(Block(name, (name,), _kernel) for name in names),
    )


def limited(space: SearchSpace, budget: str) -> Constraints:
    return Budget.parse(budget).resolve(space, [operation_cost(space, "macs")])


def keep(relaxation: Relaxation, *codes: int) -> None:
    for at, kept in enumerate(relaxation.kept):
        relaxation.kept[at] = torch.isin(torch.arange(len(kept)), torch.tensor(codes))


# Options that were dropped ---------------------------------------------------------------------------------


# A chain of three is enumerated, one of nine (262,144 networks) solved by integer programming.
@pytest.mark.parametrize("length", [3, 9])
def test_dropped_options_are_not_derived_to_use_up_the_budget(length: int) -> None:
    space = chain(length)
    relaxation = Relaxation(space, seed=0)
    keep(relaxation, 0, 1)
    codes = relaxation.derive(limited(space, "macs=60%"), at_least=0.95).codes
    assert set(codes[0].tolist()) <= {0, 1}


@pytest.mark.parametrize("length", [3, 9])
def test_no_more_dropped_options_are_derived_than_the_budget_needs(length: int) -> None:
    space = chain(length)
    relaxation = Relaxation(space, seed=0)
    keep(relaxation, 2, 3)
    # MACs go as the square of the kernel: 25 of 49 is the least that is left, so 40 % needs dropped ones.
    constraints = limited(space, "macs=40%")
    codes = relaxation.derive(constraints, at_least=0.95).codes
    assert constraints.feasible(codes).all()
    # A third of the layers with 1 or 9 instead of 25: (6 * 25 + 3 * 9) / (9 * 49) = 0.4014, with 1: 0.347.
    assert (codes < 2).sum() == length // 3
    assert relaxation.derive(limited(space, "macs=60%")).codes.min() == 2


def test_entropy_is_a_share_of_what_options_that_are_left_can_have() -> None:
    relaxation = Relaxation(chain(), seed=0)
    keep(relaxation, 0, 1)
    for vector in relaxation.logits:
        vector.data.zero_()
    assert relaxation.entropy() == pytest.approx(1.0)
    relaxation.logits[0].data[1] = np.log(3.0)  # a quarter and three
    binary = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)) / np.log(2)
    assert relaxation.entropy() == pytest.approx((2 + binary) / 3)


# Edges -----------------------------------------------------------------------------------------------------


def edged(**changes: Any) -> SearchSpace:
    """A node of two edges out of three, with two operations each."""
    pairs = [(a, b, one, other) for a, b in ((0, 1), (0, 2), (1, 2)) for one in "pq" for other in "pq"]
    terms = tuple(((f"edge{a}", one), (f"edge{b}", other)) for a, b, one, other in pairs)
    options = tuple(f"{one}{a}{other}{b}" for a, b, one, other in pairs)
    given = {
        "options": options,
        "terms": terms,
        "edges": tuple(Choice(f"edge{at}", ("none", "p", "q"), ordinal=False) for at in range(3)),
        "of_block": (),
    } | changes
    choices = (
        Choice("node", given["options"], ordinal=False, terms=given["terms"]),
        Choice("kernel", (1, 3)),
    )
    blocks = (
        Block("node", ("node",), _node, edges=given["of_block"]),
        Block("kernel", ("kernel",), _kernel),
    )
    return SearchSpace("edged", choices, blocks, edges=given["edges"])


def _node(node: Option) -> Ops:
    return (Conv2d(2, 2, 6, 6, kernel=1 + 2 * str(node).count("q")),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"terms": ((("edge0", "p"),),)}, "choice 'node' needs terms for each of its 12 options, got 1"),
        (
            {"edges": (Choice("edge0", ("p", "q")),)},
            r"'edge1' is no edge of space 'edged'; it has \['edge0'\]",
        ),
        ({"of_block": ("edge9",)}, "'edge9' is no edge of space 'edged'"),
        (
            {"edges": tuple(Choice(f"edge{at}", ("none", "p")) for at in range(3))},
            r"choice 'edge\d' has no option 'q'; allowed: \['none', 'p'\]",
        ),
        (
            {"edges": tuple(Choice(name, ("p", "q")) for name in ("edge0", "edge1", "edge2", "kernel"))},
            "edges of space 'edged' need names of their own",
        ),
        (
            {"edges": tuple(Choice(name, ("p", "q")) for name in ("edge0", "edge1", "edge2", "edge2"))},
            "edges of space 'edged' need names of their own",
        ),
    ],
)
def test_edges_that_do_not_fit_their_space_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        edged(**changes)


def by_hand(probabilities: dict[str, list[float]]) -> list[float]:
    """Products of the two edges, as a share of their sum."""
    products = [
        probabilities[f"edge{a}"][1 + "pq".index(one)] * probabilities[f"edge{b}"][1 + "pq".index(other)]
        for a, b in ((0, 1), (0, 2), (1, 2))
        for one, other in itertools.product("pq", repeat=2)
    ]
    return [product / sum(products) for product in products]


def test_options_of_a_node_are_as_probable_as_their_edges() -> None:
    space = edged()
    relaxation = Relaxation(space, seed=0)
    assert relaxation.relaxed == ("kernel", "edge0", "edge1", "edge2")
    given = {
        "kernel": [0.25, 0.75],
        "edge0": [0.5, 0.2, 0.3],
        "edge1": [0.1, 0.3, 0.6],
        "edge2": [0.2, 0.7, 0.1],
    }
    for name, vector in zip(relaxation.relaxed, relaxation.logits, strict=True):
        vector.data.copy_(torch.tensor(given[name]).log())
    node = by_hand(given)
    found = relaxation.of_choice(space.choices[0], relaxation.probabilities())
    assert found.tolist() == pytest.approx(node)
    macs = operation_cost(space, "macs")
    networks = every_network(space)
    weights = np.array(node)[networks[:, 0]] * np.array(given["kernel"])[networks[:, 1]]
    assert float(relaxation.expected(macs).detach()) == pytest.approx(float(weights @ macs.of(networks)))
    # 0.6 * 0.7 is the largest product: edges 1 and 2, q and p.
    (arch,) = space.decode(relaxation.most_probable(relaxation.probabilities()))
    assert arch.settings == (("node", "q1p2"), ("kernel", 3))
    constraints = limited(space, "macs=40%")
    best = networks[np.where(constraints.feasible(networks), weights, 0).argmax()]
    np.testing.assert_array_equal(relaxation.derive(constraints).codes[0], best)
    assert space.decode(best[None]) != [arch]


def test_a_node_that_is_fixed_stays_and_its_edges_are_not_relaxed() -> None:
    space = edged()
    relaxation = Relaxation(space, seed=0, fixed={"node": "p0q2"})
    assert relaxation.relaxed == ("kernel",)
    assert relaxation.fixed == {"node": "p0q2"}
    relaxation.logits[0].data.copy_(torch.tensor([0.25, 0.75]).log())
    macs = operation_cost(space, "macs")
    rows = space.encode([space.architecture({"node": "p0q2", "kernel": kernel}) for kernel in (1, 3)])
    assert float(relaxation.expected(macs).detach()) == pytest.approx(float([0.25, 0.75] @ macs.of(rows)))
    for codes in (
        relaxation.most_probable(relaxation.probabilities()),
        relaxation.derive(limited(space, "macs=100%")).codes,
    ):
        np.testing.assert_array_equal(codes, rows[1:])
    np.testing.assert_array_equal(relaxation.derive(limited(space, "macs=50%")).codes, rows[:1])
    with pytest.raises(BudgetError, match="no network that fits is left by the fixed options"):
        relaxation.derive(limited(space, "macs=20%"))
    with pytest.raises(SpaceError, match="choice 'node' has no option 'p0q0'"):
        Relaxation(space, seed=0, fixed={"node": "p0q0"})
    with pytest.raises(SpaceError, match="has no choice 'edge0' to fix"):
        Relaxation(space, seed=0, fixed={"edge0": "p"})


def test_edges_of_one_operation_have_no_entropy_and_can_be_searched() -> None:
    """What is left of the DARTS space is which edges a node keeps."""
    space = darts(channels=2, layers=3, resolution=4, operations=("skip_connect",))
    strategy = ProxylessNas(limited(space, "macs=100%"), seed=0)
    assert strategy.relaxation.entropy() == 0.0

    class Network:
        weights = ()

        def loss(self, batch: Any, gates: Any) -> torch.Tensor:
            assert {gate.codes for gate in gates.values()} == {(0,)}
            return torch.stack([gate.weights.sum() for gate in gates.values()]).sum()

        def velocity(self, weight: Any) -> None:
            return None

    nothing = torch.zeros(1), torch.zeros(1)
    strategy.architecture_step(Network(), nothing, nothing, Moment(9, 10, torch.Generator().manual_seed(0)))
    assert len(strategy.ask(1)) == 1


def test_a_cell_that_is_cut_in_two_is_never_derived() -> None:
    """Law: it fills a budget with convolutions that nothing reads, and computes a constant."""
    space = nas_bench_201(channels=2, cells=1, resolution=8)
    macs = operation_cost(space, "macs")
    cut = dict(
        zip(CHOICES, ("none", "nor_conv_3x3", "nor_conv_3x3", "none", "nor_conv_1x1", "none"), strict=True)
    )
    relaxation = Relaxation(space, seed=0)
    with torch.no_grad():
        for name, vector in zip(relaxation.relaxed, relaxation.logits, strict=True):
            vector.zero_()[space.variables[name].code(cut[name])] = 5.0
    codes = space.encode([space.architecture(cut)])
    assert (relaxation.most_probable(relaxation.probabilities()) == codes).all()
    limits = Constraints(space, {"macs": macs}, {"macs": float(macs.of(codes)[0])})
    for at_least in (0.0, 0.95):
        derived = relaxation.derive(limits, at_least=at_least)
        assert relaxation.space.connected(derived.codes)
        assert macs.of(derived.codes) <= limits.limits["macs"]
