"""Streams of candidates hold what was appended, whatever is cut off, and nothing else."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.errors import StorageError
from autocompress.history import History, read_history
from autocompress.space import Choice, SearchSpace
from autocompress.testing.toys import every_network, toy_space
from autocompress.trial import Outcome


def wide_space(options: int) -> SearchSpace:
    return SearchSpace("wide", (Choice("a", tuple(range(options))), Choice("b", (1, 2))), ())


@given(
    options=st.sampled_from([2, 255, 256, 257, 70_000]),
    sizes=st.lists(st.integers(0, 5), max_size=4),
    costs=st.integers(1, 3),
)
def test_candidates_come_back_as_they_were_appended(options: int, sizes: list[int], costs: int) -> None:
    space, rng = wide_space(options), np.random.default_rng(0)
    names = tuple(f"cost{i}" for i in range(costs))
    rows = [*(space.sample(size, rng) for size in sizes), np.array([[options - 1, 1]])]
    scores = [rng.normal(size=len(part)) for part in rows]
    prices = [rng.random((len(part), costs)) for part in rows]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "history.bin"
        history = History(path, space, names, {"seed": 1})
        for part, score, price in zip(rows, scores, prices, strict=True):
            history.append(part, score, price)
        found = read_history(path, space)
    np.testing.assert_array_equal(found.codes, np.vstack(rows))
    np.testing.assert_array_equal(found.metrics["score"], np.concatenate(scores))
    np.testing.assert_array_equal(np.stack([found.costs[name] for name in names], 1), np.vstack(prices))
    assert found.codes.dtype == np.int64
    assert found.measured.all()


@pytest.mark.parametrize("lost", range(1, 30, 7))
def test_an_incomplete_record_is_not_read(tmp_path: Path, lost: int) -> None:
    path, space = tmp_path / "history.bin", toy_space(2)
    codes = every_network(space)
    History(path, space, ("macs",), {}).append(codes[:5], np.arange(5.0), np.ones((5, 1)))
    record = len(space.choices) + 8 + 8
    path.write_bytes(path.read_bytes()[:-lost])
    np.testing.assert_array_equal(read_history(path, space).codes, codes[: 5 - -(-lost // record)])


def test_a_new_stream_is_started_over_an_old_one(tmp_path: Path) -> None:
    path, space = tmp_path / "history.bin", toy_space(2)
    for count in (4, 2):
        History(path, space, ("macs",), {}).append(
            every_network(space)[:count], np.ones(count), np.ones((count, 1))
        )
    assert len(read_history(path, space)) == 2


def test_a_candidate_without_a_score_reads_as_failed(tmp_path: Path) -> None:
    path, space = tmp_path / "history.bin", toy_space(2)
    History(path, space, ("macs",), {}).append(
        every_network(space)[:2], np.array([1.0, np.nan]), np.ones((2, 1))
    )
    assert read_history(path, space).outcomes.tolist() == [Outcome.MEASURED, Outcome.FAILED]


@pytest.mark.parametrize("content", [b"", b"{", b"{}\n", b"\x00" * 500, b"[1]\n", b'{"costs": 3}\n'])
def test_what_is_no_stream_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "history.bin"
    path.write_bytes(content)
    with pytest.raises(StorageError, match="is no stream of candidates"):
        read_history(path, toy_space(2))


def test_a_stream_of_another_space_or_version_is_refused(tmp_path: Path) -> None:
    path, space = tmp_path / "history.bin", toy_space(2)
    History(path, space, ("macs",), {})
    with pytest.raises(StorageError, match="no stream of version 1 of candidates of this space, 'toy'"):
        read_history(path, toy_space(3))
    path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(StorageError, match="no stream of version 1"):
        read_history(path, space)


def test_a_stream_says_what_it_belongs_to_in_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "history.bin"
    History(path, toy_space(2), ("macs",), {"seed": 1})
    assert json.loads(path.read_bytes()) == {
        "schema": "autocompress.history",
        "version": 1,
        "costs": ["macs"],
        "space": toy_space(2).fingerprint,
        "seed": 1,
    }


def test_a_stream_that_cannot_be_written_or_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot open .*file/history.bin: Not a directory|File exists"):
        History(tmp_path / "file" / "history.bin", toy_space(2), ("macs",), {})
    with pytest.raises(StorageError, match=r"cannot read .*history.bin: No such file"):
        read_history(tmp_path / "history.bin", toy_space(2))
