"""What is refused, and how: each error says what is wrong, the value, the rule and the way out."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from prune import zoo
from prune.zoo import ZOO, Head, Norms, Own, conv, model, params_of, run, seeded
from torch import Tensor, nn

from autocompress.errors import ConversionError
from autocompress.prune.check import check_buffers
from autocompress.prune.source import Source

IMAGE = torch.zeros(1, 3, 8, 8)


class Calls(nn.Module):
    """A convolution, what a test does with it, and a head."""

    def __init__(self, then: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(3, 8), conv(8, 6), Head(6)
        self.then = then

    def forward(self, x: Tensor) -> object:
        return self.then(self.head(self.second(self.first(x))))


def branches(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def listed(x: Tensor) -> Tensor:
    return torch.stack([row * float(row.max()) for row in x])


def autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ x.mT


# What forward() does -------------------------------------------------------------------------------------

RULE = "control flow that depends on values has to be moved out of it"


@pytest.mark.parametrize(
    ("then", "text"),
    [
        (branches, f"Calls cannot be traced with images of shape .1, 3, 8, 8. by torch.export: .*{RULE}"),
        (listed, f"Calls cannot be traced .*{RULE}"),
        (lambda x: x.missing, "Calls cannot be traced .*AttributeError: .*'missing'"),
        (lambda x: x.view(7, 7), r"Calls cannot be traced .*shape '\[7, 7\]' is invalid"),
        (lambda x: (x, x), "Calls must return one tensor, got tuple; wrap it in a module that returns the"),
        (lambda x: {"out": x}, "Calls must return one tensor, got dict"),
        (lambda x: [x], "Calls must return one tensor, got list"),
        (lambda x: 3, "Calls must return one tensor, got int"),
        (lambda x: None, "Calls must return one tensor, got NoneType"),
        (autocast, "under wrap_with_autocast, into which pruning does not look; move autocast"),
        (lambda x: F.dropout(x, 0.5), "gives different outputs for the same images in evaluation"),
        (lambda x: x / 0, "Calls returns nan or infinity for random images"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_followed_are_refused(then: Callable[[Tensor], object], text: str) -> None:
    with pytest.raises(ConversionError, match=text):
        Source(Calls(then), IMAGE)


class Mode(nn.Module):
    """Control flow that training and evaluation decide is that of evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(3, 8), conv(8, 6), Head(6)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.training:
            raise RuntimeError("must be looked at in evaluation mode")
        return self.head(self.second(self.first(x)))


def test_a_model_in_training_mode_is_looked_at_in_evaluation_mode_and_left_in_its_own() -> None:
    own = Mode().train()
    own.second.eval()
    found = Source(own, IMAGE)
    assert [group.name for group in found.groups] == ["first.0", "second.0"]
    assert own.training
    assert not own.second.training
    assert own.calls == 0
    assert not any(module.training for module in found.narrowed(found.least).modules())


# What the model is -----------------------------------------------------------------------------------------


def plain(**settings: object) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, **settings), nn.ReLU(), nn.Conv2d(8, 6, 3), Head(6))  # type: ignore[arg-type]


