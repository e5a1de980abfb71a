"""Plain PyTorch networks from operations: what extraction fills, export writes and a user deploys.

Nothing here knows of choices or supernets. `autocompress.export.loader` is a copy of this that
travels with every exported network.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autocompress.errors import SpaceError
from autocompress.ops import Add, Ops, UserModel

if TYPE_CHECKING:
    from autocompress.space import Codes, SearchSpace

_FILLING = (
    nn.init.kaiming_uniform_,
    nn.init.kaiming_normal_,
    nn.init.uniform_,
    Tensor.uniform_,
    Tensor.normal_,
    Tensor.fill_,
    Tensor.zero_,
)


class _Unfilled(TorchFunctionMode):
    """Leave new tensors unfilled: most of the time of making a network goes into its random numbers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Skip what initialisation calls; run everything else."""
        if func in _FILLING:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


class SqueezeExcite(nn.Module):
    """Scale each channel by what its global average says of it (`autocompress.ops.SqueezeExcite`)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, channels, height, width)` to the same shape."""
        scale = self.reduce(x.mean((2, 3), keepdim=True)).relu()
        return x * nn.functional.hardsigmoid(self.expand(scale))


class Residual(nn.Sequential):
    """Run the layers in sequence and add the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, channels, height, width)` to the same shape."""
        result = x
        for layer in self:
            result = layer(result)
        return x + result


class DropPath(nn.Module):
    """In training, zero whole images of a batch at random and scale the others, so that the mean stays.

    A cell has one after each of its operations that is not an identity: an image then lacks some paths of the
    cell. It has no state, and is the identity in evaluation mode and at rate 0. Random numbers come from
    PyTorch's global generator.

    Sources: Larsson et al., "FractalNet", ICLR 2017 (drop-path); per image, as Zoph et al., "Learning
    Transferable Architectures for Scalable Image Recognition", CVPR 2018, and the repository of DARTS do.

    Attributes:
        rate: Probability that an image is zeroed, from 0 to below 1; training sets it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, ...)` to the same shape; `x` itself is not changed."""
        if not self.training or self.rate == 0:
            return x
        kept = 1 - self.rate
        mask = x.new_empty((len(x),) + (1,) * (x.dim() - 1)).bernoulli_(kept)
        # Not a mask of 1 / kept: in bfloat16 its rounding would be the same error for every image.
        return x / kept * mask


class Graph(nn.Module):
    """Nodes, each the sum of what its incoming edges make of earlier nodes; the last node is the output.

    Args:
        nodes: How many, the input (node 0) included.
        edges: Source and target, source < target, to the module on the edge; it becomes the child
            `edge_SOURCE_TARGET`. A node without incoming edges is zero, in the shape of the input. No module
            may work in place: several edges read one node.
    """

    def __init__(self, nodes: int, edges: Mapping[tuple[int, int], nn.Module]) -> None:
        super().__init__()
        self.incoming = [sorted(source for source, end in edges if end == node) for node in range(nodes)]
        for (source, target), edge in edges.items():
            self.add_module(f"edge_{source}_{target}", edge)

    def forward(self, x: Tensor) -> Tensor:
        """Map the input `(batch, channels, height, width)` to the last node."""
        nodes = [x]
        for target, sources in enumerate(self.incoming[1:], start=1):
            parts = [self.get_submodule(f"edge_{source}_{target}")(nodes[source]) for source in sources]
            total = parts[0] if parts else torch.zeros_like(x)
            for part in parts[1:]:
                total = total + part
            nodes.append(total)
        return nodes[-1]


def build_network(blocks: Iterable[tuple[str, Ops]], *, initialise: bool = True) -> nn.Sequential:
    """Build the network that runs these blocks one after another.

    Args:
        blocks: Name and operations of each active block, as `SearchSpace.operations` returns them.
        initialise: Whether parameters get random values; otherwise they hold whatever the memory held.

    Returns:
        One child a block, named as the block with `_` for `.`; its children are the operations by position.
    """
    network = nn.Sequential()
    with nullcontext() if initialise else _Unfilled():
        for name, ops in blocks:
            residual = isinstance(ops[-1], Add)
            layers = [op.module() for op in (ops[:-1] if residual else ops)]
            network.add_module(module_name(name), (Residual if residual else nn.Sequential)(*layers))
    return network


def unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies of weights: safetensors refuses tensors that share memory."""
    plain = torch.contiguous_format
    return {name: tensor.detach().clone(memory_format=plain) for name, tensor in state.items()}


def user_model(space: "SearchSpace", codes: "Codes | None" = None) -> UserModel | None:
    """Return the user's own model as an architecture has it, by default the smallest; `None` without one.

    Args:
        space: Any.
        codes: One row, `(1, choices)`.
    """
    for _, ops in space.operations(space.smallest() if codes is None else codes):
        for op in ops:
            if isinstance(op, UserModel):
                return op
    return None


def whole_network(space: "SearchSpace") -> nn.Module:
    """Return the user's own model as it was brought, as a network of the space.

    Raises:
        SpaceError: The space is not of a model that somebody brought.
    """
    model = user_model(space)
    if model is None:
        raise SpaceError(f"space {space.name!r} is not of a user's own model; channels and bits are")
    network = nn.Sequential()
    network.add_module("network", nn.Sequential(model.whole()))
    return network.eval()


def model_of(network: nn.Module) -> nn.Module:
    """Return the user's own model out of a network of its space."""
    return network.get_submodule("network.0")


def module_name(block: str) -> str:
    """Return the name of a block as a child of a network: PyTorch forbids dots there."""
    return block.replace(".", "_")
