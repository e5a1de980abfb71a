"""The channels of a model as a space: its prices are those of the networks it stands for."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prune.zoo import ZOO, macs_of, params_of, seeded, source
from torch import Tensor, nn

from autocompress.cost import operation_cost
from autocompress.errors import ConversionError, SpaceError
from autocompress.models.mobilenet_v2 import mobilenet_v2, mobilenet_v2_cifar
from autocompress.models.resnet import resnet18, resnet50
from autocompress.models.resnet_cifar import resnet20
from autocompress.models.vgg import vgg16_bn, vgg16_bn_cifar
from autocompress.prune.network import NarrowNetwork, source_of
from autocompress.prune.source import Source
from autocompress.space import SearchSpace
from search_spaces.channels import MAX_SETTINGS, channel_space, channels

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

# The others have buffers that networks of different widths cannot share.
SHARED = sorted(ZOO.keys() - {"own"})


def widths_of(space: SearchSpace, codes: np.ndarray) -> tuple[int, ...]:
    (arch,) = space.decode(codes)
    return tuple(int(option) for _, option in arch.settings)


def check_prices(space: SearchSpace, found: Source, built: int, image: Tensor) -> None:
    """Against the sum over the operations of many networks, and against counts of a few that are built."""
    sampled = space.sample(20, np.random.default_rng(5))
    codes = np.vstack([sampled, space.largest(), space.smallest()])
    macs, params, size = (operation_cost(space, name).of(codes) for name in ("macs", "params", "size_bytes"))
    assert np.array_equal(size, 4 * params)
    for row, one in enumerate(codes):
        ((_, (op,)),) = space.operations(one[None])
        assert (macs[row], params[row]) == (op.macs, op.params)
        if row < built:
            network = found.narrowed(widths_of(space, one[None]))
            assert (macs[row], params[row]) == (macs_of(network, image), params_of(network))


@pytest.mark.parametrize("name", SHARED)
def test_macs_and_parameters_are_those_of_the_narrow_network(name: str) -> None:
    side = ZOO[name][1]
    check_prices(channel_space(source(name)), source(name), 1, torch.zeros(1, 3, side, side))


# Parameters and MACs as published with the weights of torchvision, MACs from the papers.
FULL: dict[str, tuple[Callable[[], nn.Module], int, int, float]] = {
    "resnet18": (resnet18, 224, 11_689_512, 1.81e9),
    "resnet50": (resnet50, 224, 25_557_032, 4.09e9),
    "mobilenet_v2": (mobilenet_v2, 224, 3_504_872, 0.30e9),
    "vgg16_bn": (vgg16_bn, 224, 138_365_992, 15.47e9),
    "resnet20": (lambda: resnet20(in_channels=3), 32, 272_474, 41e6),
    "vgg16_bn_cifar": (vgg16_bn_cifar, 32, 14_724_042, 313e6),
    "mobilenet_v2_cifar": (mobilenet_v2_cifar, 32, 2_236_682, 88e6),
}


def check_full(name: str, samples: int) -> None:
    make, side, params, macs = FULL[name]
    image = torch.zeros(1, 3, side, side)
    found = Source(make(), image)
    space = channel_space(found, steps=8, align=8)
    assert operation_cost(space, "params").of(space.largest()).tolist() == [params]
    assert operation_cost(space, "macs").of(space.largest())[0] == pytest.approx(macs, rel=0.02)
    check_prices(space, found, samples, image)


@pytest.mark.parametrize("name", ["resnet20", "vgg16_bn_cifar"])
def test_full_size_models_have_published_costs(name: str) -> None:
    check_full(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FULL.keys() - {"resnet20", "vgg16_bn_cifar"}))
def test_large_models_have_published_costs(name: str) -> None:
    check_full(name, 6)


# Wide concatenations -----------------------------------------------------------------------------------


class Wide(nn.Module):
    """A concatenation of more branches than can be priced together, read by layers of every kind."""

    def __init__(self, branches: int = 7) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, 10 + n, 1) for n in range(branches))
        total = sum(branch.out_channels for branch in self.branches)
        self.norm = nn.BatchNorm2d(total + 3)
        self.wide = nn.Conv2d(total + 3, 12, 3, padding=1)
        self.own = nn.Conv2d(total + 3, total + 3, 3, padding=1, groups=total + 3)
        self.twice = nn.Conv2d(total + 3, 2 * total + 6, (1, 3), padding=(0, 1), groups=total + 3, bias=False)
        self.scale = nn.Parameter(torch.ones(2 * total + 6, 1, 1))
        self.head, self.other = nn.Linear(total + 3, 4), nn.Linear(2 * total + 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.norm(torch.cat([x, *(branch(x) for branch in self.branches)], 1))
        y = self.scale * torch.relu(self.twice(maps))
        pooled = torch.nn.functional.adaptive_avg_pool2d(self.own(maps), 1).flatten(1)
        return self.head(pooled) + self.other(y.mean((2, 3))) + self.wide(maps).mean()


def test_what_reads_many_groups_is_priced_part_by_part() -> None:
    network = seeded(Wide)
    image = torch.zeros(1, 3, 6, 6)
    found = Source(network, image)
    space = channel_space(found)
    (block,) = space.blocks
    assert all(np.prod([len(space.choices[space.positions[n]].options) for n in part.choices]) <= MAX_SETTINGS
               for part in block.parts)  # fmt: skip
    assert len(block.parts) > len(found.trace.priced)
    check_prices(space, found, 10, image)


# Options -----------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 9))
def test_options_are_shares_of_the_units_rounded_to_multiples(steps: int, align: int) -> None:
    space = channel_space(source("inception"), steps=steps, align=align)
    for choice, group in zip(space.choices, source("inception").groups, strict=True):
        options = [int(option) for option in choice.options]
        assert options == sorted(set(options))
        assert options[-1] == len(group)
        assert len(options) <= steps
        assert all(option % align == 0 for option in options[:-1])
        for option in options[:-1]:
            assert min(abs(option - len(group) * step / steps) for step in range(1, steps)) <= align


def test_ten_steps_are_ten_options_where_there_are_as_many_units() -> None:
    space = channel_space(source("inception"))
    assert dict(zip([c.name for c in space.choices], [c.options for c in space.choices], strict=True)) == {
        "stem.0": tuple(range(1, 9)),
        "one.0": (1, 2, 3, 4),
        "two.0": (1, 2, 3, 4, 5, 6),
        "two.2": tuple(range(1, 11)),
        "three.1.0": (1, 2),
        "after.0": (1, 2, 3, 4, 5, 6),
    }
    assert all(choice.ordinal for choice in space.choices)


def test_as_many_units_stay_as_layers_need() -> None:
    """Two layers of which the channels are side by side in a third: each keeps one."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.sum = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((torch.cat([self.one(x), self.two(x)], 1) + self.sum(x)).mean((2, 3)))

    found = Source(Beside(), torch.zeros(1, 3, 4, 4))
    (group,) = found.groups
    assert (list(group.layers), len(group), found.least) == (["one", "two", "sum"], 8, (2,))
    assert channel_space(found).choices[0].options[0] == 2
    ranked = found.ranked({"one": np.array([0, 1, 2, 3, 10, 11, 12, 13.0])})
    narrow = ranked.narrowed((2,))
    assert torch.equal(narrow.one.weight, found.model.one.weight[[3]])
    assert torch.equal(narrow.two.weight, found.model.two.weight[[3]])
    assert torch.equal(narrow.sum.weight, found.model.sum.weight[[3, 7]])