class Stored(nn.Module):
    """An attribute that is a computed tensor: it cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.body = plain()
        self.scale = torch.ones(1, requires_grad=True) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale


def with_value(value: float) -> nn.Module:
    network = plain()
    with torch.no_grad():
        network[2].weight[1, 2, 0, 0] = value
    return network


TYPES = "both must be of one type, torch.float32 or torch.float64: call model.float"

MODELS: list[tuple[object, Tensor, str]] = [
    (plain().half(), IMAGE.half(), f"0.weight of Sequential is of torch.float16, the .*float16; {TYPES}"),
    (plain().bfloat16(), IMAGE, f"0.weight of Sequential is of torch.bfloat16, .* torch.float32; {TYPES}"),
    (plain().double(), IMAGE, f"0.weight of Sequential is of torch.float64, .*float32; {TYPES}"),
    (nn.Sequential(plain(), nn.Linear(5, 5).double()), IMAGE, "parameter 1.weight .* torch.float64, the"),
    (plain(), IMAGE.long(), "parameter 0.weight .* torch.float32, the image of torch.int64"),
    (plain().to("meta"), IMAGE, "parameter 0.weight of Sequential is on meta, the image on cpu; both must"),
    (nn.Sequential(nn.LazyConv2d(4, 3)), IMAGE, "parameter 0.weight of Sequential has no shape yet: run the"),
    (with_value(float("nan")), IMAGE, "parameter 2.weight of Sequential holds nan or infinity: its training"),
    (with_value(float("-inf")), IMAGE, "parameter 2.weight of Sequential holds nan or infinity"),
    (Stored(), IMAGE, "Stored cannot be copied: RuntimeError: .*tensors that were computed"),
    (lambda x: x, IMAGE, "the model must be a torch.nn.Module, got function"),
    (plain(), [[1.0]], "the image must be a tensor, got list"),
    (plain(), torch.zeros(3, 8, 8), r"images must be \(batch, channels, height, width\).*shape \(3, 8, 8\)"),
    (plain(), torch.zeros(0, 3, 8, 8), r"at least one in the batch, got shape \(0, 3, 8, 8\)"),
    (plain(), torch.zeros(1, 1, 8, 8), r"cannot be traced with images of shape \(1, 1, 8, 8\).*3 channels"),
    (plain(), torch.zeros(1, 3, 2, 2), r"cannot be traced with images of shape \(1, 3, 2, 2\).*images"),
]  # fmt: skip


@pytest.mark.parametrize(("network", "image", "text"), MODELS)
def test_models_and_images_that_do_not_fit_are_refused(network: nn.Module, image: Tensor, text: str) -> None:
    with pytest.raises(ConversionError, match=text):
        Source(network, image)


def test_statistics_of_norms_that_are_not_finite_are_refused() -> None:
    network = nn.Sequential(conv(3, 8), conv(8, 6), Head(6))
    network[0][1].running_var[3] = float("nan")
    with pytest.raises(ConversionError, match=r"buffer 0.1.running_var of Sequential holds nan or infinity"):
        Source(network, IMAGE)


def test_other_buffers_may_be_infinite() -> None:
    """Masks are."""
    network = plain()
    network.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    assert len(Source(network, IMAGE).groups) == 2


def test_the_weights_of_a_large_model_may_have_a_sum_that_is_not_finite() -> None:
    network = plain()
    with torch.no_grad():
        network[2].weight.fill_(3e38)
    assert len(Source(network, IMAGE).groups) == 2


def test_double_models_are_narrowed() -> None:
    found = Source(seeded(ZOO["chunks"][0]).double(), IMAGE.double())
    batch = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(
        run(found.narrowed((2, 3, 4, 1)), batch), run(found.masked((2, 3, 4, 1)), batch)
    )


def test_integer_parameters_do_not_stand_in_the_way() -> None:
    network = plain()
    network.register_parameter("steps", nn.Parameter(torch.arange(3), requires_grad=False))
    assert torch.equal(Source(network, IMAGE).narrowed((2, 2)).steps, torch.arange(3))


def test_a_batch_of_several_images_is_the_same() -> None:
    found = Source(model("shuffle"), torch.zeros(3, 3, 8, 8))
    assert [len(group) for group in found.groups] == [6, 4]
    assert [priced.op for priced in found.trace.priced] == [
        priced.op for priced in Source(model("shuffle"), IMAGE).trace.priced
    ]


# Nothing to remove -----------------------------------------------------------------------------------------

NOTHING: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: nn.Conv2d(3, 8, 3), "no channel of Conv2d can be removed: weight: it is an output"),
    (lambda: nn.Sequential(nn.Conv2d(3, 1, 3), Head(1)), "0: it makes a single channel; 1.fc: it is"),
    (nn.Identity, "no channel of Identity can be removed: it has no layers"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), "Sequential can be removed: 1: it is an output"),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), Head(4)), "0: group norm in 1"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "text"), NOTHING, ids=[text for _, text in NOTHING])
def test_a_model_of_which_nothing_can_be_removed_is_refused(make: Callable[[], nn.Module], text: str) -> None:
    with pytest.raises(ConversionError, match=text):
        Source(make(), IMAGE)


def test_layers_of_one_channel_are_reported_and_the_others_are_narrowed() -> None:
    found = Source(nn.Sequential(nn.Conv2d(3, 1, 3), nn.Conv2d(1, 6, 3), Head(6)), IMAGE)
    assert [group.name for group in found.groups] == ["1"]
    assert [(kept.layer, kept.reason) for kept in found.kept] == [
        ("0", "it makes a single channel"),
        ("2.fc", "it is an output of the model"),
    ]


# Trials ----------------------------------------------------------------------------------------------------


class Hidden(nn.Module):
    """A branch of weight zero, in which the first channels and the last go other ways, at a width of two."""

    def __init__(self, part: Callable[[Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Conv2d(3, channels, 1), nn.Conv2d(1, 4, 1), nn.Linear(4, 3)
        self.rest = nn.Conv2d(channels, 4, 1)
        self.gate = nn.Parameter(torch.zeros(1))
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head((self.rest(x) + self.gate * self.inner(self.part(x))).mean((2, 3)))


@pytest.mark.parametrize("channels", [2, 3, 5])
@pytest.mark.parametrize(
    "part", [lambda x: x[:, :1], lambda x: x[:, -1:], lambda x: x[:, 1:2], lambda x: x[:, [0]].flip(1)]
)
def test_slices_of_channels_are_refused_whatever_their_widths(
    part: Callable[[Tensor], Tensor], channels: int
) -> None:
    found = Source(Hidden(part, channels), IMAGE)
    assert [list(group.layers) for group in found.groups] == [["rest", "inner"]]
    assert found.kept[0].layer == "first"


class Permuted(nn.Module):
    """A view with numbers that runs at any width, and computes something else, behind a gate of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), Head(4)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        turned = x.roll(3, 1)
        return self.head(self.second(x + self.gate * turned.sigmoid()))


