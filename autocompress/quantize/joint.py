"""Architectures, or channels, and bits in one space, so that both are searched under one budget.

The space of a supernet is multiplied by the bits of every layer with weights: blocks price operations at
their bits, whatever else decides them. What is evaluated is a slice of the supernet, quantized.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.cost import Values
from autocompress.elastic.extract import extract
from autocompress.elastic.recalibrate import recalibrate
from autocompress.elastic.supernet import Supernet, resize
from autocompress.errors import QuantizationError
from autocompress.latency.target import Scheme
from autocompress.network import module_name
from autocompress.ops import Conv2d, Linear, Ops, SqueezeExcite
from autocompress.prune.network import source_of
from autocompress.prune.ops import Convolution
from autocompress.quantize.calibrate import ranges
from autocompress.quantize.grid import Grid, scale_of
from autocompress.quantize.layer import QuantizedLayer, room_for_bias
from autocompress.quantize.observers import weight_range
from autocompress.quantize.ops import FULL_PRECISION, at_bits
from autocompress.quantize.plan import make_plan
from autocompress.quantize.quantizer import Gradient, Quantizer
from autocompress.quantize.schemes import (
    Bits,
    activations_of,
    at_ends,
    chosen_apart,
    scales_of,
    weights_of,
)
from autocompress.quantize.source import fold
from autocompress.space import Block, Choice, Codes, Option, SearchSpace
from autocompress.training.data import DataSet
from autocompress.training.evaluate import evaluate
from autocompress.training.task import Task

KINDS = (Conv2d, Convolution, Linear, SqueezeExcite)


@dataclass(frozen=True)
class JointLayer:
    """A layer of the networks of a space, and the choices of its bits.

    Attributes:
        names: Of its modules in an extracted network: squeeze-excite has two, others one.
        norm: Of the batch norm that is folded into it; empty if there is none.
        weight: Name of the choice of its weights' bits.
        input: Name of the choice of its input's bits.
    """

    names: tuple[str, ...]
    norm: str
    weight: str
    input: str


@dataclass(frozen=True)
class Joint:
    """A space multiplied by bits.

    Attributes:
        base: The space of a supernet.
        space: Its choices, and the bits behind them.
        layers: In the order of the blocks.
    """

    base: SearchSpace
    space: SearchSpace
    layers: tuple[JointLayer, ...]

    def split(self, codes: Codes) -> tuple[Codes, dict[str, Bits]]:
        """Return the architecture of one row `(1, choices)`, and the bits of its layers by name."""
        (arch,) = self.space.decode(codes)
        settings = dict(arch.settings)
        bits = {
            name: (int(settings[layer.weight]), int(settings[layer.input]))
            for layer in self.layers
            if layer.weight in settings and layer.input in settings
            for name in layer.names
        }
        return self.base.canonical(codes[:, : len(self.base.choices)]), bits

    def joined(self, base: Codes, bits: Bits) -> Codes:
        """Return rows of the space `(n, choices)`: architectures with the same bits in every layer.

        Layers that have not these bits, as the ends, have the most they can.
        """
        rest = self.space.choices[len(self.base.choices) :]
        wanted = [bits[0] if not choice.name.endswith(".input") else bits[1] for choice in rest]
        codes = [
            choice.options.index(width) if width in choice.options else len(choice.options) - 1
            for choice, width in zip(rest, wanted, strict=True)
        ]
        return self.space.canonical(np.hstack([base, np.tile(codes, (len(base), 1))]).astype(np.int64))


def joint_space(base: SearchSpace, widths: Iterable[Bits], *, ends: int | None = 8) -> Joint:
    """Multiply a space by the bits of its layers.

    Args:
        base: Of operations of `autocompress.ops`, or `channels`.
        widths: Legal pairs of bits of weights and inputs: all pairs of some widths, or equal ones only.
        ends: Bits of the first and the last layer (`schemes.at_ends`).

    Raises:
        QuantizationError: There are no widths, or neither all pairs of some nor equal ones only; no layers
            have weights.
    """
    pairs = tuple(sorted(set(widths)))
    if not pairs:
        raise QuantizationError("no widths are legal; name at least one pair")
    apart = chosen_apart(pairs)
    norms = _norms(base) if base.name == "channels" else {}
    found: dict[str, JointLayer] = {}
    places: list[tuple[Block, int, str]] = []
    blocks: list[Block] = []
    for block in base.priced_blocks:
        quantized = sorted(
            {
                at
                for setting in base.block_settings(block)
                for at, op in enumerate(block.operations(*setting))
                if isinstance(op, KINDS)
            }
        )
        for at in quantized:
            layer = _layer(base, block, at, norms, joined=not apart)
            found.setdefault(layer.weight, layer)
            places.append((block, at, layer.weight))
        blocks.append(
            Block(f"{block.name}.rest", block.choices, partial(_rest, block.operations, frozenset(quantized)))
        )
    if not found:
        raise QuantizationError(f"space {base.name!r} has no convolutions or linear layers with weights")
    choices: dict[str, Choice] = {}
    names = list(found)
    for block, at, name in places:
        layer = found[name]
        own = at_ends(pairs, ends) if name in (names[0], names[-1]) else pairs
        condition = _condition(base, block)
        for side, choice in enumerate((layer.weight, layer.input)):
            options = tuple(sorted({pair[side] for pair in own}))
            choices.setdefault(choice, Choice(choice, options, active_when=condition))
        both = tuple(dict.fromkeys((layer.weight, layer.input)))
        run = partial(_at, block.operations, at, len(block.choices))
        blocks.append(Block(f"{block.name}.{at}", (*block.choices, *both), run))
    space = SearchSpace(f"{base.name} x bits", (*base.choices, *choices.values()), tuple(blocks))
    return Joint(base, space, tuple(found.values()))


def _condition(base: SearchSpace, block: Block) -> tuple[tuple[str, tuple[Option, ...]], ...]:
    """Return when the choices of a block's own have an effect: its bits have it then too."""
    for name in block.choices:
        if condition := base.choices[base.positions[name]].active_when:
            return condition
    return ()