@pytest.mark.parametrize("name", ["steps", "align"])
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3", None])
def test_steps_and_align_are_integers_of_at_least_one(name: str, value: Any) -> None:
    with pytest.raises(SpaceError, match=f"{name} must be an integer >= 1, got {value!r}"):
        channel_space(source("inception"), **{name: value})


def test_buffers_that_cannot_be_shared_are_refused_before_anything_is_searched() -> None:
    with pytest.raises(ConversionError, match="buffer mean of Own cannot be shared by networks of different"):
        channel_space(source("own"))


def test_a_space_can_be_pickled_with_its_model() -> None:
    space = channel_space(source("resnet"))
    again = pickle.loads(pickle.dumps(space))
    codes = space.sample(3, np.random.default_rng(0))
    assert np.array_equal(operation_cost(again, "macs").of(codes), operation_cost(space, "macs").of(codes))


# From a recipe -----------------------------------------------------------------------------------------


def test_a_space_is_made_of_a_named_model(tmp_path: Path) -> None:
    made = resnet20(classes=7, width=4)
    torch.save({"state_dict": made.state_dict()}, tmp_path / "w.pt")
    space = channels(
        "autocompress.models.resnet_cifar:resnet20",
        image=(1, 8, 8),
        arguments={"width": 4},
        classes=7,
        ignore=["layer3"],
        steps=2,
    )
    assert space.name == "channels"
    assert [choice.name for choice in space.choices][:2] == ["conv1", "layer1.0.conv1"]
    assert not any(choice.name.startswith("layer3") for choice in space.choices)
    given = {"classes": 7, "in_channels": 1, "width": 4}
    assert space.settings["arguments"] == given
    assert source_of(space).origin == {
        "model": "autocompress.models.resnet_cifar:resnet20",
        "arguments": given,
    }
    assert json.loads(json.dumps(space.settings)) == space.settings
    free = channels("autocompress.models.resnet_cifar:resnet20", image=(3, 8, 8), tied=False)
    assert free.settings["tied"] is False
    assert {choice.name for choice in free.choices} == {
        f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1, 2)
    }
    trained = channels(
        "autocompress.models.resnet_cifar:resnet20",
        image=(3, 8, 8),
        arguments={"width": 4, "classes": 7},
        weights=str(tmp_path / "w.pt"),
    )
    assert torch.equal(source_of(trained).model.fc.weight, made.fc.weight)


