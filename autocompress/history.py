"""The stream of candidates that a free evaluator scored: fixed-size records, appended to a file.

The file is a line of JSON that says what it belongs to, then one record a candidate: the codes as bytes
(wider integers only if a choice has over 256 options), the score and each cost as doubles, all little-endian.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from autocompress.errors import StorageError
from autocompress.space import Codes, SearchSpace
from autocompress.trial import Batch, Outcome

SCHEMA: Final = "autocompress.history"
MAX_HEAD_BYTES: Final = 100_000


@final
class History:
    """The stream of one search; it starts with none."""

    def __init__(
        self, path: Path, space: SearchSpace, costs: tuple[str, ...], identity: Mapping[str, Any]
    ) -> None:
        """Start the file, over what was there.

        Args:
            path: The file; its folder is made.
            space: Whose candidates.
            costs: Names of the costs, in the order of the columns.
            identity: What else they belong to; plain values.

        Raises:
            StorageError: It cannot be written.
        """
        self._path, self._dtype = path, _record(space, len(costs))
        head = {**identity, "schema": SCHEMA, "version": 1, "costs": list(costs), "space": space.fingerprint}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((json.dumps(head, sort_keys=True) + "\n").encode())
        except OSError as error:
            raise StorageError(f"cannot open {path}: {error.strerror or error}") from error

    def append(self, codes: Codes, scores: NDArray[np.float64], costs: NDArray[np.float64]) -> None:
        """Add records.

        Args:
            codes: `(n, choices)`.
            scores: `(n,)`.
            costs: `(n, costs)`.

        Raises:
            StorageError: They cannot be written.
        """
        records = np.zeros(len(codes), dtype=self._dtype)
        records["codes"], records["score"], records["costs"] = codes, scores, costs
        try:
            with self._path.open("ab") as file:
                file.write(records.tobytes())
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror or error}") from error


def read_history(path: Path, space: SearchSpace) -> Batch:
    """Return all candidates of a stream with their costs and, as metric `score`, their scores.

    A score that is `nan` is of a candidate that could not be scored. What a kill left of the last record is
    not read.

    Raises:
        StorageError: It cannot be read, is no such stream, or is of another space.
    """
    try:
        with path.open("rb") as file:
            line = file.readline(MAX_HEAD_BYTES)
            content = file.read()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        head = json.loads(line)
        costs = [str(name) for name in head["costs"]]
        known = (head["schema"], head["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} is no stream of candidates: {error!r}") from error
    if known != (SCHEMA, 1) or head.get("space") != space.fingerprint:
        raise StorageError(f"{path} is no stream of version 1 of candidates of this space, {space.name!r}")
    dtype = _record(space, len(costs))
    records = np.frombuffer(content[: len(content) // dtype.itemsize * dtype.itemsize], dtype=dtype)
    scores = records["score"].copy()
    outcomes = np.where(np.isfinite(scores), Outcome.MEASURED, Outcome.FAILED).astype(np.int8)
    columns = {name: records["costs"][:, index].copy() for index, name in enumerate(costs)}
    return Batch(records["codes"].astype(np.int64), columns, {"score": scores}, outcomes)


def _record(space: SearchSpace, costs: int) -> np.dtype[Any]:
    # One byte a gene for nearly every space.
    gene = np.min_scalar_type(int(space.counts.max()) - 1).newbyteorder("<")
    return np.dtype([("codes", gene, (len(space.choices),)), ("score", "<f8"), ("costs", "<f8", (costs,))])
