"""Rounding that is learned, so that what a layer or a block gives stays what it gave in floating point.

Rounding every weight to its nearest level is not what keeps a layer's output: errors of weights that read
similar inputs add up. Here every weight learns whether to go up or down. With one layer at a time this is
AdaRound, with one residual block at a time BRECQ.

Sources: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, equations 21
to 25; Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", ICLR 2021,
section 3 and its published settings; blocks are matched by the plain squared error, as those settings do.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autocompress.errors import QuantizationError
from autocompress.quantize.capture import batches, calls, captured, evaluating, submodule
from autocompress.quantize.layer import QuantizedLayer, quantized_layers
from autocompress.quantize.quantizer import Quantizer
from autocompress.quantize.rounding import SoftRounding


@dataclass(frozen=True)
class Reconstruction:
    """What came of one block.

    Attributes:
        name: Of the block.
        before: Squared error of its output with weights rounded to the nearest level: summed over channels,
            mean over images and positions; smaller is better.
        after: The same afterwards; never greater.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Settings:
    """How rounding is learned; numbers of the papers, but for `steps` (10,000 there) and `scale_rate`.

    Attributes:
        steps: Of the optimizer, a block. Steps times learning rate should be 10 and more: logits move by the
            rate a step, and weights that are still undecided at the end lose what they had learned.
        batch: Images a step.
        learning_rate: Of Adam; .01 in AdaRound, .001 in BRECQ, with 20,000 steps.
        regularisation: Weight of the term that pushes weights to one side (lambda); .1 suits MobileNetV2.
        warm_up: Share of the steps without it.
        beta: Its exponent at first and at last: high ones leave the middle alone.
        scale_steps: Steps that learn the scales of activations after the weights of a block; 5,000 in BRECQ.
        scale_rate: Learning rate of scales, relative to each scale, falling as a cosine; BRECQ's .0004 is
            absolute.
        seed: Of the order of the images.

    Raises:
        QuantizationError: A number is out of range.
    """

    steps: int = 2000
    batch: int = 32
    learning_rate: float = 1e-2
    regularisation: float = 0.01
    warm_up: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    scale_steps: int = 0
    scale_rate: float = 4e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if min(self.steps, self.batch) < 1 or self.scale_steps < 0:
            raise QuantizationError(
                "steps and batch must be at least 1 and scale_steps at least 0, got "
                f"{self.steps!r}, {self.batch!r} and {self.scale_steps!r}"
            )
        if not 0 <= self.warm_up < 1:
            raise QuantizationError(f"warm_up must be a share of the steps below 1, got {self.warm_up!r}")


def reconstruct(
    network: nn.Module,
    reference: nn.Module,
    blocks: Sequence[str],
    images: Tensor,
    settings: Settings | None = None,
) -> tuple[Reconstruction, ...]:
    """Learn the rounding of the weights in blocks, in the order given, which should be that of execution.

    A block reads what the quantized network gives it, and is to give what it gives in floating point. Its
    inputs and outputs over all images are held in memory. Afterwards the weights are numbers that their
    quantizers return as they are: it is a network of quantized layers as before.

    Args:
        network: Changed in place. Its weights are those of `reference`, not rounded yet.
        reference: The network in floating point, with the same names; not changed.
        blocks: Names of modules whose output is matched.
        images: `(images, ...)`, already normalised; a thousand in the papers.
        settings: How to learn.

    Returns:
        What came of each block.

    Raises:
        QuantizationError: A block is absent, runs more or less often than once, holds no layer that can be
            learned, or shares weights with another block or layer; nothing has changed then.
    """
    settings = settings or Settings()
    with evaluating(network, reference):
        _check(network, reference, blocks, images)
        return tuple(_learn_block(network, reference, name, images, settings) for name in blocks)


def _check(network: nn.Module, reference: nn.Module, blocks: Sequence[str], images: Tensor) -> None:
    """Refuse what cannot be learned before anything has changed."""
    first = next(batches(images, 2))
    for either in (network, reference):
        for name, times in calls(either, blocks, first).items():
            if times != 1:
                raise QuantizationError(
                    f"block {name!r} runs {times} times in a forward pass, so that it has no one output to "
                    "match; leave it out, or choose a block around all its calls"
                )
    for block in blocks:
        captured(network, block, first, what="input", batch=len(first))
        captured(reference, block, first, what="output", batch=len(first))
    owners: dict[Tensor, str] = {}
    for block in blocks:
        layers = learnable(submodule(network, block), block)
        for name, layer, _ in layers:
            weight: Tensor = layer.layer.get_parameter("weight")
            if weight in owners:
                raise QuantizationError(
                    f"the weights of {name!r} were named before, as {owners[weight]!r}: they can be rounded "
                    "once; name each block once, and blocks around layers that share weights"
                )
            owners[weight] = name


def learnable(block: nn.Module, name: str) -> list[tuple[str, QuantizedLayer, Quantizer]]:
    """Return the layers of a block whose rounding can be learned, with the quantizers of their weights.

    Raises:
        QuantizationError: There are none, or levels are not evenly spaced.
    """
    result = []
    for inner, layer in quantized_layers(block):
        full = f"{name}.{inner}".strip(".")
        if layer.weight is None:
            continue
        if type(layer.weight) is not Quantizer or layer.weight.grid.levels == "logarithmic":
            raise QuantizationError(
                f"the rounding of {full!r} cannot be learned: its weights need a Quantizer of evenly spaced "
                "levels; leave its block out"
            )
        result.append((full, layer, layer.weight))
    if not result:
        raise QuantizationError(f"block {name!r} has no quantized weights whose rounding could be learned")
    return result


