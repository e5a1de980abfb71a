"""Batch-norm statistics for one sub-network."""

from collections.abc import Iterable

import torch
from torch import Tensor

from autocompress.elastic.layers import NORM_EPS, memory_format
from autocompress.elastic.supernet import Statistics, Supernet
from autocompress.errors import DataError
from autocompress.space import Architecture


class _Pooled:
    """Count, mean and sum of squared deviations of a channel over everything seen so far."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, count: int, mean: Tensor, variance: Tensor) -> None:
        """Join a batch (Chan et al., 1983, equation 2.1)."""
        mean, squares = mean.double(), variance.double() * count
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        delta = mean - self.mean
        self.squares = self.squares + squares + delta * delta * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total


@torch.no_grad()
def recalibrate(supernet: Supernet, arch: Architecture, batches: Iterable[Tensor]) -> Statistics:
    """Compute the batch-norm statistics of one sub-network; writes no buffer and copies no network.

    A slice of a supernet has other activations than the network its statistics came from; without this
    its accuracy is close to chance. Mean and variance are pooled over all batches, as if they were one:
    neither their order nor their sizes matter, except that later layers see each batch normalised by itself.

    Source: Yu & Huang, Universally Slimmable Networks, ICCV 2019, section 3.3 (post-statistics).

    Args:
        supernet: Not changed.
        arch: The sub-network.
        batches: Images `(batch, channels, height, width)` of the training set, normalised; brought to the
            memory format of the supernet.

    Returns:
        Mean and unbiased variance by name of the layer; empty for a network without batch norm.

    Raises:
        DataError: There is no batch, and there are layers of batch norm.
    """
    if not any(layer.norms(op) for _, ops in supernet.plan(arch) for layer, op in ops if layer is not None):
        return {}
    pooled: dict[str, _Pooled] = {}

    def record(name: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float = NORM_EPS) -> Tensor:
        # One pass gives the output and the batch's statistics together.
        output, mean, inverse_std = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        variance = inverse_std.double().pow(-2) - eps
        pooled.setdefault(name, _Pooled(weight.dtype)).add(
            x.numel() // x.shape[1], mean, variance.clamp_min(0)
        )
        return output

    count, keep = 0, memory_format(supernet.parameters())
    for batch in batches:
        supernet.run(batch.contiguous(memory_format=keep), arch, record)
        count += len(batch)
    if not count:
        raise DataError("recalibration needs at least one batch of training images, got none")
    statistics: dict[str, tuple[Tensor, Tensor]] = {}
    for name, pool in pooled.items():
        if pool.mean is None or pool.squares is None:
            raise ValueError(f"no batch reached layer {name}")
        variance = pool.squares / max(pool.count - 1, 1)
        statistics[name] = (pool.mean.to(pool.dtype), variance.to(pool.dtype))
    return statistics
