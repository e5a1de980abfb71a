"""Fitted weights: against least squares by other means, and laws."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import prune_networks as networks
import pytest
import torch
import torch.nn.functional as F
from small_networks import assert_equal, weights
from torch import Tensor, nn

from autocompress.errors import ConversionError, DataError
from autocompress.models.resnet_cifar import resnet20
from autocompress.prune.layers import Layer, layer_of, names_of, run
from autocompress.prune.reconstruct import reconstruct
from autocompress.prune.samples import Places, inputs_at, outputs_at
from autocompress.prune.source import Source, Widths

ALL = 10_000
"""Positions of an image: more than there are."""


def half(source: Source) -> Widths:
    return tuple(
        max(least, len(group) // 2) for group, least in zip(source.groups, source.least, strict=True)
    )


def only(source: Source, number: int) -> Widths:
    """Cut one group alone."""
    return tuple(width if at == number else len(source.groups[at]) for at, width in enumerate(half(source)))


def seen(model: nn.Module, images: Tensor) -> dict[str, list[tuple[Layer, Tensor, Tensor]]]:
    """Weight of each layer to input and output of each of its runs."""
    found: dict[str, list[tuple[Layer, Tensor, Tensor]]] = {}
    names = names_of(model)

    def see(function: Any, args: Any, kwargs: Any, output: Any) -> None:
        call = layer_of(names, function, args, kwargs)
        if call is not None:
            found.setdefault(call[0].weight, []).append((call[0], call[1].clone(), output.clone()))

    run(model, images, see)
    return found


def kept(source: Source, widths: Widths) -> dict[str, dict[int, Tensor]]:
    found: dict[str, dict[int, Tensor]] = {}
    for name, axis, positions in source.positions(widths):
        found.setdefault(name, {})[axis] = positions
    return found


def errors(source: Source, widths: Widths, model: nn.Module, images: Tensor) -> dict[str, float]:
    """Squared error of the outputs, before batch norm, of each layer that reads fewer channels."""
    cuts = kept(source, widths)
    whole, narrow = seen(source.model, images), seen(model, images)
    found: dict[str, float] = {}
    for name, runs in narrow.items():
        for (layer, _, output), (_, _, expected) in zip(runs, whole[name], strict=True):
            if layer.groups == 1 and 1 in cuts.get(name, {}):
                if 0 in cuts[name]:
                    expected = expected.index_select(layer.axis, cuts[name][0])
                error = float((output - expected).double().square().sum())
                found[name] = found.get(name, 0.0) + error
    return found


# Laws ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [networks.chain, networks.Added, networks.Dense, networks.Own, networks.Grouped],
    ids=lambda model: model.__name__,
)
def test_at_full_width_nothing_changes(model: Callable[[], nn.Module]) -> None:
    source = networks.source_of(networks.shake(model()))
    narrow = source.narrowed(source.full)
    assert reconstruct(source, source.full, narrow, networks.batches()) == ()
    assert_equal(weights(source.model), narrow.state_dict())


def test_the_error_of_no_layer_grows_when_one_group_is_cut() -> None:
    source = networks.source_of(networks.shake(resnet20(classes=3, width=4)))
    data = networks.batches(1, 8)
    better = 0
    for number in range(len(source.groups)):
        widths = only(source, number)
        model = source.narrowed(widths)
        before = errors(source, widths, model, data[0][0])
        # A tied group is read by layers behind each other: of these only the first is fitted on equal terms.
        assert reconstruct(source, widths, model, data, samples=ALL) == ()
        after = errors(source, widths, model, data[0][0])
        assert before.keys() == after.keys()
        first = next(iter(before))
        assert after[first] <= before[first] * (1 + 1e-5)
        better += after[first] < 0.9 * before[first]
    assert better >= 10


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1e3])
def test_the_error_does_not_grow_at_any_ridge(ridge: float) -> None:
    source = networks.chained()
    data = networks.batches(1, 8)
    widths = only(source, 0)
    model = source.narrowed(widths)
    before = errors(source, widths, model, data[0][0])["3.weight"]
    reconstruct(source, widths, model, data, samples=ALL, ridge=ridge)
    after = errors(source, widths, model, data[0][0])["3.weight"]
    assert after <= before
    if ridge == 1e3:
        assert after > 0.9 * before


def combined(
    model: nn.Sequential, filters: str, norm: str | None, source: int, factors: dict[int, float]
) -> None:
    """Make channels multiples of another one before the activation."""
    with torch.no_grad():
        for other, factor in factors.items():
            for name in (f"{filters}.weight", f"{filters}.bias"):
                if name in dict(model.named_parameters()):
                    tensor = model.get_parameter(name)
                    tensor[other] = tensor[source] * (1 if norm else factor)
            if norm:
                module: Any = model.get_submodule(norm)
                for tensor in (module.running_mean, module.running_var):
                    tensor[other] = tensor[source]
                for tensor in (module.weight, module.bias):
                    tensor[other] = tensor[source] * factor


def test_it_is_exact_when_removed_channels_are_multiples_of_kept_ones() -> None:
    model = networks.chain()
    # ReLU and pooling leave positive factors as they are.
    combined(model, "0", "1", 1, {4: 2.0, 5: 0.5})
    combined(model, "3", None, 0, {6: 1.5, 7: 3.0})
    combined(model, "6", "7", 2, {4: 0.7})
    source = networks.source_of(model)
    widths = (4, 6, 4)
    narrow = source.narrowed(widths)
    x = networks.batches(1, 8, seed=9)[0][0]
    with torch.no_grad():
        expected = source.model(x)
        assert (narrow(x) - expected).abs().max() > 0.1
        reconstruct(source, widths, narrow, networks.batches(4, 16), samples=ALL)
        torch.testing.assert_close(narrow(x), expected, rtol=1e-3, atol=1e-3)


def test_it_is_exact_when_removed_channels_are_combinations_of_kept_ones_and_a_constant() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(45, 3)
    )
    networks.shake(model)
    with torch.no_grad():
        kernel, bias = model.get_parameter("0.weight"), model.get_parameter("0.bias")
        mixed = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
        kernel[5:] = torch.einsum("oi,ichw->ochw", mixed, kernel[:5])
        # Without padding the bias of the reader takes up any constant.
        bias[5:] = torch.tensor([1.0, -2.0, 3.0])
    source = networks.source_of(model, side=9)
    widths = (5, 5)
    narrow = source.narrowed(widths)
    reconstruct(source, widths, narrow, networks.batches(4, 16, side=9), samples=ALL)
    x = networks.batches(1, 8, side=9, seed=9)[0][0]
    with torch.no_grad():
        torch.testing.assert_close(narrow(x), source.model(x), rtol=1e-3, atol=1e-3)


READERS: dict[str, Callable[[], nn.Module]] = {
    "1x1": lambda: nn.Conv2d(6, 4, 1),
    "3x3 stride 2 padding 1": lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False),
    "3x2 dilation 2": lambda: nn.Conv2d(6, 4, (3, 2), dilation=(2, 1)),
    "same": lambda: nn.Conv2d(6, 4, 5, padding="same"),
    "circular": lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"),
    "flattened": lambda: nn.Sequential(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(24, 4)),
}


def responses(reader: nn.Module, read: Tensor) -> Tensor:
    """The first output with one of its weights, or its bias, one and all else zero: `(rows, weights)`."""
    found = []
    for parameter in reader.parameters():
        for place in range(parameter[0].numel()):
            for other in reader.parameters():
                other.zero_()
            parameter.view(len(parameter), -1)[0, place] = 1
            found.append(reader(read)[:, 0].flatten())
    return torch.stack(found, 1)


@pytest.mark.parametrize("reader", READERS)
@torch.no_grad()
def test_the_fit_is_the_least_squares_solution_of_the_outputs(reader: str) -> None:
    model = networks.shake(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), READERS[reader]()))
    source = networks.source_of(model)
    ((images, _),) = data = networks.batches(1, 24)
    narrow: Any = source.narrowed((4,))
    assert reconstruct(source, (4,), narrow, data, samples=ALL, ridge=1e-9) == ()
    found = torch.cat([parameter.reshape(4, -1) for parameter in narrow[2].parameters()], 1).clone()
    expected = source.model(images).movedim(1, 0).flatten(1).T
    rows = responses(narrow[2], narrow[:2](images))
    solution = np.linalg.lstsq(rows.double().numpy(), expected.double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(found.numpy(), solution.T, rtol=1e-3, atol=1e-4)


def test_fitted_models_are_nearer_to_the_whole_one_on_other_images() -> None:
    source = networks.source_of(networks.shake(resnet20(classes=3, width=4)))
    widths = half(source)
    fitted = source.narrowed(widths)
    left = reconstruct(source, widths, fitted, networks.batches(4, 64), samples=ALL)
    assert left == ()
    x = networks.batches(1, 64, seed=9)[0][0]
    with torch.no_grad():
        expected, cut, found = source.model(x), source.narrowed(widths)(x), fitted(x)
    assert (found - expected).norm() < 0.5 * (cut - expected).norm()


def test_layers_behind_are_fitted_to_what_fitted_layers_make() -> None:
    source = networks.chained()
    widths, data = half(source), networks.batches(2, 32)
    fitted = source.narrowed(widths)
    reconstruct(source, widths, fitted, data, samples=ALL)
    images = torch.cat([images for images, _ in data])
    found = errors(source, widths, fitted, images)["6.weight"]
    # No other weights of the last convolution come closer, with the layers before it as they are now.
    ((layer, x, output),) = seen(fitted, images)["6.weight"]
    every = Places(
        torch.arange(len(output)).repeat_interleave(output[0, 0].numel()),
        torch.arange(output[0, 0].numel()).repeat(len(output)),
    )
    rows = inputs_at(layer, x, output, every).flatten(1)
    cut = kept(source, widths)["6.weight"][0]
    expected = outputs_at(layer, seen(source.model, images)["6.weight"][0][2], every)[:, cut]
    residuals = np.linalg.lstsq(rows.numpy(), expected.numpy(), rcond=None)[1]
    assert found == pytest.approx(residuals.sum(), rel=1e-3)


def test_only_layers_that_read_fewer_channels_change_and_never_the_whole_model() -> None:
    source = networks.chained()
    before = weights(source.model)
    widths = only(source, 1)
    model = source.narrowed(widths)
    cut = weights(model)
    reconstruct(source, widths, model, networks.batches())
    assert_equal(before, source.model.state_dict())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, cut[name])}
    assert changed == {"6.weight"}
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_with_groups_are_left_alone_and_named() -> None:
    source = networks.source_of(networks.shake(networks.Grouped()))
    widths = half(source)
    model = source.narrowed(widths)
    cut = weights(model)
    assert reconstruct(source, widths, model, networks.batches()) == ("depthwise", "halves")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, cut[name])}
    assert changed == {"fc.weight", "fc.bias"}


@torch.no_grad()
def test_a_layer_that_runs_twice_is_fitted_to_both_runs() -> None:
    source = networks.source_of(networks.shake(networks.Own()))
    ((images, _),) = data = networks.batches(1, 24)
    model: Any = source.narrowed((3,))
    cut = kept(source, (3,))["twice.weight"][0]
    made = [output[:, cut].flatten() for _, _, output in seen(source.model, images)["twice.weight"]]
    # Of the second run what the layer made of it before.
    read = [x for _, x, _ in seen(model, images)["twice.weight"]]
    reconstruct(source, (3,), model, data, samples=ALL, ridge=1e-9)
    weight = model.twice.weight.flatten(1)
    rows = torch.cat([F.unfold(x, 3).transpose(1, 2).flatten(0, 1) for x in read]).double()
    expected = torch.cat([m.view(24, 3, -1).transpose(1, 2).flatten(0, 1) for m in made]).double()
    solution = np.linalg.lstsq(rows.numpy(), expected.numpy(), rcond=None)[0]
    np.testing.assert_allclose(weight.numpy(), solution.T, rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_weights() -> None:
    source = networks.chained()
    widths = half(source)
    models = [source.narrowed(widths) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.rand(3)
        reconstruct(source, widths, model, networks.batches(), samples=3, seed=seed)
    assert_equal(weights(models[0]), models[1].state_dict())
    assert not torch.equal(models[0].get_parameter("3.weight"), models[2].get_parameter("3.weight"))


def test_a_layer_that_reads_only_zeros_is_left_as_it_is() -> None:
    model = networks.chain()
    with torch.no_grad():
        model.get_parameter("1.weight")[:3] = 0
        model.get_parameter("1.bias")[:3] = -1
    source = networks.source_of(model)
    widths = (3, 8, 5)
    narrow = source.narrowed(widths)
    cut = weights(narrow)
    reconstruct(source, widths, narrow, networks.batches())
    assert torch.equal(narrow.get_parameter("3.weight"), cut["3.weight"])


def test_a_model_that_is_trained_on_or_on_other_weights_can_be_fitted() -> None:
    source = networks.chained()
    widths = half(source)
    model = networks.shake(source.narrowed(widths), seed=7).train()
    images = networks.batches()[0][0]
    reconstruct(source, widths, model, networks.batches(), samples=ALL)
    again = copy.deepcopy(model)
    assert not model.training
    with torch.no_grad():
        assert torch.isfinite(again(images)).all()


# Bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [0, -1, 1.5, True])
def test_samples_must_be_a_count(samples: Any) -> None:
    source = networks.chained()
    with pytest.raises(ConversionError, match="samples must be an integer >= 1"):
        reconstruct(source, half(source), source.narrowed(half(source)), networks.batches(), samples=samples)


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("inf"), float("nan")])
def test_ridge_must_be_above_zero(ridge: float) -> None:
    source = networks.chained()
    with pytest.raises(ConversionError, match="ridge must be a finite number > 0"):
        reconstruct(source, half(source), source.narrowed(half(source)), networks.batches(), ridge=ridge)


def test_too_small_a_ridge_is_said() -> None:
    model = networks.chain()
    combined(model, "0", "1", 0, {1: 1.0, 2: 1.0})
    source = networks.source_of(model)
    widths = (3, 8, 5)
    with pytest.raises(ConversionError, match="layer 3 cannot be fitted with ridge 1e-300: make it greater"):
        reconstruct(source, widths, source.narrowed(widths), networks.batches(1, 1), samples=1, ridge=1e-300)


def test_the_model_must_have_the_widths() -> None:
    source = networks.chained()
    with pytest.raises(ConversionError, match=r"0.weight must be \(3, 3, 3, 3\), it has \(6, 3, 3, 3\)"):
        reconstruct(source, half(source), source.narrowed(source.full), networks.batches())
    with pytest.raises(ConversionError, match=r"not of these widths: 0.weight must be .*, it has none"):
        reconstruct(source, half(source), nn.Identity(), networks.batches())


def test_there_must_be_images_and_they_must_be_finite() -> None:
    source = networks.chained()
    widths = half(source)
    with pytest.raises(DataError, match="at least one batch"):
        reconstruct(source, widths, source.narrowed(widths), [])
    ((images, targets),) = networks.batches(1)
    images[0, 0] = torch.nan
    with pytest.raises(ConversionError, match="into or out of layer 3 holds nan or infinity"):
        reconstruct(source, widths, source.narrowed(widths), [(images, targets)])
