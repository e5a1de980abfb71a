"""Eager PyTorch, channels_last, on the CPU or a CUDA device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from autocompress.errors import PluginError
from autocompress.latency.runtime import Blocks, Run, Runtime
from autocompress.latency.target import Target

if TYPE_CHECKING:
    from torch import nn


def _prepare(blocks: Blocks, target: Target) -> Run:
    return prepare_module(_random_network(blocks), blocks[0][1][0].in_shape, target)


def prepare_module(module: "nn.Module", in_shape: tuple[int, ...], target: Target) -> Run:
    """Run a PyTorch module eagerly: evaluation mode, channels_last, no gradients.

    Args:
        module: Changed: put into evaluation mode and channels_last, on the target's device, in its format.
        in_shape: Channels, height, width.
        target: Gives batch, device and number format; its threads hold inside `pinned` only, since PyTorch's
            are the process's.

    Raises:
        PluginError: The target is of CUDA, and there is none.
    """
    import torch

    if target.device == "cuda" and not torch.cuda.is_available():
        raise PluginError(f"target {target.name!r} needs a CUDA device and a PyTorch built for it; none here")
    kind = getattr(torch, target.number_format)
    module = module.eval().to(target.device, kind, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(target.batch, *in_shape, generator=torch.Generator().manual_seed(0))
    x = x.to(target.device, kind).contiguous(memory_format=torch.channels_last)

    def run() -> Any:
        with torch.no_grad():
            return module(x)

    def run_and_wait() -> Any:
        # Kernels run after the call returns.
        result = run()
        torch.cuda.synchronize()
        return result

    return run if target.device == "cpu" else run_and_wait


def _random_network(blocks: Blocks) -> "nn.Module":
    import torch
    from torch import nn

    from autocompress.network import build_network

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(blocks)
        for module in network.modules():
            # PyTorch's own initialisation shrinks activations at each layer without normalisation; after
            # some dozens they could become subnormal numbers, which are slow.
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    return network


@contextmanager
def _pinned(target: Target) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(target.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


RUNTIME: Final = Runtime(
    package="torch",
    install="pip install torch",
    packages=("torch",),
    runs={"cpu": ("float32",), "cuda": ("float32", "float16", "bfloat16")},
    prepare=_prepare,
    pinned=_pinned,
)
