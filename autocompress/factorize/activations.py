"""What the layers of a model read and give on calibration images."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.errors import FactorizationError
from autocompress.factorize.candidates import Inputs, called, quiet_copy


def inputs_of(model: nn.Module, names: Iterable[str], images: Inputs) -> dict[str, list[Tensor]]:
    """Return what layers of a model read in evaluation mode, run by run; nothing for those that do not run.

    Args:
        model: Not changed.
        names: Of the modules.
        images: A batch of what the model is called with.

    Raises:
        FactorizationError: The model cannot run on the images, or what a layer reads is not finite.
    """
    still = quiet_copy(model)
    read: dict[str, list[Tensor]] = defaultdict(list)

    def keeping(name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given: Tensor = args[0] if args else kwargs["input"]
            # What comes after may work in place.
            read[name].append(given.detach().clone())

        return see

    for name in names:
        still.get_submodule(name).register_forward_pre_hook(keeping(name), with_kwargs=True)
    called(still, images)
    for name, given in read.items():
        if not all(bool(x.isfinite().all()) for x in given):
            raise FactorizationError(f"what layer {name!r} reads on the images holds nan or infinity")
    return dict(read)


def outputs(layer: nn.Module, x: Tensor, kernel: Tensor) -> Tensor:
    """Return what a layer gives with another kernel `(out, in, height, width)`, without a bias."""
    weight = kernel.to(x.dtype)
    if isinstance(layer, nn.Conv2d):
        given: Tensor = layer._conv_forward(x, weight, None)
        return given
    return F.linear(x, weight[:, :, 0, 0])


def energy(layer: nn.Module, read: Iterable[Tensor], kernel: Tensor) -> float:
    """Return the squared norm of all that a layer gives with another kernel, without a bias."""
    return sum(float(outputs(layer, x, kernel).double().square().sum()) for x in read)
