"""Scores of units: against definitions, other implementations, and laws."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import prune_networks as networks
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from small_networks import assert_equal, weights
from torch import Tensor, nn

from autocompress.errors import ConversionError, DataError
from autocompress.models.resnet_cifar import resnet20
from autocompress.prune.importance import CRITERIA, importance
from autocompress.prune.labels import Labels
from autocompress.prune.layers import entering, structure
from autocompress.prune.source import Source

Numbers = NDArray[np.float64]

OF_WEIGHTS = [name for name, criterion in CRITERIA.items() if not criterion.batches]

MODELS: dict[str, Callable[[], nn.Module]] = {
    "chain": networks.chain,
    "added": lambda: networks.shake(networks.Added()),
    "dense": lambda: networks.shake(networks.Dense()),
    "own": lambda: networks.shake(networks.Own()),
    "grouped": lambda: networks.shake(networks.Grouped()),
    "resnet20": lambda: networks.shake(resnet20(classes=3, width=4)),
}


@functools.cache
def source_with_a_frozen_layer(model: str) -> Source:
    user = MODELS[model]()
    next(user.parameters()).requires_grad_(False)
    return networks.source_of(user)


def scores_of(source: Source, criterion: str, **settings: Any) -> dict[str, Numbers]:
    given: dict[str, Any] = {"batches": networks.batches(), "loss": F.cross_entropy} | settings
    return importance(source, criterion, **given)


def by_hand(source: Source, group: str, parts: list[tuple[Labels, Any]]) -> Numbers:
    """The mean over all channels that carry the label of a unit, one by one."""
    (units,) = (g.units for g in source.groups if g.name == group)
    return np.array(
        [
            np.mean(
                [float(v) for labels, values in parts for o, v in zip(labels, values, strict=True) if o == u]
            )
            for u in units
        ]
    )


# What holds for all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_scores_every_unit_and_leaves_the_model_alone(criterion: str, model: str) -> None:
    source = source_with_a_frozen_layer(model)
    before = weights(source.model)
    found = scores_of(source, criterion)
    assert list(found) == [group.name for group in source.groups]
    for group in source.groups:
        assert found[group.name].shape == (len(group),)
        assert np.isfinite(found[group.name]).all()
    assert_equal(before, source.model.state_dict())
    assert all(parameter.grad is None for parameter in source.model.parameters())
    assert not next(source.model.parameters()).requires_grad
    assert not source.model.training
    ranked = source.ranked(found)
    for group, order in zip(ranked.groups, ranked.ranking, strict=True):
        score = dict(zip(group.units.tolist(), found[group.name], strict=True))
        # The first `least` units are those that layers cannot do without.
        rest = [score[unit] for unit in order.tolist()[ranked.least[ranked.groups.index(group)] :]]
        assert rest == sorted(rest, reverse=True)


@pytest.mark.parametrize("criterion", ["random", "thinet", "lasso", "taylor"])
def test_the_same_seed_gives_the_same_scores_whatever_else_is_drawn(criterion: str) -> None:
    source = networks.chained()
    one = scores_of(source, criterion, seed=3)
    torch.rand(5)
    np.testing.assert_equal(scores_of(source, criterion, seed=3), one)


@pytest.mark.parametrize("criterion", ["random", "thinet"])
def test_another_seed_gives_other_scores(criterion: str) -> None:
    source = networks.chained()
    one, other = (np.concatenate([*scores_of(source, criterion, seed=s).values()]) for s in (0, 1))
    assert (one != other).any()


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name not in ("random", "first")])
def test_permuted_channels_have_permuted_scores(criterion: str) -> None:
    model = networks.chain()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, axis in {"3.weight": 0, "3.bias": 0, "6.weight": 1}.items():
            tensor = moved.get_parameter(name)
            tensor.copy_(tensor.index_select(axis, order))
    one, other = (scores_of(networks.source_of(m), criterion) for m in (model, moved))
    np.testing.assert_allclose(other["3"], one["3"][order.numpy()], rtol=1e-4)
    # Which outputs of this layer ThiNet draws sums from are others then.
    for name in ("6",) if criterion == "thinet" else ("0", "6"):
        np.testing.assert_allclose(other[name], one[name], rtol=1e-4)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_batches_are_gone_through_once_and_may_come_from_a_generator(criterion: str) -> None:
    source = networks.chained()

    def once() -> Iterator[networks.Batch]:
        yield from networks.batches()

    np.testing.assert_equal(scores_of(source, criterion, batches=once()), scores_of(source, criterion))


@pytest.mark.parametrize("criterion", ["obd", "apoz", "activation"])
def test_how_images_are_put_into_batches_does_not_matter(criterion: str) -> None:
    source = networks.chained()
    ((images, targets),) = networks.batches(1, 9)
    parts = [(images[:2], targets[:2]), (images[2:], targets[2:])]
    one, other = (scores_of(source, criterion, batches=b) for b in ([(images, targets)], parts))
    for name, scores in one.items():
        np.testing.assert_allclose(other[name], scores, rtol=1e-5)


# Weights ---------------------------------------------------------------------------------------------------


def test_random_and_first() -> None:
    source = networks.chained()
    assert scores_of(source, "first")["3"].argsort().tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    for scores in scores_of(source, "random").values():
        assert ((scores >= 0) & (scores < 1)).all()
        assert len(set(scores.tolist())) == len(scores)


def pruning_groups(model: nn.Module, images: Tensor, layers: list[str]) -> Iterator[tuple[str, Any]]:
    tp = pytest.importorskip("torch_pruning")
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=images)
    for name in layers:
        layer: Any = model.get_submodule(name)
        cut = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
        yield name, graph.get_pruning_group(layer, cut, idxs=list(range(len(layer.weight))))


@pytest.mark.parametrize(("criterion", "p"), [("l1", 1), ("l2", 2)])
@pytest.mark.filterwarnings("ignore")  # of torch-pruning
def test_norms_of_filters_are_those_of_torch_pruning(criterion: str, p: int) -> None:
    tp = pytest.importorskip("torch_pruning")
    source = networks.source_of(networks.shake(resnet20(classes=3, width=4)))
    found = scores_of(source, criterion)
    other = tp.importance.MagnitudeImportance(p=p, group_reduction="first", normalizer=None)
    alone = [group.name for group in source.groups if len(group.layers) == 1]
    assert len(alone) == 9
    for name, group in pruning_groups(source.model, torch.zeros(1, 3, 8, 8), alone):
        np.testing.assert_allclose(found[name], other(group).numpy() ** (1 / p), rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of torch-pruning
def test_scales_of_batch_norm_are_those_of_torch_pruning() -> None:
    tp = pytest.importorskip("torch_pruning")
    source = networks.source_of(networks.shake(resnet20(classes=3, width=4)))
    found = scores_of(source, "bn_scale")
    other = tp.importance.BNScaleImportance(group_reduction="mean", normalizer=None)
    names = [group.name for group in source.groups]
    for name, group in pruning_groups(source.model, torch.zeros(1, 3, 8, 8), names):
        np.testing.assert_allclose(found[name], other(group).numpy(), rtol=1e-5)


def test_the_norm_of_a_group_counts_what_reads_a_channel() -> None:
    source = networks.source_of(networks.chain())
    made, read = (source.model.get_parameter(f"{layer}.weight").detach().numpy() for layer in "03")
    norms = np.linalg.norm(made.reshape(len(made), -1), axis=1)
    norms = norms + np.linalg.norm(read.swapaxes(0, 1).reshape(len(made), -1), axis=1)
    np.testing.assert_allclose(scores_of(source, "group_l2")["0"], norms / 2, rtol=1e-6)


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c not in ("random", "first", "group_l2")])
def test_groups_that_a_criterion_says_nothing_of_have_the_norm_of_the_group(criterion: str) -> None:
    up = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2), nn.Conv2d(4, 5, 1), nn.Flatten()
    )
    source = networks.source_of(up)
    found, expected = scores_of(source, criterion), scores_of(source, "group_l2")
    assert {"0", "2"} <= found.keys()
    silent = {"thinet": "0", "lasso": "0", "similarity": "02", "apoz": "", "activation": ""}
    for name in "02":
        same = np.array_equal(found[name], expected[name])
        assert same == (name in silent.get(criterion, "2"))


def test_a_unit_of_two_layers_has_the_mean_of_its_filters() -> None:
    source = networks.source_of(networks.shake(networks.Added()))
    left, right = (source.model.get_parameter(f"{name}.weight").detach() for name in ("left", "right"))
    expected = (left.abs().sum((1, 2, 3)) + right.abs().sum((1, 2, 3))) / 2
    np.testing.assert_allclose(scores_of(source, "l1")["left"], expected.numpy(), rtol=1e-6)
    expected = (left.flatten(1).norm(dim=1) + right.flatten(1).norm(dim=1)) / 2
    np.testing.assert_allclose(scores_of(source, "l2")["left"], expected.numpy(), rtol=1e-6)


def test_a_unit_of_two_groups_has_the_mean_of_its_channels_and_depthwise_filters_do_not_count() -> None:
    source = networks.source_of(networks.shake(networks.Grouped()))
    rows = source.model.get_parameter("expand.weight").detach().abs().sum((1, 2, 3))
    np.testing.assert_allclose(
        scores_of(source, "l1")["expand"], (rows[:4] + rows[4:]).numpy() / 2, rtol=1e-6
    )


def test_scales_of_a_depthwise_norm_and_of_one_behind_a_concatenation_count() -> None:
    grouped = networks.source_of(networks.shake(networks.Grouped()))
    scale = grouped.model.get_parameter("bn.weight").detach()
    np.testing.assert_allclose(
        scores_of(grouped, "bn_scale")["expand"], (scale[:4] + scale[4:]).numpy() / 2, rtol=1e-6
    )
    dense = networks.source_of(networks.shake(networks.Dense()))
    scale = dense.model.get_parameter("bn.weight").detach()
    with torch.no_grad():
        scale[2] *= -1
    found = scores_of(dense, "bn_scale")
    np.testing.assert_allclose(found["stem"], scale[:4].abs().numpy(), rtol=1e-6)
    np.testing.assert_allclose(found["grow"], scale[4:].numpy(), rtol=1e-6)


class HalfNormed(nn.Module):
    """Of two layers that are concatenated and added to a third, one alone has batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.bn = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)
        self.two = nn.Conv2d(3, 3, 1)
        self.sum = nn.Conv2d(3, 5, 1)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.cat([self.bn(self.one(x)), self.two(x)], 1)
        out: Tensor = self.fc((parts + self.sum(x)).mean((2, 3)))
        return out


