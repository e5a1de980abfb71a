"""Well-known networks: published sizes and costs, torchvision's names, and that they train and export."""

import hashlib
import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autocompress.errors import SpaceError
from autocompress.models import vgg
from autocompress.models.mobilenet_v2 import InvertedResidual, MobileNetV2, mobilenet_v2, mobilenet_v2_cifar
from autocompress.models.resnet import BasicBlock, Bottleneck, ResNet, resnet18, resnet50
from autocompress.models.resnet_cifar import Block, ResNetCifar, resnet20, resnet56
from autocompress.models.vgg import vgg16_bn, vgg16_bn_cifar

Factory = Callable[..., nn.Module]

IMAGENET: tuple[Factory, ...] = (resnet18, resnet50, vgg16_bn, mobilenet_v2)
CIFAR: tuple[Factory, ...] = (resnet20, resnet56, vgg16_bn_cifar, mobilenet_v2_cifar)
SIZED = [(factory, 224) for factory in IMAGENET] + [(factory, 32) for factory in CIFAR]
"""Factories with the pixels of a side of their images."""


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


each = pytest.mark.parametrize("factory", [*IMAGENET, *CIFAR], ids=name_of)
each_sized = pytest.mark.parametrize(("factory", "pixels"), SIZED, ids=name_of)


def without_values(factory: Factory, **arguments: float) -> nn.Module:
    """A network in evaluation mode, on the device whose tensors have shapes alone."""
    with torch.device("meta"):
        return factory(**arguments).eval()


def images(pixels: int, batch: int = 1, channels: int = 3) -> Tensor:
    return torch.zeros(batch, channels, pixels, pixels, device="meta")


def params(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def macs(network: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x)
    flops = counter.get_total_flops()  # two operations each
    return flops // 2


# Sizes and costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "published_params", "published_gmacs", "digit"),
    [
        (resnet18, 11_689_512, 1.814, 1e-3),
        (resnet50, 25_557_032, 4.089, 1e-3),
        (vgg16_bn, 138_365_992, 15.47, 1e-2),
        (mobilenet_v2, 3_504_872, 0.301, 1e-3),
    ],
    ids=name_of,
)
def test_networks_for_imagenet_have_the_published_parameters_and_macs(
    factory: Factory, published_params: int, published_gmacs: float, digit: float
) -> None:
    """Source: `num_params` and `_ops` of the weights in torchvision's documentation, at 224 pixels."""
    network = without_values(factory)
    assert params(network) == published_params
    assert macs(network, images(224)) / 1e9 == pytest.approx(published_gmacs, abs=digit / 2)


@pytest.mark.parametrize(
    ("width", "million_macs", "million_weights"),
    [
        (1.4, 582, 6.06),
        (1.3, 509, 5.34),
        (1.0, 300, 3.47),
        (0.75, 209, 2.61),
        (0.5, 97, 1.95),
        (0.35, 59, 1.66),
    ],
)
def test_mobilenet_v2_of_every_published_width_has_the_published_macs_and_weights(
    width: float, million_macs: int, million_weights: float
) -> None:
    """Source: table of checkpoints in tensorflow/models, research/slim/nets/mobilenet/README.md.

    Its MACs are cut, not rounded, and its parameters are those of convolutions and of the linear layer.
    """
    network = without_values(mobilenet_v2, width=width)
    weights = sum(parameter.numel() for parameter in network.parameters() if parameter.dim() > 1)
    assert macs(network, images(224)) // 10**6 == million_macs
    assert round(weights / 1e6, 2) == million_weights


@pytest.mark.parametrize(
    ("factory", "exact", "published"), [(resnet20, 272_474, 0.27), (resnet56, 855_770, 0.85)]
)
def test_resnets_for_cifar_have_the_parameters_counted_by_hand(
    factory: Factory, exact: int, published: float
) -> None:
    """He et al., table 6, with option A. ResNet-20, n = 3 blocks a stage, convolution by convolution:

    first 27*16 = 432; stage 1: 6*9*16*16 = 13,824; stage 2: 9*16*32 + 5*9*32*32 = 50,688; stage 3:
    9*32*64 + 5*9*64*64 = 202,752; norms, 2 a channel: 2*(7*16 + 6*32 + 6*64) = 1,376; linear 64*10 + 10 =
    650. That is 269,722 with option A. Option B adds 16*32 + 2*32 + 32*64 + 2*64 = 2,752: 272,474.
    ResNet-56, n = 9, has 12 more of each convolution: 12 * (9*(16*16 + 32*32 + 64*64) + 2*(16 + 32 + 64)).
    """
    assert 272_474 + 12 * (9 * (16**2 + 32**2 + 64**2) + 2 * (16 + 32 + 64)) == 855_770
    found = params(without_values(factory))
    assert found == exact
    option_a = found - 2_752
    assert option_a / 1e6 == pytest.approx(published, abs=0.005)


