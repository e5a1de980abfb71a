"""Plain CSV: the header says the unit, keys are block keys."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from autocompress.errors import TableError
from autocompress.latency.foreign.plain_csv import read_plain_csv
from autocompress.latency.foreign.rows import ForeignRow
from autocompress.ops import Add, Conv2d, GlobalAvgPool, Linear, block_key

Change = Callable[[str, str, str], Path]

KEY = block_key((Conv2d(3, 8, 8, 8, kernel=3),))


def test_times_are_converted_from_the_unit_of_the_header(folder: Path) -> None:
    rows = read_plain_csv(folder / "plain.csv")
    head = block_key((GlobalAvgPool(8, 8, 8), Linear(8, 3)))
    assert rows == {KEY: ForeignRow(0.25, 0.0105, 30), head: ForeignRow(0.1, 0.0, 20)}


def test_the_sample_of_the_docs_is_a_table(tmp_path: Path) -> None:
    page = Path(__file__).parents[3] / "docs" / "foreign-tables.md"
    (sample,) = re.findall(r"```\n(key,.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "plain.csv").write_text(sample, encoding="utf-8")
    assert read_plain_csv(tmp_path / "plain.csv") == {KEY: ForeignRow(0.25, 0.0105, 30)}


@pytest.mark.parametrize(
    ("header", "values", "expected"),
    [
        ("key,median_ms", "2.5", ForeignRow(2.5)),
        ("key,median_s", "2.5", ForeignRow(2500.0)),
        ("key,median_us", "2.5", ForeignRow(0.0025)),
        ("key,median_ms,spread_ms", "2.5,1", ForeignRow(2.5, 1.0)),
        ("key,median_s,count", "1,7", ForeignRow(1000.0, None, 7)),
        ("key,median_s,spread_s,count", "1,0.5,7", ForeignRow(1000.0, 500.0, 7)),
    ],
)
def test_spread_and_count_may_be_left_out(
    tmp_path: Path, header: str, values: str, expected: ForeignRow
) -> None:
    path = tmp_path / "plain.csv"
    path.write_text(f'{header}\n"{KEY}",{values}\n', encoding="utf-8")
    assert read_plain_csv(path) == {KEY: expected}


def test_the_keys_of_blocks_are_keys(tmp_path: Path) -> None:
    residual = (Conv2d(8, 8, 4, 4, bias=True, norm=False, activation="relu6"), Add(8, 4, 4))
    path = tmp_path / "plain.csv"
    path.write_text(f'key,median_ms\r\n"{block_key(residual)}",1\r\n', encoding="utf-8", newline="")
    assert list(read_plain_csv(path)) == [block_key(residual)]


@pytest.mark.parametrize(
    "header",
    [
        "key,median",
        "key,median_ns",
        "key,median_min",
        "key,mean_ms",
        "median_ms,key",
        "key,median_us,spread_ms",
        "key,median_us,count,spread_us",
        "key,median_us,spread_us,count,note",
        "KEY,median_us",
        " key,median_us",
        "key;median_us",
    ],
)
def test_another_unit_or_header_is_refused_with_the_allowed_ones(tmp_path: Path, header: str) -> None:
    path = tmp_path / "plain.csv"
    columns = header.count(",")
    path.write_text(f'{header}\n"{KEY}"{",1" * columns}\n', encoding="utf-8")
    with pytest.raises(TableError, match=f"one of median_ms, median_us, median_s, got '{header}'"):
        read_plain_csv(path)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (",250,", ",-250,", "line 2, column median_us must be at least 0, got -250"),
        (",250,", ",NaN,", "line 2, column median_us must be a finite number, got 'NaN'"),
        (",250,", ",inf,", "must be a finite number, got 'inf'"),
        (",250,", ",1e400,", "must be a finite number, got inf"),
        (",250,", ",1e300,", "must be at most 1e\\+100"),
        (",250,", ",250 us,", "must be a finite number, got '250 us'"),
        (",250,", ",,", "must be a finite number, got ''"),
        (",10.5,", ",-10.5,", "column spread_us must be at least 0"),
        (",30\n", ",0\n", "column count must be an integer >= 1, got 0"),
        (",30\n", ",30.0\n", "column count must be an integer >= 1, got 30.0"),
        ("Conv2d(in_channels", "Conv2d[in_channels", "must be a block key such as 'Linear"),
        (
            '"GlobalAvgPool(channels=8,height=8,width=8) > Linear(in_features=8,out_features=3)"',
            f'"{KEY}"',
            "stands twice",
        ),
    ],
)
def test_a_wrong_row_is_refused(changed: Change, old: str, new: str, match: str) -> None:
    path = changed("plain.csv", old, new)
    with pytest.raises(TableError, match=rf"latency CSV .*plain\.csv: .*{match}.*docs/foreign-tables\.md"):
        read_plain_csv(path)
