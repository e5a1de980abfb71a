import csv
import json
from pathlib import Path

import numpy as np
import pytest

from autocompress.errors import DataError
from autocompress.evaluation.ofa_table import COLUMNS, read_ofa_table
from search_spaces.mobilenet_v3 import mobilenet_v3

SPACE = mobilenet_v3()
GOLDEN = json.loads((Path(__file__).parents[1] / "golden/mobilenet_v3_subnets.json").read_text())["rows"]
"""Published sub-networks: genes, parameters, MACs (source in the file); their accuracies here are made up."""
PUBLISHED = Path(__file__).parents[3] / "shared/data/ofa/ofa_mbv3_w10_imagenet_subnets.csv"


def written(path: Path, rows: list[dict[str, str]], columns: tuple[str, ...] = COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def golden_lines() -> list[dict[str, str]]:
    return [
        {
            "kernel": " ".join(map(str, row["kernel"])),
            "expand": " ".join(map(str, row["expand"])),
            "depth": " ".join(map(str, row["depth"])),
            "resolution": str(row["resolution"]),
            "params": str(row["params"]),
            "macs": str(row["macs"]),
            "top1_percent": str(70 + index / 8),
        }
        for index, row in enumerate(GOLDEN)
    ]


def test_every_line_becomes_the_row_with_its_options(tmp_path: Path) -> None:
    table = read_ofa_table(written(tmp_path / "t.csv", golden_lines()), SPACE)
    assert table.codes.shape == (len(GOLDEN), len(SPACE.choices))
    np.testing.assert_array_equal(table.top1_percent, 70 + np.arange(len(GOLDEN)) / 8)
    np.testing.assert_array_equal(table.macs, [row["macs"] for row in GOLDEN])
    np.testing.assert_array_equal(table.params, [row["params"] for row in GOLDEN])
    np.testing.assert_array_equal(table.codes, SPACE.canonical(table.codes))
    for row, found in zip(GOLDEN, SPACE.decode(table.codes), strict=True):
        for stage in range(5):
            depth = found[f"stage{stage + 1}.depth"]
            assert depth == row["depth"][stage]
            for block in range(int(depth)):
                for name in ("kernel", "expand"):
                    assert found[f"stage{stage + 1}.block{block + 1}.{name}"] == row[name][4 * stage + block]


def test_lines_of_one_network_are_one_distinct_row_with_their_mean(tmp_path: Path) -> None:
    lines = golden_lines()[:3]
    # The last block of a stage of depth below four has no effect: another kernel there is the same network.
    skipped = next(i for i, line in enumerate(lines) if "4" not in line["depth"].split()[0])
    kernels = lines[skipped]["kernel"].split()
    kernels[3] = "3" if kernels[3] != "3" else "7"
    lines.append({**lines[skipped], "kernel": " ".join(kernels), "top1_percent": "90"})
    table = read_ofa_table(written(tmp_path / "t.csv", lines), SPACE)
    np.testing.assert_array_equal(table.codes[3], table.codes[skipped])
    distinct = table.distinct()
    assert len(distinct.codes) == 3
    at = int((distinct.codes == table.codes[3]).all(axis=1).argmax())
    assert distinct.top1_percent[at] == (table.top1_percent[skipped] + 90) / 2
    assert distinct.macs[at] == table.macs[skipped]
    assert sorted(distinct.params) == sorted(table.params[:3])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("kernel", "3 3", "line 3: kernel must have 20 numbers, got 2: '3 3'"),
        ("kernel", " ".join(["3"] * 19 + ["x"]), "line 3: kernel must be integers separated by blanks"),
        ("kernel", " ".join(["4"] * 20), r"line 3: .*'stage1\.block1\.kernel' has no option 4; allowed"),
        ("depth", "5 5 5 5 5", r"line 3: .*'stage1\.depth' has no option 5; allowed: \[2, 3, 4\]"),
        ("resolution", "192", r"line 3: .*'resolution' has no option 192; allowed: \[224\]"),
        ("top1_percent", "nan", "line 3: top1_percent must be a positive number, got 'nan'"),
        ("top1_percent", "", "line 3: top1_percent must be a positive number, got ''"),
        ("macs", "123456", "line 3: macs are 123456 in the table and [0-9]+ in space 'mobilenet_v3'"),
    ],
)
def test_a_wrong_entry_names_line_and_rule(tmp_path: Path, column: str, value: str, message: str) -> None:
    lines = golden_lines()[:3]
    lines[1][column] = value
    with pytest.raises(DataError, match=message):
        read_ofa_table(written(tmp_path / "t.csv", lines), SPACE)


def test_a_table_of_another_width_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", golden_lines())
    with pytest.raises(DataError, match="the table is of another space"):
        read_ofa_table(path, mobilenet_v3(width=1.2))


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("3 3 3\n", "line 3: kernel must have 20 numbers, got 3"),
        (None, "line 3: .*more fields than the 7 columns"),
    ],
)
def test_a_line_of_another_length_is_refused(tmp_path: Path, end: str | None, message: str) -> None:
    path = written(tmp_path / "t.csv", golden_lines()[:1])
    text = path.read_text()
    path.write_text(text + (end or text.splitlines()[1] + ",1\n"))
    with pytest.raises(DataError, match=message):
        read_ofa_table(path, SPACE)


def test_a_missing_an_empty_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv cannot be read"):
        read_ofa_table(tmp_path / "none.csv", SPACE)
    with pytest.raises(DataError, match="has no sub-network"):
        read_ofa_table(written(tmp_path / "t.csv", []), SPACE)
    with pytest.raises(DataError, match="lacks the columns macs, top1_percent"):
        read_ofa_table(written(tmp_path / "t.csv", golden_lines(), COLUMNS[:-2]), SPACE)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="cannot be read"):
        read_ofa_table(tmp_path / "binary.csv", SPACE)


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.exists(), reason=f"needs {PUBLISHED}")
def test_the_published_table_is_read_whole() -> None:
    """904 lines of 842 networks; every published MAC and parameter is the space's."""
    table = read_ofa_table(PUBLISHED, SPACE)
    assert len(table.codes) == 904
    distinct = table.distinct()
    assert len(distinct.codes) == 842
    assert 70 < distinct.top1_percent.min() < distinct.top1_percent.max() < 78
