"""A model at the bits of a policy: folded, calibrated once, priced without being built."""

import copy
import itertools

import numpy as np
import pytest
import torch
from quantized_networks import INTEGERS, WIDTHS, images, residual, source
from torch import nn

from autocompress.elastic.extract import extract
from autocompress.elastic.recalibrate import recalibrate
from autocompress.errors import ConversionError, QuantizationError
from autocompress.latency.target import Scheme
from autocompress.network import build_network, unshared
from autocompress.quantize.layer import QuantizedLayer, quantized_layers
from autocompress.quantize.ops import Conversion, Quantized
from autocompress.quantize.source import Policy
from search_spaces.bits import bit_space

FLOATS = (32, 32)


def outputs(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(images(seed=1))


def test_folding_keeps_what_the_model_computes() -> None:
    model = residual()
    found = source(model)
    assert torch.allclose(outputs(found.model), outputs(model), atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in found.model.modules())


def test_the_users_model_is_not_changed() -> None:
    model = residual()
    before = copy.deepcopy(model.state_dict())
    source(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_at_32_bits_a_network_is_the_folded_model_bit_for_bit() -> None:
    found = source(widths=INTEGERS)
    assert torch.equal(outputs(found.network((FLOATS,) * 7)), outputs(found.model))


class Upscaling(nn.Module):
    """Transposed convolutions, with groups and without."""

    def __init__(self) -> None:
        super().__init__()
        self.grow, self.grouped = nn.ConvTranspose2d(3, 4, 2, 2), nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.last = nn.Conv2d(6, 2, (1, 3), dilation=(1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.grouped(self.grow(x).relu()).relu())


def test_transposed_and_dilated_convolutions_are_quantized_too() -> None:
    found = source(Upscaling().eval(), widths=INTEGERS, outputs=True)
    exact, eight = outputs(found.model), outputs(found.network(((8, 8),) * 3))
    assert float((exact - eight).norm()) < 0.05 * float(exact.norm())
    layers = dict(quantized_layers(found.network(((8, 8),) * 3)))
    assert [len(layer.weight.scale) for layer in layers.values()] == [4, 1, 2]


def test_more_bits_are_nearer_to_floating_point() -> None:
    found = source()
    exact = outputs(found.model)
    errors = [
        float((outputs(found.network((bits,) * 7)) - exact).norm()) for bits in ((2, 4), (4, 4), (8, 8))
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02 * float(exact.norm())


def test_every_policy_reads_its_scales_from_what_all_share() -> None:
    found = source()
    shared = dict(found.shared().named_parameters(remove_duplicate=False))
    rng = np.random.default_rng(0)
    for _ in range(5):
        policy = _random(rng, found.plan)
        network = found.network(policy)
        entries = found.entries(policy)
        for name, parameter in network.named_parameters():
            expected = shared[name][list(entries[name][0])] if name in entries else shared[name]
            assert torch.equal(parameter, expected), name
        # Layers that read one tensor quantize it alike.
        left, right = (dict(quantized_layers(network))[name].input for name in ("left", "right"))
        assert left is right


def _random(rng: np.random.Generator, plan: object) -> Policy:
    inputs = {site.source: int(rng.choice((4, 8))) for site in plan.sites}  # type: ignore[attr-defined]
    return tuple((int(rng.choice((2, 4, 8))), inputs[site.source]) for site in plan.sites)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("part", "bits"), [("weight", 2), ("weight", 8), ("input", 4)])
def test_a_quantizer_alone_is_that_of_the_network(part: str, bits: int) -> None:
    found = source()
    policy = ((bits, 4) if part == "weight" else (8, bits),) * 7
    number, name = next((n, s.name) for n, s in enumerate(found.plan.sites) if n and s.source == s.name)
    whole = getattr(found.network(policy).get_submodule(name), part)
    alone = found.quantizer(number, part, bits)
    assert torch.equal(alone.scale, whole.scale)
    assert torch.equal(alone.zero_point, whole.zero_point)
    assert (alone.grid, alone.axis) == (whole.grid, whole.axis)


def test_layers_of_one_tensor_quantize_it_once_whatever_finetuning_learns() -> None:
    space = bit_space(source(widths=INTEGERS, outputs=True))
    supernet = space.supernet().eval()
    (arch,) = space.decode(space.smallest())
    network = extract(supernet, arch, {}).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(images()).square().mean().backward()
    optimizer.step()
    layers = {name.rpartition(".")[2]: layer for name, layer in quantized_layers(network)}
    assert layers["left"].input is layers["right"].input
    again = build_network(space.operations(space.smallest()))
    again.load_state_dict(unshared(network.state_dict()))
    with torch.no_grad():
        assert torch.equal(again.eval()(images()), network.eval()(images()))


def test_scales_of_a_width_do_not_depend_on_the_other_widths() -> None:
    alone, among = source(widths=((4, 4),)), source()
    policy = ((4, 4),) * 7
    one, other = (dict(found.network(policy).named_parameters()) for found in (alone, among))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_inputs_of_relu_use_all_levels_above_zero() -> None:
    network = source().network(((8, 8),) * 7)
    grids = {name: layer.input.grid for name, layer in quantized_layers(network)}
    assert not grids["left"].signed
    assert grids["stem"].signed  # the scheme has no zero points
    asymmetric = source(scheme=Scheme((8,), activations="asymmetric"), widths=((8, 8),))
    grids = {name: layer.input.grid for name, layer in quantized_layers(asymmetric.network(((8, 8),) * 7))}
    assert not grids["stem"].symmetric
    assert not grids["stem"].signed


def test_what_integers_meet_is_said_at_which_scale_they_leave() -> None:
    found = source(widths=INTEGERS, outputs=True)
    layers = dict(quantized_layers(found.network(((8, 8),) * 7)))
    # `stem` and `left` hand integers on; the linear layer gives floats.
    assert [name for name, layer in layers.items() if layer.output] == ["after", "right", "swish", "last"]
    assert not layers["last"].output.grid.signed
    alone = tuple((8, 8) if site.name == "stem" else FLOATS for site in found.plan.sites)
    layers = dict(quantized_layers(found.network(alone)))
    assert [name for name, layer in layers.items() if layer.output] == ["stem"]
    assert not any(layer.output for _, layer in quantized_layers(source().network(((8, 8),) * 7)))


def _conversions(policy: Policy) -> list[str]:
    found = source(widths=INTEGERS, outputs=True).operations(policy)
    return sorted(f"{op.kind} {op.channels}x{op.height}" for op in found if isinstance(op, Conversion))


def test_conversions_are_those_that_a_runtime_has_to_do() -> None:
    assert _conversions((FLOATS,) * 7) == []
    # The image enters; two branches leave for the addition; its sum, what hard swish gives, and the mean
    # enter; `last` leaves. Hard swish takes integers to floats itself.
    assert _conversions(((8, 8),) * 7) == sorted(
        ["quantize 3x8", "dequantize 8x4", "dequantize 8x4", "quantize 8x4", "quantize 8x4", "dequantize 8x4",
         "quantize 8x1"]
    )  # fmt: skip
    only = lambda name: tuple(  # noqa: E731
        (8, 8) if site.name == name else FLOATS for site in source(widths=INTEGERS).plan.sites
    )
    assert _conversions(only("after")) == ["dequantize 8x4", "quantize 8x4"]
    assert _conversions(only("fc")) == ["quantize 8x1"]


def test_operations_have_the_bits_of_the_policy() -> None:
    found = source()
    policy = tuple((2 if n % 2 else 4, 8) for n in range(7))
    ops = [op for op in found.operations(policy) if isinstance(op, Quantized)]
    assert [op.weight_bits for op in ops] == [4, 2, 4, 2, 4, 2, 4]
    assert sum(op.bops for op in ops) == sum(op.macs * op.weight_bits * 8 for op in ops)


def test_the_digest_tells_models_widths_and_calibration_apart() -> None:
    digests = {source().digest, source(residual(1)).digest, source(widths=((4, 4),)).digest}
    other = type(source())(
        residual(), images()[:1], calibration=[images(seed=5)], widths=WIDTHS, scheme=Scheme((2, 4, 8))
    )
    assert len(digests | {other.digest}) == 4
    assert source().digest in digests


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (((8, 8),) * 6, "must have 7 pairs of bits"),
        (((3, 8),) * 7, "layer stem cannot have 3 bits of weights"),
    ],
)
def test_policies_that_were_not_calibrated_for_are_refused(policy: Policy, text: str) -> None:
    with pytest.raises(QuantizationError, match=text):
        source().network(policy)


def _with(calibration: list[torch.Tensor], model: nn.Module | None = None) -> None:
    type(source())(
        model or residual(), images()[:1], calibration=calibration, widths=WIDTHS, scheme=Scheme((2, 4, 8))
    )


def test_no_calibration_images_are_refused() -> None:
    with pytest.raises(QuantizationError, match="at least one calibration image, got none"):
        _with([])


def test_calibration_images_that_are_not_finite_are_refused() -> None:
    with pytest.raises(QuantizationError, match="calibration images hold nan or infinity"):
        _with([images() * float("nan")])


def test_a_range_that_is_not_finite_names_the_layer() -> None:
    model = residual()
    model.after.register_forward_hook(lambda module, given, result: result * float("inf"))
    with pytest.raises(QuantizationError, match="layer swish"):
        _with([images()], model)


def test_constant_calibration_images_give_a_network_that_runs() -> None:
    found = type(source())(
        residual(),
        images()[:1],
        calibration=[torch.zeros(4, 3, 8, 8)],
        widths=WIDTHS,
        scheme=Scheme((2, 4, 8)),
    )
    assert torch.isfinite(outputs(found.network(((4, 4),) * 7))).all()


class PreActivation(nn.Module):
    """Batch norm before the layer: nothing to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(x).relu())


def test_layers_without_batch_norm_to_fold_are_quantized_as_they_are() -> None:
    found = source(PreActivation().eval())
    assert [site.norm for site in found.plan.sites] == [""]
    assert isinstance(found.model.norm, nn.BatchNorm2d)
    space = bit_space(found, ends=None)
    supernet = space.supernet().eval()
    (arch,) = space.decode(space.largest())
    statistics = recalibrate(supernet, arch, [images()])
    network = extract(supernet, arch, statistics)
    assert torch.isfinite(outputs(network)).all()


def test_buffers_that_slices_could_not_share_are_named() -> None:
    model = PreActivation()
    model.register_buffer("index", torch.arange(3))
    with pytest.raises(ConversionError, match="buffer index of PreActivation"):
        source(model.eval())


def test_weights_that_are_not_finite_are_refused() -> None:
    model = residual()
    model.stem.weight.data[0] = float("nan")
    with pytest.raises(ConversionError, match="nan or infinity"):
        source(model)


@pytest.mark.parametrize("bits", list(itertools.product((2, 8), (4, 8))))
def test_finetuning_reaches_every_scale_and_weight(bits: tuple[int, int]) -> None:
    network = source().network((bits,) * 7).train()
    network(images()).square().mean().backward()
    for name, layer in quantized_layers(network):
        assert isinstance(layer, QuantizedLayer)
        assert layer.layer.weight.grad is not None, name
        assert layer.weight.scale.grad is not None, name
        assert layer.input.scale.grad is not None, name


def test_the_bias_of_a_channel_without_weights_stays() -> None:
    """Batch norm with a scale of next to nothing leaves channels whose weights are as good as zero."""
    model = residual()
    model.stem_norm.weight.data[2] = 1e-10
    model.stem_norm.bias.data[2] = 0.7
    found = source(model, widths=INTEGERS, outputs=True)
    network = found.network(((8, 8),) * 7)
    seen = []
    layers = dict(quantized_layers(network))
    layers["stem"].register_forward_hook(lambda module, given, result: seen.append(result[:, 2]))
    outputs(network)
    assert torch.allclose(seen[0], torch.tensor(0.7), atol=1e-3)
    exact, eight = outputs(found.model), outputs(network)
    assert float((exact - eight).norm()) < 0.02 * float(exact.norm())
