"""What layers read and give on some images, for ranges of every width at once."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.elastic.supernet import resize
from autocompress.errors import QuantizationError
from autocompress.quantize.observers import Observer, observer


@dataclass
class Seen:
    """Distributions of tensors.

    Attributes:
        inputs: By name of the layer that reads one.
        outputs: By name of the layer that gives one.
    """

    inputs: dict[str, Observer] = field(default_factory=dict)
    outputs: dict[str, Observer] = field(default_factory=dict)


def ranges(
    model: nn.Module,
    images: Iterable[Tensor],
    *,
    inputs: Sequence[str],
    outputs: Mapping[str, bool],
    method: str,
) -> Seen:
    """Run a model on images and look at what layers read and give.

    Args:
        model: In evaluation mode; left as it is.
        images: Batches that it takes.
        inputs: Layers whose input is looked at.
        outputs: Layers whose output is, with whether negative values of it count as 0 (ReLU comes next).
        method: A name of `OBSERVERS`.

    Raises:
        QuantizationError: There are no images, a layer did not run, or a number is not finite.
    """
    seen = Seen({name: observer(method) for name in inputs}, {name: observer(method) for name in outputs})
    count = 0
    with ExitStack() as stack, torch.no_grad():
        for name in dict.fromkeys([*inputs, *outputs]):
            hook = _hook(seen, name, outputs.get(name, False))
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        for batch in images:
            if not torch.isfinite(batch).all():
                raise QuantizationError("calibration images hold nan or infinity; look at your data")
            count += len(batch)
            model(batch)
    if not count:
        raise QuantizationError("ranges of activations need at least one calibration image, got none")
    return seen


def _hook(seen: Seen, name: str, rectified: bool) -> Any:
    def look(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        try:
            if name in seen.inputs:
                seen.inputs[name].observe(given[0])
            if name in seen.outputs:
                seen.outputs[name].observe(result.clamp_min(0.0) if rectified else result)
        except QuantizationError as error:
            raise QuantizationError(f"layer {name}: {error}") from None

    return look


def images_of(batches: Iterable[Tensor], count: int, size: tuple[int, int]) -> list[Tensor]:
    """Return the first images of some batches, resized to height and width of those a model takes.

    Raises:
        QuantizationError: `count` is below 1.
    """
    if count < 1:
        raise QuantizationError(f"calibration needs at least 1 image, got {count}")
    found, missing = [], count
    for batch in batches:
        found.append(resize(batch[:missing], size))
        missing -= len(found[-1])
        if missing <= 0:
            break
    return found
