"""Plain PyTorch networks from operations: what extraction fills, export writes and a user deploys.

Nothing here knows of choices or supernets. `autocompress.export.loader` is a copy of this in 30 lines that
travels with every exported network.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from autocompress.ops import Add, Ops


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


def build_network(blocks: Iterable[tuple[str, Ops]], *, device: str | None = None) -> nn.Sequential:
    """Build the network that runs these blocks one after another.

    Args:
        blocks: Name and operations of each active block, as `SearchSpace.operations` returns them.
        device: Where the parameters are made; `"meta"` skips their initialisation.

    Returns:
        One child a block, named as the block with `_` for `.`; its children are the operations by position.
    """
    network = nn.Sequential()
    with torch.device(device or "cpu"):
        for name, ops in blocks:
            residual = isinstance(ops[-1], Add)
            layers = [op.module() for op in (ops[:-1] if residual else ops)]
            network.add_module(module_name(name), (Residual if residual else nn.Sequential)(*layers))
    return network


def module_name(block: str) -> str:
    """Return the name of a block as a child of a network: PyTorch forbids dots there."""
    return block.replace(".", "_")
