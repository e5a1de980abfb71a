"""The bits of a user's own model: one choice for the weights and one for the input of each layer.

Layers that read the same tensor share the choice of its bits. Where a device runs weights and activations of
one width only, a layer has one choice for both; 32 stands for floating point. Nothing is built to price a
network; what is built is the user's own model with quantizers in its layers.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autocompress.elastic.supernet import resize
from autocompress.errors import QuantizationError, SpaceError
from autocompress.latency.target import load_target
from autocompress.ops import Ops, OpSpec
from autocompress.prune.load import arguments_of, load_model
from autocompress.quantize.calibrate import images_of
from autocompress.quantize.hawq import Losses, expected_losses
from autocompress.quantize.network import QuantizedNetwork
from autocompress.quantize.ops import FULL_PRECISION, at_bits
from autocompress.quantize.plan import Site
from autocompress.quantize.schemes import Bits, at_ends, chosen_apart, legal_widths
from autocompress.quantize.source import Policy, QuantizationSource
from autocompress.space import Block, Choice, Option, SearchSpace

Sample = tuple[Iterable[tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], Tensor]]
"""Batches of training images with their targets, and the loss of the task."""

ENDS = 8
"""Bits of the first and the last layer where others have fewer, as published policies have them."""


def bits(
    model: str,
    *,
    image: Sequence[int] = (3, 32, 32),
    weights: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    classes: int | None = None,
    target: str = "onnxruntime-cpu",
    widths: Sequence[int | Sequence[int]] | None = None,
    ends: int | None = ENDS,
    calibration: Iterable[Tensor] = (),
    calibration_images: int = 512,
    weight_ranges: str = "mse",
    activation_ranges: str = "mse",
    gradient: str = "lsq",
    worth: str = "",
    sample: Callable[[], Sample] | None = None,
) -> SearchSpace:
    """Make the space of a model that a recipe names.

    Args:
        model: `file.py:factory` or `module:factory`.
        image: Channels, height and width of the images it takes.
        weights: File of its trained weights.
        arguments: Of the factory.
        classes: Given to the factory if it takes `classes` or `num_classes` and `arguments` has none.
        target: Says which widths are legal, and how numbers are quantized.
        widths: Of the target's widths, those that may be chosen: widths, for weights and activations alike,
            or pairs (weights, activations). By default all; 32 is floating point.
        ends: Bits of the first and the last layer, where the target has them; `None` leaves them open. They
            are open in any case where all that can be chosen is this width and floating point.
        calibration: Training images, in batches; a recipe leaves it out.
        calibration_images: How many of them ranges are found on.
        weight_ranges: A method of `autocompress.quantize.observers`.
        activation_ranges: And of activations.
        gradient: How finetuning learns scales: `lsq`, `pact` or `fixed`.
        worth: `hawq` says of every option what it is expected to add to the loss, by traces of Hessians;
            without, options have no worth.
        sample: Gives training images with their targets, and the loss, to that; a recipe leaves it out.

    Raises:
        ConversionError: The model cannot be made or traced.
        QuantizationError: It cannot be quantized, or the target has no such widths.
        SpaceError: An argument is out of its range.
    """
    if len(image) != 3 or not all(type(size) is int and size > 0 for size in image):
        raise SpaceError(f"image must be channels, height and width, integers >= 1, got {image!r}")
    side = (image[1], image[2])
    device = load_target(target)
    scheme, legal = legal_widths(device, widths)
    given = arguments_of(model, arguments or {}, classes=classes, in_channels=image[0])
    found = load_model(model, given, weights)
    source = QuantizationSource(
        found,
        torch.zeros(1, *image),
        calibration=images_of(calibration, calibration_images, side),
        widths=legal,
        scheme=scheme,
        outputs=bool(device.runtime),
        weight_ranges=weight_ranges,
        activation_ranges=activation_ranges,
        gradient=gradient,  # type: ignore[arg-type]  # checked there
    )
    source.origin = {"model": model, "arguments": given}
    if worth not in ("", "hawq"):
        raise SpaceError(f"worth must be 'hawq' or nothing, got {worth!r}")
    if worth and sample is None:
        raise SpaceError("worth 'hawq' looks at images and their targets: give a sample")
    space = bit_space(source, ends=ends)
    if sample is not None and worth:
        batches, loss = sample()
        sized = [(resize(images, side), targets) for images, targets in batches]
        space = worth_by_losses(source, space, *expected_losses(source, sized, loss))
    settings = {
        "model": model,
        "image": list(image),
        "weights": weights,
        "arguments": given,
        "target": target,
        "widths": [list(pair) for pair in legal],
        "ends": ends,
        "calibration_images": calibration_images,
        "weight_ranges": weight_ranges,
        "activation_ranges": activation_ranges,
        "gradient": gradient,
        "worth": worth,
    }
    return dataclasses.replace(space, settings=settings)


def bit_space(source: QuantizationSource, *, ends: int | None = ENDS) -> SearchSpace:
    """Make the space of a model that is at hand: its source says which widths are legal.

    Args:
        source: The model.
        ends: See `bits`.

    Raises:
        QuantizationError: No widths are legal.
    """
    if not source.widths:
        raise QuantizationError("no widths are legal; name at least one")
    layers = [_layer(source, number, ends) for number in range(len(source.plan.sites))]
    choices = {choice.name: choice for layer in layers for choice in layer.choices}
    places = {name: place for place, name in enumerate(choices)}
    whole = QuantizedNetwork(
        type(source.model).__name__, source.digest, (source.widths[0],) * len(layers), source
    )
    readers = tuple((places[layer.names[0]], places[layer.names[-1]]) for layer in layers)
    parts = [
        *(Block(layer.site.name, layer.names, partial(_priced, layer.site.ops)) for layer in layers),
        *(Block(f"other{n}", (), partial(_constant, op)) for n, op in enumerate(source.plan.others)),
        *(_conversions(source, layers) if source.outputs else ()),
    ]
    block = Block("network", tuple(choices), partial(_network, whole, readers), tuple(parts))
    return SearchSpace("bits", tuple(choices.values()), (block,))


@dataclass(frozen=True)
class _Layer:
    """A layer and its choices: one for weights and one for its input, or one for both."""

    site: Site
    choices: tuple[Choice, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(choice.name for choice in self.choices)


def _layer(source: QuantizationSource, number: int, ends: int | None) -> _Layer:
    """Return a layer with the choices it has.

    Raises:
        QuantizationError: Its legal pairs are neither all of some widths nor equal ones only.
    """
    sites = source.plan.sites
    site, at_end = sites[number], number in (0, len(sites) - 1)
    pairs = at_ends(source.widths, ends) if at_end else source.widths
    weights, inputs = (tuple(sorted({pair[side] for pair in pairs})) for side in (0, 1))
    if chosen_apart(source.widths):
        names = f"{site.name}.weight", f"{site.source}.input"
        return _Layer(site, (Choice(names[0], weights), Choice(names[1], inputs)))
    # Layers of one tensor share it, and with it the width of their weights.
    return _Layer(site, (Choice(f"{site.source}.bits", weights),))


def worth_by_losses(
    source: QuantizationSource, space: SearchSpace, of_weights: Losses, of_inputs: Losses
) -> SearchSpace:
    """Return a space of `bit_space` whose options are worth minus what they are expected to add to the loss.

    A choice for both weights and inputs is worth the sum.
    """
    found = {choice.name: [0.0] * len(choice.options) for choice in space.choices}
    for site in source.plan.sites:
        for name, losses in (
            (f"{site.name}.weight", of_weights[site.name]),
            (f"{site.source}.bits", of_weights[site.name]),
            *(((f"{site.source}.input", of_inputs[site.name]),) if site.name in of_inputs else ()),
            *(((f"{site.source}.bits", of_inputs[site.name]),) if site.name in of_inputs else ()),
        ):
            if name in found:
                options = space.choices[space.positions[name]].options
                found[name] = [
                    worth - losses[int(option)] for worth, option in zip(found[name], options, strict=True)
                ]
    return dataclasses.replace(space, worth={name: tuple(values) for name, values in found.items()})


def _constant(op: OpSpec) -> Ops:
    return (op,)


def _priced(ops: Ops, *options: Option) -> Ops:
    return tuple(at_bits(op, int(options[0]), int(options[-1])) for op in ops)


def _network(whole: QuantizedNetwork, places: Sequence[Bits], *options: Option) -> Ops:
    return (whole.at(tuple((int(options[w]), int(options[a])) for w, a in places)),)


def _conversions(source: QuantizationSource, layers: Sequence[_Layer]) -> list[Block]:
    """Return the blocks that price conversions: what a layer gives and how it is read decide together."""
    numbers = {layer.site.name: number for number, layer in enumerate(layers)}
    blocks, handed = [], set()
    for number, layer in enumerate(layers):
        near = [number]
        if layer.site.reader:
            near.append(numbers[layer.site.reader])
            handed.add(layer.site.reader)
        names = tuple(dict.fromkeys(name for n in near for name in layers[n].names))
        places = tuple((names.index(layers[n].names[0]), names.index(layers[n].names[-1])) for n in near)
        run = partial(_after, source, tuple(near), places)
        blocks.append(Block(f"{layer.site.name} > {layer.site.reader}", names, run))
    for layer in layers:
        if layer.site.source == layer.site.name and layer.site.name not in handed:
            run = partial(_before, source, numbers[layer.site.name])
            blocks.append(Block(f"> {layer.site.name}", layer.names, run))
    return blocks


def _policy(source: QuantizationSource, known: Mapping[int, Bits]) -> Policy:
    floats = FULL_PRECISION, FULL_PRECISION
    return tuple(known.get(number, floats) for number in range(len(source.plan.sites)))


def _after(source: QuantizationSource, near: Sequence[int], places: Sequence[Bits], *options: Option) -> Ops:
    known = {n: (int(options[w]), int(options[a])) for n, (w, a) in zip(near, places, strict=True)}
    policy = _policy(source, known)
    before = source.conversion_before(policy, source.plan.sites[near[1]].name) if len(near) > 1 else ()
    return source.conversions_after(policy, near[0]) + before


def _before(source: QuantizationSource, number: int, *options: Option) -> Ops:
    policy = _policy(source, {number: (int(options[0]), int(options[-1]))})
    return source.conversion_before(policy, source.plan.sites[number].name)
