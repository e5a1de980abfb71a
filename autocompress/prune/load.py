"""A user's model from its file or module, with weights that are never unpickled."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autocompress.errors import ConversionError

if TYPE_CHECKING:
    from autocompress.training.data import DataSet

SHOWN_ERROR = 120
SHOWN = 3
"""Names of each kind that an error lists."""

WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name in a state dict."""


def load_model(name: str, arguments: Mapping[str, Any], weights: str | Path | None = None) -> nn.Module:
    """Make a model and load its weights.

    Args:
        name: `file.py:factory` or `module:factory`; a class of a module will do.
        arguments: Of the factory.
        weights: A state dict, safetensors or PyTorch's own format; without, the weights are as made.

    Raises:
        ConversionError: There is no such file, module or factory, it does not take the arguments or fails,
            returns no module, or the weights are not of this model.
    """
    factory = _factory(name)
    try:
        model = factory(**arguments)
    except Exception as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ConversionError(f"{name}({shown}) raises {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConversionError(f"{name} must return a torch.nn.Module, got {type(model).__name__}")
    if weights is not None:
        _fill(model, read_state(Path(weights)), f"{weights} does not hold the weights of {name}")
    return model


def load_model_for(
    data: "DataSet", name: str, arguments: Mapping[str, Any], weights: str | Path | None = None
) -> nn.Module:
    """Make a model for the channels and classes of a data set, where its factory takes them.

    Raises:
        ConversionError: As `load_model`.
    """
    given = arguments_of(name, arguments, classes=data.classes or None, in_channels=data.in_shape[0])
    return load_model(name, given, weights)


def _fill(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    own = model.state_dict()
    for wrapper in WRAPPERS:
        if state and all(key.startswith(wrapper) for key in state) and not state.keys() & own.keys():
            state = {key.removeprefix(wrapper): tensor for key, tensor in state.items()}
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if key in state and isinstance(tensor, Tensor) and state[key].shape != tensor.shape
    ]
    wrong = {
        "missing": [key for key in own if key not in state],
        "not in the model": [key for key in state if key not in own],
        "of another shape": shapes,
    }
    found = [f"{len(keys)} {kind}, such as {', '.join(keys[:SHOWN])}" for kind, keys in wrong.items() if keys]
    if found:
        raise ConversionError(f"{what}: of {len(own)} tensors {'; '.join(found)}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ConversionError(f"{what}: {error}") from error


def takes(name: str) -> set[str]:
    """Return the names of the arguments that a factory takes.

    Raises:
        ConversionError: There is no such factory.
    """
    try:
        return set(inspect.signature(_factory(name)).parameters)
    except ConversionError:
        raise
    except (TypeError, ValueError):  # of some built-ins Python does not know what they take
        return set()


def arguments_of(
    name: str, given: Mapping[str, Any], *, classes: int | None, in_channels: int
) -> dict[str, Any]:
    """Return the arguments of a factory, with what the data say where it takes that and nothing is given.

    Raises:
        ConversionError: There is no such factory.
    """
    taken = takes(name)
    known = {"classes": classes, "num_classes": classes, "in_channels": in_channels}
    return {key: value for key, value in known.items() if key in taken and value is not None} | dict(given)


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
    found: Any = getattr(module, attribute, None)
    if not callable(found):
        made_here = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__
        ]
        raise ConversionError(
            f"{place} has no {attribute!r} to call; it has {', '.join(made_here) or 'nothing to call'}"
        )
    factory: Callable[..., Any] = found
    return factory


def _module(path: Path) -> Any:
    """Import a file under its own name, so that models of it can be pickled for workers."""
    if not path.is_file():
        raise ConversionError(f"there is no file {path}")
    path = path.resolve()
    known = sys.modules.get(path.stem)
    if known is not None:
        if Path(getattr(known, "__file__", None) or "").resolve() == path:
            return known
        raise ConversionError(
            f"{path} cannot be imported as {path.stem!r}: a module of that name is loaded already, from "
            f"{getattr(known, '__file__', None) or 'Python itself'}; rename the file"
        )
    # It stays on the path: what it imports when it is called, and workers that unpickle its models, need it.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConversionError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict: safetensors, or a file of `torch.save`, of which tensors alone are read.

    Raises:
        ConversionError: It cannot be read, or holds something else.
    """
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise ConversionError(f"weights must be a file, but {path} {what}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the libraries raise errors of every kind
        # What PyTorch advises, to unpickle all the same, is left out.
        text = next(iter(str(error).strip().splitlines()), "").partition(". ")[0]
        raise ConversionError(
            f"weights {path} cannot be read: {type(error).__name__}: {text[:SHOWN_ERROR]}; a state dict is "
            "expected, as safetensors or by torch.save(model.state_dict(), path): whole models are never "
            "unpickled"
        ) from error
    # Training scripts keep it beside other things.
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ConversionError(
            f"weights {path} must be a state dict, names to tensors, got {type(content).__name__}"
        )
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ConversionError(
                f"weights {path} must be a state dict, names to tensors, but {name!r} is "
                f"{type(value).__name__}"
            )
    return content
