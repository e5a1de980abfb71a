"""What edges of cells share when they are mixed: weighted sums, partial channels."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autocompress.errors import SpaceError


def weighted(x: Tensor, parts: Iterable[tuple[Callable[[Tensor], Tensor], Tensor | None]]) -> Tensor | None:
    """Run the parts on x and return their weighted sum, `None` of nothing; a weight of `None` is 1.

    Weights of exactly 0 and 1, which binary gates have, keep one path in memory: the gradient by such a
    weight is the inner product of what comes back with what the part computes, which is computed once more
    for it (ProxylessNAS, section 3.2; in its repository for the parts that do not run). Nothing comes back
    through a part of weight 0.
    """
    total: Tensor | None = None
    for run, weight in parts:
        if weight is None:
            output = run(x)
        elif not (torch.is_grad_enabled() and weight.requires_grad):
            output = weight.to(x.dtype) * run(x)
        elif (value := float(weight.detach())) == 0.0:
            output = _gated(weight, x, None, run)
        elif value == 1.0:
            output = _gated(weight, x, run(x), run)
        else:
            output = weight.to(x.dtype) * run(x)
        total = output if total is None else total + output
    return total


def _gated(weight: Tensor, x: Tensor, output: Tensor | None, run: Callable[[Tensor], Tensor]) -> Tensor:
    found: Tensor = _Gated.apply(weight, x.detach(), output, run)  # type: ignore[no-untyped-call]
    return found


class _Gated(torch.autograd.Function):
    """A part times its binary gate, of which no more than the input is kept."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, output: Tensor | None, run: Any) -> Tensor:
        """Return the output, or zeros in its shape."""
        ctx.run, ctx.dtype, ctx.active = run, weight.dtype, output is not None
        ctx.save_for_backward(x)
        if output is not None:
            return output.view_as(output)
        with torch.no_grad():
            return torch.zeros_like(run(x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        """Compute the output again for the gradient by the gate; pass on what goes through an active part."""
        (x,), (gradient,) = ctx.saved_tensors, gradients
        with torch.no_grad():
            by_gate = (gradient * ctx.run(x)).sum().to(ctx.dtype)
        return by_gate, None, gradient if ctx.active else None, None


def identity(x: Tensor, rate: float) -> Tensor:
    """Pass on what an identity gives, of which a share of the numbers is dropped.

    Source: Chen et al., P-DARTS, ICCV 2019, section 3.3: an identity that is dropped in part leaves gradients
    to the operations beside it.
    """
    return F.dropout(x, rate) if rate > 0 else x


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