def _layer(base: SearchSpace, block: Block, at: int, norms: Mapping[str, str], *, joined: bool) -> JointLayer:
    """Name a layer as the extracted network does."""
    if base.name == "channels":
        source = source_of(base)
        name = source.trace.priced[int(block.name.partition(".")[0])].name
        full, norm = f"network.0.{name}", f"network.0.{norms[name]}" if norms.get(name) else ""
        modules: tuple[str, ...] = (full,)
    else:
        place = f"{module_name(block.name)}.{at}"
        first = next(ops[at] for s in base.block_settings(block) if len(ops := block.operations(*s)) > at)
        full = place
        parts = ("reduce", "expand") if isinstance(first, SqueezeExcite) else ("conv",)
        parts = ("linear",) if isinstance(first, Linear) else parts
        modules = tuple(f"{place}.{part}" for part in parts)
        norm = f"{place}.bn" if getattr(first, "norm", False) else ""
    if joined:
        return JointLayer(modules, norm, f"{full}.bits", f"{full}.bits")
    return JointLayer(modules, norm, f"{full}.weight", f"{full}.input")


def _norms(base: SearchSpace) -> dict[str, str]:
    """Return the batch norm that can be folded into each layer of a user's model."""
    source = source_of(base)
    plan = make_plan(source.model, torch.zeros(1, *source.trace.in_shape))
    return {site.name: site.norm for site in plan.sites}


def _rest(operations: Any, quantized: frozenset[int], *options: Option) -> Ops:
    return tuple(op for at, op in enumerate(operations(*options)) if at not in quantized)


def _at(operations: Any, at: int, count: int, *options: Option) -> Ops:
    ops: Ops = operations(*options[:count])
    bits = options[count:]
    return (at_bits(ops[at], int(bits[0]), int(bits[-1])),) if len(ops) > at else ()