def test_what_computes_something_else_behind_a_zero_is_found() -> None:
    """Trained zeros hide it: the trial is on random weights."""
    found = Source(Permuted(), IMAGE)
    assert [group.name for group in found.groups] == ["second"]
    assert found.kept[0].reason.startswith("its channels can only be removed all together") or (
        "differs by" in found.kept[0].reason
    )


def test_weights_that_must_stay_small_are_tried_as_they_are() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), Head(4)
            self.power = nn.Parameter(torch.tensor(1e-3))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second((1e3 * self.power * self.first(x).abs()).exp().exp().log()))

    assert [group.name for group in Source(Steep(), IMAGE).groups] == ["first", "second"]


class Many(nn.Module):
    """Ten layers, of which the view after some has numbers."""

    def __init__(self, bound: set[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if n == 0 else 4, 4, 1) for n in range(10))
        self.head = Head(4)
        self.bound = bound

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x)
            x = x.view(1, 4, 8, 8) if number in self.bound else F.relu(x)
        return self.head(x)


@pytest.mark.parametrize("bound", [set(), {0}, {9}, {2, 3, 7}, {0, 1, 2, 3, 4, 5, 6, 8, 9}])
def test_exactly_the_groups_that_fail_are_found(bound: set[int]) -> None:
    found = Source(Many(bound), IMAGE)
    assert {group.name for group in found.groups} == {f"layers.{n}" for n in range(10) if n not in bound}
    advice = "write sizes in views and slices of forward() as x.shape, not as numbers"
    assert {kept.layer for kept in found.kept if kept.advice == advice} == {f"layers.{n}" for n in bound}


class Auxiliary(nn.Module):
    """A second head that only training uses, as in GoogLeNet; of a width of its own or of the network's."""

    def __init__(self, bound: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(3, 8), conv(8, 6), Head(6)
        self.aux = Head(8 if bound else 3)
        self.bound = bound

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out = self.head(self.second(y))
        return out + self.aux(y if self.bound else x) if self.training else out


def test_what_only_training_reads_stays() -> None:
    own = Auxiliary(bound=True)
    state = torch.get_rng_state()
    found = Source(own, IMAGE)
    assert torch.equal(torch.get_rng_state(), state)
    assert [group.name for group in found.groups] == ["second.0"]
    (kept, _) = found.kept
    assert kept.layer == "first.0"
    assert kept.reason.startswith("without some channels of first.0 the model does not run in training mode")
    assert kept.advice == "remove the layers that only training uses, such as that of aux.fc.weight"
    narrow = found.narrowed((3,)).train()
    assert narrow(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    assert params_of(narrow) == sum(op.params for op in found.operations((3,)))


def test_what_only_training_runs_is_left_alone_where_it_reads_nothing_that_is_removed() -> None:
    found = Source(Auxiliary(bound=False), IMAGE)
    assert [group.name for group in found.groups] == ["first.0", "second.0"]


# Buffers that widths cannot share --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (Own, "buffer mean of Own cannot be shared by networks of different widths; compute it in forward"),
        (lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, affine=False)), "1 is a BatchNorm2d with aff"),
        (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), "InstanceNorm2d is a Inst"),
        (lambda: nn.Sequential(nn.Sequential(Own())), "buffer 0.0.mean of Sequential cannot be shared"),
    ],
)  # fmt: skip
def test_buffers_that_networks_of_different_widths_cannot_share_are_named(
    make: Callable[[], nn.Module], text: str
) -> None:
    with pytest.raises(ConversionError, match=text):
        check_buffers(make())


def test_batch_norm_with_or_without_statistics_can_be_shared() -> None:
    check_buffers(nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm1d(4)))
    check_buffers(Norms())


def test_what_is_tied_by_shortcuts_can_be_left_alone() -> None:
    whole = zoo.source("resnet")
    free = whole.untied()
    tied = {layer for group in whole.groups if len(group.layers) > 1 for layer in group.layers}
    assert tied
    assert [g.name for g in free.groups] == [g.name for g in whole.groups if len(g.layers) == 1]
    reasons = {kept.layer: kept.reason for kept in free.kept}
    assert all("ties it to other layers, and tied ones are left alone" in reasons[layer] for layer in tied)
    assert len(whole.groups) > len(free.groups)
    narrow = free.narrowed(tuple(max(least, 2) for least in free.least))
    assert run(narrow, zoo.images("resnet")).shape == run(whole.model, zoo.images("resnet")).shape


def test_depthwise_convolutions_do_not_tie() -> None:
    whole = zoo.source("mobilenet")
    assert {g.name for g in whole.untied().groups} == {g.name for g in whole.groups if len(g.layers) == 1}
    assert len(whole.untied().groups) > len(whole.groups) / 2
