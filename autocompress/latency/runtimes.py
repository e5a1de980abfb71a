"""Runtimes: each turns blocks, a module or an ONNX file into a function that runs once.

Inputs are made beforehand, so that one call is one inference and nothing else. Clocks are read elsewhere.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocompress.errors import TableError
from autocompress.latency.target import Target
from autocompress.ops import Conv2d, Ops

if TYPE_CHECKING:
    from torch import nn

Run = Callable[[], object]
"""Runs a network or a block once; what it returns is not looked at."""

Blocks = Sequence[tuple[str, Ops]]


def prepare(blocks: Blocks, target: Target) -> Run:
    """Build the network of these blocks, with random weights, on the target's runtime."""
    if target.runtime == "onnxruntime":
        from autocompress.export.onnx_graph import onnx_model

        return prepare_onnx(onnx_model(blocks, batch=target.batch), target)
    return prepare_module(_random_network(blocks), blocks[0][1][0].in_shape, target)


def prepare_onnx(model: bytes | Path, target: Target) -> Run:
    """Load an ONNX model, serialized or as a file, into an ONNX Runtime session on the CPU.

    Free dimensions of the input become the target's batch.

    Raises:
        TableError: The target is of another runtime, or ONNX Runtime cannot load the model.
    """
    import onnxruntime

    if target.runtime != "onnxruntime":
        raise TableError(f"an ONNX model runs on onnxruntime; target {target.name!r} is of {target.runtime}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Threads that spin while they wait take the cores from whatever is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # noqa: BLE001  (onnxruntime has a dozen unrelated exception classes)
        what = "the model" if isinstance(model, bytes) else str(model)
        raise TableError(f"ONNX Runtime cannot load {what}: {error}") from None
    rng = np.random.default_rng(0)
    feeds = {}
    for argument in session.get_inputs():
        shape = [size if isinstance(size, int) else target.batch for size in argument.shape]
        feeds[argument.name] = rng.standard_normal(shape, dtype=np.float32)

    def run() -> Any:
        return session.run(None, feeds)

    return run


def prepare_module(module: "nn.Module", in_shape: tuple[int, ...], target: Target) -> Run:
    """Run a PyTorch module eagerly on the CPU: evaluation mode, channels_last, no gradients.

    Args:
        module: Changed: put into evaluation mode and channels_last.
        in_shape: Channels, height, width.
        target: Gives the batch; its threads hold inside `pinned` only, since PyTorch's are the process's.
    """
    import torch

    module = module.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(target.batch, *in_shape, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)

    def run() -> Any:
        with torch.no_grad():
            return module(x)

    return run


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


def background(target: Target) -> list[Run]:
    """Build a dozen small blocks that run between the timed runs of a few networks."""
    blocks: list[Ops] = []
    for size, channels in ((32, 8), (16, 16), (8, 32), (4, 64)):
        for kernel in (3, 5, 7):
            middle = 4 * channels
            blocks.append(
                (
                    Conv2d(channels, middle, size, size, activation="hard_swish"),
                    Conv2d(middle, middle, size, size, kernel=kernel, groups=middle, activation="relu"),
                    Conv2d(middle, channels, size, size),
                )
            )
    return [prepare([("background", ops)], target) for ops in blocks]


@contextmanager
def pinned(target: Target) -> Iterator[None]:
    """Hold the number of threads of the process at the target's; restored at the end."""
    if target.runtime != "pytorch":
        # ONNX Runtime has its threads by session.
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(target.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def versions() -> dict[str, str]:
    """Return the versions of what runs and times networks."""
    return {name: version(name) for name in ("numpy", "onnxruntime", "torch")}