def _learn_block(
    network: nn.Module, reference: nn.Module, name: str, images: Tensor, settings: Settings
) -> Reconstruction:
    """Learn one block, and keep what was learned where it is better."""
    block = submodule(network, name)
    inputs = captured(network, name, images, what="input", batch=settings.batch)
    targets = captured(reference, name, images, what="output", batch=settings.batch)
    order = torch.Generator().manual_seed(settings.seed)
    before = _error(block, inputs, targets, settings.batch)
    layers = learnable(block, name)
    roundings = [
        SoftRounding(layer.layer.get_parameter("weight"), quantizer) for _, layer, quantizer in layers
    ]
    for (_, layer, _), rounding in zip(layers, roundings, strict=True):
        layer.register_module("weight", rounding)
    try:
        _learn_rounding(block, roundings, inputs, targets, settings, order)
    finally:
        for _, layer, quantizer in layers:
            layer.register_module("weight", quantizer)
    weights = [layer.layer.get_parameter("weight") for _, layer, _ in layers]
    floats = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, rounding in zip(weights, roundings, strict=True):
            weight.copy_(rounding.hard())
    after = _error(block, inputs, targets, settings.batch)
    if not after <= before:
        # Few steps can end above the nearest levels, which then are what is kept.
        with torch.no_grad():
            for weight, given, (_, _, quantizer) in zip(weights, floats, layers, strict=True):
                weight.copy_(quantizer(given))
        after = before
    scales = _activation_scales(block) if settings.scale_steps else []
    if scales:
        given_scales = [scale.detach().clone() for scale in scales]
        _learn_scales(block, scales, inputs, targets, settings, order)
        learned = _error(block, inputs, targets, settings.batch)
        if learned <= after:
            after = learned
        else:
            with torch.no_grad():
                for scale, value in zip(scales, given_scales, strict=True):
                    scale.copy_(value)
    return Reconstruction(name, before, after)


def _learn_rounding(
    block: nn.Module,
    roundings: Sequence[SoftRounding],
    inputs: Tensor,
    targets: Tensor,
    settings: Settings,
    order: torch.Generator,
) -> None:
    """Train the rounding of all layers of a block together."""
    logits = [rounding.logits for rounding in roundings]

    def loss(step: int, output: Tensor, target: Tensor) -> Tensor:
        result = squared_error(output, target)
        progress = (step / settings.steps - settings.warm_up) / (1 - settings.warm_up)
        if progress >= 0:
            first, last = settings.beta
            beta = last + (first - last) * (1 - progress)
            undecided = torch.stack([rounding.undecided(beta) for rounding in roundings]).sum()
            result = result + settings.regularisation * undecided
        return result

    optimizer = torch.optim.Adam(logits, lr=settings.learning_rate)
    _train(block, logits, optimizer, loss, inputs, targets, settings.steps, settings.batch, order)


def _learn_scales(
    block: nn.Module,
    scales: Sequence[nn.Parameter],
    inputs: Tensor,
    targets: Tensor,
    settings: Settings,
    order: torch.Generator,
) -> None:
    """Train the scales of a block's activations."""
    # Adam steps by the learning rate itself: a part of each scale, or small scales would turn negative.
    groups = [
        {"params": [scale], "lr": settings.scale_rate * float(scale.detach().mean())} for scale in scales
    ]
    optimizer = torch.optim.Adam(groups)
    rates = [group["lr"] for group in optimizer.param_groups]

    def loss(step: int, output: Tensor, target: Tensor) -> Tensor:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * step / settings.scale_steps)) / 2
        return squared_error(output, target)

    _train(block, scales, optimizer, loss, inputs, targets, settings.scale_steps, settings.batch, order)


def _train(
    block: nn.Module,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loss: Callable[[int, Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    steps: int,
    batch: int,
    order: torch.Generator,
) -> None:
    for step in range(steps):
        # A batch is a copy: layers of the block may write over it in place.
        chosen = torch.randint(len(inputs), (min(batch, len(inputs)),), generator=order)
        value = loss(step, block(inputs[chosen]), targets[chosen])
        # Asked for these alone: gradients of other parameters stay as they were.
        gradients = torch.autograd.grad(value, list(parameters))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the squared error, summed over channels, mean over images and positions.

    Channels are axis 1, as in the papers' code: the loss then weighs as much against the regularisation for
    any size of image.
    """
    return (output - target).square().sum(1).mean()


def _error(block: nn.Module, inputs: Tensor, targets: Tensor, batch: int) -> float:
    """Return the squared error over all images."""
    with torch.no_grad():
        total = sum(
            float(squared_error(block(x.clone()), y)) * len(x)
            for x, y in zip(batches(inputs, batch), batches(targets, batch), strict=True)
        )
    return total / len(inputs)


def _activation_scales(block: nn.Module) -> list[nn.Parameter]:
    """Return the scales of a block's inputs and outputs that can be learned, each once."""
    found: dict[nn.Parameter, None] = {}
    for _, layer in quantized_layers(block):
        for quantizer in (layer.input, layer.output):
            if quantizer is not None and quantizer.gradient != "fixed":
                found[quantizer.scale] = None
    return [scale for scale in found if scale.requires_grad]
