"""HAQ's table: cost of each layer by bits of weights and activations, a NumPy array.

Source: Wang et al., HAQ, CVPR 2019; mit-han-lab/haq, `lib/simulator/lookup_tables`. The array is indexed by
bits minus one. The published code stands for "not quantized" with -1, which NumPy takes for a column near the
end; here a width outside 1..8 is refused. The unit is not stated: the numbers look like cycles.
"""

import io
import math
import re
from pathlib import Path
from typing import Final

import numpy as np

from autocompress.errors import TableError
from autocompress.latency.foreign.bit_table import BitTable
from autocompress.latency.reading import MAX_COST, read_bytes, reading, shown

BITS: Final = 8
UNIT: Final = "cycles (assumed)"
MAGIC: Final = b"\x93NUMPY\x01\x00"
MAX_HEADER: Final = 1000
# As NumPy writes it. Matched rather than evaluated: the header is a Python expression.
HEADER: Final = re.compile(
    rb"\{'descr': '([<>|](?:[iu][1248]|f[248]))', 'fortran_order': (?:True|False), "
    rb"'shape': \(([0-9]{1,9}), ([0-9]{1,9}), ([0-9]{1,9})\), \} *\n"
)


def read_haq(path: Path) -> BitTable:
    """Read a table; its layers are named by their position, `"0"`, `"1"` and so on.

    Args:
        path: A `.npy` file of format version 1.0: numbers of shape `(layers, 8, 8)`.

    Raises:
        TableError: The file is absent, damaged, of another shape or type, or a cost is negative or not
            finite.
    """
    with reading("HAQ table", path):
        content = read_bytes(path)
        layers = _check(content)
        values = np.load(io.BytesIO(content), allow_pickle=False).astype(np.float64)
        wrong = np.argwhere(~((values >= 0) & (values <= MAX_COST)))
        if len(wrong):
            layer, weights, activations = wrong[0].tolist()
            raise TableError(
                f"the cost of layer {layer} at {weights + 1} bits of weights and {activations + 1} of "
                f"activations must be in 0..{MAX_COST:g}, got {values[layer, weights, activations]}"
            )
        rows = {
            (str(layer), weights + 1, activations + 1): value
            for layer, table in enumerate(values.tolist())
            for weights, line in enumerate(table)
            for activations, value in enumerate(line)
        }
        return BitTable(str(path), UNIT, tuple(map(str, range(layers))), rows)


def _check(content: bytes) -> int:
    """Return the number of layers of a file that NumPy can load without surprise."""
    start = len(MAGIC) + 2
    if not content.startswith(MAGIC) or len(content) < start:
        raise TableError(f"must be a NumPy file of version 1.0, got {shown(content[:12])}")
    size = int.from_bytes(content[len(MAGIC) : start], "little")
    header = HEADER.fullmatch(content[start : start + min(size, MAX_HEADER)])
    if header is None:
        raise TableError(
            "must be an array of numbers with three dimensions, (layers, bits of weights, bits of "
            f"activations); objects are never unpickled; got header {shown(content[start : start + 80])}"
        )
    shape = tuple(int(length) for length in header.groups()[1:])
    if shape[0] < 1 or shape[1:] != (BITS, BITS):
        raise TableError(f"must have shape (layers, {BITS}, {BITS}), index = bits - 1, got {shape}")
    expected = math.prod(shape) * int(header.group(1)[2:])
    if len(content) - start - size != expected:
        raise TableError(
            f"must have {expected} bytes of numbers for shape {shape}, got {len(content) - start - size}: "
            "it is truncated or damaged; get it anew"
        )
    return shape[0]