def test_a_group_that_is_normed_in_part_is_scored_by_filters() -> None:
    source = networks.source_of(networks.shake(HalfNormed()))
    assert [len(group) for group in source.groups] == [5]
    np.testing.assert_equal(scores_of(source, "bn_scale"), scores_of(source, "l2"))
    chain = networks.chained()
    np.testing.assert_equal(scores_of(chain, "bn_scale")["3"], scores_of(chain, "l2")["3"])
    assert (scores_of(chain, "bn_scale")["0"] != scores_of(chain, "l2")["0"]).all()


@pytest.mark.parametrize("model", ["chain", "resnet20"])
def test_distances_of_filters_are_those_of_scipy(model: str) -> None:
    source = networks.source_of(MODELS[model]())
    found = scores_of(source, "fpgm")
    for group in source.groups:
        parts = []
        for layer, labels in group.layers.items():
            rows = source.model.get_parameter(f"{layer}.weight").detach().flatten(1).double().numpy()
            parts.append((labels, cdist(rows, rows).sum(1)))
        np.testing.assert_allclose(found[group.name], by_hand(source, group.name, parts), rtol=1e-6)


def test_the_filter_in_the_middle_of_the_others_is_the_least_important_by_fpgm() -> None:
    model = networks.chain()
    with torch.no_grad():
        kernel = model.get_parameter("3.weight")
        kernel[4] = kernel[[0, 1, 2, 3, 5, 6, 7]].mean(0)
    assert scores_of(networks.source_of(model), "fpgm")["3"].argmin() == 4


