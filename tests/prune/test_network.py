"""A narrow network as one operation of a space: the laws of supernets, and what it says of itself."""

import dataclasses
from functools import cache

import pytest
import torch
from prune.zoo import ZOO, images, model, run, source
from torch import nn

from autocompress.elastic.extract import extract
from autocompress.elastic.recalibrate import recalibrate
from autocompress.errors import ConversionError, CostError
from autocompress.network import model_of
from autocompress.prune.network import NarrowNetwork, source_of
from autocompress.prune.source import Source
from autocompress.space import SearchSpace
from autocompress.testing.elastic import ElasticContract
from search_spaces.channels import channel_space


@cache
def space_of(name: str) -> SearchSpace:
    return channel_space(source(name), steps=3)


class TestResNet(ElasticContract):
    def space(self) -> SearchSpace:
        return space_of("resnet")


class TestChunks(ElasticContract):
    """Chunks, concatenations, and channels that are tied in threes."""

    def space(self) -> SearchSpace:
        return space_of("chunks")


def network(name: str) -> NarrowNetwork:
    found = source(name)
    return NarrowNetwork(type(found.model).__name__, found.digest, found.full, found)


def test_at_full_width_the_supernet_computes_what_the_model_does() -> None:
    space = space_of("chunks")
    (largest,) = space.decode(space.largest())
    found = extract(space.supernet(), largest)
    norms = dict(model_of(found).named_buffers())
    for name, buffer in model("chunks").named_buffers():
        norms[name].copy_(buffer)
    assert torch.equal(run(found.eval(), images("chunks")), run(source("chunks").model, images("chunks")))


def test_the_name_in_tables_has_the_model_and_the_widths() -> None:
    own = network("own").at((3, 2))
    assert own.key == f"NarrowNetwork(name=Own,digest={source('own').digest},widths=(3, 2))"
    assert (own.in_shape, own.out_shape) == ((3, 8, 8), (5, 1, 1))


def test_entries_are_the_positions_that_are_kept() -> None:
    found = network("own").at((3, 2)).entries
    assert found["one"] == {0: [0, 1, 2]}
    assert found["two"] == {0: [0, 1], 1: [0, 1, 2]}
    assert found["head.fc.weight"] == {1: [0, 1]}
    assert network("own").entries == {}


def test_a_new_module_has_random_weights_where_a_layer_makes_them() -> None:
    own = network("scales")
    first, second = own.module(), own.module()
    assert not torch.equal(first.stem.weight, second.stem.weight)
    for made in (first, second):
        assert torch.equal(made.gamma, model("scales").gamma)
        assert all(module.training for module in made.modules())


def test_a_new_module_has_the_statistics_of_new_norms() -> None:
    made = network("own").module()
    assert torch.equal(made.norm.running_mean, torch.zeros(6))
    assert torch.equal(made.mean, model("own").mean)


@pytest.mark.parametrize("name", sorted(ZOO))
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_a_module_without_values_has_no_memory(name: str) -> None:
    least = network(name).at(source(name).least)
    with torch.device("meta"):
        made = least.module()
    assert {tensor.device.type for tensor in (*made.parameters(), *made.buffers())} == {"meta"}


def test_peak_memory_is_not_guessed() -> None:
    with pytest.raises(CostError, match="the peak of activations of a user's model is not computed"):
        _ = network("own").peak_elements


def test_a_model_is_looked_at_on_its_own_device_whatever_the_default_one_is() -> None:
    with torch.device("meta"):
        found = Source(model("chunks"), torch.zeros(1, 3, 8, 8, device="cpu"))
    assert found.digest == source("chunks").digest


def test_the_model_of_a_space_is_found() -> None:
    assert source_of(space_of("chunks")) is source("chunks")
    with pytest.raises(ConversionError, match="space 'toy' does not narrow a model"):
        source_of(dataclasses.replace(space_of("chunks"), name="toy", blocks=()))


def test_the_model_of_an_extracted_network_is_the_users_own() -> None:
    space = space_of("resnet")
    found = model_of(extract(space.supernet(), space.decode(space.smallest())[0]))
    assert type(found) is type(model("resnet"))
    assert isinstance(found.conv1, nn.Conv2d)


# Batch norms of classes of their own ------------------------------------------------------------------------


class NormAct(nn.BatchNorm2d):
    """As in timm: a norm and an activation with a parameter in one module."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.PReLU(init=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))  # type: ignore[no-any-return]


class Twice(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(x))


class ByHand(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (1, -1, 1, 1)
        return (x - self.running_mean.view(shape)) * self.weight.view(shape)


class Remembering(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("seen", torch.zeros(1))


def with_norm(kind: type[nn.BatchNorm2d]) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), kind(8), nn.Conv2d(8, 6, 3, padding=1), kind(6),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    return made


def test_norms_with_an_activation_in_them_are_recalibrated_like_plain_ones() -> None:
    """A second implementation: the same network with the activation as a layer of its own."""
    apart = nn.Sequential()
    for layer in with_norm(NormAct):
        if isinstance(layer, NormAct):
            norm = nn.BatchNorm2d(layer.num_features)
            norm.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("act")})
            apart.extend([norm, layer.act])
        else:
            apart.append(layer)
    batch = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for network in (with_norm(NormAct), apart):
        space = channel_space(Source(network, batch[:1]), steps=2)
        supernet = space.supernet().eval()
        (arch,) = space.decode(space.smallest())
        statistics = recalibrate(supernet, arch, [batch])
        plain = extract(supernet, arch, statistics)
        with torch.no_grad():
            torch.testing.assert_close(plain(batch), supernet(batch, arch, statistics=statistics))
        supernet.train()(batch, arch).square().mean().backward()
        gradients = sorted(float(p.grad.norm()) for p in supernet.parameters() if p.grad is not None)
        found.append((plain(batch).detach(), gradients))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


@pytest.mark.parametrize("kind", [Twice, ByHand, Remembering])
def test_norms_that_normalise_otherwise_are_refused(kind: type[nn.BatchNorm2d]) -> None:
    with pytest.raises(
        ConversionError, match=f"is a {kind.__name__} with affine=True; .*normalise their input once"
    ):
        channel_space(Source(with_norm(kind), torch.zeros(1, 3, 8, 8)))
