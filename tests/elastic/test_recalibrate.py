"""Batch-norm statistics against closed forms on all activations at once."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import arch_of, images, shaken
from torch import Tensor, nn

from autocompress.elastic.extract import extract
from autocompress.elastic.recalibrate import recalibrate
from autocompress.elastic.supernet import Supernet
from autocompress.errors import DataError
from autocompress.space import Architecture
from autocompress.testing.toys import toy_classifier_space

SPACE = toy_classifier_space()
STEM = "stem.0_conv2d"


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    return shaken(SPACE)


@pytest.fixture
def arch() -> Architecture:
    return arch_of(SPACE, resolution=12, block1_kernel=3, block2_expand=2)


def activations(supernet: Supernet, arch: Architecture, x: Tensor) -> Tensor:
    """What the first batch norm gets, `(channels, everything else)`, in double precision."""
    with torch.no_grad():
        return extract(supernet, arch).stem[0].conv(x).double().transpose(0, 1).flatten(1)


def test_the_first_layer_s_are_mean_and_unbiased_variance_over_all_images(
    supernet: Supernet, arch: Architecture
) -> None:
    batches = [images(5, seed=1), images(3, seed=2) * 4 + 1, images(1, seed=3)]
    mean, variance = recalibrate(supernet, arch, batches)[STEM]
    every = activations(supernet, arch, torch.cat(batches))
    torch.testing.assert_close(mean, every.mean(1).float())
    torch.testing.assert_close(variance, every.var(1).float())


@given(st.permutations(range(6)), st.sets(st.integers(1, 5)))
def test_neither_order_nor_batch_sizes_matter_to_the_first_layer(order: list[int], cuts: set[int]) -> None:
    supernet, arch = shaken(SPACE), arch_of(SPACE, resolution=12)
    x = images(6, seed=4)
    expected = recalibrate(supernet, arch, [x])[STEM]
    bounds = [0, *sorted(cuts), 6]
    split = [x[list(order[start:stop])] for start, stop in itertools.pairwise(bounds)]
    found = recalibrate(supernet, arch, split)[STEM]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_every_layer_has_those_that_a_plain_network_measures_on_the_same_batch(
    supernet: Supernet, arch: Architecture
) -> None:
    # PyTorch's own batch norm with momentum 1 keeps mean and unbiased variance of the batch it saw last.
    network = extract(supernet, arch)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network(images(8))
    statistics = recalibrate(supernet, arch, [images(8)])
    assert len(statistics) == len(norms) == 1 + 2 * 3
    for norm, (mean, variance) in zip(norms, statistics.values(), strict=True):
        torch.testing.assert_close(mean, norm.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(variance, norm.running_var, rtol=1e-4, atol=1e-5)


def test_over_equal_batches_means_are_those_of_cumulative_batch_norm_and_variances_are_no_smaller(
    supernet: Supernet, arch: Architecture
) -> None:
    # `momentum=None` averages over batches: right for means; of variances it forgets what is between batches.
    network = extract(supernet, arch)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    batches = [images(4, seed=seed) + seed for seed in range(3)]
    with torch.no_grad():
        for batch in batches:
            network(batch)
    statistics = recalibrate(supernet, arch, batches)
    for norm, (mean, variance) in zip(norms, statistics.values(), strict=True):
        torch.testing.assert_close(mean, norm.running_mean, rtol=1e-4, atol=1e-5)
        # The law of total variance, up to the corrections for 143 and more samples a batch.
        assert (variance >= 0.99 * norm.running_var - 1e-6).all()
    assert (statistics[STEM][1] > 1.01 * norms[0].running_var).any()


def test_later_layers_see_batches_normalised_by_themselves(supernet: Supernet, arch: Architecture) -> None:
    # So a change of brightness of one batch has no effect behind the first norm.
    batches = [images(4, seed=1), images(4, seed=2)]
    plain = recalibrate(supernet, arch, batches)
    doubled = recalibrate(supernet, arch, [batches[0], 2 * batches[1]])
    assert not torch.allclose(plain[STEM][1], doubled[STEM][1], rtol=0.1)
    for name in plain:
        if name != STEM:
            torch.testing.assert_close(plain[name], doubled[name], rtol=1e-2, atol=1e-3)


def test_it_writes_nothing(supernet: Supernet, arch: Architecture) -> None:
    assert list(supernet.buffers()) == []
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    batch = images()
    recalibrate(supernet, arch, [batch])
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())
    assert torch.equal(batch, images())
    assert all(parameter.grad is None for parameter in supernet.parameters())


def test_statistics_are_those_of_constant_images_without_variance(
    supernet: Supernet, arch: Architecture
) -> None:
    # A 3x3 convolution of stride 2 sees the border; pixel by pixel, all images of the batch are equal.
    batch = torch.ones(3, 3, 12, 12)
    mean, variance = recalibrate(supernet, arch, [batch])[STEM]
    every = activations(supernet, arch, batch)
    torch.testing.assert_close(mean, every.mean(1).float())
    torch.testing.assert_close(variance, every.var(1).float(), rtol=1e-4, atol=1e-7)
    assert (variance >= 0).all()


def test_images_of_another_resolution_are_resized_first(supernet: Supernet) -> None:
    small = arch_of(SPACE, resolution=8)
    assert (
        recalibrate(supernet, small, [images(side=8)]).keys()
        == recalibrate(supernet, small, [images(side=12)]).keys()
    )


def test_a_supernet_in_double_precision_gets_statistics_in_double_precision(arch: Architecture) -> None:
    supernet = shaken(SPACE).double()
    statistics = recalibrate(supernet, arch, [images().double()])
    assert statistics[STEM][0].dtype == torch.float64
    network = extract(supernet, arch, statistics)
    with torch.no_grad():
        x = images(seed=9).double()
        assert torch.equal(supernet(x, arch, statistics=statistics), network(x))


def test_no_batch_is_an_error(supernet: Supernet, arch: Architecture) -> None:
    with pytest.raises(DataError, match="needs at least one batch of training images, got none"):
        recalibrate(supernet, arch, [])