def removals_by_definition(rows: Numbers, read: Numbers) -> list[int]:
    """Srinivas & Babu: all pairs anew at each step."""
    read, left, gone = read.copy(), list(range(len(rows))), []
    while len(left) > 1:
        pairs = [
            ((read[j] ** 2).mean() * ((rows[i] - rows[j]) ** 2).sum(), i, j)
            for i in left
            for j in left
            if i != j
        ]
        _, i, j = min(pairs)
        read[i] += read[j]
        left.remove(j)
        gone.append(j)
    return gone + left


def test_similarity_removes_pairs_as_its_definition_says() -> None:
    source = networks.source_of(networks.chain(seed=4))
    model = source.model
    found = scores_of(source, "similarity")
    rows = torch.cat([model.get_parameter("3.weight").flatten(1), model.get_parameter("3.bias")[:, None]], 1)
    read = model.get_parameter("6.weight").flatten(1).T
    order = removals_by_definition(rows.detach().double().numpy(), read.detach().double().numpy())
    assert found["3"].argsort().tolist() == order


def test_similarity_sees_through_batch_norm() -> None:
    source = networks.source_of(networks.chain(seed=2))
    norm: Any = source.model.get_submodule("1")
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double()
    shift = norm.bias.detach().double() - norm.running_mean.double() * scale
    rows = source.model.get_parameter("0.weight").detach().double().flatten(1) * scale[:, None]
    read = source.model.get_parameter("3.weight").detach().double().transpose(0, 1).flatten(1)
    order = removals_by_definition(torch.cat([rows, shift[:, None]], 1).numpy(), read.numpy())
    assert scores_of(source, "similarity")["0"].argsort().tolist() == order


