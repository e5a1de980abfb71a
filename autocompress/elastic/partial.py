"""What edges of cells share when they are mixed: weighted sums, partial channels."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from autocompress.errors import SpaceError


def weighted(parts: Iterable[tuple[Callable[[], Tensor], Tensor | None]]) -> Tensor | None:
    """Run the parts and return their weighted sum, `None` of nothing; a weight of `None` is 1.

    Nothing comes back through a part of weight zero; the gradient by its weight needs no more than its
    output. It is run without a graph, which is what keeps one path in memory (ProxylessNAS, section 3.2).
    """
    total: Tensor | None = None
    for run, weight in parts:
        if weight is None:
            output = run()
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and float(weight.detach()) != 0.0):
                output = run()
            output = weight.to(output.dtype) * output
        total = output if total is None else total + output
    return total


def through_part(run: Callable[[Tensor], Tensor], x: Tensor, channels: int, *, stride: int = 1) -> Tensor:
    """Run one in so many channels, pass the others on, and shuffle them.

    Source: Xu et al., PC-DARTS, ICLR 2020, section 3.2; shuffled as in its repository, in as many groups.

    Args:
        run: Maps `(batch, c, height, width)` to as many channels.
        x: `(batch, C, height, width)`.
        channels: 1 runs all of them.
        stride: Of `run`; what is passed on is pooled by its maximum.

    Raises:
        SpaceError: C is no multiple of `channels`.
    """
    if channels == 1:
        return run(x)
    width = x.shape[1]
    if width % channels:
        raise SpaceError(f"one in {channels} channels needs a multiple of {channels} channels, got {width}")
    part = width // channels
    rest = x[:, part:] if stride == 1 else F.max_pool2d(x[:, part:], stride)
    joined = torch.cat([run(x[:, :part]), rest], dim=1)
    grouped = joined.view(len(x), channels, part, *joined.shape[2:])
    return grouped.transpose(1, 2).reshape(joined.shape)
