"""Checkpoints: whole or absent, loaded without running code, and never of another run."""

import os
import pickle
import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autocompress.errors import CheckpointError, StorageError
from autocompress.training.checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state

IDENTITY = {"kind": "supernet", "space": {"name": "toy", "settings": {"width": 1.0}}, "settings": {"seed": 0}}

OURS = {"schema": "autocompress.checkpoint", "version": 1}


def content() -> dict[str, Any]:
    weight = torch.arange(24.0).view(1, 2, 3, 4)
    return {
        "model": {"weight": weight, "last": weight.contiguous(memory_format=torch.channels_last)},
        "position": {"step": 3, "losses": [1.5, 0.25], "scores": [[1, "largest", 0.5]]},
        "random": random_state(),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pt"


def test_what_was_saved_is_loaded_with_memory_format_and_all(path: Path) -> None:
    saved = content()
    save_checkpoint(path, IDENTITY, saved)
    loaded = load_checkpoint(path, IDENTITY)
    assert torch.equal(loaded["model"]["weight"], saved["model"]["weight"])
    assert loaded["model"]["last"].stride() == saved["model"]["last"].stride()
    assert loaded["position"] == saved["position"]
    assert os.listdir(path.parent) == [path.name]


def test_random_states_go_on_where_they_were(path: Path) -> None:
    save_checkpoint(path, IDENTITY, content())
    expected = torch.rand(3), random.random(), random.gauss(0, 1)
    set_random_state(load_checkpoint(path, IDENTITY)["random"])
    found = torch.rand(3), random.random(), random.gauss(0, 1)
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"kind": "network"}, "its kind is 'supernet', here 'network'"),
        ({"settings": {"seed": 1}}, "its settings.seed is 0, here 1"),
        (
            {"space": {"name": "toy", "settings": {"width": 0.5}}},
            "its space.settings.width is 1.0, here 0.5",
        ),
        ({"space": {"name": "other", "settings": {"width": 1.0}}}, "its space.name is 'toy'"),
        ({"data": "0123"}, "its data is None, here '0123'"),
        ({"settings": 3}, "its settings is {'seed': 0}, here 3"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_first_difference(
    path: Path, other: dict[str, Any], message: str
) -> None:
    save_checkpoint(path, IDENTITY, content())
    with pytest.raises(CheckpointError, match="belongs to another run") as caught:
        load_checkpoint(path, IDENTITY | other)
    assert message in str(caught.value)
    assert "remove the checkpoint" in str(caught.value)


def test_a_key_that_this_run_does_not_have_is_a_difference(path: Path) -> None:
    save_checkpoint(path, IDENTITY | {"teacher": "a"}, content())
    with pytest.raises(CheckpointError, match="its teacher is 'a', here None"):
        load_checkpoint(path, IDENTITY)


def test_an_absent_checkpoint_is_named(path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"checkpoint not found: {path}"):
        load_checkpoint(path, IDENTITY)


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        load_checkpoint(tmp_path, IDENTITY)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "checkpoint.pt"
    save_checkpoint(path, IDENTITY, content())
    return path.read_bytes()


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_checkpoint_is_damaged(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated.pt"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        load_checkpoint(path, IDENTITY)


@given(junk=st.binary(max_size=200))
def test_any_bytes_are_an_error_of_ours(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.pt"
    path.write_bytes(junk)
    with pytest.raises(CheckpointError):
        load_checkpoint(path, IDENTITY)


@given(data=st.data())
def test_a_flipped_byte_is_an_error_of_ours_or_harmless(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.pt"
    position = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.integers(1, 255))
    path.write_bytes(whole[:position] + bytes([whole[position] ^ other]) + whole[position + 1 :])
    try:
        loaded = load_checkpoint(path, IDENTITY)
    except CheckpointError:
        return
    # Padding, time stamps and the like; what is loaded is right.
    assert torch.equal(loaded["model"]["weight"], content()["model"]["weight"])


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_in_a_weight_is_refused(whole: bytes, path: Path, bit: int) -> None:
    """PyTorch itself reads it without a word."""
    start = whole.index(content()["model"]["weight"].numpy().tobytes())
    path.write_bytes(whole[:start] + bytes([whole[start] ^ 1 << bit]) + whole[start + 1 :])
    with pytest.raises(CheckpointError, match=r"is damaged: the checksum of .* is wrong"):
        load_checkpoint(path, IDENTITY)


class Malicious:
    """Unpickling it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("how", ["torch", "torch, old format", "pickle"])
def test_a_malicious_checkpoint_runs_nothing(path: Path, how: str) -> None:
    target = path.parent / "owned"
    payload = {
        "schema": "autocompress.checkpoint",
        "version": 1,
        "identity": IDENTITY,
        "x": Malicious(target),
    }
    if how == "pickle":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        load_checkpoint(path, IDENTITY)
    assert not target.exists()


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ([1, 2], "is not a checkpoint of autocompress"),
        ({"model": {}}, "is not a checkpoint of autocompress"),
        ({"schema": "autocompress.checkpoint", "version": 2, "identity": IDENTITY}, "has version 2"),
        ({"schema": "autocompress.checkpoint", "version": 1}, "does not say what it belongs to"),
        (
            {"schema": "autocompress.checkpoint", "version": 1, "identity": 7},
            "does not say what it belongs to",
        ),
    ],
)
def test_other_files_of_pytorch_are_refused(path: Path, payload: Any, message: str) -> None:
    torch.save(payload, path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, IDENTITY)


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files of this process may not grow beyond 4 kB, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_else(
    path: Path, request: pytest.FixtureRequest
) -> None:
    save_checkpoint(path, IDENTITY, {"step": 1})
    older = path.read_bytes()
    request.getfixturevalue("small_disk")
    with pytest.raises(StorageError, match=f"cannot write {path}"):
        save_checkpoint(path, IDENTITY, {"step": 2, "weight": torch.zeros(100_000)})
    assert path.read_bytes() == older
    assert os.listdir(path.parent) == [path.name]
    assert load_checkpoint(path, IDENTITY)["step"] == 1


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "checkpoint.pt", IDENTITY, {})
