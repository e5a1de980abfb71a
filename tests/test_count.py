"""Counting MACs: closed forms, the operations of a space, and what is known to mislead."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.cost import operation_cost
from autocompress.count import count, load_module, parse_shape
from autocompress.errors import CostError, PluginError
from autocompress.network import build_network
from search_spaces.mobilenet_v3 import mobilenet_v3


def image(channels: int = 8, side: int = 16, batch: int = 1) -> Tensor:
    return torch.zeros(batch, channels, side, side)


class Sliced(nn.Conv2d):
    """Half of its filters, by a function call, as a supernet runs them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[: self.out_channels // 2], padding=1)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight


@pytest.mark.parametrize(
    ("module", "x", "macs"),
    [
        (nn.Conv2d(8, 16, 3, padding=1), image(), 16 * 16 * 16 * 8 * 9),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), image(), 16 * 16 * 8 * 9),
        (nn.Conv2d(8, 16, 3, padding=1, stride=2, groups=2), image(), 8 * 8 * 16 * 4 * 9),
        (nn.Conv2d(8, 16, 1), image(batch=3), 3 * 16 * 16 * 16 * 8),
        (nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1), image(), 16 * 16 * 8 * 4 * 16),
        (nn.Linear(32, 10), torch.zeros(5, 32), 5 * 32 * 10),
        (Sliced(8, 16, 3), image(), 16 * 16 * 8 * 8 * 9),
        (Product(), torch.zeros(2, 32), 2 * 32 * 10),
        (nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)), image(), 0),
        # Four gates, each of the input and of the state, at every step.
        (nn.LSTM(8, 16, batch_first=True), torch.zeros(2, 5, 8), 2 * 5 * 4 * 16 * (8 + 16)),
        # Four projections, two products of 1024 x 1024, two layers.
        (
            nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True),
            torch.zeros(1, 1024, 256),
            1024 * (4 * 256 * 256 + 2 * 1024 * 256 + 2 * 256 * 1024),
        ),
    ],
)
def test_closed_forms(module: nn.Module, x: Tensor, macs: int) -> None:
    found = count(module, x)
    assert (found.macs, found.device) == (macs, "meta")
    assert found.params == sum(p.numel() for p in module.parameters())


def test_every_network_of_a_space_costs_what_its_operations_say() -> None:
    """Second implementation: convolutions, squeeze-excite and the classifier, from shapes alone."""
    space = mobilenet_v3(preset="tiny", in_channels=1, classes=10)
    rows = np.vstack([space.smallest(), space.largest(), space.sample(6, np.random.default_rng(0))])
    for row in rows:
        blocks = space.operations(row)
        found = count(build_network(blocks), torch.zeros(1, *blocks[0][1][0].in_shape))
        for metric, value in {"macs": found.macs, "params": found.params}.items():
            assert value == operation_cost(space, metric).of(row[None])[0]


def test_modules_are_named_from_the_root_and_parents_hold_their_children() -> None:
    network = nn.Sequential(nn.Sequential(nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)), nn.Conv2d(2, 1, 1))
    found = count(network, image())
    pixels = 16 * 16
    assert found.by_module == {"0": 40 * pixels, "0.0": 32 * pixels, "0.1": 8 * pixels, "1": 2 * pixels}


def test_what_thop_does_not_see_is_doubtful_and_what_both_see_is_not() -> None:
    plain = count(nn.Sequential(nn.Conv2d(8, 16, 3, bias=False)), image())
    assert plain.thop_macs == plain.macs
    assert not plain.doubtful
    unseen = count(Product(), torch.zeros(2, 32))
    assert unseen.thop_macs == 0
    assert unseen.doubtful


class Looks(nn.Module):
    """Does something else where the largest value is above zero: needs values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.max()) <= 0 else x


def test_a_network_that_needs_values_is_counted_on_the_cpu() -> None:
    found = count(Looks(), image())
    assert (found.macs, found.device) == (32 * 16 * 16, "cpu")


def test_the_network_is_left_as_it_was() -> None:
    network = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
    before, fastpath = copy.deepcopy(network.state_dict()), torch.backends.mha.get_fastpath_enabled()
    count(network, torch.ones(2, 8, 4, 4))
    assert network.training
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert torch.backends.mha.get_fastpath_enabled() == fastpath


def test_a_shared_parameter_counts_once_its_work_as_often_as_it_is_done() -> None:
    shared = nn.Conv2d(8, 8, 1, bias=False)
    found = count(nn.Sequential(shared, shared), image())
    assert (found.params, found.macs) == (64, 2 * 64 * 256)


def test_an_input_that_does_not_fit_is_refused_with_its_shape() -> None:
    with pytest.raises(CostError, match="Conv2d cannot run on an input of 1x3x16x16: RuntimeError: "):
        count(nn.Conv2d(8, 4, 1), image(3))


@pytest.mark.parametrize("text", ["", "x", "1x", "1x3x0", "1x-3", "1,3,4", "1x3.5", "1 x 3"])
def test_shapes_that_cannot_be_meant_are_refused(text: str) -> None:
    with pytest.raises(CostError, match="an input reads like 1x3x224x224"):
        parse_shape(text)


def test_a_shape_is_read() -> None:
    assert parse_shape("1x3x224x224") == (1, 3, 224, 224)


MODEL = """
from parts import width
from torch import nn

made = nn.Conv2d(8, width, 1)

def factory():
    return nn.Conv2d(8, width, 1)

def number():
    return 3

def fails():
    raise KeyError("weights")
"""


def test_a_network_is_loaded_from_a_file_beside_others(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text("width = 5")
    (tmp_path / "model.py").write_text(MODEL)
    for name in ("factory", "made"):
        network = load_module(f"{tmp_path / 'model.py'}:{name}")
        assert isinstance(network, nn.Conv2d)
        assert network.out_channels == 5
    assert isinstance(load_module("torch.nn:Identity"), nn.Identity)
    for name, message in {
        "number": "must give a torch.nn.Module, got int",
        "fails": "cannot be made: KeyError: 'weights'",
        "absent": "cannot be made: AttributeError",
    }.items():
        with pytest.raises(PluginError, match=message):
            load_module(f"{tmp_path / 'model.py'}:{name}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.py", "a network is named as model.py:factory"),
        (":factory", "a network is named as"),
        ("absent.py:factory", "there is no file absent.py"),
        ("no_such_package:factory", "ModuleNotFoundError"),
    ],
)
def test_names_that_lead_nowhere_are_refused(name: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        load_module(name)


def test_where_thop_cannot_run_the_count_stands_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Python 3.12, where a module that it imports is gone."""
    monkeypatch.setitem(sys.modules, "thop", None)
    found = count(nn.Conv2d(8, 16, 1), image())
    assert (found.macs, found.thop_macs, found.doubtful) == (128 * 256, None, False)
    assert found.thop_error.startswith("ModuleNotFoundError")
