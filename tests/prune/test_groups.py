"""Which channels hang together: by hand, against a second implementation, and what is said of the others."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from prune.zoo import ZOO, Flatten, model, run, seeded, source
from torch import Tensor, nn

from autocompress.errors import ConversionError
from autocompress.models.mobilenet_v2 import mobilenet_v2, mobilenet_v2_cifar
from autocompress.models.resnet import resnet18, resnet50
from autocompress.models.resnet_cifar import resnet20, resnet56
from autocompress.models.vgg import vgg16_bn, vgg16_bn_cifar
from autocompress.prune.group import Kept
from autocompress.prune.source import Source

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

OUTPUT = "it is an output of the model"

GROUPS: dict[str, dict[str, int]] = {
    "dense": {"stem": 6, "layers.0": 4, "layers.1": 4, "layers.2": 4, "transition.2": 8},
    "inception": {"stem.0": 8, "one.0": 4, "two.0": 6, "two.2": 10, "three.1.0": 2, "after.0": 6},
    # Halves and thirds are equal: 12 channels are 6 units of two, and 4 of three.
    "chunks": {"stem.0": 6, "inner.0": 6, "last.0": 10, "split.0": 4},
    "depthwise": {"stem.0": 6, "point.0": 8},
    # 12 channels in 3 groups are 4 units; of the 18 that come out, two groups of 9 are read, which leaves 3.
    "grouped": {"reduce.0": 4, "grouped.0": 3, "again.0": 6, "expand.0": 8},
    "squeezeexcite": {"one.0 up": 8, "down": 4, "two.0 expand": 10, "reduce": 6},
    "shared": {"stem.0 shared.0 first": 8},
    "scales": {"stem body": 8},
    "preactivation": {"stem": 8, "conv1": 12, "conv2 shortcut": 16},
    "flatten": {"p": 6, "q": 6, "hidden": 10},
    "geometry": {"dilated.0": 6, "same": 7, "valid": 6, "mirror": 8, "even": 6},
    # Two rows of six are shuffled, three of four by the module.
    "shuffle": {"stem.0 branch.0": 6, "mix.0": 4},
    # A depthwise convolution makes 12 of 6, which two groups read: 3 units of two of the 6. Four channels
    # become one map of twice the size.
    "growing": {"stem.0": 8, "up": 3, "grouped": 4, "point": 6, "last": 6},
    "gates": {"stem.0": 6, "one two": 8},
    "tokens": {"patches down": 8, "up": 12},
    "decoder": {"encode": 10, "decode": 6, "after.0": 8},
    "padded": {"stem.0 body.1": 6, "body.0.0": 8},
    "own": {"one": 8, "two": 6},
    "norms": {"stem.0": 8, "middle.0": 10, "hidden": 10},
    "constants": {"free.0": 8, "hidden": 12},
    "slices": {"one two": 8},
    "attention": {"stem.0": 8, "after.0": 10},
    "computed": {"last.0": 8},
    "twins": {"stem.0.0": 10},
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_groups_are_those_that_one_finds_by_hand(name: str) -> None:
    assert {" ".join(group.layers): len(group) for group in source(name).groups} == GROUPS[name]


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_layer_is_in_one_group_or_has_one_entry_that_says_why_not(name: str) -> None:
    found = source(name)
    grouped = [layer for group in found.groups for layer in group.layers]
    assert len(grouped) == len(set(grouped))
    entries = [kept.layer for kept in found.kept]
    assert len(entries) == len(set(entries))
    made = {
        key
        for key, module in found.model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and not depthwise(module)
    }
    assert made - {"second"} <= {*grouped, *entries} <= made | {"one", "two"}
    for kept in found.kept:
        assert kept.reason
        # A layer is in both if only some of its channels stay.
        assert (kept.layer in grouped) == (name == "padded" and kept.layer == "body.1")


def depthwise(module: nn.Module) -> bool:
    return getattr(module, "groups", 1) > 1 and module.groups == module.in_channels


# Small networks whose account is stated in full --------------------------------------------------------


def entries(found: Source) -> dict[str, tuple[int, str]]:
    return {kept.layer: (kept.channels, kept.reason) for kept in found.kept}


NOT_FOLLOWED = "is an operation that pruning does not follow"

KEPT: dict[str, dict[str, tuple[int, str]]] = {
    "padded": {
        "body.1": (4, "add in the model's forward() combines its channels with the image"),
        "head.fc": (5, OUTPUT),
    },
    "gates": {
        "mask": (1, "mul in the model's forward() uses it for several channels"),
        "head": (5, OUTPUT),
    },
    "tokens": {
        "mix": (6, "it makes positions of a map, not channels"),
        "back": (16, "it makes positions of a map, not channels"),
        "head": (5, OUTPUT),
    },
    "norms": {
        "grouped": (8, "group norm in group computes its statistics over several channels together"),
        "layered": (6, "layer norm in layer computes its statistics over several channels together"),
        "head": (5, OUTPUT),
    },
    "constants": {
        "bound.0": (6, "without some channels of bound.0 the model does not run: shape '[-1, 96]' is"),
        "head": (5, OUTPUT),
    },
    "slices": {
        "stem.0": (8, "without some channels of stem.0 the model does not run"),
        "head.fc": (5, OUTPUT),
    },
    "attention": {
        **dict.fromkeys(("query", "key", "value"), (6, f"matmul in the model's forward() {NOT_FOLLOWED}")),
        "head.fc": (5, OUTPUT),
    },
    "computed": {
        "stem.0": (8, "the weights of normed are computed, not stored"),
        "normed": (6, "the weights of normed are computed, not stored"),
        "head.fc": (5, OUTPUT),
    },
    "twins": {
        "stem.1.0": (6, f"conv1d in along {NOT_FOLLOWED}"),
        "along": (8, f"conv1d in along {NOT_FOLLOWED}"),
        "head": (5, OUTPUT),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_has_to_stay_is_reported_with_the_reason(name: str) -> None:
    found = entries(source(name))
    assert list(found) == list(KEPT[name])
    for layer, (channels, reason) in KEPT[name].items():
        assert found[layer][0] == channels
        assert found[layer][1].startswith(reason)


class Chain(nn.Module):
    """Three convolutions, and what a test does between the second and the third."""

    def __init__(self, between: Callable[[Tensor], Tensor], channels: int = 6, after: int = 6) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, channels, 3, padding=1)
        self.three, self.head = nn.Conv2d(after, 4, 1), nn.Linear(4, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.three(self.between(self.two(F.relu(self.one(x))))).mean((2, 3)))


def chain(between: Callable[[Tensor], Tensor], channels: int = 6, after: int = 6) -> Source:
    return Source(seeded(lambda: Chain(between, channels, after)), torch.zeros(1, 3, 8, 8))


STAYS: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (lambda x: x.softmax(1), "softmax"),
    (lambda x: x - x.mean(1, keepdim=True), "mean"),
    (lambda x: F.local_response_norm(x, 2), "unsqueeze|avg_pool|pad"),
    (lambda x: F.normalize(x, dim=1), "linalg_vector_norm"),
    (lambda x: x.cumsum(1), "cumsum"),
    (lambda x: torch.einsum("nchw,ndhw->nchw", x, x), "einsum"),
    (lambda x: F.conv2d(x, torch.ones(6, 6, 1, 1)), "computed"),
    (lambda x: x + torch.arange(6.0).view(6, 1, 1), "add"),
    (lambda x: x.roll(1, dims=1), "differs"),
    (lambda x: x.flip(1)[:, [0, 2, 1, 3, 4, 5]], "index"),
    (lambda x: torch.cat([x[:, :3], x[:, 3:].exp()], 1), "does not run|differs"),
    (lambda x: x.permute(0, 2, 1, 3).reshape(x.shape), "all together"),
    (lambda x: F.max_pool2d(x.permute(0, 2, 3, 1), (1, 3), 1, (0, 1)).permute(0, 3, 1, 2), "max_pool2d"),
]


@pytest.mark.parametrize(("between", "text"), STAYS, ids=[text for _, text in STAYS])
def test_what_mixes_channels_keeps_those_before_it_and_no_others(
    between: Callable[[Tensor], Tensor], text: str
) -> None:
    found = chain(between)
    assert [group.name for group in found.groups] == ["one", "three"]
    kept = found.kept[0]
    assert kept.layer == "two"
    # Convolutions that are in forward() have their own names in the graph.
    assert {entry.layer.partition("_")[0] for entry in found.kept} <= {"two", "head", "conv2d"}
    assert kept.channels == 6
    assert np.any([part in kept.reason for part in text.split("|")]), kept.reason


FREE: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(3, 1),
    "permuted": lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2),
    "flattened": lambda x: x.flatten(2).softmax(-1).view(*x.shape),
    "tokens": lambda x: x.flatten(2).mT.unsqueeze(1).squeeze(1).mT.unflatten(2, (8, 8)),
    "pooled": lambda x: F.adaptive_max_pool2d(F.avg_pool2d(F.pad(x, (1, 0, 2, 1)), 3), 2),
    "indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "resized": lambda x: F.interpolate(x, size=(5, 6), mode="bicubic", align_corners=True),
    "normed": lambda x: (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True) + 1).sqrt(),
    "largest": lambda x: x / x.flatten(2).max(-1).values[..., None, None].clamp(min=1),
    "typed": lambda x: x.to(torch.float64).to(x.dtype).type_as(x),
    "chosen": lambda x: torch.where(x > 0, x, 0.1 * x).clamp(-3, 3),
    "stacked": lambda x: torch.stack([x, x.relu()]).sum(0),
    "unbound": lambda x: torch.stack(x.unbind(2), 2),
    "split": lambda x: torch.cat(x.split(4, dim=3), dim=2),
    "rolled": lambda x: x.roll((1, 2), (2, 3)).flip(3),
    "in place": lambda x: x.mul_(2).add_(1).relu_(),
    "scalar": lambda x: x * x.mean((2, 3), keepdim=True).pow(2) + 3,
    "cropped": lambda x: x[..., 1:-1, ::2],
    "written": lambda x: (1.0 - x).square() / 2,
}


@pytest.mark.parametrize("name", FREE)
def test_what_looks_at_each_channel_alone_is_followed(name: str) -> None:
    found = chain(FREE[name])
    assert {group.name: len(group) for group in found.groups} == {"one": 8, "two": 6, "three": 4}
    batch = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(run(found.narrowed((3, 4, 2)), batch), run(found.masked((3, 4, 2)), batch))


def test_repeated_channels_are_one_unit_each() -> None:
    found = chain(lambda x: x.repeat(1, 2, 1, 1), after=12)
    assert len(found.groups[1]) == 6
    assert found.narrowed((8, 2, 4)).three.in_channels == 4


# Against Torch-Pruning -----------------------------------------------------------------------------------


def theirs(network: nn.Module, image: Tensor) -> set[frozenset[str]]:
    """The partition of layers by Torch-Pruning 1.6.1 (Fang et al., "DepGraph", CVPR 2023)."""
    pruning = pytest.importorskip("torch_pruning")
    graph = pruning.DependencyGraph().build_dependency(
        network,
        example_inputs=image,
        forward_fn=None,
        output_transform=None,
        unwrapped_parameters=None,
        customized_pruners=None,
        ignored_layers=None,
        ignored_params=None,
        verbose=False,
    )
    names = {module: name for name, module in network.named_modules()}
    makers = (pruning.prune_conv_out_channels, pruning.prune_linear_out_channels)
    return {
        frozenset(names[dependency.target.module] for dependency, _ in group if dependency.handler in makers)
        for group in graph.get_all_groups(ignored_layers=[], root_module_types=(nn.Conv2d, nn.Linear))
    }


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (lambda: resnet20(width=4), 16),
    "resnet56": (lambda: resnet56(width=4), 16),
    "resnet18": (resnet18, 32),
    "resnet50": (resnet50, 32),
    "vgg16_bn_cifar": (lambda: vgg16_bn_cifar(width=8), 32),
    "mobilenet_v2_cifar": (lambda: mobilenet_v2_cifar(width=0.25), 32),
}


def check_partition(network: nn.Module, side: int) -> None:
    image = torch.zeros(1, 3, side, side)
    ours = {frozenset(group.layers) for group in Source(network, image).groups}
    (last,) = theirs(network.eval(), image) - ours
    assert ours < theirs(network.eval(), image)
    # They leave it to the user to name the layer whose outputs are the model's.
    assert len(last) == 1


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_partitioned_as_torch_pruning_does(name: str) -> None:
    make, side = MODELS[name]
    check_partition(make(), side)


@pytest.mark.slow
@pytest.mark.parametrize("make", [resnet18, resnet50, vgg16_bn, mobilenet_v2])
def test_layers_of_full_models_are_partitioned_as_torch_pruning_does(make: Callable[[], nn.Module]) -> None:
    check_partition(make(), 224 if make is vgg16_bn else 64)


def test_a_flattened_concatenation_keeps_its_offsets() -> None:
    """Torch-Pruning 1.6.1 loses them: to prune channel 1 of q it prunes p too, and inputs 16 to 31."""
    pruning = pytest.importorskip("torch_pruning")
    found = source("flatten")
    assert [group.name for group in found.groups] == ["p", "q", "hidden"]
    gone = found.ranked({"p": np.zeros(6), "q": np.array([1, 0, 1, 1, 1, 1.0]), "hidden": np.zeros(10)})
    narrow = gone.narrowed((6, 5, 10))
    # Of 12 channels with 4 x 4 pixels each, channel 1 of q is number 7.
    inputs = [place for place in range(192) if not 7 * 16 <= place < 8 * 16]
    assert torch.equal(narrow.p.weight, found.model.p.weight)
    assert torch.equal(narrow.q.weight, found.model.q.weight[[0, 2, 3, 4, 5]])
    assert torch.equal(narrow.hidden.weight, found.model.hidden.weight[:, inputs])

    network = seeded(Flatten).eval()
    graph = pruning.DependencyGraph().build_dependency(network, torch.zeros(1, 3, 8, 8), verbose=False)
    group = graph.get_pruning_group(network.q, pruning.prune_conv_out_channels, idxs=[1])
    pruned = {
        dependency.target.module: idxs
        for dependency, idxs in group
        if isinstance(dependency.target.module, nn.Conv2d | nn.Linear)
    }
    assert network.p in pruned
    assert pruned[network.hidden] == list(range(16, 32))


# Ignored layers ------------------------------------------------------------------------------------------


def ignoring(*patterns: str) -> Source:
    return Source(model("resnet"), torch.zeros(1, 3, 8, 8), ignore=patterns)


def test_ignored_layers_keep_their_channels_and_so_do_those_tied_to_them() -> None:
    found = ignoring("layer1.0.conv2", "layer3")
    assert [group.name for group in found.groups] == ["layer1.0.conv1", "layer2.0.conv1", "layer2.0.conv2"]
    own, tied = "it is on the list of those to ignore", "layer1.0.conv2, tied to it, is on the list"
    said = entries(found)
    assert {layer: reason for layer, (_, reason) in said.items() if reason == own} == dict.fromkeys(
        ("layer1.0.conv2", "layer3.0.conv1", "layer3.0.conv2"), own
    )
    assert said["conv1"][1].startswith(tied)
    assert said["layer3.0.shortcut.0"][1].startswith("layer3.0.conv2, tied to it, is on the list")
    assert said["fc"] == (10, OUTPUT)
    assert len(said) == len(found.kept) == 6


def test_patterns_are_those_of_file_names() -> None:
    assert [group.name for group in ignoring("*.conv1").groups] == [
        "conv1",
        "layer2.0.conv2",
        "layer3.0.conv2",
    ]
    assert [g.name for g in ignoring("layer?.0.conv2").groups] == [f"layer{n}.0.conv1" for n in (1, 2, 3)]


def test_a_layer_that_is_ignored_and_has_to_stay_anyway_has_one_entry() -> None:
    found = ignoring("fc", "fc", "*.conv2")
    assert [kept.layer for kept in found.kept].count("fc") == 1
    assert Kept("fc", 10, OUTPUT, "") in found.kept


@pytest.mark.parametrize(
    ("patterns", "text"),
    [
        (["layer1.0.cnv2"], "ignore has 'layer1.0.cnv2', which is no layer .* nearest are layer1.0.conv2"),
        (["layer"], "ignore has 'layer'"),
        ([""], "ignore has ''"),
        (["fc", "bn1"], "ignore has 'bn1'"),
        ("fc", "ignore must be a list of names, got the text 'fc'"),
        (["*"], "no channel of ResNetCifar can be removed: conv1: it is on the list"),
    ],
)
def test_patterns_that_match_nothing_or_everything_are_refused(patterns: Any, text: str) -> None:
    with pytest.raises(ConversionError, match=text):
        Source(model("resnet"), torch.zeros(1, 3, 8, 8), ignore=patterns)
