"""From slices to networks, and optimizer steps that leave the rest alone. Bit equality is in the contract."""

import copy

import pytest
import torch
from small_networks import arch_of, images, shaken
from torch import nn

from autocompress.elastic.extract import active_masks, extract, only_active
from autocompress.elastic.layers import memory_format
from autocompress.elastic.recalibrate import recalibrate
from autocompress.elastic.supernet import Supernet
from autocompress.errors import SpaceError
from autocompress.network import build_network
from autocompress.ops import Conv2d, Ops
from autocompress.space import Block, Choice, Option, SearchSpace
from autocompress.testing.toys import toy_classifier_space

SPACE = toy_classifier_space()
SMALL = {"resolution": 8, "depth": 1, "block1_kernel": 1, "block1_expand": 2}


# Extraction -------------------------------------------------------------------------------------------


def test_a_network_consists_of_plain_modules_under_the_names_of_its_operations() -> None:
    supernet, arch = shaken(SPACE), arch_of(SPACE, **SMALL)
    network = extract(supernet, arch)
    expected = build_network(SPACE.operations(SPACE.encode([arch])))
    assert {name: type(module) for name, module in network.named_modules()} == {
        name: type(module) for name, module in expected.named_modules()
    }
    assert {name: tensor.shape for name, tensor in network.state_dict().items()} == {
        name: tensor.shape for name, tensor in expected.state_dict().items()
    }


def test_statistics_become_running_statistics_and_the_network_is_ready_to_run() -> None:
    supernet, arch = shaken(SPACE), arch_of(SPACE, **SMALL)
    statistics = recalibrate(supernet, arch, [images()])
    network = extract(supernet, arch, statistics)
    assert not network.training
    norm = network.block1[1].bn
    torch.testing.assert_close(norm.running_mean, statistics["block1.1_depthwise"][0], rtol=0, atol=0)
    torch.testing.assert_close(norm.running_var, statistics["block1.1_depthwise"][1], rtol=0, atol=0)
    norm.running_mean.zero_()
    assert statistics["block1.1_depthwise"][0].any(), "shared with the statistics"


def test_without_statistics_a_network_is_for_training_and_starts_as_pytorch_does() -> None:
    network = extract(shaken(SPACE), arch_of(SPACE, **SMALL))
    fresh = nn.BatchNorm2d(4)
    assert network.training
    norm = network.stem[0].bn
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(norm, name), getattr(fresh, name))
    network(images(side=8)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert int(norm.num_batches_tracked) == 1


def test_training_the_network_leaves_the_supernet_and_the_other_way_round() -> None:
    supernet, arch = shaken(SPACE), arch_of(SPACE)
    network = extract(supernet, arch)
    mine = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    its = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, mine[name]) for name, tensor in supernet.state_dict().items())
    network.load_state_dict(its)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, its[name]) for name, tensor in network.state_dict().items())


def test_no_random_number_is_drawn() -> None:
    supernet = shaken(SPACE)
    before = torch.get_rng_state()
    extract(supernet, arch_of(SPACE))
    assert torch.equal(torch.get_rng_state(), before)


def test_statistics_of_another_network_are_refused() -> None:
    supernet = shaken(SPACE)
    statistics = recalibrate(supernet, arch_of(SPACE, **SMALL), [images()])
    with pytest.raises(SpaceError, match=r"'block1\.0_conv2d' needs .* of 16 channels, got those of 8"):
        extract(supernet, arch_of(SPACE), statistics)


def _optional_norm(norm: Option) -> Ops:
    plain = norm == "no"
    return (Conv2d(3, 4, 6, 6, bias=plain, norm=not plain), Conv2d(4, 2, 6, 6, bias=True, norm=not plain))


def _both(norm: Option) -> Ops:
    return (Conv2d(3, 4, 6, 6, bias=True, norm=norm == "yes"),)


def test_a_network_without_norm_comes_out_of_a_supernet_with_norm() -> None:
    space = SearchSpace("s", (Choice("norm", ("no", "yes")),), (Block("b", ("norm",), _both),))
    supernet = shaken(space)
    for option in ("no", "yes"):
        arch = space.architecture({"norm": option})
        statistics = recalibrate(supernet, arch, [images(side=6)])
        assert len(statistics) == (option == "yes")
        network = extract(supernet, arch, statistics)
        assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == (option == "yes")
        with torch.no_grad():
            assert torch.equal(network(images(side=6)), supernet(images(side=6), arch, statistics=statistics))


def test_a_block_of_which_no_setting_contains_the_others_makes_no_supernet() -> None:
    space = SearchSpace("s", (Choice("norm", ("no", "yes")),), (Block("b", ("norm",), _optional_norm),))
    with pytest.raises(SpaceError, match=r"b\.0_conv2d: .* is the largest operation but does not contain"):
        Supernet(space)


def test_the_memory_format_is_read_off_the_weights() -> None:
    supernet = shaken(SPACE)
    assert memory_format(supernet.parameters()) == torch.contiguous_format
    supernet.to(memory_format=torch.channels_last)
    assert memory_format(supernet.parameters()) == torch.channels_last
    # 1x1 and depthwise weights are laid out the same either way.
    assert memory_format(nn.Conv2d(4, 4, 1).parameters()) == torch.contiguous_format


