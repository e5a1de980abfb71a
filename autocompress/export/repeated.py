"""Weights that compress: a short random pattern, repeated, in place of the weights of an ONNX model.

Models that are only timed have random weights, which no archive can make smaller. How long a kernel takes
does not depend on values, as long as they are ordinary numbers, so a bundle of models for another device
repeats a few of them: of 766 MB of blocks and networks of MobileNetV3 10 MB are left.
"""

from typing import Any, Final

import numpy as np
import onnx
from onnx import helper

# A prime: rows of a weight matrix, whose lengths are not multiples of it, then differ from each other.
PERIOD: Final = 509
# Sign, exponent and 4 bits of mantissa of a 32-bit float; the rest would be half of what is left to store.
KEPT_BITS: Final = np.uint32(0xFFF80000)


def repeated_weights(model: bytes, *, period: int = PERIOD) -> bytes:
    """Return a model that is timed like the given one and compresses about a hundredfold.

    Each stored tensor of more than `period` values repeats its first ones; 32-bit floats lose the lower bits
    of their mantissa. Scales, zero points and other short tensors stay as they are, so do shapes, types and
    nodes.

    Args:
        model: Serialized; its weights lie in it, not in a file beside it.
        period: Values before the pattern begins again.
    """
    loaded = onnx.load_from_string(model)
    for tensor in loaded.graph.initializer:
        _repeat(tensor, period)
    serialized: bytes = loaded.SerializeToString()
    return serialized


def _repeat(tensor: Any, period: int) -> None:
    size = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    count = len(tensor.raw_data) // size
    if count <= period:
        return
    pattern = tensor.raw_data[: period * size]
    if tensor.data_type == onnx.TensorProto.FLOAT:
        pattern = (np.frombuffer(pattern, dtype="<u4") & KEPT_BITS).astype("<u4").tobytes()
    tensor.raw_data = (pattern * (count // period + 1))[: count * size]
