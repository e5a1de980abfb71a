"""Units that are zero add nothing: removing them changes nothing, whatever the network is."""

import copy

import numpy as np
import pytest
import torch
from prune.zoo import ZOO, images, model, run
from sparsify.works import Small, small, work_on
from torch import nn

from autocompress.errors import ConversionError
from autocompress.prune.importance_weights import l1
from autocompress.prune.source import Source
from autocompress.sparse.method import Work
from autocompress.sparse.units import clear, filters, lowest, parts, scales, scored, zero_units


def random_units(work: Work, share: float = 0.5) -> torch.Tensor:
    rng = np.random.default_rng(0)
    scores = {group.name: rng.random(len(group)) for group in work.source.groups}
    return torch.tensor(list(lowest(work, scores, share)), dtype=torch.int64)


def without(source: Source, units: torch.Tensor) -> nn.Module:
    """The narrow model without some units."""
    gone = set(units.tolist())
    scores = {g.name: np.array([float(u not in gone) for u in g.units.tolist()]) for g in source.groups}
    widths = tuple(int(scores[group.name].sum()) for group in source.groups)
    return source.ranked(scores).narrowed(widths)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_network_with_zero_units_computes_what_it_does_without_them(name: str) -> None:
    side = ZOO[name][1]
    work = work_on(copy.deepcopy(model(name)), side)
    before = run(work.network, images(name))
    units = random_units(work)
    clear(parts(work), units)
    found = run(work.network, images(name))
    narrow = without(work.source, units)
    scale = float(found.abs().max())
    assert float((run(narrow, images(name)) - found).abs().max()) <= 1e-5 * max(scale, 1.0)
    assert not torch.allclose(before, found)


def test_zero_units_are_counted_by_group() -> None:
    work = work_on(small())
    assert zero_units(work) == {"conv1": 0, "conv3": 0, "conv4": 0}
    labels = dict(zip(("conv1", "conv3", "conv4"), work.source.groups, strict=True))
    units = [*labels["conv1"].units[:2].tolist(), *labels["conv4"].units[3:].tolist()]
    clear(parts(work), torch.tensor(units))
    assert zero_units(work) == {"conv1": 2, "conv3": 0, "conv4": 3}
    with torch.no_grad():
        work.network.get_parameter("conv4.bias")[3] = 0.1
    assert zero_units(work) == {"conv1": 2, "conv3": 0, "conv4": 2}


def test_filters_without_bias_and_norm_are_not_a_whole_unit() -> None:
    work = work_on(small())
    units = torch.from_numpy(work.source.groups[0].units[:2])
    clear(filters(work), units)
    assert zero_units(work)["conv1"] == 0
    network = work.network
    assert isinstance(network, Small)
    assert (network.conv1.weight[:2] == 0).all()
    assert (network.conv2.weight[:2] == 0).all()
    assert (network.bn1.weight != 0).all()
    assert (network.conv3.weight[:, :2] != 0).any()


def test_each_group_loses_a_share_rounded_down_of_what_is_left() -> None:
    work = work_on(small())
    scores = scored(work, l1)
    taken = set(lowest(work, scores, 0.3))
    counts = [len(taken & set(group.units.tolist())) for group in work.source.groups]
    assert counts == [2, 3, 1]  # of 8, 10 and 6
    for group in work.source.groups:
        values = dict(zip(group.units.tolist(), scores[group.name].tolist(), strict=True))
        own = taken & set(values)
        assert max(values[u] for u in own) < min(values[u] for u in set(values) - own)
    more = set(lowest(work, scores, 0.3, gone=taken))
    assert not more & taken
    assert [len(more & set(group.units.tolist())) for group in work.source.groups] == [1, 2, 1]


def test_a_layer_keeps_a_channel_whatever_the_share() -> None:
    work = work_on(small())
    taken = set(lowest(work, scored(work, l1), 1.0, at_least=100))
    assert [len(taken & set(group.units.tolist())) for group in work.source.groups] == [7, 9, 5]


def test_only_scales_of_channels_that_can_go_are_trained() -> None:
    class Output(nn.Module):
        """Its last norm makes the output."""

        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.two = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x)).mean((2, 3))

    assert [one.name for one in scales(work_on(Output()), "slimming")] == ["one.1.weight"]


def test_without_batch_norm_there_is_nothing_to_train() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3))
    with pytest.raises(ConversionError, match="no channel that can be removed has one; methods without"):
        scales(work_on(plain), "slimming")
    frozen = small()
    for norm in (frozen.bn1, frozen.bn2, frozen.bn3):
        norm.weight.requires_grad_(False)
    with pytest.raises(ConversionError, match="all of them have requires_grad=False"):
        scales(work_on(frozen), "slimming")


def test_the_user_may_keep_layers_out() -> None:
    work = work_on(small(), ignore=("conv3",))
    assert [one.name for one in scales(work, "slimming")] == ["bn1.weight", "bn2.weight"]
    assert list(zero_units(work)) == ["conv1", "conv4"]
