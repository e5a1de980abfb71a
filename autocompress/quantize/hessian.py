"""How much a loss curves along the weights of each layer: what few bits cost, without trying them.

Source: Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", NeurIPS 2020,
sections 3.1 and 3.2.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from autocompress.errors import QuantizationError
from autocompress.quantize.capture import evaluating
from autocompress.quantize.grid import Grid, quantized, scale_of
from autocompress.quantize.observers import weight_range

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of outputs and targets: a scalar, the mean over the batch."""

Batch = tuple[Tensor, Tensor]
"""Images and targets."""

LEAST_SAMPLES: Final = 10
"""Before the estimates may be taken for settled."""


@dataclass(frozen=True)
class Trace:
    """The estimated trace of the Hessian of a loss with respect to one tensor of weights.

    Attributes:
        mean: Of the diagonal: the trace divided by the number of weights. Away from a minimum it can be
            negative.
        error: Its standard error.
        samples: Random vectors it comes from.
    """

    mean: float
    error: float
    samples: int


def hessian_traces(
    network: nn.Module,
    loss: Loss,
    batches: Sequence[Batch],
    weights: Mapping[str, nn.Parameter],
    *,
    samples: int = 50,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> dict[str, Trace]:
    """Estimate the mean trace of the Hessian for each tensor of weights.

    Hutchinson's estimate: E[z' H z] over vectors z of random signs is the trace of H. A sample is a product
    of z with the Hessian of one tensor (a second backward pass). One product with that of all weights would
    serve all tensors, but what they have in common, zero in expectation, is most of the variance: tensors of
    little curvature took 25 times the samples on a small network. Sampling of a tensor ends when a further
    sample changes its trace by less than the tolerance, relative to its size.

    Args:
        network: In floating point: quantizers have no second derivative. Run in evaluation mode.
        loss: Of its outputs and the targets.
        batches: Their Hessians are averaged by number of images; each sample passes through all of them.
        weights: By name.
        samples: At most this many a tensor.
        tolerance: Of the change, divided by the magnitude of the trace + 1e-6; 0 takes all samples.
        seed: Of the vectors.

    Returns:
        Traces by name.

    Raises:
        QuantizationError: There are no weights or batches, the loss does not depend on some weights, or a
            curvature is not finite.
    """
    if samples < 2:
        raise QuantizationError(f"samples must be at least 2, got {samples!r}")
    estimates = {name: _Estimate(torch.Generator().manual_seed(seed)) for name in weights}
    with _differentiable(network, weights, batches):
        for _ in range(samples):
            going = {
                name: weight for name, weight in weights.items() if not estimates[name].settled(tolerance)
            }
            if not going:
                break
            signs = {name: _signs(weight, estimates[name].generator) for name, weight in going.items()}
            found = dict.fromkeys(going, 0.0)
            for share, batch in _weighted(batches):
                gradients = _gradients(network, loss, batch, going)
                for name, weight in going.items():
                    (product,) = torch.autograd.grad(
                        gradients[name], weight, signs[name], retain_graph=True, materialize_grads=True
                    )
                    found[name] += share * float((signs[name] * product).sum().detach())
            for name, value in found.items():
                estimates[name].add(name, value)
    return {name: estimates[name].trace(weight.numel()) for name, weight in weights.items()}


class _Estimate:
    """Samples of one trace, and the generator of its vectors."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.values: list[float] = []

    def add(self, name: str, value: float) -> None:
        """Take a sample into account."""
        if not math.isfinite(value):
            raise QuantizationError(
                f"the curvature of the loss is not finite for {name!r}, got {value}; look for overflow in "
                "the network"
            )
        self.values.append(value)

    def settled(self, tolerance: float) -> bool:
        """Return whether the last sample changed next to nothing."""
        if len(self.values) < LEAST_SAMPLES:
            return False
        before, mean = statistics.fmean(self.values[:-1]), statistics.fmean(self.values)
        return abs(mean - before) / (abs(mean) + 1e-6) < tolerance

    def trace(self, weights: int) -> Trace:
        """Return the estimate for each of so many weights."""
        error = statistics.stdev(self.values) / math.sqrt(len(self.values))
        return Trace(statistics.fmean(self.values) / weights, error / weights, len(self.values))


def exact_traces(
    network: nn.Module, loss: Loss, batches: Sequence[Batch], weights: Mapping[str, nn.Parameter]
) -> dict[str, float]:
    """Return the mean trace for each tensor of weights, by one derivative a weight: for small networks.

    Raises:
        QuantizationError: As `hessian_traces`.
    """
    result = dict.fromkeys(weights, 0.0)
    with _differentiable(network, weights, batches):
        for share, batch in _weighted(batches):
            gradients = _gradients(network, loss, batch, weights)
            for name, weight in weights.items():
                for at, entry in enumerate(gradients[name].flatten()):
                    (row,) = torch.autograd.grad(entry, weight, retain_graph=True, materialize_grads=True)
                    result[name] += share * float(row.flatten()[at]) / weight.numel()
    return result


def sensitivity(mean_trace: float, weight: Tensor, rounded: Tensor) -> float:
    """Return the expected increase of the loss, up to a factor, when weights are rounded.

    Omega of HAWQ-V2, equation 9: the mean trace times the squared distance. Smaller is better.
    """
    return mean_trace * float((rounded - weight).detach().double().square().sum())


def sensitivities(
    mean_trace: float,
    weight: Tensor,
    grids: Mapping[int, Grid],
    *,
    axis: int | None = 0,
    method: str = "mse",
) -> dict[int, float]:
    """Return `sensitivity` by bits.

    Args:
        mean_trace: Of the layer.
        weight: Its weights.
        grids: By bits.
        axis: Along which weights have a scale each.
        method: Of `weight_range`.
    """
    result = {}
    for bits, grid in grids.items():
        scale, zero_point = scale_of(*weight_range(weight, grid, axis, method), grid)
        rounded = quantized(weight.detach(), scale, zero_point, grid, axis)
        result[bits] = sensitivity(mean_trace, weight, rounded)
    return result


@contextmanager
def _differentiable(
    network: nn.Module, weights: Mapping[str, nn.Parameter], batches: Sequence[Batch]
) -> Iterator[None]:
    """Let the network be derived by these weights alone; batch norms take their running statistics.

    With the statistics of the batch, the loss of an image would depend on the other images.

    Raises:
        QuantizationError: There are no weights or batches, or an operation has no second derivative.
    """
    if not weights:
        raise QuantizationError("weights must not be empty: name the parameters whose curvature is asked for")
    if not batches or any(len(images) == 0 for images, _ in batches):
        raise QuantizationError("batches must hold images")
    wanted = set(weights.values())
    given = {parameter: parameter.requires_grad for parameter in (*network.parameters(), *wanted)}
    try:
        for parameter in given:
            parameter.requires_grad_(parameter in wanted)
        with evaluating(network), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _SecondDerivatives():
            yield
    except RuntimeError as error:
        if "derivative" not in str(error) or "not implemented" not in str(error):
            raise
        raise QuantizationError(
            f"PyTorch has no second derivative of an operation of {type(network).__name__}, which curvature "
            f"(hawq) needs: {error}; write the operation otherwise, or take another strategy, such as exact"
        ) from error
    finally:
        for parameter, requires in given.items():
            parameter.requires_grad_(requires)


class _SecondDerivatives(TorchFunctionMode):
    """Computes hard sigmoid by what it is made of: PyTorch 2.13 does not derive its kernel twice."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of PyTorch."""
        if func is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        return func(*args, **(kwargs or {}))


def _weighted(batches: Sequence[Batch]) -> Iterator[tuple[float, Batch]]:
    """Yield batches with their share of all images."""
    total = sum(len(images) for images, _ in batches)
    for batch in batches:
        yield len(batch[0]) / total, batch


def _gradients(
    network: nn.Module, loss: Loss, batch: Batch, weights: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return the gradients of the loss, which can be derived again."""
    images, targets = batch
    value = loss(network(images), targets)
    gradients = torch.autograd.grad(value, list(weights.values()), create_graph=True, allow_unused=True)
    unused = [name for name, gradient in zip(weights, gradients, strict=True) if gradient is None]
    if unused:
        raise QuantizationError(f"the loss does not depend on the weights {unused}; leave them out")
    return dict(zip(weights, gradients, strict=True))


def _signs(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return 1 or -1 for every entry, each as likely."""
    return (2 * torch.randint(2, tensor.shape, generator=generator) - 1).to(tensor)
