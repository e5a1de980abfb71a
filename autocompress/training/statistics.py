"""Batch-norm statistics of a plain network, computed anew: those of training lag behind the weights."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

BatchNorm = nn.modules.batchnorm._BatchNorm

CALIBRATION_IMAGES = 1024
"""Training images that statistics are computed from."""

NEGLIGIBLE = 0.01


def lags(network: nn.Module, steps: int) -> bool:
    """Whether running statistics are in part older than some steps of training.

    After `n` steps of momentum `m` the share `(1 - m)^n` of them is from before: with the usual 0.1 more than
    a hundredth up to 43 steps.
    """
    momenta = (norm.momentum for norm in _norms(network))
    return any(momentum is not None and (1 - momentum) ** steps > NEGLIGIBLE for momentum in momenta)


def recalibrate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of every batch norm by plain means over some batches.

    Statistics are moving means over the last steps; where filters were just set to zero they are those of
    another network, and accuracy can be close to chance. Dropout and the like stay off; the number of batches
    that a norm counts is put back. Norms in evaluation mode of their own (`track_running_stats=False`) have
    nothing to compute.

    Source: Yu & Huang, "Universally Slimmable Networks", ICCV 2019, "post-statistics of batch normalization".

    Args:
        network: Left in evaluation mode.
        batches: `(batch, channels, height, width)`, normalised.
    """
    norms = _norms(network)
    network.eval()
    if not norms:
        return
    before = [(norm, norm.momentum, copy.deepcopy(norm.num_batches_tracked)) for norm in norms]
    try:
        for norm in norms:
            norm.train()
            norm.momentum = None  # the mean over all batches
            norm.reset_running_stats()
        with torch.no_grad():
            for images in batches:
                network(images)
    finally:
        for norm, momentum, counted in before:
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and counted is not None:
                norm.num_batches_tracked.copy_(counted)
        network.eval()


def _norms(network: nn.Module) -> list[BatchNorm]:
    """Return the batch norms that have running statistics."""
    return [m for m in network.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]
