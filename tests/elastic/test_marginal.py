"""Elastic widths in mixtures: what is gated at 0 and 1 is the slice; what is in between has its gradient."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from small_networks import images, shaken
from torch import Tensor

from autocompress.elastic.marginal import MarginalGates, width_choices
from autocompress.elastic.mixture import Gate, run_mixture
from autocompress.errors import SpaceError
from autocompress.ops import Add, Conv2d, GlobalAvgPool, Linear, Ops
from autocompress.space import Block, Choice, Option, SearchSpace
from autocompress.testing.toys import every_network, toy_classifier_space, toy_width_space
from search_spaces.mobilenet_v3 import mobilenet_v3
from search_spaces.nas_bench_201 import nas_bench_201

WIDTHS = ("stem.width", "stage.width", "block1.expand", "block2.expand", "head.width")


def one_hot(count: int, code: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(code), count).double()


# The law -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [False, True], ids=["every option computed", "one option computed"])
def test_a_one_hot_mixture_is_the_slice_for_every_network(alone: bool) -> None:
    space = toy_width_space()
    supernet = shaken(space, scale=0.5).double()
    (largest,) = space.decode(space.largest())
    x = images(3, 8).double()
    networks = every_network(space)
    assert len(networks) == space.size == 120
    with torch.no_grad():
        for codes in networks:
            gates = {
                choice.name: Gate((code,), torch.ones(1))
                if alone
                else Gate.all(one_hot(len(choice.options), code))
                for choice, code in zip(space.choices, codes.tolist(), strict=True)
            }
            (arch,) = space.decode(codes[None, :])
            found, slice_ = run_mixture(supernet, x, largest, gates), supernet(x, arch)
            torch.testing.assert_close(found, slice_, rtol=0 if alone else 1e-9, atol=0 if alone else 1e-10)


def test_soft_gates_of_widths_run_the_largest_width_once() -> None:
    space = toy_width_space()
    supernet = shaken(space)
    (largest,) = space.decode(space.largest())
    ran: list[int] = []
    for name, layer in supernet.layers["block2"].named_children():
        if "depthwise" in name:
            layer.register_forward_hook(lambda *given: ran.append(given[-1].shape[1]))
    even = {c.name: Gate.all(torch.full((len(c.options),), 0.5)) for c in space.choices if c.name in WIDTHS}
    run_mixture(supernet, images(2, 8), largest, even)
    assert ran == [16]
    run_mixture(supernet, images(2, 8), largest, {**even, "block2.kernel": Gate.all(torch.ones(2))})
    assert ran == [16] * 3  # once a kernel, not once a kernel and width


# The gates -----------------------------------------------------------------------------------------------


def test_a_channel_is_gated_by_the_probability_that_the_width_is_larger() -> None:
    space = toy_width_space()
    blocks = {block.name: block for block in space.blocks}
    marginal = MarginalGates(space)
    stage = Gate.all(torch.tensor([0.2, 0.3, 0.5]))
    expand = Gate.all(torch.tensor([0.6, 0.4]))
    setting: dict[str, Option] = {"stem.width": 6, "stage.width": 8, "block1.expand": 2}
    project = [None, None, [1, 1, 0.8, 0.8, 0.5, 0.5, 0.5, 0.5]]
    found = marginal.of(blocks["block1"], setting, {"stage.width": stage})
    for gate, expected in zip(found, project, strict=True):
        assert (gate is None) == (expected is None)
        if gate is not None:
            torch.testing.assert_close(gate, torch.tensor(expected))

    # Middle widths 2, 4, 8 times 1, 2; squeeze-excite's hidden width is half of that.
    setting = {"depth": 2, "stage.width": 8, "block2.kernel": 3, "block2.expand": 2}
    first, depthwise, attention, project_, added = marginal.of(
        blocks["block2"], setting, {"stage.width": stage, "block2.expand": expand}
    )
    of_16 = [1.0] * 2 + [0.2 * 0.4 + 0.8] * 2 + [0.3 * 0.4 + 0.5] * 4 + [0.5 * 0.4] * 8
    assert first is None  # the depthwise convolution keeps channels apart
    torch.testing.assert_close(depthwise, torch.tensor(of_16))
    torch.testing.assert_close(attention, torch.tensor(of_16[::2]))
    torch.testing.assert_close(project_, torch.tensor(project[2]))
    assert added is None  # both summands are gated

    # Two computed options, as in ProxylessNAS; a scale; and a block that is left out.
    pair = Gate((0, 1), torch.tensor([1.0, 0.0]), torch.tensor(2.0))
    narrow: dict[str, Option] = {"stem.width": 6, "stage.width": 4, "block1.expand": 2}
    (*_, last) = marginal.of(blocks["block1"], narrow, {"stage.width": pair})
    torch.testing.assert_close(last, torch.tensor([2.0, 2.0, 0.0, 0.0]))
    assert marginal.of(blocks["block2"], {**setting, "depth": 1}, {"stage.width": stage}) == []


def test_the_gradient_of_widths_is_that_of_finite_differences() -> None:
    space = toy_width_space()
    supernet = shaken(space, scale=0.5).double()
    (largest,) = space.decode(space.largest())
    generator = torch.Generator().manual_seed(2)
    logits = {
        c.name: torch.randn(len(c.options), generator=generator, dtype=torch.float64) for c in space.choices
    }
    x, targets = images(4, 8).double(), torch.tensor([0, 1, 2, 1])

    def loss(given: dict[str, Tensor]) -> Tensor:
        gates = {name: Gate.all(vector.softmax(0)) for name, vector in given.items()}
        return torch.nn.functional.cross_entropy(run_mixture(supernet, x, largest, gates), targets)

    leaves = {name: vector.clone().requires_grad_() for name, vector in logits.items()}
    loss(leaves).backward()  # type: ignore[no-untyped-call]
    step = 1e-5
    for name, vector in logits.items():
        gradient = leaves[name].grad
        assert gradient is not None
        assert float(gradient.abs().max()) > 1e-6
        for code in range(len(vector)):
            nudge = step * one_hot(len(vector), code)
            with torch.no_grad():
                sides = [float(loss({**logits, name: vector + sign * nudge})) for sign in (1, -1)]
            slope = (sides[0] - sides[1]) / (2 * step)
            assert float(gradient[code]) == pytest.approx(slope, rel=1e-4, abs=1e-9)


# Which choices are widths --------------------------------------------------------------------------------


def test_widths_are_found_from_the_operations_alone() -> None:
    assert width_choices(toy_width_space()) == WIDTHS
    assert width_choices(toy_classifier_space()) == ("block1.expand", "block2.expand")
    small = mobilenet_v3(width=0.25, geometry="small", depths=(1, 2), kernels=(3, 5), resolutions=(24, 32))
    assert width_choices(small) == tuple(c.name for c in small.choices if c.name.endswith("expand"))
    assert width_choices(nas_bench_201(channels=4, cells=1, resolution=8)) == ()


class OfItsOwn(Conv2d):
    """An operation that autocompress does not know."""


def _conv(inputs: int, outputs: int, *, side: int = 4, kernel: int = 1, groups: int = 1) -> Conv2d:
    return Conv2d(inputs, outputs, side, side, kernel=kernel, groups=groups)


def _head(width: int, side: int = 4) -> Ops:
    return (GlobalAvgPool(width, side, side), Linear(width, 2))


# What else than a width may change with a choice, its options, and its blocks.
OTHERS: dict[str, tuple[tuple[int, ...], tuple[Callable[[int], Ops], ...]]] = {
    "size": ((4, 8), (lambda c: (_conv(3, c, side=c),), lambda c: _head(c, c))),
    "kernel": ((1, 3), (lambda c: (_conv(3, c, kernel=c),), _head)),
    "descending order": ((8, 4), (lambda c: (_conv(3, c),), _head)),
    "slices inside groups": ((4, 8), (lambda c: (_conv(3, c), _conv(c, c, groups=2)), _head)),
    "an addition where widths happen to be equal": (
        (4, 8),
        (
            lambda c: (_conv(3, 4),),
            lambda c: (_conv(4, c), Add(4, 4, 4)) if c == 4 else (_conv(4, c),),
            _head,
        ),
    ),
    "a block that is left out": ((4, 8), (lambda c: (_conv(3, c),), lambda c: _head(c) if c > 4 else ())),
    "an operation of its own": ((4, 8), (lambda c: (OfItsOwn(3, c, 4, 4),), _head)),
    "outputs": ((4, 8), (lambda c: (GlobalAvgPool(3, 4, 4), Linear(3, c)),)),
    "inputs": ((1, 3), (lambda c: (_conv(c, 4),), lambda c: _head(4))),
}


@pytest.mark.parametrize("reason", OTHERS)
def test_a_choice_that_is_no_width_alone_is_none(reason: str) -> None:
    options, parts = OTHERS[reason]
    blocks = tuple(Block(f"b{at}", ("c",), part) for at, part in enumerate(parts))
    assert width_choices(SearchSpace("other", (Choice("c", options),), blocks)) == ()


def test_a_plain_width_is_one() -> None:
    """What the others above would be without the change that their names say."""
    blocks = (Block("b0", ("c",), lambda c: (_conv(3, c),)), Block("b1", ("c",), _head))
    assert width_choices(SearchSpace("plain", (Choice("c", (4, 8)),), blocks)) == ("c",)


def _sized(stage: str, scale: Option) -> Ops:
    side, channels = int(scale), int(scale) // 2
    if stage == "stem":
        return (Conv2d(3, channels, side, side, kernel=3, activation="relu"),)
    return (GlobalAvgPool(channels, side, side), Linear(channels, 3))


def test_a_choice_of_width_and_size_cannot_be_gated() -> None:
    blocks = tuple(Block(name, ("scale",), partial(_sized, name)) for name in ("stem", "head"))
    space = SearchSpace("scaled", (Choice("scale", (4, 8)),), blocks)
    (largest,) = space.decode(space.largest())
    with pytest.raises(SpaceError, match=r"more of a shape than channels \(resolution\) cannot be gated"):
        run_mixture(space.supernet(), images(2, 8), largest, {"scale": Gate.all(torch.tensor([0.5, 0.5]))})


def test_every_pair_of_options_of_two_widths_of_one_channel_count_is_drawn_on_its_own() -> None:
    """Against the definition: the share of all networks, by their probability, that have the channel."""
    space = toy_width_space()
    block = next(block for block in space.blocks if block.name == "block1")
    weights = {"stem.width": torch.tensor([0.3, 0.7]), "block1.expand": torch.tensor([0.9, 0.1])}
    gates = {name: Gate.all(vector) for name, vector in weights.items()}
    setting: dict[str, Option] = {"stem.width": 6, "stage.width": 8, "block1.expand": 2}
    _, gate, _ = MarginalGates(space).of(block, setting, gates)
    expected = torch.zeros(12)
    for (i, stem), (j, expand) in itertools.product(enumerate((4, 6)), enumerate((1, 2))):
        expected[: stem * expand] += weights["stem.width"][i] * weights["block1.expand"][j]
    torch.testing.assert_close(gate, expected)