MODEL = "autocompress.models.resnet_cifar:resnet20"
VGG = "autocompress.models.vgg:vgg16_bn_cifar"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"image": (3, 8)}, SpaceError, r"image must be channels, height and width, .* >= 1, got \(3, 8\)"),
        ({"image": (3, 8, 0)}, SpaceError, "image must be channels"),
        ({"image": (3, 8.0, 8)}, SpaceError, "image must be channels"),
        ({"image": (3, True, 8)}, SpaceError, "image must be channels"),
        ({"image": (3, 1, 1), "arguments": {"width": 4}, "model": VGG}, ConversionError, "cannot be traced"),
        ({"weights": "absent.pt"}, ConversionError, "must be a file, but absent.pt does not"),
        ({"arguments": {"depth": 3}}, ConversionError, "raises TypeError: .*'depth'"),
        ({"model": "autocompress.models.resnet_cifar:resnet21"}, ConversionError, "has no 'resnet21'"),
        ({"ignore": ["nothing"]}, ConversionError, "ignore has 'nothing', which is no layer"),
        ({"ignore": "fc"}, ConversionError, "ignore must be a list of names, got the text 'fc'"),
        ({"steps": 0}, SpaceError, "steps must be an integer >= 1, got 0"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        channels(**{"model": MODEL, "image": (3, 8, 8), **arguments})


def test_the_block_of_a_space_is_the_whole_network() -> None:
    space = channel_space(source("resnet"))
    ((name, (op,)),) = space.operations(space.smallest())
    assert name == "network"
    assert isinstance(op, NarrowNetwork)
    assert op.widths == widths_of(space, space.smallest())