def test_similarity_with_two_layers_and_two_readers_puts_them_side_by_side() -> None:
    source = networks.source_of(networks.shake(networks.Added(), seed=1))
    parameter = source.model.get_parameter
    made = [parameter(f"{n}.weight").flatten(1) for n in ("left", "right")]
    made += [parameter(f"{n}.bias")[:, None] for n in ("left", "right")]
    read = [parameter(f"{n}.weight").transpose(0, 1).flatten(1) for n in ("one", "other")]
    order = removals_by_definition(*(torch.cat(parts, 1).detach().double().numpy() for parts in (made, read)))
    assert scores_of(source, "similarity")["left"].argsort().tolist() == order


def copy_channel(model: nn.Module, layers: list[str], readers: list[str], one: int, other: int) -> None:
    """Make a channel compute what another does."""
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name.rpartition(".")[0] in layers and tensor.dim():
                tensor[other] = tensor[one]
            if name in readers:
                tensor[:, other] = tensor[:, one]


@pytest.mark.parametrize(
    ("model", "group", "layers", "readers"),
    [
        ("chain", "0", ["0", "1"], ["3.weight"]),
        ("chain", "3", ["3"], ["6.weight"]),
        ("added", "left", ["left", "right"], ["one.weight", "other.weight"]),
        ("dense", "stem", ["stem", "bn"], ["grow.weight", "head.weight"]),
    ],
)
@pytest.mark.parametrize("criterion", ["similarity", "lasso"])
def test_the_copy_of_a_channel_matters_least(
    criterion: str, model: str, group: str, layers: list[str], readers: list[str]
) -> None:
    user = MODELS[model]()
    copy_channel(user, layers, readers, 1, 3)
    scores = scores_of(networks.source_of(user), criterion)[group]
    assert scores.argmin() == 3
    assert scores[1] > scores[3]


def test_a_copy_with_another_depthwise_filter_is_no_copy() -> None:
    model = networks.shake(networks.Grouped())
    with torch.no_grad():
        model.get_parameter("expand.weight")[[3, 7]] = model.get_parameter("expand.weight")[[1, 5]]
        model.get_parameter("expand.bias")[[3, 7]] = model.get_parameter("expand.bias")[[1, 5]]
        # What the others are multiplied with is small: they go first.
        model.get_parameter("halves.weight")[:, [0, 2]] *= 0.01
    assert scores_of(networks.source_of(model), "similarity")["expand"].argmin() in (0, 2)
    with torch.no_grad():
        for name in ("weight", "bias"):
            model.get_parameter(f"bn.{name}")[[3, 7]] = model.get_parameter(f"bn.{name}")[[1, 5]]
        model.get_parameter("depthwise.weight")[[3, 7]] = model.get_parameter("depthwise.weight")[[1, 5]]
        for name in ("running_mean", "running_var"):
            buffer = model.get_buffer(f"bn.{name}")
            buffer[[3, 7]] = buffer[[1, 5]]
    assert scores_of(networks.source_of(model), "similarity")["expand"].argmin() in (1, 3)