@pytest.mark.parametrize("width", [1, 7, 16])
@pytest.mark.parametrize("blocks", [1, 3, 9])
def test_resnets_for_cifar_cost_what_closed_forms_say(blocks: int, width: int) -> None:
    """The sums over the three stages, for n blocks of width w; maps of 32, 16 and 8 pixels a side."""
    n, w, channels, classes = blocks, width, 2, 7
    network = without_values(ResNetCifar, blocks=n, width=w, in_channels=channels, classes=classes)
    # Convolutions 9ww * [2n + 2 + 4(2n - 1) + 8 + 16(2n - 1)], shortcuts ww * [2 + 8].
    weights = 9 * channels * w + w * w * (378 * n - 80) + 4 * w * classes
    norms = 2 * (w * (1 + 2 * n) + 2 * w * (2 * n + 1) + 4 * w * (2 * n + 1))
    assert params(network) == weights + norms + classes
    pixels = 32 * 32
    assert macs(network, images(32, channels=channels)) == (
        9 * channels * w * pixels + w * w * (54 * n - 8) * pixels + 4 * w * classes
    )


@pytest.mark.parametrize("w", [5, 64])
def test_the_vgg_for_cifar_costs_what_its_thirteen_convolutions_and_its_linear_layer_do(w: int) -> None:
    """Column D of table 1 of Simonyan & Zisserman, and the side of the maps that poolings leave."""
    channels, classes = 1, 5
    network = without_values(vgg16_bn_cifar, width=w, in_channels=channels, classes=classes)
    column = [w, w, 2 * w, 2 * w, *[4 * w] * 3, *[8 * w] * 6]
    sides = [32, 32, 16, 16, *[8] * 3, *[4] * 3, *[2] * 3]
    weights = [9 * i * o for i, o in zip([channels, *column], column, strict=False)]
    assert params(network) == sum(weights) + 2 * sum(column) + (8 * w + 1) * classes
    costs = sum(weight * side**2 for weight, side in zip(weights, sides, strict=True))
    assert macs(network, images(32, channels=channels)) == costs + 8 * w * classes


def test_the_mobilenet_v2_for_cifar_has_the_same_layers_on_maps_of_32_to_4_pixels() -> None:
    network = without_values(mobilenet_v2_cifar)
    assert params(network) == 3_504_872 - 1281 * 1000 + 1281 * 10
    # Table 2, with the side of the map before and after the first block of a stage.
    table = [
        (1, 16, 1, 32, 32),
        (6, 24, 2, 32, 32),
        (6, 32, 3, 32, 16),
        (6, 64, 4, 16, 8),
        (6, 96, 3, 8, 8),
        (6, 160, 3, 8, 4),
        (6, 320, 1, 4, 4),
    ]
    total, channels = 27 * 32 * 32**2, 32
    for expansion, out, repeats, before, after in table:
        for side in [before] + [after] * (repeats - 1):
            hidden = expansion * channels
            total += (expansion > 1) * channels * hidden * side**2 + hidden * (9 + out) * after**2
            channels = out
    assert macs(network, images(32)) == total + 320 * 1280 * 4**2 + 1280 * 10


# Names of parameters ---------------------------------------------------------------------------------------


def described(state: dict[str, Tensor]) -> str:
    return "".join(f"{name} {tuple(tensor.shape)}\n" for name, tensor in state.items())


@pytest.mark.parametrize(
    ("factory", "checksum"),
    [
        (resnet18, "761022b221a39ceb0afbf6540088f2c88938ca83e3adf823383af010f42a10c3"),
        (resnet50, "3fa57287149b51c43a043a424dcd918aaa5a894c977b50e35a9154f41f9c8fd0"),
        (vgg16_bn, "5f99e428d932f79ed2b9c1492f12f180bc654131af090a5c4bcd3592856dd598"),
        (mobilenet_v2, "5c45000c8dea04dbc07d2038c9b43d2aac4b77dad25001a7e10fc6fb67ffdd1e"),
    ],
    ids=name_of,
)
def test_state_dicts_have_the_names_shapes_and_order_of_torchvision(factory: Factory, checksum: str) -> None:
    """SHA-256 of the lines of `described` for torchvision 0.28.0; the next test shows what differs."""
    text = described(without_values(factory).state_dict())
    assert hashlib.sha256(text.encode()).hexdigest() == checksum


