"""Images out of a network's own statistics, where there are no data to calibrate with.

Source: Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR 2020, section 3.1, equation 2.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.errors import QuantizationError
from autocompress.quantize.capture import evaluating

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def synthesize(
    network: nn.Module,
    shape: tuple[int, ...],
    *,
    images: int = 32,
    steps: int = 500,
    learning_rate: float = 0.5,
    seed: int = 0,
) -> Tensor:
    """Return images on which the inputs of batch norms have the means and deviations they had in training.

    Adam starts from normal noise; the squared distances of means and of deviations are summed over channels
    and batch norms, and those of the images themselves to 0 and 1 are added. Each batch norm is hooked
    itself: pairs of layers and norms by their order are wrong wherever a shortcut is.

    Args:
        network: With batch norms that are not folded yet; not changed.
        shape: Of an image, as (3, 224, 224).
        images: How many; they are optimized together.
        steps: Of Adam.
        learning_rate: Of Adam; a tenth after 100 steps without progress, at least 1e-4.
        seed: Of the noise.

    Returns:
        `(images, *shape)`.

    Raises:
        QuantizationError: The network has no batch norm with running statistics, runs none of them, or too
            few images are asked for.
    """
    if images < 2 or steps < 1:
        raise QuantizationError(
            f"images must be at least 2 and steps at least 1, got {images!r} and {steps!r}"
        )
    norms = [module for module in network.modules() if _has_statistics(module)]
    if not norms:
        raise QuantizationError(
            f"{type(network).__name__} has no batch norm with running statistics, so that nothing is known "
            "of its data; fold batch norms after making images, or calibrate with real ones"
        )
    made = torch.randn(images, *shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    optimizer = torch.optim.Adam([made], lr=learning_rate)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=100, min_lr=1e-4)
    distances: list[Tensor] = []

    def compare(module: nn.Module, args: tuple[Any, ...]) -> None:
        mean, deviation = _statistics(args[0])
        variance = module.get_buffer("running_var")
        distances.append((mean - module.get_buffer("running_mean")).square().sum())
        distances.append((deviation - variance.sqrt()).square().sum())

    best, result = torch.inf, made.detach().clone()
    with ExitStack() as hooks, evaluating(network), torch.enable_grad():
        for norm in norms:
            hooks.callback(norm.register_forward_pre_hook(compare).remove)
        for _ in range(steps):
            distances.clear()
            network(made)
            if not distances:
                raise QuantizationError("no batch norm of the network is run in a forward pass")
            mean, deviation = _statistics(made)
            own = mean.square().sum() + (deviation - 1).square().sum()
            loss = torch.stack(distances).sum() + own
            value = float(loss.detach())
            if value < best:
                best, result = value, made.detach().clone()
            # Of the images alone: gradients of the network's parameters stay as they were.
            (made.grad,) = torch.autograd.grad(loss, [made])
            optimizer.step()
            scheduler.step(value)
    return result


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, NORMS) and module.running_mean is not None


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each channel, `(channels,)` each."""
    channels = x.transpose(0, 1).flatten(1)
    variance = channels.var(1, unbiased=False)
    # The root has no slope at 0, where a channel is constant.
    return channels.mean(1), (variance + 1e-12).sqrt()