def test_a_copy_with_another_norm_behind_a_concatenation_is_no_copy() -> None:
    model = networks.shake(networks.Dense())
    copy_channel(model, ["stem"], ["grow.weight", "head.weight"], 1, 3)
    with torch.no_grad():
        model.get_parameter("head.weight")[:, [0, 2]] *= 0.1
        model.get_parameter("grow.weight")[:, [0, 2]] *= 0.1
    assert scores_of(networks.source_of(model), "similarity")["stem"].argmin() in (0, 2)


# Dead channels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "criterion", [c for c in CRITERIA if c not in ("random", "first", "fpgm", "similarity")]
)
@pytest.mark.parametrize("group", ["0", "3"])
def test_a_channel_that_is_always_zero_matters_least(criterion: str, group: str) -> None:
    model = networks.chain()
    with torch.no_grad():
        model.get_parameter(f"{group}.weight")[2] = 0
        if group == "0":
            model.get_parameter("1.weight")[2] = 0
            model.get_parameter("1.bias")[2] = 0
        else:
            model.get_parameter("3.bias")[2] = 0
    scores = scores_of(networks.source_of(model), criterion)[group]
    assert scores.argmin() == 2
    if criterion not in ("thinet", "lasso", "group_l2"):  # places; the last counts readers
        assert scores[2] == 0


@pytest.mark.parametrize("criterion", ["similarity", "taylor", "obd", "thinet", "lasso"])
def test_a_channel_that_nobody_reads_matters_least(criterion: str) -> None:
    model = networks.chain()
    with torch.no_grad():
        model.get_parameter("6.weight")[:, 5] = 0
    assert scores_of(networks.source_of(model), criterion)["3"].argmin() == 5


# Derivatives -----------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Without activations: a loss that is linear in outputs is linear in each channel."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, bias=not norm)
        self.bn = nn.BatchNorm2d(5) if norm else nn.Identity()
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.bn(self.conv(x)).mean((2, 3)))
        return out


@pytest.mark.parametrize("norm", [False, True])
def test_of_a_linear_loss_taylor_is_the_change_when_the_channel_goes(norm: bool) -> None:
    source = networks.source_of(networks.shake(Linear(norm)))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * torch.tensor([1.0, -2.0, 0.5])).sum(1).mean()

    data = networks.batches(3)
    found = scores_of(source, "taylor", batches=data, loss=loss)["conv"]
    for unit, score in enumerate(found):
        without = source.ranked({"conv": -np.eye(5)[unit]}).narrowed((4,))
        with torch.no_grad():
            changes = [abs(float(loss(without(x), t) - loss(source.model(x), t))) for x, t in data]
        assert score == pytest.approx(np.mean(changes), rel=1e-3, abs=1e-6)


@pytest.mark.filterwarnings("ignore")  # of torch-pruning
def test_taylor_of_filters_is_that_of_torch_pruning() -> None:
    """Its batch norm is never looked at: in 1.6.1 the branch for it asks for group norm."""
    tp = pytest.importorskip("torch_pruning")
    model = networks.chain()
    with torch.no_grad():  # biases, which we add before the magnitude is taken and it after
        model.get_parameter("3.bias").zero_()
    source = networks.source_of(model)
    ((images, targets),) = data = networks.batches(1)
    F.cross_entropy(model(images), targets).backward()  # type: ignore[no-untyped-call]
    other = tp.importance.TaylorImportance(group_reduction="first", normalizer=None, multivariable=True)
    ((_, group),) = pruning_groups(model, images, ["3"])
    np.testing.assert_allclose(
        scores_of(source, "taylor", batches=data)["3"], other(group).numpy(), rtol=1e-4, atol=1e-8
    )


def test_taylor_of_batch_norm_is_the_mean_over_batches_of_scale_and_shift_times_gradient() -> None:
    model = networks.chain()
    data = networks.batches(3)
    norm: Any = model.get_submodule("1")
    total = torch.zeros(6)
    for images, targets in data:
        model.zero_grad()
        F.cross_entropy(model(images), targets).backward()  # type: ignore[no-untyped-call]
        total += (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).abs().detach()
    found = scores_of(networks.source_of(model), "taylor", batches=data)["0"]
    np.testing.assert_allclose(found, total.numpy() / 3, rtol=1e-4)


