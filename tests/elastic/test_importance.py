"""Width sorting: a renaming of channels."""

from functools import partial

import pytest
import torch
from small_networks import arch_of, images, shaken
from torch import Tensor

from autocompress.elastic.importance import sort_channels
from autocompress.elastic.layers import ElasticConv2d, ElasticSqueezeExcite
from autocompress.elastic.supernet import Supernet
from autocompress.ops import Conv2d, Ops, SqueezeExcite
from autocompress.space import Block, Choice, Option, SearchSpace
from autocompress.testing.toys import toy_classifier_space

SPACE = toy_classifier_space()


def conv(supernet: Supernet, block: str, place: str) -> ElasticConv2d:
    layer = supernet.layers[block][place]
    assert isinstance(layer, ElasticConv2d)
    return layer


def shuffled(supernet: Supernet, block: str) -> list[int]:
    """Give the channels of a block importances that are known, out of order; return the right order."""
    order = [5, 0, 9, 15, 2, 11, 1, 8, 3, 14, 4, 13, 6, 10, 7, 12]
    with torch.no_grad():
        project = conv(supernet, block, "3_conv2d").weight
        for rank, channel in enumerate(order):
            column = project[:, channel]
            project[:, channel] = column / column.abs().sum() * (20 - rank)
    return order


def test_channels_are_sorted_by_what_the_next_convolution_reads_of_them() -> None:
    supernet = shaken(SPACE)
    order = shuffled(supernet, "block1")
    before = {name: parameter.clone() for name, parameter in supernet.layers["block1"].named_parameters()}
    sort_channels(supernet)
    # Sorted by hand: every tensor that has the channels, along the axis where it has them.
    for name, axis in {
        "0_conv2d.weight": 0,
        "0_conv2d.norm_weight": 0,
        "0_conv2d.norm_bias": 0,
        "1_depthwise.weight": 0,
        "1_depthwise.norm_weight": 0,
        "1_depthwise.norm_bias": 0,
        "2_squeezeexcite.expand_bias": 0,
        "3_conv2d.weight": 1,
    }.items():
        after = dict(supernet.layers["block1"].named_parameters())[name]
        assert torch.equal(after, before[name].index_select(axis, torch.tensor(order))), name
    importance = conv(supernet, "block1", "3_conv2d").weight.abs().sum((0, 2, 3))
    torch.testing.assert_close(importance, torch.arange(20.0, 4, -1))


def test_what_is_not_inside_a_block_stays() -> None:
    supernet = shaken(SPACE)
    before = {name: parameter.clone() for name, parameter in supernet.named_parameters()}
    sort_channels(supernet)
    for name in (
        "layers.stem.0_conv2d.weight",
        "layers.head.1_linear.weight",
        "layers.block1.3_conv2d.norm_weight",
    ):
        assert torch.equal(dict(supernet.named_parameters())[name], before[name])
    for name, parameter in supernet.named_parameters():
        if ".transforms." in name:
            assert torch.equal(parameter, before[name])


def test_the_largest_network_computes_what_it_did() -> None:
    supernet = shaken(SPACE)
    for block in ("block1", "block2"):
        shuffled(supernet, block)
    largest = arch_of(SPACE)
    with torch.no_grad():
        before = supernet(images(), largest)
        narrow = supernet(images(), arch_of(SPACE, block1_expand=2))
        sort_channels(supernet)
        torch.testing.assert_close(supernet(images(), largest), before, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(supernet(images(), arch_of(SPACE, block1_expand=2)), narrow, atol=1e-3)


def test_narrow_networks_hold_the_most_important_channels() -> None:
    supernet = shaken(SPACE)
    kept = shuffled(supernet, "block1")[:8]
    project = conv(supernet, "block1", "3_conv2d")
    expected = project.weight.detach()[:, kept].clone()
    sort_channels(supernet)
    narrow = Conv2d(8, 4, 6, 6)
    assert torch.equal(project.sliced(narrow)["conv.weight"], expected)


def test_hidden_channels_of_squeeze_excite_are_sorted_by_what_is_read_of_them() -> None:
    supernet = shaken(SPACE)
    layer = supernet.layers["block1"]["2_squeezeexcite"]
    assert isinstance(layer, ElasticSqueezeExcite)
    x = images(channels=16, side=6)
    op = SqueezeExcite(16, 6, 6, 4)
    # Without the sorting of channels, which would permute them too.
    with torch.no_grad():
        conv(supernet, "block1", "3_conv2d").weight.copy_(torch.arange(16.0, 0, -1).view(1, 16, 1, 1))
        before = layer(x, op, None)  # type: ignore[arg-type]
        order = layer.expand_weight.abs().sum((0, 2, 3)).argsort(descending=True)
        bias = layer.reduce_bias[order].clone()
        sort_channels(supernet)
        torch.testing.assert_close(layer(x, op, None), before)  # type: ignore[arg-type]
    assert torch.equal(layer.reduce_bias, bias)
    importance = layer.expand_weight.abs().sum((0, 2, 3))
    assert (importance[:-1] >= importance[1:]).all()


def test_sorting_twice_is_sorting_once() -> None:
    supernet = shaken(SPACE)
    sort_channels(supernet)
    once = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    sort_channels(supernet)
    assert all(torch.equal(tensor, once[name]) for name, tensor in supernet.state_dict().items())


def _optional_attention(attention: Option) -> Ops:
    """Positions move with the choice: the last convolution has other weights with and without."""
    ops: Ops = (Conv2d(3, 6, 4, 4), Conv2d(6, 6, 4, 4, 3, groups=6))
    if attention == "yes":
        ops += (SqueezeExcite(6, 4, 4, 2),)
    return (*ops, Conv2d(6, 6, 4, 4))


def _chain(last: int, width: Option) -> Ops:
    return (Conv2d(3, int(width), 4, 4), Conv2d(int(width), 2, 4, 4, last))


def _grouped(option: Option) -> Ops:
    return (Conv2d(4, 8, 4, 4), Conv2d(8, 8, 4, 4, 3, groups=2), Conv2d(8, int(option), 4, 4))


@pytest.mark.parametrize(
    "space",
    [
        SearchSpace("optional", (Choice("a", ("no", "yes")),), (Block("b", ("a",), _optional_attention),)),
        SearchSpace(
            # The last option is not the widest: the largest network has a slice only.
            "last is narrow",
            (Choice("width", (6, 3)),),
            (Block("b", ("width",), partial(_chain, 1)),),
        ),
        SearchSpace("grouped", (Choice("out", (2, 4)),), (Block("b", ("out",), _grouped),)),
    ],
    ids=lambda space: space.name,
)
def test_blocks_of_other_structure_keep_the_function_of_the_largest_network(space: SearchSpace) -> None:
    supernet = shaken(space, scale=0.5)
    (largest,) = space.decode(space.largest())
    first = space.operations(space.largest())[0][1][0].in_shape
    x: Tensor = images(channels=first[0], side=4)
    with torch.no_grad():
        before = supernet(x, largest)
        sort_channels(supernet)
        torch.testing.assert_close(supernet(x, largest), before, rtol=1e-4, atol=1e-5)
