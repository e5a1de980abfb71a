"""The published once-for-all sub-networks with their ImageNet accuracy, as rows of a search space.

Format: the CSV of DyNAS-T (Intel, Apache-2.0; sub-networks of the once-for-all MobileNetV3 w1.0, Cai et
al., ICLR 2020). Its columns are `kernel` and `expand` (20 numbers each, four for each of five stages, also
those of blocks that depth leaves out), `depth` (five), `resolution`, `params`, `macs` and `top1_percent`.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autocompress.cost import Values, operation_cost
from autocompress.errors import DataError, SpaceError
from autocompress.space import Architecture, Codes, Option, SearchSpace

STAGES, BLOCKS = 5, 4
LISTS = {"kernel": STAGES * BLOCKS, "expand": STAGES * BLOCKS, "depth": STAGES}
"""Columns that hold several integers, separated by blanks, and how many."""
COUNTS = ("params", "macs")
COLUMNS = (*LISTS, "resolution", *COUNTS, "top1_percent")


@dataclass(frozen=True, eq=False)
class OfaTable:
    """Sub-networks and what was published of them.

    Attributes:
        codes: `(n, choices)`, canonical.
        top1_percent: ImageNet top-1 accuracy, `(n,)`.
        macs: Multiply-accumulates, `(n,)`; those of the space to the last one.
        params: Parameters, `(n,)`; those of the space to the last one.
    """

    codes: Codes
    top1_percent: Values
    macs: Values
    params: Values

    def distinct(self) -> "OfaTable":
        """Return one row a network, in lexicographic order of codes, its accuracy the mean of its lines.

        Genes of blocks that depth leaves out have no effect, so several lines can be of one network.
        """
        codes, first, network = np.unique(self.codes, axis=0, return_index=True, return_inverse=True)
        network = network.reshape(-1)
        mean = np.bincount(network, weights=self.top1_percent) / np.bincount(network)
        return OfaTable(codes, mean, self.macs[first], self.params[first])


def read_ofa_table(path: Path, space: SearchSpace) -> OfaTable:
    """Read the published sub-networks.

    Args:
        path: The CSV file.
        space: `mobilenet_v3` with the geometry `imagenet`, width 1 and every published option; choices are
            `resolution`, `stage1.depth`..., `stage1.block1.kernel`, `stage1.block1.expand`...

    Raises:
        DataError: The file is missing or empty, lacks columns, or a line (named by its number) has a wrong
            count of fields or numbers, something that is no number, an option that the space lacks, or
            parameters or MACs that differ from those of the space: the table is then of another space.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{path} lacks the columns {', '.join(missing)}")
            lines = [(reader.line_num, line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"the table of sub-networks {path} cannot be read: {error}") from None
    if not lines:
        raise DataError(f"{path} has no sub-network, only the names of columns")
    rows, numbers = [], []
    for number, line in lines:
        try:
            rows.append(_architecture(line, space))
            numbers.append([_number(line, name) for name in (*COUNTS, "top1_percent")])
        except (DataError, SpaceError) as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    codes = space.encode(rows)
    params, macs, accuracy = np.array(numbers, dtype=np.float64).T
    for metric, published in {"params": params, "macs": macs}.items():
        counted = operation_cost(space, metric).of(codes)
        wrong = np.flatnonzero(counted != published)
        if len(wrong):
            raise DataError(
                f"{path}, line {lines[wrong[0]][0]}: {metric} are {published[wrong[0]]:.0f} in the table and "
                f"{counted[wrong[0]]:.0f} in space {space.name!r}; the table is of another space "
                "(width, classes or resolution)"
            )
    return OfaTable(codes, accuracy, macs, params)


def _architecture(line: dict[str, str], space: SearchSpace) -> Architecture:
    if None in line:
        raise DataError(f"the line has more fields than the {len(line) - 1} columns")
    genes = {name: _integers(line, name, count) for name, count in LISTS.items()}
    settings: dict[str, Option] = {"resolution": _integers(line, "resolution", 1)[0]}
    for stage in range(STAGES):
        settings[f"stage{stage + 1}.depth"] = genes["depth"][stage]
        for block in range(BLOCKS):
            for name in ("kernel", "expand"):
                value = genes[name][BLOCKS * stage + block]
                settings[f"stage{stage + 1}.block{block + 1}.{name}"] = value
    return space.architecture(settings)


def _integers(line: dict[str, str], column: str, count: int) -> list[int]:
    text = line[column] or ""
    try:
        values = [int(part) for part in text.split()]
    except ValueError:
        raise DataError(f"{column} must be integers separated by blanks, got {text!r}") from None
    if len(values) != count:
        raise DataError(f"{column} must have {count} numbers, got {len(values)}: {text!r}")
    return values


def _number(line: dict[str, str], column: str) -> float:
    text = line[column] or ""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise DataError(f"{column} must be a positive number, got {text!r}")
    return value
