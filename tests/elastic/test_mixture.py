"""Mixtures against what their parts compute one by one."""

from collections.abc import Mapping

import pytest
import torch
from small_networks import arch_of, images, shaken
from torch import Tensor

from autocompress.elastic.extract import extract
from autocompress.elastic.mixture import Gate, run_mixture
from autocompress.elastic.partial import through_part
from autocompress.elastic.supernet import Supernet
from autocompress.errors import SpaceError
from autocompress.space import Architecture
from autocompress.testing.toys import toy_classifier_space
from search_spaces.nas_bench_201 import CHOICES, nas_bench_201


def mixed(supernet: Supernet, arch: Architecture, gates: Mapping[str, Tensor]) -> Tensor:
    return run_mixture(supernet, images(), arch, {name: Gate.all(weights) for name, weights in gates.items()})


def test_gates_on_two_choices_of_a_block_mix_all_pairs_of_options() -> None:
    space = toy_classifier_space(blocks=2)
    supernet = shaken(space)
    kernel, depth = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.6, 0.4])
    mixture = torch.zeros(4, 4, 6, 6)
    for weight, k in zip(kernel, (1, 3, 5), strict=True):
        arch = arch_of(space, resolution=12, depth=2, block2_kernel=k)
        network = extract(supernet, arch)  # in training mode: statistics of the batch, as in the supernet
        before = network.block1(network.stem(images()))
        mixture = mixture + weight * (depth[0] * before + depth[1] * network.block2(before))
    expected = network.head(mixture)
    gates = {"block2.kernel": kernel, "depth": depth}
    torch.testing.assert_close(mixed(supernet, arch, gates), expected, rtol=1e-4, atol=1e-5)


def test_where_a_gated_choice_leaves_the_block_out_its_input_stands_for_it() -> None:
    space = toy_classifier_space(blocks=2)
    supernet = shaken(space)
    deep = arch_of(space, resolution=12, depth=2)
    network = extract(supernet, deep)
    before = network.block1(network.stem(images()))
    expected = network.head(0.25 * before + 0.75 * network.block2(before))
    gates = {"depth": torch.tensor([0.25, 0.75])}
    torch.testing.assert_close(mixed(supernet, deep, gates), expected, rtol=1e-4, atol=1e-5)


def test_options_of_which_a_block_runs_the_same_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    space = toy_classifier_space(blocks=2)
    supernet = shaken(space)
    kernel, depth = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.6, 0.4])
    before = torch.zeros(4, 4, 6, 6)
    for weight, k in zip(kernel, (1, 3, 5), strict=True):
        network = extract(supernet, arch_of(space, resolution=12, depth=2, block1_kernel=k))
        before = before + weight * network.block1(network.stem(images()))
    expected = network.head(depth[0] * before + depth[1] * network.block2(before))
    bound: list[str] = []
    original = supernet.bind
    monkeypatch.setattr(supernet, "bind", lambda name, ops: (bound.append(name), original(name, ops))[1])
    deepest = arch_of(space, resolution=12, depth=2)
    gates = {"block1.kernel": Gate.all(kernel), "depth": Gate.all(depth)}
    found = run_mixture(supernet, images(), deepest, gates)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # Of three kernels and two depths: block 1 is there at both depths, block 2 is left out at the first.
    assert (bound.count("block1"), bound.count("block2")) == (3, 2)


def test_the_gradient_of_gates_is_that_of_finite_differences() -> None:
    space = toy_classifier_space(blocks=1)
    supernet = shaken(space).double()
    arch = arch_of(space, resolution=12, depth=1)
    gate = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64, requires_grad=True)

    def loss(gate: Tensor) -> Tensor:
        return (
            run_mixture(supernet, images().double(), arch, {"block1.kernel": Gate.all(gate)}).square().sum()
        )

    loss(gate).backward()
    assert gate.grad is not None
    step = 1e-5
    for code in range(3):
        nudge = torch.zeros(3, dtype=torch.float64)
        nudge[code] = step
        slope = (loss(gate.detach() + nudge) - loss(gate.detach() - nudge)) / (2 * step)
        assert gate.grad[code].item() == pytest.approx(slope.item(), rel=1e-4)
        assert gate.grad[code] != 0


def test_a_gate_that_names_no_choice_is_refused() -> None:
    space = toy_classifier_space()
    with pytest.raises(SpaceError, match=r"gates name 'block9\.kernel', which is no choice or edge of space"):
        mixed(space.supernet(), arch_of(space, depth=1), {"block9.kernel": torch.ones(3)})


def test_a_gate_of_the_wrong_length_is_refused() -> None:
    space = toy_classifier_space()
    with pytest.raises(
        SpaceError, match=r"the gate of 'block1\.kernel' has weights of shape \(2,\), not \(3,\)"
    ):
        run_mixture(
            space.supernet(),
            images(),
            arch_of(space, depth=1),
            {"block1.kernel": Gate((0, 1, 2), torch.ones(2))},
        )


def test_resolution_cannot_be_gated() -> None:
    space = toy_classifier_space()
    gates = {"resolution": torch.tensor([0.5, 0.5])}
    with pytest.raises(SpaceError, match=r"'stem' takes \(3, 8, 8\).*got \(3, 12, 12\).*cannot be gated"):
        mixed(space.supernet(), arch_of(space, resolution=12, depth=1), gates)


@pytest.mark.parametrize("codes", [(), (2, 1), (1, 1), (0, 3)])
def test_a_gate_of_options_that_are_not_there_is_refused(codes: tuple[int, ...]) -> None:
    space = toy_classifier_space()
    gates = {"block1.kernel": Gate(codes, torch.ones(len(codes)))}
    with pytest.raises(SpaceError, match=r"names options .*, which are not of 0\.\.2"):
        run_mixture(space.supernet(), images(), arch_of(space, depth=1), gates)