def quantize_layers(
    network: nn.Module,
    bits: Mapping[str, Bits],
    images: Sequence[Tensor],
    scheme: Scheme,
    *,
    norms: Mapping[str, str] | None = None,
    method: str = "mse",
    gradient: Gradient = "lsq",
) -> nn.Module:
    """Quantize the layers of any network, in place, with ranges of its own; nothing is traced.

    Inputs whose least value on the images is 0 or more get an unsigned grid.

    Args:
        network: In evaluation mode.
        bits: By name of the layer; 32 leaves weights or input in floating point.
        images: What ranges are found on, in batches.
        scheme: How the device quantizes.
        norms: Batch norms to fold, by name of the layer.
        method: Of ranges, of weights and inputs alike.
        gradient: How scales are learned.

    Raises:
        QuantizationError: There are no images, or a layer did not run.
    """
    fold(network, norms or {})
    layers = {name: cast(Any, network.get_submodule(name)) for name in bits}
    seen = ranges(
        network,
        images,
        inputs=[n for n, b in bits.items() if b[1] != FULL_PRECISION],
        outputs={},
        method=method,
    )
    for name, (weight_bits, input_bits) in bits.items():
        layer, parts = layers[name], dict[str, Quantizer]()
        if input_bits != FULL_PRECISION:
            observer = seen.inputs[name]
            # The range of a grid that can lie anywhere says whether there is anything below zero.
            positive = float(observer.range(Grid(8, signed=False, symmetric=False))[0]) >= 0
            grid = activations_of(scheme, input_bits, positive=positive)
            parts["input"] = Quantizer(grid, gradient=gradient)
            parts["input"].lay([scale_of(*observer.range(grid), grid)])
        if weight_bits != FULL_PRECISION:
            grid = weights_of(scheme, weight_bits)
            count, axis = scales_of(scheme, layer)
            parts["weight"] = Quantizer(grid, channels=count, axis=axis, gradient=gradient)
            scale, zero_point = scale_of(*weight_range(layer.weight.detach(), grid, axis, method), grid)
            if "input" in parts:
                scale = room_for_bias(scale, layer.bias, parts["input"].scale.detach())
            parts["weight"].lay([(scale, zero_point)])
        network.set_submodule(name, QuantizedLayer(layer, **parts))
    return network.eval()


@dataclass
class JointEvaluator:
    """Scores slices of a supernet at their bits, on the held-out validation images.

    Attributes:
        supernet: Trained, of `joint.base`.
        joint: What is searched.
        data: Only its validation part is scored.
        task: Says the metric.
        calibration: Training images, for the statistics of batch norm and for ranges.
        scheme: How the device quantizes.
    """

    supernet: Supernet
    joint: Joint
    data: DataSet
    task: Task
    calibration: list[Tensor]
    scheme: Scheme
    paid: bool = True

    def network(self, codes: Codes) -> tuple[nn.Module, tuple[int, int]]:
        """Return the quantized network of one row, and height and width of its images."""
        base, bits = self.joint.split(codes)
        (arch,) = self.joint.base.decode(base)
        statistics = recalibrate(self.supernet, arch, self.calibration)
        network = extract(self.supernet, arch, statistics or {})
        size = self.joint.base.operations(base)[0][1][0].in_shape[1:]
        images = [resize(batch, size) for batch in self.calibration]
        present = dict(network.named_modules())
        norms = {
            layer.names[0]: layer.norm
            for layer in self.joint.layers
            if layer.names[0] in bits and layer.norm and layer.norm in present
        }
        return quantize_layers(network, bits, images, self.scheme, norms=norms), size

    @torch.no_grad()
    def __call__(self, codes: Codes) -> Mapping[str, Values]:
        """Return the mean score and its standard error, each `(n,)`.

        Raises:
            EvaluationError: A score is not finite.
        """
        means, errors = [], []
        for row in codes:
            network, size = self.network(row[None])
            scored = evaluate(
                lambda x, n=network, s=size: n(resize(x, s)),  # type: ignore[misc]
                self.data.validation,
                self.task.score,
            )
            means.append(scored.mean)
            errors.append(scored.standard_error)
        return {self.task.metric: np.array(means), f"{self.task.metric}_error": np.array(errors)}
