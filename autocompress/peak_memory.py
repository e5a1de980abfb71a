"""Peak memory of activations, from operations alone.

The metric is called `peak_activation_bytes`, not `peak_memory_bytes`: the latter is what
`autocompress.latency.memory` measures of a whole process, with weights and what the runtime keeps. Weights
are not included here; they are `size_bytes` (or `autocompress.weight_bytes`).

The schedule is sequential, as interpreters for small devices run a network:

- Operations run one after another. While one runs, its input and its output are alive, each in a buffer of
  its own; a buffer is free again when nothing later reads it.
- Batch norm and activation are fused into their convolution or linear layer, or work in place: no buffer.
- In a block that ends in `Add`, the block's input is alive until the addition, which writes a third buffer
  (it does not work in place). While the first operation reads the block's input, that counts once.
- `SqueezeExcite` keeps its input until the final multiplication, which writes a new buffer; its averages and
  scales, one a channel, and its hidden numbers are counted while they are alive.
- The input of the network is alive while its first block needs it; its buffer is free afterwards.
- Workspaces of kernels (im2col, wider accumulators), alignment and fragmentation are not counted.

An operation of a user's own counts its input and its output, unless its `peak_elements` says more.
"""

import math
from collections.abc import Iterable

from autocompress.cost import MaximumCost, compile_maximum
from autocompress.errors import CostError
from autocompress.ops import Add, Ops
from autocompress.space import SearchSpace

METRIC = "peak_activation_bytes"

ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
"""Bytes of one number in each format that a target computes in."""


def block_peak_elements(ops: Ops) -> int:
    """Return how many elements for one image are alive at the worst moment of a block, 0 if it is empty."""
    added = max((position for position, op in enumerate(ops) if isinstance(op, Add)), default=0)
    peak = 0
    for position, op in enumerate(ops):
        # The first operation's input is the block's.
        held = math.prod(ops[0].in_shape) if 0 < position <= added else 0
        peak = max(peak, held + op.peak_elements)
    return peak


def peak_activation_bytes(
    blocks: Iterable[tuple[str, Ops]], *, element_bytes: int = 4, batch: int = 1
) -> int:
    """Return the most bytes of activations that are alive at once, weights not included.

    Args:
        blocks: Name and operations of each active block, as `SearchSpace.operations` returns them.
        element_bytes: Of one number: 4 for 32-bit floats, 1 for 8-bit integers.
        batch: Images at once.

    Raises:
        CostError: `element_bytes` or `batch` is not a positive integer.
    """
    each = _bytes_of_an_element(element_bytes, batch)
    return each * max((block_peak_elements(ops) for _, ops in blocks), default=0)


def peak_activation_cost(space: SearchSpace, *, element_bytes: int = 4, batch: int = 1) -> MaximumCost:
    """Compile the peak of activations of every architecture of a space, in bytes, weights not included.

    Args:
        space: The space.
        element_bytes: Of one number: 4 for 32-bit floats, 1 for 8-bit integers.
        batch: Images at once.

    Raises:
        CostError: `element_bytes` or `batch` is not a positive integer, or a block of the space depends on
            too many options.
    """
    each = _bytes_of_an_element(element_bytes, batch)
    return compile_maximum(space, lambda ops: each * block_peak_elements(ops), METRIC)


def _bytes_of_an_element(element_bytes: int, batch: int) -> int:
    for name, value in {"element_bytes": element_bytes, "batch": batch}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CostError(f"{name} must be an integer >= 1, got {value!r}")
    return element_bytes * batch
