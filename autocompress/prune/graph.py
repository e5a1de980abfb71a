"""The graph of a PyTorch model as `torch.export` writes it: one node for each function that is called."""

import io
import traceback
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.fx import Node

from autocompress.errors import ConversionError
from autocompress.export.quiet import quiet


@dataclass(frozen=True)
class Graph:
    """What a model runs for one batch.

    Attributes:
        nodes: In the order in which they run.
        stored: Name of a node that is a parameter or buffer, to the name of that.
        constants: Names of nodes that are other tensors of the model, or written down in its `forward()`.
        tensors: Name of a parameter or buffer to it.
        first_names: Name of a parameter or buffer to the first name of the same tensor.
        unused: Names of the parameters that are not read.
    """

    nodes: tuple[Node, ...]
    stored: Mapping[str, str]
    constants: frozenset[str]
    tensors: Mapping[str, Tensor]
    first_names: Mapping[str, str]
    unused: tuple[str, ...]


def _place(error: BaseException) -> str:
    """Say in which line of the user's own code an error was raised; empty where that is not known."""
    packages = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(packages)]
    return f" (at {own[-1].filename}:{own[-1].lineno}: {own[-1].line})" if own else ""


def export(model: nn.Module, image: Tensor) -> Graph:
    """Follow a model, which is in evaluation mode and left as it is.

    Raises:
        ConversionError: It cannot be followed, or returns something else than one tensor.
    """
    kind = type(model).__name__
    try:
        # Where it fails, torch.export prints what it has followed so far.
        with torch.no_grad(), quiet(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            program: Any = torch.export.export(model, (image,), strict=False)
    except Exception as error:
        raise ConversionError(
            f"{kind} cannot be traced with images of shape {tuple(image.shape)} by torch.export: "
            f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}{_place(error)}; "
            "images must be of the shape the model takes, and control flow that depends on values has to be "
            "moved out of it"
        ) from error
    signature = program.graph_signature
    nodes = tuple(program.graph.nodes)
    returned, spec = nodes[-1].args[0], program.call_spec.out_spec
    if not spec.is_leaf() or not isinstance(returned[0], Node):
        got = type(returned[0]) if spec.is_leaf() else spec.type
        raise ConversionError(
            f"{kind} must return one tensor, got {got.__name__}; wrap it in a module that returns the tensor "
            "you need"
        )
    for node in nodes:
        if isinstance(node.target, HigherOrderOperator):
            raise ConversionError(
                f"{module_name(node) or kind} runs a part of its forward() under {function_name(node)}, into "
                "which pruning does not look; move autocast and control flow out of the network"
            )
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    firsts: dict[int, str] = {}
    for name, tensor in tensors.items():
        firsts.setdefault(id(tensor), name)
    return Graph(
        nodes,
        {**signature.inputs_to_parameters, **signature.inputs_to_buffers},
        frozenset(signature.inputs_to_lifted_tensor_constants),
        tensors,
        {name: firsts[id(tensor)] for name, tensor in tensors.items()},
        tuple(signature.inputs_to_parameters[node.name] for node in nodes if _is_unused(node, signature)),
    )


def _is_unused(node: Node, signature: Any) -> bool:
    return not node.users and node.name in signature.inputs_to_parameters


def function_name(node: Node) -> str:
    """Return the name of what a node calls, without its overload: `conv2d`, `getitem`."""
    target = node.target
    packet = getattr(target, "overloadpacket", None)
    return getattr(packet or target, "__name__", str(target)).removeprefix("aten.")


def module_name(node: Node) -> str:
    """Return the name of the innermost module that a node ran in; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def place(node: Node) -> str:
    """Return the name of the innermost module that a node ran in, for people."""
    return module_name(node) or "the model's forward()"


def shape_of(node: Any) -> tuple[int, ...]:
    """Return the shape of what a node gives."""
    return tuple(node.meta["val"].shape)


def argument(node: Node, at: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call, by position or name."""
    return node.args[at] if len(node.args) > at else node.kwargs.get(name, default)


def arguments(node: Node, *names: str) -> dict[str, Any]:
    """Return the arguments that a call gives, by name."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def only_user(node: Node) -> Node | None:
    """Return the one node that reads what this one gives, if it is one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def pair(value: Any) -> tuple[int, int]:
    """Return height and width of what may be one number for both."""
    listed = [value] if isinstance(value, int) else list(value)
    return (int(listed[0]), int(listed[-1]))
