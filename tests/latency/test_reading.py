"""Files are read by size, as text and without duplicates, or refused with path, reason and way out."""

import gzip
import os
from pathlib import Path

import pytest

from autocompress.errors import TableError
from autocompress.latency import reading
from autocompress.latency.foreign.strict_yaml import parse_yaml
from autocompress.latency.reading import (
    MAX_BYTES,
    cost_of,
    number_or_text,
    parse_csv,
    parse_json,
    read_bytes,
    read_text,
)
from autocompress.latency.strict import Node


def test_a_file_of_two_gigabytes_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "huge.csv"
    with path.open("wb") as file:
        file.truncate(2 * 2**30)
    monkeypatch.setattr(Path, "open", None)  # any attempt to read would be a TypeError
    with pytest.raises(TableError, match=f"at most {MAX_BYTES} bytes, also unpacked, got {2 * 2**30} bytes"):
        read_bytes(path)


@pytest.mark.parametrize(("excess", "refused"), [(0, False), (1, True)])
def test_a_packed_file_is_refused_by_what_it_unpacks_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excess: int, refused: bool
) -> None:
    monkeypatch.setattr(reading, "MAX_BYTES", 10_000)
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b"0" * (10_000 + excess)))
    assert path.stat().st_size < 100
    if refused:
        with pytest.raises(TableError, match="at most 10000 bytes, also unpacked, got more than 10000"):
            read_bytes(path)
    else:
        assert len(read_bytes(path)) == 10_000


@pytest.mark.slow
def test_a_real_gzip_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.json.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(1024):
            file.write(bytes(2**20))
    with pytest.raises(TableError, match="got more than"):
        read_bytes(path)


def test_what_is_no_readable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="not found; give the path"):
        read_bytes(tmp_path / "absent.csv")
    with pytest.raises(TableError, match="must be a regular file"):
        read_bytes(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TableError, match="must be a regular file"):  # and does not wait for a writer
        read_bytes(tmp_path / "pipe")
    with pytest.raises(TableError, match="cannot be read"):
        read_bytes(tmp_path / "null\0character")


@pytest.mark.parametrize(
    "content", [b"", b"plain", gzip.compress(b"x" * 1000, mtime=0)[:-9], b"\x1f\x8b\x08\0" * 9]
)
def test_a_damaged_packed_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "table.csv.gz"
    path.write_bytes(content)
    if content == b"":
        assert read_bytes(path) == b""  # gzip: no member; the reader finds no table in it
        return
    with pytest.raises(TableError, match="truncated or damaged"):
        read_bytes(path)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b"key\xff")
    with pytest.raises(TableError, match="text in UTF-8, got byte 0xff at 3"):
        read_text(path)
    path.write_bytes(b"key\0")
    with pytest.raises(TableError, match="null character at 3"):
        read_text(path)
    path.write_bytes(b"key,1.2")
    assert read_text(path) == "key,1.2"
    with pytest.raises(TableError, match=r"end of a line, got 'key,1\.2': it may be truncated"):
        read_text(path, whole_lines=True)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"a": 1, "a": 1}', "'a' stands twice"),
        ('{"a": {"b": 1, "c": 1, "b": 2}}', "'b' stands twice"),
        ('{"a": NaN}', "finite, got NaN"),
        ('{"a": -Infinity}', "finite, got -Infinity"),
        ('{"a": 1', "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("1" * 5000, "at most 18 digits"),
        ("", "must be JSON, got ''"),
    ],
)
def test_json_that_is_damaged_or_ambiguous_is_refused(text: str, match: str) -> None:
    with pytest.raises(TableError, match=match):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: 1\nb: 2\na: 3\n", "'a' stands twice"),
        ("a: {b: 1, b: 1}\n", "'b' stands twice"),
        ("a: !!python/object/apply:os.system [echo]\n", "line 1: tags, anchors and aliases are refused"),
        ("a: 1\nb: !!float 3\n", "line 2: tags"),
        ("a: ! 3\n", "line 1: tags"),
        ("--- !<tag:yaml.org,2002:map>\na: 1\n", "tags"),
        ("a: &x {mean: 1}\nb: 2\n", "anchors"),
        ("a: &x 1\nb: *x\n", "anchors"),
        ("a: [1, 2]\n", "must be a mapping of keys to rows"),
        ("? {a: 1}\n: 2\n", "a mapping must not be a key"),
        ("a: {b: {c: {d: 1}}}\n", "4 levels deep"),
        ("a: 1\n---\na: 1\n", "one document, got 2"),
        ("", "one document, got 0"),
        ("text\n", "must be a mapping"),
        ("a: {b: 1\n", "must be YAML"),
        ("a: \x07\n", "must be YAML"),
        ("{" * 100_000, "must not be a key or|must be"),
    ],
)
def test_yaml_that_is_more_than_mappings_is_refused(text: str, match: str) -> None:
    with pytest.raises(TableError, match=match):
        parse_yaml(text)


def test_yaml_is_read_as_numbers_and_texts() -> None:
    text = "a: {b: 1, c: -2.5e-3, 'd': '7'}\n224: 1e-5\ne: no\nf: 1_000\ng: .nan\nh: 0x10\ni:\n"
    assert parse_yaml(text).value == {
        "a": {"b": 1, "c": -0.0025, "d": "7"},
        "224": 1e-5,
        "e": "no",
        "f": "1_000",
        "g": ".nan",
        "h": "0x10",
        "i": "",
    }


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "name every column once"),
        ("a,b,a\n1,2,3\n", "name every column once"),
        ("a,b\n", "at least one row"),
        ("a,b\n1\n", "line 2 must have 2 values, got 1"),
        ("a,b\n1,2\n1,2,3\n", "line 3 must have 2 values, got 3"),
        ("a,b\n1,2\n\n", "line 3 must have 2 values, got 0"),
        ('a,b\n1,"2\n', "must be CSV"),
        ('a,b\n1,"2"3\n', "must be CSV"),
        ("a,b\n1," + "2" * 200_000 + "\n", "must be CSV"),
    ],
)
def test_csv_of_another_form_is_refused(text: str, match: str) -> None:
    with pytest.raises(TableError, match=match):
        parse_csv(text)


def test_only_plain_decimals_are_numbers() -> None:
    for text, number in (("1", 1), ("-2.50", -2.5), (".5", 0.5), ("1e3", 1000.0), ("+7", 7), ("1.", 1.0)):
        assert number_or_text(text) == number
    for text in ("", "nan", "inf", "1_000", "0x1", "1,5", " 1", "1 ms", "1e", "\u0661"):
        assert number_or_text(text) == text


@pytest.mark.parametrize("value", [-1, -1e-300, float("nan"), float("inf"), 2e100, True, "1", None, [1]])
def test_a_cost_that_is_no_finite_number_at_least_zero_is_refused(value: object) -> None:
    with pytest.raises(TableError, match="line 3, column x must be"):
        cost_of(Node(value, "line 3, column x"))