def test_obd_by_hand_of_two_weights() -> None:
    """y = 2 w1 x + 3 w2 x, loss (y - t)^2 / 2: derivatives (y - t) 2 x and (y - t) 3 x."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.tensor([0.5, -1.0]).view(2, 1, 1, 1))
        model.get_parameter("2.weight").copy_(torch.tensor([[2.0, 3.0]]))
    images, targets = torch.tensor([1.0, 2.0, -1.0]).view(3, 1, 1, 1), torch.tensor([[1.0], [0.0], [2.0]])
    source = Source(model, images)
    found = scores_of(
        source,
        "obd",
        batches=[(images[:2], targets[:2]), (images[2:], targets[2:])],
        loss=lambda y, t: ((y - t) ** 2).mean() / 2,
    )
    # y = -2 x, so y - t = -3, -4, 0 and (y - t) x = -3, -8, 0: the mean of its square is 73 / 3.
    np.testing.assert_allclose(found["0"], [4 * 73 / 3 * 0.25 / 2, 9 * 73 / 3 * 1.0 / 2], rtol=1e-6)


def test_obd_is_the_mean_over_images_run_one_by_one() -> None:
    source = networks.chained()
    data = networks.batches(2, 4)
    model = copy.deepcopy(source.model).requires_grad_()
    kernel, bias = model.get_parameter("3.weight"), model.get_parameter("3.bias")
    total = torch.zeros(8)
    for images, targets in data:
        for image, target in zip(images, targets, strict=True):
            model.zero_grad()
            F.cross_entropy(model(image[None]), target[None]).backward()  # type: ignore[no-untyped-call]
            assert kernel.grad is not None
            assert bias.grad is not None
            total += (kernel * kernel.grad).square().sum((1, 2, 3)) + (bias * bias.grad).square()
    np.testing.assert_allclose(
        scores_of(source, "obd", batches=data)["3"], total.detach().numpy() / 8 / 2, rtol=1e-4
    )


# Activations -----------------------------------------------------------------------------------------------


def known_channels() -> tuple[Source, Tensor]:
    """Channels 0 to 2 are x, -x and x - 1 before the activation; pooling follows."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    )
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1, 1))
        model.get_parameter("0.bias").copy_(torch.tensor([0.0, 0.0, -1.0]))
    x = torch.tensor([[0.5, 2.0, 3.0, 0.25], [0.5, 0.5, 0.5, 4.0]]).view(2, 1, 2, 2)
    return Source(model, x), x


def test_zeros_and_magnitudes_are_those_right_after_the_activation() -> None:
    source, x = known_channels()
    data = [(x, torch.zeros(2))]
    np.testing.assert_allclose(scores_of(source, "apoz", batches=data)["0"], [1, 0, 3 / 8])
    np.testing.assert_allclose(
        scores_of(source, "activation", batches=data)["0"], [11.25 / 8, 0, (1 + 2 + 3) / 8], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("criterion", "measure"), [("apoz", lambda x: (x != 0).float()), ("activation", abs)]
)
def test_activations_are_what_hooks_see(criterion: str, measure: Callable[[Tensor], Tensor]) -> None:
    source = networks.chained()
    data = networks.batches(1)
    seen: dict[str, Tensor] = {}
    model = copy.deepcopy(source.model)
    for conv, relu in {"0": "2", "3": "4", "6": "8"}.items():
        model.get_submodule(relu).register_forward_hook(
            lambda _, __, output, conv=conv: seen.update({conv: measure(output).mean((0, 2, 3))})
        )
    model(data[0][0])
    found = scores_of(source, criterion, batches=data)
    for name, values in seen.items():
        np.testing.assert_allclose(found[name], values.detach().numpy(), rtol=1e-5)


def test_a_residual_stage_is_looked_at_behind_each_of_its_sums() -> None:
    source = networks.source_of(networks.shake(resnet20(classes=3, width=4)))
    data = networks.batches(1)
    model: Any = copy.deepcopy(source.model)
    with torch.no_grad():
        x = F.relu(model.bn1(model.conv1(data[0][0])))
        maps = [x]
        for block in model.layer1:
            maps.append(block(maps[-1]))
    expected = torch.stack([x.mean((0, 2, 3)) for x in maps]).mean(0)
    np.testing.assert_allclose(scores_of(source, "activation", batches=data)["conv1"], expected, rtol=1e-5)


