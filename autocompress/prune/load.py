"""A user's model from its file or module, with weights that are never unpickled."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.errors import ConversionError


def load_model(name: str, arguments: Mapping[str, Any], weights: str | Path | None = None) -> nn.Module:
    """Make a model and load its weights.

    Args:
        name: `file.py:factory` or `module:factory`; a class of a module will do.
        arguments: Of the factory; those it does not take are left out if their value is `None`.
        weights: A state dict, safetensors or PyTorch's own format; without, the weights are as made.

    Raises:
        ConversionError: There is no such file, module or factory, it does not take the arguments, returns no
            module, or the weights are not of this model.
    """
    factory = _factory(name)
    try:
        model = factory(**arguments)
    except TypeError as error:
        raise ConversionError(f"{name} refuses {dict(arguments)}: {error}") from None
    if not isinstance(model, nn.Module):
        raise ConversionError(f"{name} must return a torch.nn.Module, got {type(model).__name__}")
    if weights is not None:
        state = read_state(Path(weights))
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ConversionError(f"{weights} does not hold the weights of {name}: {error}") from None
    return model


def takes(name: str) -> set[str]:
    """Return the names of the arguments that a factory takes."""
    try:
        return set(inspect.signature(_factory(name)).parameters)
    except (TypeError, ValueError):  # of some built-ins Python does not know what they take
        return set()


def _factory(name: str) -> Callable[..., Any]:
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ConversionError(f"a model is file.py:factory or module:factory, got {name!r}")
    try:
        module = _module(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except ConversionError:
        raise
    except Exception as error:  # what the user's file does when it is run
        raise ConversionError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ConversionError(f"{place} has no {attribute!r} to call")
    found: Callable[..., Any] = factory
    return found


def _module(path: Path) -> Any:
    if not path.is_file():
        raise ConversionError(f"there is no file {path}")
    # Under its own name, so that models of it can be pickled for workers.
    known = sys.modules.get(path.stem)
    if known is not None and Path(getattr(known, "__file__", "") or "").resolve() == path.resolve():
        return known
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        return importlib.import_module(path.stem)
    finally:
        sys.path.pop(0)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict: safetensors, or a file of `torch.save`, of which tensors alone are read.

    Raises:
        ConversionError: It cannot be read, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  (the libraries raise errors of every kind)
        raise ConversionError(
            f"weights {path} cannot be read: {error}; a state dict is expected, as safetensors or by "
            "torch.save"
        ) from None
    # Training scripts keep it beside other things.
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConversionError(f"weights {path} must be a state dict, names to tensors")
    return content
