"""Networks of torchvision and timm, where they are installed, with random weights.

Run with `pytest -m slow tests/prune/test_foreign.py`; without the packages everything here is skipped.
"""

import importlib

import numpy as np
import pytest
import torch
from prune.zoo import macs_of, params_of, run
from torch import nn

from autocompress.cost import operation_cost
from autocompress.prune.source import Source
from search_spaces.channels import channel_space

pytestmark = pytest.mark.slow
SIDE = 64
# What is followed whole; what of it keeps its channels is said.
TORCHVISION = ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "densenet121",
               "googlenet", "shufflenet_v2_x1_0", "squeezenet1_1", "regnet_y_400mf", "vgg11_bn")  # fmt: skip
TIMM = ("resnet18", "mobilenetv3_small_100", "efficientnet_b0", "densenet121", "repvgg_a0", "ghostnet_100")


def torchvision_network(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    arguments = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    made: nn.Module = getattr(models, name)(weights=None, **arguments)
    return made


def timm_network(name: str) -> nn.Module:
    pytest.importorskip("timm")
    made: nn.Module = importlib.import_module("timm").create_model(name, pretrained=False)
    return made


def check(network: nn.Module) -> None:
    """Narrow computes what masked does; prices are counts; whole is the original, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, SIDE, SIDE, generator=generator)
    # Norms with statistics of their own: zero biases would hide mistakes.
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr]
            module.bias.data.normal_(0, 0.1, generator=generator)
    source = Source(network, images[:1])
    space = channel_space(source, steps=4)
    costs = [operation_cost(space, metric) for metric in ("macs", "params")]
    rows = space.sample(3, np.random.default_rng(0))
    assert torch.equal(run(source.narrowed(source.full), images), run(network.eval(), images))
    for row, arch in zip(rows, space.decode(rows), strict=True):
        widths = tuple(int(arch[choice.name]) for choice in space.choices)
        narrow = source.narrowed(widths)
        expected = run(source.masked(widths), images)
        found = run(narrow, images)
        assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
        assert [int(cost.of(row[None])[0]) for cost in costs] == [
            macs_of(narrow, images[:1]),
            params_of(narrow),
        ]


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    check(torchvision_network(name))


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    check(timm_network(name))
