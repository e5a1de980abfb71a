"""What bits cost in loss, by its curvature: traces of Hessians times squared errors of rounding.

Sources: Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", NeurIPS 2020,
equation 9 for weights and section 3.4 for activations.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.quantize.grid import quantized
from autocompress.quantize.hessian import Batch, Loss, hessian_traces, sensitivity
from autocompress.quantize.ops import FULL_PRECISION
from autocompress.quantize.quantizer import Quantizer
from autocompress.quantize.source import QuantizationSource

Losses = dict[str, dict[int, float]]
"""Name of a layer, or of what it reads, to the loss that is expected at each number of bits."""


def expected_losses(
    source: QuantizationSource, batches: Sequence[Batch], loss: Loss, *, samples: int = 50, seed: int = 0
) -> tuple[Losses, Losses]:
    """Return how much each layer's weights and inputs are expected to add to the loss, times two.

    Weights: the mean trace of the Hessian times the squared error of all weights. Inputs: the same of the
    tensor that the layer reads, the mean over images. At 32 bits it is 0.

    Args:
        source: The model.
        batches: Some training images with their targets.
        loss: Of outputs and targets, a mean over images.
        samples: At most so many products with each Hessian (`hessian_traces`).
        seed: Of the random vectors.

    Returns:
        Of weights by layer, of inputs by source.

    Raises:
        QuantizationError: There are no batches, or a curvature is not finite.
    """
    model, sites = source.model, source.plan.sites
    weights = {site.name: _weight(model, site.name) for site in sites}
    reads = [site.name for site in sites if site.name == site.source]
    with _disturbed(model, reads, batches) as disturbances:
        traces = hessian_traces(model, loss, batches, weights | disturbances, samples=samples, seed=seed)
    of_weights: Losses = {}
    for number, site in enumerate(sites):
        of_weights[site.name] = {FULL_PRECISION: 0.0}
        for bits in source.weight_widths:
            rounded = _rounded(source.quantizer(number, "weight", bits), weights[site.name])
            of_weights[site.name][bits] = sensitivity(traces[site.name].mean, weights[site.name], rounded)
    of_inputs = {
        name: {
            FULL_PRECISION: 0.0,
            **{bits: traces[_input_of(name)].mean * error for bits, error in errors.items()},
        }
        for name, errors in _input_errors(source, reads, batches).items()
    }
    return of_weights, of_inputs


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    found: Any = model.get_submodule(name)
    weight: nn.Parameter = found.weight
    return weight


def _input_of(name: str) -> str:
    return f"{name} reads"


@contextmanager
def _disturbed(
    model: nn.Module, names: Sequence[str], batches: Iterable[Batch]
) -> Iterator[dict[str, nn.Parameter]]:
    """Add a zero to what layers read, the same for every image, so that curvature along it can be asked for.

    Images do not depend on each other in evaluation mode: the Hessian along it is the mean of theirs.
    """
    found: dict[str, nn.Parameter] = {}
    (images, _), *_ = batches
    with ExitStack() as stack:
        for name in names:

            def add(module: nn.Module, given: tuple[Tensor, ...], name: str = name) -> tuple[Tensor, ...]:
                if name not in found:
                    found[name] = nn.Parameter(torch.zeros_like(given[0][:1]))
                return (given[0] + found[name], *given[1:])

            stack.callback(model.get_submodule(name).register_forward_pre_hook(add).remove)
        with torch.no_grad():
            model(images[:1])
        yield {_input_of(name): disturbance for name, disturbance in found.items()}


def _input_errors(
    source: QuantizationSource, names: Sequence[str], batches: Iterable[Batch]
) -> dict[str, dict[int, float]]:
    """Return the squared error of what layers read at each width, the mean over images of the sum over it."""
    numbers = {site.name: number for number, site in enumerate(source.plan.sites)}
    quantizers = {
        name: {bits: source.quantizer(numbers[name], "input", bits) for bits in source.activation_widths}
        for name in names
    }
    totals: dict[str, dict[int, float]] = {
        name: dict.fromkeys(source.activation_widths, 0.0) for name in names
    }
    count = 0
    with ExitStack() as stack, torch.no_grad():
        for name in names:

            def measure(module: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                for bits, quantizer in quantizers[name].items():
                    error = _rounded(quantizer, given[0]) - given[0]
                    totals[name][bits] += float(error.double().square().sum())

            stack.callback(source.model.get_submodule(name).register_forward_pre_hook(measure).remove)
        for images, _ in batches:
            source.model(images)
            count += len(images)
    return {name: {bits: total / count for bits, total in of.items()} for name, of in totals.items()}


def _rounded(quantizer: Quantizer, x: Tensor) -> Tensor:
    return quantized(
        x.detach(), quantizer.scale.detach(), quantizer.zero_point.detach(), quantizer.grid, quantizer.axis
    )