# Cells ---------------------------------------------------------------------------------------------------


def test_an_edge_of_a_cell_is_the_weighted_sum_of_its_operations() -> None:
    space = nas_bench_201(channels=4, cells=1, resolution=8)
    supernet = shaken(space)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    # All edges but the last one skip or are none: node 3 is that edge of what node 2 is, the input.
    settings = dict.fromkeys(CHOICES, "none") | {"edge_0_2": "skip_connect"}
    weights = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25])
    parts = []
    for option in space.choices[5].options:
        # One cell mixed at a time: the head is linear in nothing else, so compare where the cell ends.
        arch = space.architecture({**settings, "edge_2_3": option})
        network = extract(supernet, arch)
        parts.append(network[1](network[0](x)))
    expected = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    arch = space.architecture({**settings, "edge_2_3": "skip_connect"})
    seen: list[Tensor] = []
    cell = type(space.operations(space.encode([arch]))[1][1][0])
    original = cell.mixture

    def spy(self: object, *arguments: object) -> Tensor:
        seen.append(original(self, *arguments))  # type: ignore[arg-type]
        return seen[-1]

    cell.mixture = spy  # type: ignore[method-assign]
    try:
        run_mixture(supernet, x, arch, {"edge_2_3": Gate.all(weights)})
        run_mixture(supernet, x, arch, {"edge_2_3": Gate((1, 3), weights[[1, 3]], torch.tensor(2.0))})
    finally:
        cell.mixture = original  # type: ignore[method-assign]
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(seen[3], 2 * (weights[1] * parts[1] + weights[3] * parts[3]))


def test_partial_channels_pass_the_others_on_and_shuffle_in_groups() -> None:
    x = torch.arange(8.0).view(1, 8, 1, 1)
    mixed = through_part(lambda part: 10 + part, x, 4)
    # Two channels are run; then channel c of group g stands at c * 4 + g, for groups of two.
    assert mixed.flatten().tolist() == [10, 2, 4, 6, 11, 3, 5, 7]
    assert through_part(lambda part: 10 + part, x, 1).flatten().tolist() == list(range(10, 18))
    big = torch.randn(2, 4, 6, 6)
    halved = through_part(lambda part: part[..., ::2, ::2], big, 2, stride=2)
    torch.testing.assert_close(halved[:, 1], torch.nn.functional.max_pool2d(big[:, 2:3], 2)[:, 0])
    with pytest.raises(SpaceError, match="one in 3 channels needs a multiple of 3 channels, got 8"):
        through_part(lambda part: part, x, 3)


def test_cells_on_a_part_of_the_channels_use_the_leading_weights() -> None:
    space = nas_bench_201(channels=8, cells=1, resolution=8)
    supernet = space.supernet()
    (arch,) = space.decode(space.largest())
    gates = {name: Gate.all(torch.full((5,), 0.2)) for name in CHOICES}
    x = torch.randn(3, 3, 8, 8)
    for affine in (True, False):
        run_mixture(supernet, x, arch, gates, affine=affine, channels=4).sum().backward()
        gradient = (
            supernet.layers["stage1_cell1"]["0_cell"]
            .module.get_parameter("edge_0_1.nor_conv_3x3.conv.weight")
            .grad
        )
        assert gradient is not None
        assert bool(gradient[:2, :2].any())
        assert not bool(gradient[2:].any() or gradient[:, 2:].any())
        norm = supernet.layers["stage1_cell1"]["0_cell"].module.get_parameter("edge_0_1.nor_conv_3x3.bn.bias")
        assert (norm.grad is not None) == affine
        supernet.zero_grad(set_to_none=True)


@pytest.mark.parametrize("chain", [False, True])
def test_binary_gates_keep_one_path_and_have_the_gradients_of_others(chain: bool) -> None:
    space = toy_classifier_space(blocks=2) if chain else nas_bench_201(channels=4, cells=1, resolution=8)
    supernet = shaken(space).double()
    (arch,) = space.decode(space.largest())
    names = [name for name in (c.name for c in space.choices) if name not in ("resolution", "depth")]
    side = 12 if chain else 8
    x = torch.randn(3, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = torch.randn(3, 10 if not chain else 3, dtype=torch.float64)

    def gradients(first: float) -> tuple[float, list[Tensor], int]:
        weights = {n: torch.tensor([first, 1 - first], dtype=torch.float64).requires_grad_() for n in names}
        counts = {c.name: len(c.options) for c in space.choices}
        gates = {n: Gate((0, counts[n] - 1), weights[n].flip(0)) for n in names}
        kept: set[int] = set()

        def pack(tensor: Tensor) -> Tensor:
            kept.add(tensor.untyped_storage().data_ptr())
            return tensor

        supernet.zero_grad(set_to_none=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = run_mixture(supernet, x, arch, gates)
            loss = ((outputs - target[:, : outputs.shape[1]]) ** 2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        of_weights = [p.grad for p in supernet.parameters() if p.grad is not None]
        found = [weights[n].grad for n in names]
        return float(loss.detach()), [g for g in [*found, *of_weights] if g is not None], len(kept)

    loss, binary, kept = gradients(1.0)
    other, nearly, all_kept = gradients(1.0 - 1e-9)
    assert loss == pytest.approx(other, rel=1e-6)
    assert kept < all_kept
    for one, two in zip(binary[: len(names)], nearly[: len(names)], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
