"""Bytes of parameters when weights are stored in few bits."""

from autocompress.errors import CostError
from autocompress.ops import Ops


def weight_bytes(ops: Ops, *, weight_bits: int, other_bits: int = 32) -> int:
    """Return the bytes of the parameters of operations, each tensor rounded up to whole bytes.

    Scales and zero points of a quantization scheme are not counted. At 32 bits it is the sum of `size_bytes`.

    This is a price: `compile_cost(space, partial(weight_bytes, weight_bits=8), "size_bytes")` is the cost of
    the networks of a space, which a budget can limit.

    Args:
        ops: The operations.
        weight_bits: Of the weights of convolutions and linear layers, squeeze-excite's included; of all
            parameters of a user's own operation that does not tell its `weight_tensors`.
        other_bits: Of biases and of scale and shift of norms.

    Raises:
        CostError: A number of bits is not a positive integer.
    """
    for name, value in {"weight_bits": weight_bits, "other_bits": other_bits}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CostError(f"{name} must be an integer >= 1, got {value!r}")
    return sum(
        -(-elements * bits // 8)
        for op in ops
        for tensors, bits in ((op.weight_tensors, weight_bits), (op.other_tensors, other_bits))
        for elements in tensors
    )
