"""The supernet as a whole: contract of our spaces, published sizes, gates, resolutions."""

import numpy as np
import pytest
import torch
from small_networks import arch_of, images, shaken

from autocompress.elastic.layers import ElasticConv2d
from autocompress.elastic.recalibrate import recalibrate
from autocompress.elastic.supernet import Supernet, resize
from autocompress.errors import SpaceError
from autocompress.space import SearchSpace
from autocompress.testing.elastic import ElasticContract
from autocompress.testing.toys import toy_classifier_space, toy_space, toy_width_space
from search_spaces.mobilenet_v3 import mobilenet_v3


class TestToyClassifier(ElasticContract):
    def space(self) -> SearchSpace:
        return toy_classifier_space()


class TestToyWidths(ElasticContract):
    def space(self) -> SearchSpace:
        return toy_width_space()


class TestToy(ElasticContract):
    def space(self) -> SearchSpace:
        return toy_space(3)


class TestTinyMobileNetV3(ElasticContract):
    def space(self) -> SearchSpace:
        return mobilenet_v3(preset="tiny", classes=10, depths=(1, 2), resolutions=(16, 24))


# Sizes ---------------------------------------------------------------------------------------------------


def test_once_for_all_has_14120_parameters_besides_its_largest_network() -> None:
    # Cai et al.'s own supernet minus its largest sub-network: 20 layers with transforms 7 to 5 and 5 to 3,
    # 25 * 25 + 9 * 9 each (counted on their code, /shared/SUPERNETS.md 1.2).
    space = mobilenet_v3()
    with torch.device("meta"):
        supernet = Supernet(space)
    largest = sum(op.params for _, ops in space.operations(space.largest()) for op in ops)
    assert sum(parameter.numel() for parameter in supernet.parameters()) - largest == 14_120


def test_without_kernel_transforms_a_supernet_has_the_parameters_of_its_largest_network() -> None:
    space = toy_classifier_space()
    supernet = Supernet(space, kernel_transform=False)
    largest = sum(op.params for _, ops in space.operations(space.largest()) for op in ops)
    assert sum(parameter.numel() for parameter in supernet.parameters()) == largest


# Initialisation ------------------------------------------------------------------------------------------


def test_residual_blocks_start_as_the_identity_so_that_depth_makes_no_difference() -> None:
    space = toy_classifier_space()
    supernet = space.supernet()
    shallow, deep = arch_of(space, resolution=12, depth=1), arch_of(space, resolution=12, depth=2)
    assert torch.equal(supernet(images(), shallow), supernet(images(), deep))
    outputs = supernet(images(), deep)
    assert outputs.std() > 0
    plain = [
        layer
        for layer in supernet.modules()
        if isinstance(layer, ElasticConv2d) and layer.norm_weight is not None and not layer.norm_weight.any()
    ]
    assert {layer.name for layer in plain} == {"block1.3_conv2d", "block2.3_conv2d"}


def test_seeds_differ_and_repeat() -> None:
    space = toy_classifier_space()
    first, again, other = (Supernet(space, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.stem.0_conv2d.weight"], other["layers.stem.0_conv2d.weight"])


def test_convolutions_start_with_the_variance_of_he_by_fan_out() -> None:
    # He et al., ICCV 2015, equation 14: variance 2 / (kernel^2 * outputs). Three standard errors.
    supernets = [Supernet(toy_space(1), seed=seed) for seed in range(60)]
    samples = torch.stack([supernet.layers["block1"]["0_conv2d"].weight for supernet in supernets])
    assert samples.shape == (60, 4, 4, 5, 5)
    expected = 2 / (25 * 4)
    assert samples.var().item() == pytest.approx(expected, rel=3 * (2 / samples.numel()) ** 0.5)
    assert samples.mean().item() == pytest.approx(0, abs=3 * (expected / samples.numel()) ** 0.5)


# Resolution ----------------------------------------------------------------------------------------------


def test_images_are_resized_to_the_resolution_of_the_architecture() -> None:
    space = toy_classifier_space()
    supernet = shaken(space)
    arch = arch_of(space, resolution=8, depth=1)
    expected = supernet(resize(images(), (8, 8)), arch)
    assert torch.equal(supernet(images(), arch), expected)


def test_resizing_is_the_mean_of_what_a_pixel_covers_and_keeps_images_of_the_right_size() -> None:
    ramp = torch.arange(16.0).view(1, 1, 4, 4)
    assert resize(ramp, (4, 4)) is ramp
    constant = torch.full((1, 2, 12, 12), 3.0)
    torch.testing.assert_close(resize(constant, (8, 8)), torch.full((1, 2, 8, 8), 3.0))
    # Halved with antialiasing, a triangle of width 4: (1, 3, 3, 1) / 8 inside, cut off at the border.
    row = torch.tensor([0.0, 0, 1, 0, 0, 0, 0, 0]).expand(1, 1, 8, 8)
    torch.testing.assert_close(resize(row, (8, 4))[0, 0, 0], torch.tensor([1 / 7, 3 / 8, 0, 0]))


# Errors --------------------------------------------------------------------------------------------------


def test_statistics_of_another_network_are_refused_by_name() -> None:
    space = toy_classifier_space()
    supernet = space.supernet()
    small = arch_of(space, resolution=8, depth=1, block1_expand=2)
    statistics = recalibrate(supernet, small, [images()])
    deep = arch_of(space, resolution=8, depth=2, block1_expand=2)
    with pytest.raises(SpaceError, match=r"'block2\.0_conv2d' needs .* 16 channels, got none; recalibrate"):
        supernet(images(), deep, statistics=statistics)
    wide = arch_of(space, resolution=8, depth=1, block1_expand=4)
    with pytest.raises(SpaceError, match=r"needs .* 16 channels, got those of 8 channels"):
        supernet(images(), wide, statistics=statistics)


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.elastic.supernet.MAX_PLANS", 3)
    space = toy_classifier_space()
    supernet = space.supernet()
    archs = space.decode(space.sample(20, np.random.default_rng(0)))
    for arch in archs:
        assert next(name for name, _ in supernet.plan(arch)) == "stem"
    assert len(supernet._plans) <= 3
