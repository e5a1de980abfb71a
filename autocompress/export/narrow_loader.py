"""Rebuild a network that was made narrower, from its own factory: `load(folder)`. A copy travels with it.

`load(folder, model)` takes the original model instead, as its factory makes it; it is changed in place.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn


def narrow(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Give every parameter and buffer of a model the shape and the values of a state dict, in place."""
    owners = dict(model.named_modules())
    made: dict[int, nn.Parameter] = {}
    for name, tensor in state.items():
        place, _, own = name.rpartition(".")
        module = owners[place]
        old = getattr(module, own)
        if isinstance(old, nn.Parameter):
            # Parameters that modules share stay one.
            new = made.setdefault(id(old), nn.Parameter(tensor, requires_grad=old.requires_grad))
            setattr(module, own, new)
        else:
            module._buffers[own] = tensor
    for module in owners.values():
        restate(module)
    return model


def restate(module: nn.Module) -> None:
    """Make a module say the widths that its tensors have."""
    if isinstance(module, nn.Conv2d):
        out, per_group = module.weight.shape[:2]
        if module.groups > 1 and module.groups == module.in_channels:
            module.groups = out // (module.out_channels // module.in_channels)
        module.in_channels, module.out_channels = per_group * module.groups, out
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
        module.num_features = len(module.running_mean)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def load(folder: Path | str, model: nn.Module | None = None) -> nn.Module:
    """Return the narrow network in evaluation mode.

    Args:
        folder: Of the export.
        model: The original model; without, it is made by the factory that `network.json` names, which is
            imported.
    """
    folder = Path(folder)
    if model is None:
        model = original(json.loads((folder / "network.json").read_text(encoding="utf-8")))
    return narrow(model, load_file(folder / "network.safetensors")).eval()


def original(made_by: dict[str, Any]) -> nn.Module:
    """Call the factory of the model."""
    place, _, factory = made_by["model"].rpartition(":")
    if place.endswith(".py"):
        sys.path.insert(0, str(Path(place).parent))
        place = Path(place).stem
    found: nn.Module = getattr(importlib.import_module(place), factory)(**made_by["arguments"])
    return found
