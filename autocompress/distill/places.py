"""Where distillation looks: layers of a network by name, found by what they give, and watched while it runs.

A place is the name of a module, whose output is meant; with `:in` after it, what enters the module.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.errors import DistillationError
from autocompress.quantize.quantizer import Quantizer

INPUT = ":in"
SHOWN_NAMES = 5


class Watch:
    """What places of a network gave in its last run, until `close`; the network is not changed.

    Args:
        network: Which.
        places: Names of its modules, as in `named_modules()`; what enters one is `NAME:in`.

    Raises:
        DistillationError: The network has no module of that name; the nearest names are in the message.
    """

    def __init__(self, network: nn.Module, places: Sequence[str]) -> None:
        self._seen: dict[str, Any] = {}
        self._hooks = []
        modules = dict(network.named_modules())
        for place in dict.fromkeys(places):
            module = modules.get(place.removesuffix(INPUT))
            if module is None or not place:
                self.close()
                raise unknown(place, modules, type(network).__name__)
            if place.endswith(INPUT):
                self._hooks.append(module.register_forward_pre_hook(self._entering(place)))
            else:
                self._hooks.append(module.register_forward_hook(self._leaving(place)))

    def _entering(self, place: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._seen[place] = inputs[0]

        return hook

    def _leaving(self, place: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self._seen[place] = output

        return hook

    def __getitem__(self, place: str) -> Tensor:
        """Return what a place gave in the last run; of a tuple the last tensor.

        Raises:
            DistillationError: It did not run, or gave no tensor.
        """
        if place not in self._seen:
            raise DistillationError(f"layer {place!r} did not run: take one that every pass runs")
        found = self._seen[place]
        # A cell may pass on the output before its own, too.
        found = found[-1] if isinstance(found, tuple) else found
        if not isinstance(found, Tensor):
            raise DistillationError(f"layer {place!r} gives a {type(found).__name__}, not a tensor")
        return found

    def forget(self) -> None:
        """Let go of what was seen: the tensors hold the graph of a pass."""
        self._seen.clear()

    def close(self) -> None:
        """Watch no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.forget()


def unknown(place: str, modules: Mapping[str, nn.Module], network: str) -> DistillationError:
    """Return the error for a name that a network does not have."""
    names = [name for name in modules if name]
    near = difflib.get_close_matches(place.removesuffix(INPUT), names, SHOWN_NAMES, cutoff=0.3)
    has = f"the nearest are {near}" if near else f"it has {names[:SHOWN_NAMES]} and others"
    return DistillationError(f"{network} has no layer {place!r}; {has} (`network.named_modules()` lists all)")


def embedding_of(network: nn.Module, images: Tensor) -> str:
    """Return the place whose tensor enters the linear layer that runs last: the features of an image.

    Raises:
        DistillationError: The network runs no linear layer.
    """
    linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    ran = [name for name, _ in _outputs(network, linear, images)]
    if not ran:
        raise DistillationError(
            f"features of an image are what enters the last linear layer, and {type(network).__name__} runs "
            "none; name a layer instead (layers)"
        )
    return ran[-1] + INPUT


def stages_of(network: nn.Module, images: Tensor) -> list[str]:
    """Return the last layer that gives maps of each size, from the largest maps to the smallest.

    These are the stages of a network, after which its maps are halved; maps of one pixel are none.

    Raises:
        DistillationError: The network gives no maps.
    """
    inner = {
        name: module
        for name, module in network.named_modules()
        # These give weights, too, which are no maps.
        if name and not isinstance(module, Quantizer) and "parametrizations" not in name.split(".")
    }
    last: dict[tuple[int, int], str] = {}
    for name, output in _outputs(network, inner, images):
        output = output[-1] if isinstance(output, tuple) else output
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] * output.shape[3] > 1:
            last[output.shape[2], output.shape[3]] = name
    if not last:
        raise DistillationError(
            f"{type(network).__name__} gives no maps (batch, channels, height, width) to compare; "
            "name layers (layers), or take a loss of outputs or embeddings"
        )
    return [last[size] for size in sorted(last, key=lambda size: -size[0] * size[1])]


def _outputs(network: nn.Module, modules: Mapping[str, nn.Module], images: Tensor) -> list[tuple[str, Any]]:
    """Run a network; return what modules gave, in the order in which they ended."""
    found: list[tuple[str, Any]] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: found.append((name, output)))
        for name, module in modules.items()
    ]
    training = network.training
    try:
        with torch.no_grad():
            network.eval()(images)
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return found
