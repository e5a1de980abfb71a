"""Checkpoints: atomic, safe to load, and sure of what they belong to."""

import hashlib
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autocompress.atomic import replacing
from autocompress.errors import CheckpointError

SCHEMA = "autocompress.checkpoint"
VERSION = 1


def save_checkpoint(path: Path, identity: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: Where.
        identity: Plain values that say what it belongs to (space, kind, settings); compared on loading.
        content: Tensors, numbers, strings, and lists and dicts of them.

    Raises:
        StorageError: It cannot be written; an older checkpoint is unchanged.
    """
    payload = {"schema": SCHEMA, "version": VERSION, "identity": dict(identity), **content}
    with replacing(path) as temporary:
        try:
            torch.save(payload, temporary)
        except RuntimeError as error:
            # torch reports a full disk as a RuntimeError of its own.
            raise OSError(f"{error} (is the disk full?)") from error


def load_checkpoint(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Read a checkpoint without running any code from it.

    Raises:
        CheckpointError: It is absent, damaged, of another version, or belongs to something else; the message
            names the first difference.
    """
    try:
        with path.open("rb") as file:
            # PyTorch also reads its old format, an archive of pickles; ours is always a zip file.
            if file.read(4) != b"PK\x03\x04":
                raise CheckpointError(
                    f"checkpoint {path} is damaged or no checkpoint: it is not a zip file; remove it to "
                    "train again"
                )
        with zipfile.ZipFile(path) as archive:
            # PyTorch does not compare checksums: a flipped bit in a weight would be read as it is.
            if (damaged := archive.testzip()) is not None:
                raise CheckpointError(f"checkpoint {path} is damaged: the checksum of {damaged} is wrong")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint not found: {path}") from None
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 damaged bytes lead the unpickler to nearly any error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"checkpoint {path} is damaged or no checkpoint: {reason}; remove it to train again"
        ) from None
    if not isinstance(payload, dict) or payload.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} is not a checkpoint of autocompress")
    if payload.get("version") != VERSION:
        raise CheckpointError(
            f"checkpoint {path} has version {payload.get('version')}; this release reads version {VERSION}"
        )
    found = payload.get("identity")
    if not isinstance(found, Mapping):
        raise CheckpointError(f"checkpoint {path} is damaged: it does not say what it belongs to")
    _compare(path, found, identity, "")
    return payload


def _compare(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str) -> None:
    for key in sorted({*found, *expected}):
        have, want = found.get(key), expected.get(key)
        if isinstance(have, Mapping) and isinstance(want, Mapping):
            _compare(path, have, want, f"{prefix}{key}.")
        elif have != want:
            raise CheckpointError(
                f"checkpoint {path} belongs to another run: its {prefix}{key} is {have!r}, here {want!r}; "
                "use another run directory, or remove the checkpoint to start again"
            )


def random_state() -> dict[str, Any]:
    """Return the state of the global generators of torch and Python, for a checkpoint."""
    version, words, gauss = random.getstate()
    return {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def weights_fingerprint(network: nn.Module) -> str:
    """Return 16 hexadecimal digits over every parameter and buffer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