def test_channels_without_activation_are_looked_at_where_they_are_read() -> None:
    source = networks.source_of(networks.shake(networks.Dense()))
    data = networks.batches(1)
    model: Any = source.model
    with torch.no_grad():
        stem = model.stem(data[0][0])
        parts = torch.cat([stem, model.grow(F.relu(stem))], 1)
        read = F.relu(model.bn(parts))
    found = scores_of(source, "activation", batches=data)
    np.testing.assert_allclose(found["grow"], read[:, 4:].mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found["stem"], F.relu(stem).mean((0, 2, 3)), rtol=1e-5)


# What the next layers make of channels ---------------------------------------------------------------------


def one_sum(seed: int = 0) -> tuple[Source, networks.Batch, Tensor]:
    """A network whose reader has one output and one position, and what each channel adds to it."""
    model = nn.Sequential(nn.Conv2d(3, 7, 4), nn.ReLU(), nn.Flatten(), nn.Linear(7, 1))
    source = Source(networks.shake(model, seed), torch.zeros(1, 3, 4, 4))
    ((images, targets),) = networks.batches(1, 40, side=4, seed=seed)
    with torch.no_grad():
        channels = source.model[:3](images)  # type: ignore[index]
    return source, (images, targets), channels * source.model.get_parameter("3.weight")[0].detach()


@pytest.mark.parametrize("seed", range(3))
def test_thinet_removes_greedily_what_changes_the_sum_least(seed: int) -> None:
    source, batch, parts = one_sum(seed)
    gone: list[int] = []
    while len(gone) < 7:
        left = [unit for unit in range(7) if unit not in gone]
        costs = {unit: float(parts[:, [*gone, unit]].sum(1).square().sum()) for unit in left}
        gone.append(min(left, key=lambda unit: costs[unit]))
    scores = scores_of(source, "thinet", batches=[batch])["0"]
    assert scores.argsort().tolist() == gone
    np.testing.assert_allclose(np.sort(scores), np.arange(1, 8) / 7)


