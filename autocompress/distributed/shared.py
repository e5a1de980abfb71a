"""Objects with tensors for many processes: pickled once, with the tensors' memory beside the pickle.

Ray puts arrays into shared memory and gives every process of a machine the same pages. Tensors it copies. So
the memory of tensors is handed to it as arrays, and tensors are made on top of them: ten workers hold the
weights of one.

Workers `protect` that memory: **writing to such a tensor ends the process** (a segmentation fault). A
`SupernetEvaluator` writes to none of them; an evaluator that trains does so on a copy (`copy.deepcopy`).
"""

import ctypes
import io
import mmap
import pickle
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMALL_BYTES = 1 << 14
"""Below, tensors are copied: they are no burden, and counters and statistics are what modules write to."""
PROT_READ = 1
Bytes = NDArray[np.uint8]


def packed(content: Any) -> tuple[bytes, list[Bytes]]:
    """Return a pickle and the memory of its tensors, to be put into an object store.

    Raises:
        Exception: Whatever pickling raises.
    """
    import torch
    from ray import cloudpickle

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        """Has tensors on the CPU beside the pickle."""

        def reducer_override(self, obj: Any) -> Any:
            """Reduce a tensor to its bytes; anything else as always."""
            if type(obj) is torch.Tensor and _shareable(obj):
                dense = obj.detach()
                if not _dense(dense):
                    dense = dense.contiguous()
                flat = dense.as_strided((dense.numel(),), (1,))
                memory: Any = flat.view(torch.uint8).numpy()
                dtype = str(dense.dtype).removeprefix("torch.")
                shaped = (tuple(dense.shape), dense.stride(), obj.requires_grad)
                return _tensor, (pickle.PickleBuffer(memory), dtype, *shaped)
            return super().reducer_override(obj)

    stream, buffers = io.BytesIO(), list[Bytes]()

    def beside(buffer: pickle.PickleBuffer) -> None:
        buffers.append(np.frombuffer(buffer.raw(), dtype=np.uint8))

    Pickler(stream, protocol=5, buffer_callback=beside).dump(content)
    return stream.getvalue(), buffers


def unpacked(content: bytes, buffers: Sequence[Bytes]) -> Any:
    """Return the object, its tensors on the memory of `buffers`; only for what this program packed."""
    return pickle.loads(content, buffers=buffers)


def protect(buffers: Sequence[Bytes]) -> None:
    """Make memory read-only for this process, but for the edges of pages: who writes to it is ended.

    Ray maps shared memory for reading and writing, and PyTorch does not ask: without this, an evaluator that
    writes to its weights would change those of all other workers, and nobody would know.

    Raises:
        OSError: The system does not allow it.
    """
    system, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    for buffer in buffers:
        start, end = buffer.ctypes.data, buffer.ctypes.data + buffer.nbytes
        first, last = -(-start // page) * page, end // page * page
        if first < last and system.mprotect(ctypes.c_void_p(first), ctypes.c_size_t(last - first), PROT_READ):
            raise OSError(ctypes.get_errno(), "mprotect")


def _shareable(tensor: Any) -> bool:
    import torch

    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.numel() * tensor.element_size() >= SMALL_BYTES
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
        and (tensor.is_leaf or not tensor.requires_grad)
    )


def _dense(tensor: Any) -> bool:
    """Whether a tensor is all of a stretch of memory, in whatever order of its axes."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _tensor(
    memory: Any, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], requires_grad: bool
) -> Any:
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given .* is not writable")
        flat = torch.from_numpy(np.frombuffer(memory, dtype=np.uint8)).view(getattr(torch, dtype))
    tensor = flat.as_strided(shape, strides)
    return tensor.requires_grad_() if requires_grad else tensor
