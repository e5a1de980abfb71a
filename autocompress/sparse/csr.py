"""Bytes of sparse weights in compressed sparse rows, next to dense ones."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

VALUE_BYTES = 4
"""Of a float32."""
INDEX_BYTES = 4
"""Of an index of SciPy, cuSPARSE and MKL: int32."""


@dataclass(frozen=True)
class Matrix:
    """A weight as the matrix that a sparse kernel multiplies by: `(out, in * height * width)`.

    Attributes:
        rows: One a filter.
        columns: Weights of a filter.
        nonzero: Weights that are not zero.
    """

    rows: int
    columns: int
    nonzero: int

    @classmethod
    def of(cls, weight: Tensor) -> "Matrix":
        """Count a weight, `(out, ...)`."""
        return cls(len(weight), weight[0].numel(), int((weight.detach() != 0).sum()))

    @property
    def dense_bytes(self) -> int:
        """Of all values."""
        return VALUE_BYTES * self.rows * self.columns

    @property
    def csr_bytes(self) -> int:
        """Values, a column index each, and row pointers; all indices int32."""
        return self._bytes(INDEX_BYTES, INDEX_BYTES)

    @property
    def small_csr_bytes(self) -> int:
        """The same with the smallest unsigned integers that hold the indices; a format for files.

        1, 2 or 4 bytes, one width for the column indices and one for the row pointers.
        """
        return self._bytes(width_of(self.columns - 1), width_of(self.nonzero))

    def _bytes(self, column: int, pointer: int) -> int:
        return (VALUE_BYTES + column) * self.nonzero + pointer * (self.rows + 1)


def width_of(largest: int) -> int:
    """Return the bytes of the smallest of uint8, uint16 and uint32 that holds a number."""
    return next(width for width in (1, 2, 4) if largest < 256**width)


def account_of(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return the bytes of each weight and of all, and in words what they do not mean."""
    matrices = {name: Matrix.of(weight) for name, weight in weights.items()}
    layers = [
        {
            "name": name,
            "rows": each.rows,
            "columns": each.columns,
            "nonzero": each.nonzero,
            "dense_bytes": each.dense_bytes,
            "csr_bytes": each.csr_bytes,
            "small_csr_bytes": each.small_csr_bytes,
        }
        for name, each in matrices.items()
    ]
    dense, csr, small = (
        sum(getattr(each, kind) for each in matrices.values())
        for kind in ("dense_bytes", "csr_bytes", "small_csr_bytes")
    )
    larger = [name for name, each in matrices.items() if each.csr_bytes >= each.dense_bytes]
    empty = [name for name, each in matrices.items() if not each.nonzero]
    notes = [
        f"{dense} bytes dense; {csr} as CSR with int32 indices (values, column indices, row pointers); "
        f"{small} with the smallest indices that hold them, which is a format for files"
    ]
    if larger:
        notes.append(f"CSR with int32 indices is no smaller than dense for {', '.join(larger)}")
    if empty:
        notes.append(f"no weight is left in {', '.join(empty)}: lower sparsity, or use scope: layer")
    notes.append(
        "the network is not faster by this: dense runtimes multiply by zeros as by other numbers; to be "
        "faster, remove channels"
    )
    total = {"dense_bytes": dense, "csr_bytes": csr, "small_csr_bytes": small}
    return {"csr": {"index_bytes": INDEX_BYTES, "total": total, "layers": layers}, "notes": notes}