@pytest.mark.slow
@pytest.mark.parametrize("factory", IMAGENET, ids=name_of)
def test_torchvision_s_state_dicts_load_and_give_its_outputs(factory: Factory) -> None:
    try:
        models = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:
        # A torchvision that was built for another torch fails with RuntimeError.
        pytest.skip(f"compares with torchvision, which cannot be imported: {error}")
    theirs = getattr(models, factory.__name__)(weights=None).eval()
    ours = factory().eval()
    assert described(ours.state_dict()) == described(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


# What they compute -----------------------------------------------------------------------------------------


@each_sized
def test_images_of_any_number_channels_and_side_give_one_number_a_class(
    factory: Factory, pixels: int
) -> None:
    network = without_values(factory, classes=7, in_channels=2)
    for side in (pixels, 48):
        assert network(images(side, batch=3, channels=2)).shape == (3, 7)


@pytest.mark.parametrize(
    ("factory", "published"),
    [(vgg16_bn, [0.5, 0.5]), (mobilenet_v2, [0.2]), (mobilenet_v2_cifar, [0.2])],
    ids=name_of,
)
def test_dropout_is_torchvision_s(factory: Factory, published: list[float]) -> None:
    modules = without_values(factory).modules()
    assert [module.p for module in modules if isinstance(module, nn.Dropout)] == published


@pytest.mark.parametrize(
    ("block", "last_norm", "channels"),
    [
        (Block(8, 8, 1), "bn2", 8),
        (BasicBlock(8, 8, 1), "bn2", 8),
        (Bottleneck(32, 8, 1), "bn3", 32),
        (InvertedResidual(8, 8, 1, 6), "conv.3", 8),
        (InvertedResidual(8, 8, 1, 1), "conv.2", 8),
    ],
)
def test_a_block_whose_last_norm_is_zero_passes_its_input_on(
    block: nn.Module, last_norm: str, channels: int
) -> None:
    x = torch.rand(2, channels, 6, 6, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    assert not torch.equal(block(x), before)
    nn.init.zeros_(block.get_submodule(last_norm).weight)  # type: ignore[arg-type]
    assert torch.equal(block(x), before)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "block", [Block(8, 16, 2), BasicBlock(8, 16, 2), Bottleneck(8, 4, 2), InvertedResidual(8, 16, 2, 6)]
)
def test_a_block_with_a_stride_halves_the_map(block: nn.Module) -> None:
    assert block(torch.rand(2, 8, 6, 6)).shape == (2, 16, 3, 3)


@pytest.fixture
def few_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave VGG-16 its layers, but not the 120 million weights of the hidden ones, which take seconds."""
    monkeypatch.setattr(vgg, "HIDDEN", 32)


@each
@pytest.mark.usefixtures("few_hidden")
def test_first_weights_are_the_published_ones(factory: Factory) -> None:
    """He et al., ICCV 2015, equation 14: the variance is 2 over the fan-out, here of all groups together.

    Linear layers as in torchvision; those of residual networks are PyTorch's own, uniform. Of 3,000 or more
    weights: the standard error of a deviation is 1 / sqrt(6000) = 1.3 %, seven of them 9 %.
    """
    torch.manual_seed(0)
    network = factory()
    checked = 0
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())
        elif isinstance(module, nn.Conv2d):
            assert module.bias is None or bool((module.bias == 0).all())
            if module.weight.numel() >= 3000:
                fan_out = module.out_channels * module.kernel_size[0] ** 2
                assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.09)
                checked += 1
        elif isinstance(module, nn.Linear) and module.weight.numel() >= 3000:
            published = math.sqrt(1 / (3 * module.in_features)) if hasattr(network, "fc") else 0.01
            assert module.weight.std().item() == pytest.approx(published, rel=0.09)
            assert bool((module.bias == 0).all()) != hasattr(network, "fc")
    assert checked >= 10


# Training and export ---------------------------------------------------------------------------------------


def cancelled(network: nn.Module) -> set[str]:
    """Biases of convolutions that a batch norm follows: it takes them away, so their gradient is rounding."""
    return {
        f"{name}.bias"
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.bias is not None
    }


@each
@pytest.mark.usefixtures("few_hidden")
def test_a_training_step_changes_every_parameter(factory: Factory) -> None:
    torch.manual_seed(0)
    network = factory(classes=5).train()
    free = cancelled(network)
    assert len(free) == (13 if factory is vgg16_bn else 0)
    loss = nn.functional.cross_entropy(network(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer.step()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        if name not in free:
            assert bool(parameter.grad.any()), name
            assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("factory", "pixels", "activation", "activations"),
    [
        # After the first convolution, and as many a block as it has convolutions, the last after the sum.
        (resnet18, 224, "relu_", 1 + 8 * 2),
        (resnet50, 224, "relu_", 1 + 16 * 3),
        (resnet20, 32, "relu", 1 + 9 * 2),
        (resnet56, 32, "relu", 1 + 27 * 2),
        (vgg16_bn, 224, "relu_", 13 + 2),
        (vgg16_bn_cifar, 32, "relu_", 13),
        # ReLU6 is a hard tangent to PyTorch; the first block does not expand, and none ends in one.
        (mobilenet_v2, 224, "hardtanh_", 1 + 1 + 16 * 2 + 1),
        (mobilenet_v2_cifar, 32, "hardtanh_", 1 + 1 + 16 * 2 + 1),
    ],
    ids=name_of,
)
def test_export_traces_every_layer_and_activation(
    factory: Factory, pixels: int, activation: str, activations: int
) -> None:
    network = without_values(factory)
    exported = torch.export.export(network, (images(pixels),), strict=False)
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    for kind, operation in {nn.Conv2d: "conv2d", nn.BatchNorm2d: "batch_norm", nn.Linear: "linear"}.items():
        layers = sum(isinstance(module, kind) for module in network.modules())
        assert targets.count(f"aten.{operation}.default") == layers
    assert targets.count(f"aten.{activation}.default") == activations
    (output,) = exported.graph.output_node().args[0]
    assert output.meta["val"].shape == (1, 10 if pixels == 32 else 1000)


# What is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "3", None])
@pytest.mark.parametrize(
    ("factory", "argument"),
    [(factory, argument) for factory in (*IMAGENET, *CIFAR) for argument in ("classes", "in_channels")]
    + [(factory, "width") for factory in (resnet20, resnet56, vgg16_bn_cifar)],
    ids=name_of,
)
def test_counts_that_are_no_integers_of_at_least_1_are_refused(
    factory: Factory, argument: str, value: Any
) -> None:
    with pytest.raises(SpaceError, match=f"^{argument} must be an integer >= 1, got {value!r}$"):
        factory(**{argument: value})


@pytest.mark.parametrize("value", [0, -0.5, math.inf, math.nan, True, "1", None])
@pytest.mark.parametrize("factory", [mobilenet_v2, mobilenet_v2_cifar], ids=name_of)
def test_width_factors_that_are_no_finite_numbers_above_0_are_refused(factory: Factory, value: Any) -> None:
    with pytest.raises(SpaceError, match=f"^width must be a finite number > 0, got {value!r}$"):
        factory(width=value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNetCifar(0), "blocks must be an integer >= 1, got 0"),
        (lambda: ResNet(BasicBlock, (2, 2, 2)), r"depths must be 4 numbers, one a stage, got \(2, 2, 2\)"),
        (lambda: ResNet(BasicBlock, (2, 0, 2, 2)), r"depths\[1\] must be an integer >= 1, got 0"),
        (lambda: MobileNetV2(strides=(2,) * 7), "strides must be 8 numbers, each 1 or 2, got"),
        (lambda: MobileNetV2(strides=(3,) * 8), "strides must be 8 numbers, each 1 or 2, got"),
    ],
)
def test_layouts_that_are_no_networks_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        make()


def test_the_narrowest_networks_still_run() -> None:
    narrowest = [resnet20(1, 1, 1), vgg16_bn_cifar(1, 1, 1), mobilenet_v2_cifar(1, 1, 0.001)]
    for network in narrowest:
        assert network.eval()(torch.zeros(1, 1, 32, 32)).shape == (1, 1)
    assert {module.out_channels for module in narrowest[2].modules() if isinstance(module, nn.Conv2d)} == {
        8,
        48,
        1280,
    }