def rows_of_parts(source: Source, reader: str, x: Tensor) -> Numbers:
    """What each unit of the one group that is read adds to each output at each position."""
    (layer,) = (layer for layer in structure(source).layers if layer.name == reader)
    labels = entering(source, layer)
    weight = source.model.get_parameter(layer.weight).detach()
    columns = []
    for unit in sorted(set(labels.tolist()) - {0}):
        alone = x * torch.from_numpy(labels == unit).view(1, -1, 1, 1)
        parts = F.conv2d(alone, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        columns.append(parts.double().flatten().numpy())
    return np.stack(columns, 1)


def assert_entries(rows: Numbers, scores: Numbers) -> None:
    """The first units are the ones with a coefficient of scikit-learn's LASSO, for penalties that shrink."""
    from sklearn.linear_model import Lasso

    order = (-scores).argsort()
    highest = np.abs(rows.T @ rows.sum(1)).max() / len(rows)
    sizes = set()
    for alpha in highest * np.geomspace(0.999, 0.0005, 60):
        lasso = Lasso(alpha, fit_intercept=False, max_iter=100_000, tol=1e-10).fit(rows, rows.sum(1))
        support = np.flatnonzero(lasso.coef_)
        assert set(support) == set(order[: len(support)])
        sizes.add(len(support))
    assert len(sizes) > 2


def test_lasso_orders_units_as_the_lasso_of_all_rows() -> None:
    # 3 by 3 positions after the stride: fewer than are drawn, so all are.
    source = networks.source_of(networks.chain(seed=1), side=6)
    ((images, _),) = data = networks.batches(1, 6, side=6)
    with torch.no_grad():
        read = source.model[:3](images)  # type: ignore[index]
    assert_entries(rows_of_parts(source, "3", read), scores_of(source, "lasso", batches=data)["0"])


def test_lasso_of_a_reader_with_groups() -> None:
    source = networks.source_of(networks.shake(networks.Grouped(), seed=3), side=3)
    ((images, targets),) = networks.batches(1, 12, side=3)
    model: Any = source.model
    with torch.no_grad():
        read = F.relu6(model.bn(model.depthwise(F.relu6(model.expand(images)))))
    rows = rows_of_parts(source, "halves", read)
    assert_entries(rows, scores_of(source, "lasso", batches=[(images, targets)])["expand"])


@pytest.mark.parametrize("criterion", ["thinet", "lasso"])
def test_each_group_of_a_reader_reads_its_own_channels(criterion: str) -> None:
    """Half of a unit is not read, the other half is always zero."""
    model = networks.shake(networks.Grouped())
    with torch.no_grad():
        model.get_parameter("halves.weight")[:3, 2] = 0
        for name in ("bn.weight", "bn.bias"):
            model.get_parameter(name)[6] = 0
    scores = scores_of(networks.source_of(model), criterion)["expand"]
    assert scores[2] == scores.min() == 0.25


@pytest.mark.parametrize("criterion", ["thinet", "lasso"])
def test_a_group_with_two_readers_has_the_mean_of_their_places(criterion: str) -> None:
    model = networks.shake(networks.Added(), seed=5)
    both = scores_of(networks.source_of(model, side=3), criterion, batches=networks.batches(1, 6, 3))["left"]
    places = []
    for other in ("one", "other"):
        alone = copy.deepcopy(model)
        with torch.no_grad():  # the other reader sees nothing, and puts the last units first
            alone.get_parameter(f"{other}.weight").zero_()
        found = scores_of(networks.source_of(alone, side=3), criterion, batches=networks.batches(1, 6, 3))[
            "left"
        ]
        places.append(2 * found - np.array([1.0, 0.75, 0.5, 0.25]))
    np.testing.assert_allclose(both, (places[0] + places[1]) / 2)
    for each in places:
        np.testing.assert_allclose(np.sort(each), [0.25, 0.5, 0.75, 1.0])


# Bad input -------------------------------------------------------------------------------------------------


def test_an_unknown_criterion_is_told_the_nearest_and_all() -> None:
    source = networks.chained()
    with pytest.raises(
        ConversionError, match=r"no criterion 'tailor'; did you mean 'taylor'\? There are random,"
    ):
        importance(source, "tailor")
    with pytest.raises(ConversionError, match="no criterion ''"):
        importance(source, "")


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name not in OF_WEIGHTS])
def test_what_a_criterion_lacks_is_said(criterion: str) -> None:
    source = networks.chained()
    with pytest.raises(ConversionError, match=f"'{criterion}' needs batches"):
        importance(source, criterion, loss=F.cross_entropy)
    with pytest.raises(DataError, match="at least one batch"):
        importance(source, criterion, batches=[], loss=F.cross_entropy)
    if CRITERIA[criterion].loss:
        with pytest.raises(ConversionError, match=f"'{criterion}' needs loss"):
            importance(source, criterion, batches=networks.batches())


def test_batches_must_be_pairs() -> None:
    source = networks.chained()
    with pytest.raises(DataError, match="batch 0 must be a pair of images and targets, got Tensor"):
        importance(source, "apoz", batches=[torch.zeros(2, 3, 8, 8)])  # type: ignore[list-item]


@pytest.mark.parametrize("criterion", ["taylor", "obd", "activation"])
def test_scores_that_are_not_finite_are_refused(criterion: str) -> None:
    source = networks.chained()
    ((images, targets),) = networks.batches(1)
    images[0, 0, 0, 0] = torch.nan
    with pytest.raises(ConversionError, match=f"'{criterion}' gives nan for unit 0 of group '0'"):
        scores_of(source, criterion, batches=[(images, targets)])


@pytest.mark.parametrize("criterion", ["thinet", "lasso"])
def test_orders_of_what_is_not_finite_are_refused(criterion: str) -> None:
    source = networks.chained()
    ((images, targets),) = networks.batches(1)
    images[0, 0] = torch.nan
    with pytest.raises(ConversionError, match="reads nan or infinity"):
        scores_of(source, criterion, batches=[(images, targets)])


@pytest.mark.parametrize(
    "loss", [lambda y, t: F.cross_entropy(y, t, reduction="none"), lambda y, t: torch.tensor(1.0)]
)
@pytest.mark.parametrize("criterion", ["taylor", "obd"])
def test_a_loss_must_be_one_number_with_a_derivative(
    criterion: str, loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    source = networks.chained()
    if criterion == "obd" and loss(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long)).shape == (1,):
        return  # of one image it is one number
    with pytest.raises(ConversionError, match="the loss must be one number with a derivative"):
        scores_of(source, criterion, loss=loss)