# Active -----------------------------------------------------------------------------------------------


def test_what_all_networks_leave_out_has_no_mask_and_what_one_uses_has() -> None:
    supernet = shaken(SPACE)
    small, deep = arch_of(SPACE, **SMALL), arch_of(SPACE, **SMALL | {"depth": 2, "block2_expand": 2})
    assert not any(name.startswith("layers.block2") for name in active_masks(supernet, [small]))
    masks = active_masks(supernet, [small, deep])
    # 8 of 16 middle channels, and 1x1 of 5x5 in the first block, all of the kernel in the second.
    assert masks["layers.block2.0_conv2d.weight"].sum() == 8 * 4
    assert masks["layers.block2.1_depthwise.weight"].sum() == 8 * 25
    assert masks["layers.block2.1_depthwise.norm_weight"].tolist() == [True] * 8 + [False] * 8
    assert "layers.block2.1_depthwise.transforms.3" not in masks


def test_without_transforms_as_many_entries_are_active_as_the_network_has_parameters() -> None:
    supernet = Supernet(SPACE, kernel_transform=False)
    for settings in ({}, SMALL, {"block1_kernel": 3, "block2_expand": 2}):
        arch = arch_of(SPACE, **settings)
        params = sum(op.params for _, ops in SPACE.operations(SPACE.encode([arch])) for op in ops)
        assert sum(int(mask.sum()) for mask in active_masks(supernet, [arch]).values()) == params


def test_the_masks_of_several_networks_are_their_union() -> None:
    supernet = shaken(SPACE)
    archs = [arch_of(SPACE, **some) for some in ({"block1_kernel": 1}, {"block2_kernel": 3, **SMALL}, {})]
    union = active_masks(supernet, archs)
    each = [active_masks(supernet, [arch]) for arch in archs]
    for name, parameter in supernet.named_parameters():
        expected = torch.zeros_like(parameter, dtype=torch.bool)
        for masks in each:
            expected |= masks.get(name, torch.zeros_like(expected))
        assert torch.equal(union.get(name, torch.zeros_like(expected)), expected), name


def optimizers(supernet: Supernet) -> dict[str, torch.optim.Optimizer]:
    return {
        "sgd": torch.optim.SGD(supernet.parameters(), lr=0.1, momentum=0.9, weight_decay=0.3, nesterov=True),
        "adamw": torch.optim.AdamW(supernet.parameters(), lr=0.1, weight_decay=0.3),
    }


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_active_entries_move_as_with_the_plain_optimizer_and_inactive_ones_not_at_all(kind: str) -> None:
    guarded, plain = shaken(SPACE), shaken(SPACE)
    mine, its = optimizers(guarded)[kind], optimizers(plain)[kind]
    largest, small = arch_of(SPACE), arch_of(SPACE, **SMALL)
    for step, arch in enumerate([largest, small, small]):  # momentum everywhere first
        before = {name: p.detach().clone() for name, p in guarded.named_parameters()}
        plain.load_state_dict(guarded.state_dict())
        its.load_state_dict(copy.deepcopy(mine.state_dict()))
        for supernet, optimizer in ((guarded, mine), (plain, its)):
            optimizer.zero_grad(set_to_none=True)
            supernet(images(seed=step), arch).square().mean().backward()
        with only_active(guarded, mine, [arch]):
            mine.step()
        its.step()
        masks = active_masks(guarded, [arch])
        reference = dict(plain.named_parameters())
        moved = 0
        for name, parameter in guarded.named_parameters():
            mask = masks.get(name, torch.zeros_like(parameter, dtype=torch.bool))
            assert torch.equal(parameter[mask], reference[name][mask]), name
            assert torch.equal(parameter[~mask], before[name][~mask]), name
            moved += int((reference[name][~mask] != before[name][~mask]).sum())
        assert moved > 0 or arch is largest, "the plain optimizer moves nothing either"


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_optimizer_s_own_state_of_inactive_entries_stays(kind: str) -> None:
    supernet = shaken(SPACE)
    optimizer = optimizers(supernet)[kind]
    key = "momentum_buffer" if kind == "sgd" else "exp_avg"
    weight = dict(supernet.named_parameters())["layers.block1.0_conv2d.weight"]
    for arch in (arch_of(SPACE), arch_of(SPACE, **SMALL)):
        state = optimizer.state[weight].get(key)
        before = None if state is None else state.clone()
        optimizer.zero_grad(set_to_none=True)
        supernet(images(), arch).square().mean().backward()
        with only_active(supernet, optimizer, [arch]):
            optimizer.step()
    assert before is not None
    after = optimizer.state[weight][key]
    assert torch.equal(after[8:], before[8:])
    assert not torch.equal(after[:8], before[:8])


def test_a_first_step_leaves_no_momentum_where_nothing_was_used() -> None:
    supernet = shaken(SPACE)
    optimizer = optimizers(supernet)["sgd"]
    arch = arch_of(SPACE, **SMALL)
    supernet(images(), arch).square().mean().backward()
    with only_active(supernet, optimizer, [arch]):
        optimizer.step()
    weight = dict(supernet.named_parameters())["layers.block1.0_conv2d.weight"]
    assert not optimizer.state[weight]["momentum_buffer"][8:].any()
    assert optimizer.state[weight]["momentum_buffer"][:8].any()
