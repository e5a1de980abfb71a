"""The file of samples survives a kill, and refuses what it cannot trust."""

from pathlib import Path

import pytest

from autocompress.errors import StorageError, TableError
from autocompress.latency.samples import SampleFile

SUBJECT = {"target": {"runtime": "onnxruntime"}, "device": {"cpu": "mine"}}
ROUNDS = [{"block a": 0.25, "block b": 1.5}, {"block b": 1.625}, {"network c": 3.0}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "samples.jsonl"
    file = SampleFile(path, SUBJECT)
    for samples in ROUNDS:
        file.append(samples)
    file.finish(["block a"], 0.02)
    return path


def test_rounds_are_read_as_they_were_written(path: Path) -> None:
    file = SampleFile(path, SUBJECT)
    assert file.rounds == ROUNDS
    file.append({"block b": 2.0, "block d": 4.0})
    assert SampleFile(path, SUBJECT).rounds == [*ROUNDS, {"block b": 2.0, "block d": 4.0}]


def test_the_start_is_kept_when_the_file_is_opened_again(path: Path) -> None:
    started = SampleFile(path, SUBJECT).started
    assert started == SampleFile(path, SUBJECT).started
    assert started.endswith("+00:00")


def test_finished_items_are_finished_at_their_tolerance_and_above(path: Path) -> None:
    file = SampleFile(path, SUBJECT)
    assert file.finished(0.02) == file.finished(0.05) == {"block a"}
    assert file.finished(0.01) == set()


def test_a_file_cut_at_any_byte_opens_with_the_whole_lines_before(path: Path) -> None:
    text = path.read_bytes()
    for end in range(len(text)):
        path.write_bytes(text[:end])
        file = SampleFile(path, SUBJECT)
        assert file.rounds == ROUNDS[: len(file.rounds)]
        file.append({"block z": 9.0})
        assert SampleFile(path, SUBJECT).rounds == [*file.rounds]


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"ms": {"0": NaN}}',
        '{"ms": {"0": -1.0}}',
        '{"ms": {"77": 1.0}}',
        '{"ms": {"0": null}}',
        '{"other": 1}',
        "[1]",
        "{}",
    ],
)
def test_a_damaged_line_is_an_error_with_its_number(path: Path, line: str) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], line, *lines[4:]]) + "\n")
    with pytest.raises(TableError, match=r"line 5 is damaged .*delete the file"):
        SampleFile(path, SUBJECT)


def test_samples_of_another_target_or_device_are_refused(path: Path) -> None:
    with pytest.raises(TableError, match=r"samples of device .*'mine'.*, not of .*'yours'"):
        SampleFile(path, {**SUBJECT, "device": {"cpu": "yours"}})


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"schema": "something.else"}\n')
    with pytest.raises(TableError, match=r"no file of autocompress.latency_samples version 1"):
        SampleFile(path, SUBJECT)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot read"):
        SampleFile(tmp_path / "file" / "samples.jsonl", SUBJECT)
