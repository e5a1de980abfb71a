"""Quantizers as modules: numbers pass as the nearest level, gradients as if they had not been rounded.

The gradient of rounding is taken for 1 inside the range and 0 outside (straight-through estimator: Bengio et
al., 2013; Jacob et al., CVPR 2018). What the scale learns from is `Gradient`.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from autocompress.errors import QuantizationError
from autocompress.quantize.grid import LEAST_SCALE, Grid, along, power_of_two, quantized

Gradient = Literal["lsq", "pact", "fixed"]
"""How a scale is learned: by rounding errors and clipped values (LSQ), by clipped values alone (PACT, whose
clipping level is the scale times the greatest integer), or not at all."""


class FakeQuantize(torch.autograd.Function):
    """Quantize to uniform levels and back.

    With v = x / s and y = s (q - z), the gradients are

    - of x: 1 where v + z is inside qmin..qmax before rounding, 0 outside (the mask that some implementations
      forget);
    - of s, LSQ: q - z - v inside, qmin - z below, qmax - z above;
    - of s, PACT: 0 inside, qmin - z below, qmax - z above: what is clipped moves with the clipping level.

    Sources: Esser et al., "Learned Step Size Quantization", ICLR 2020, equations 1 to 5; Choi et al., "PACT",
    2018, equation 3.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, axis: int | None, gradient: str
    ) -> Tensor:
        """Return the nearest levels, in the shape of `x`."""
        s, z = along(scale, x, axis), along(zero_point, x, axis)
        unrounded = x / s + z
        q = unrounded.round().clamp_(grid.qmin, grid.qmax)
        ctx.save_for_backward(unrounded, q, s, z)
        ctx.grid, ctx.axis, ctx.gradient, ctx.shape = grid, axis, gradient, scale.shape
        return (q - z) * s

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients of `x` and of the scale."""
        (given,) = gradients
        unrounded, q, _, z = ctx.saved_tensors
        inside = (unrounded >= ctx.grid.qmin) & (unrounded <= ctx.grid.qmax)
        of_scale = None
        if ctx.needs_input_grad[1]:
            within = q - unrounded if ctx.gradient == "lsq" else torch.zeros((), dtype=q.dtype)
            slope = torch.where(inside, within, q - z) * given
            if ctx.axis is None:
                of_scale = slope.sum().reshape(ctx.shape)
            else:
                others = [axis for axis in range(slope.dim()) if axis != ctx.axis]
                of_scale = slope.sum(others).reshape(ctx.shape)
        return given * inside, of_scale, None, None, None, None


class _Logarithmic(torch.autograd.Function):
    """Quantize to powers of two; the gradient passes inside the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, grid: Grid, axis: int | None) -> Tensor:
        """Return the nearest levels, in the shape of `x`."""
        s = along(scale, x, axis)
        ctx.save_for_backward((x <= s) & (x >= (-s if grid.signed else torch.zeros_like(s))))
        return quantized(x, scale, torch.zeros_like(scale), grid, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient of `x`; the scale stays."""
        (given,) = gradients
        (inside,) = ctx.saved_tensors
        return given * inside, None, None, None


class Quantizer(nn.Module):
    """One tensor's way through a grid, with a scale that can be learned.

    Args:
        grid: The levels.
        channels: How many scales there are: 1, or one an entry of `axis`.
        axis: Of the tensor along which scales differ; `None` for one scale.
        gradient: How the scale is learned.

    Attributes:
        scale: `(channels,)`, positive.
        zero_point: `(channels,)`, integers; never learned.
    """

    def __init__(
        self, grid: Grid, *, channels: int = 1, axis: int | None = None, gradient: Gradient = "lsq"
    ) -> None:
        """Start at scale 1."""
        super().__init__()
        if gradient not in get_args(Gradient):
            raise QuantizationError(f"gradient must be one of {get_args(Gradient)}, got {gradient!r}")
        self.grid, self.axis, self.gradient = grid, axis, gradient
        self.scale = nn.Parameter(torch.ones(channels))
        # A parameter, so that slices of a supernet hold it as they hold the scale.
        self.zero_point = nn.Parameter(torch.zeros(channels), requires_grad=False)

    @torch.no_grad()
    def lay(self, scales: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Set scales and zero points, one after another where there are those of several widths."""
        self.scale.copy_(torch.cat([scale.reshape(-1) for scale, _ in scales]))
        self.zero_point.copy_(torch.cat([point.reshape(-1) for _, point in scales]))

    def step(self) -> Tensor:
        """Return the distance of two levels, `(channels,)`; of logarithmic ones the greatest level."""
        scale = self.scale.clamp_min(LEAST_SCALE)
        if self.gradient == "fixed":
            scale = scale.detach()
        if self.grid.levels == "power_of_two_scale":
            # Rounded as scales of ranges are, and passed straight through.
            scale = scale + (power_of_two(scale) - scale).detach()
        return scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the nearest levels, in the shape of `x`."""
        grid, scale = self.grid, self.step()
        if grid.levels == "logarithmic":
            result = _Logarithmic.apply(x, scale, grid, self.axis)  # type: ignore[no-untyped-call]
            return cast(Tensor, result)
        zero_point = self.zero_point.detach()
        if not torch.is_grad_enabled():
            return self._fused(x, scale, zero_point)
        if self.gradient == "lsq":
            scale = _scaled_gradient(scale, 1 / math.sqrt(self._count(x) * grid.qmax))
        result = FakeQuantize.apply(  # type: ignore[no-untyped-call]
            x, scale, zero_point, grid, self.axis, self.gradient
        )
        return cast(Tensor, result)

    def _count(self, x: Tensor) -> int:
        """Return N of LSQ: weights that share the scale, or features of an image."""
        return x[0].numel() if self.axis is None else x.numel() // len(self.scale)

    def _fused(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return the same by PyTorch's kernel, in one pass over the numbers."""
        if torch.compiler.is_exporting():
            # That kernel has no form with a free batch size in torch.export.
            return quantized(x, scale, zero_point.round(), self.grid, self.axis)
        points = zero_point.round().to(torch.int32)
        if self.axis is None:
            return torch.fake_quantize_per_tensor_affine(x, scale, points, self.grid.qmin, self.grid.qmax)
        return torch.fake_quantize_per_channel_affine(
            x, scale, points, self.axis, self.grid.qmin, self.grid.qmax
        )

    def extra_repr(self) -> str:
        """Say what it does."""
        return f"{self.grid.bits} bits, {'signed' if self.grid.signed else 'unsigned'}, axis={self.axis}"


def learned_scales(network: nn.Module) -> list[nn.Parameter]:
    """Return the scales of a network that finetuning learns."""
    found = [module for module in network.modules() if isinstance(module, Quantizer)]
    return [quantizer.scale for quantizer in found if quantizer.gradient != "fixed"]


@torch.no_grad()
def limit_gradients(scales: Iterable[nn.Parameter]) -> None:
    """Keep the gradient of each scale within the scale itself, in place.

    A step of gradient descent then changes it by no more than the learning rate, as a share. LSQ's factor
    balances the mean of many rounding errors; one weight beyond the range counts up to 2^bits times as much,
    and a scale of 8 bits is so small that such a gradient made it hundreds of times greater in one step.
    """
    for scale in scales:
        if scale.grad is not None:
            scale.grad.clamp_(-scale.abs(), scale.abs())


def _scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """Return `x` with gradients multiplied by a factor."""
    return (x - x * factor).detach() + x * factor
