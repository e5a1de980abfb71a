"""A narrow network as one operation of a space: the laws of supernets, and what it says of itself."""

import dataclasses
from functools import cache

import pytest
import torch
from prune.zoo import ZOO, images, model, run, source
from torch import nn

from autocompress.elastic.extract import extract
from autocompress.errors import ConversionError, CostError
from autocompress.prune.network import NarrowNetwork, model_of, source_of
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
