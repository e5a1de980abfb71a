"""What an exported network is, in one JSON file beside it: shapes, preprocessing, parity, checksums."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.atomic import read_json, write_json
from autocompress.errors import ExportError

if TYPE_CHECKING:
    from torch import nn

SCHEMA = "autocompress.export"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
FILES: dict[str, tuple[str, ...]] = {
    "onnx": ("network.onnx",),
    "torch_export": ("network.pt2",),
    "safetensors": ("network.safetensors", "network.json", "loader.py"),
}
"""Files of each format."""


@dataclass(frozen=True)
class Parity:
    """How far a format that was loaded back is from the PyTorch network.

    Attributes:
        max_abs_difference: Largest absolute difference of an output.
        tolerance: Largest that is allowed; 0 demands equal bits.
        scale: Largest absolute output of the PyTorch network.
        images: Number of images that were compared.
        agreement: Of a network of few bits, the share of the sample's images with the same greatest output.
    """

    max_abs_difference: float
    tolerance: float
    scale: float
    images: int
    agreement: float | None = None


@dataclass(frozen=True)
class FileEntry:
    """Checksum and size of one file."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class TensorEntry:
    """The input or the output of the network.

    Attributes:
        name: Its name in the ONNX graph.
        dtype: Type of its elements, `float32`.
        shape: `"batch"`, which is free, or 1 where the network can only be traced so, then the fixed sizes.
        layout: Order of the axes, contiguous in memory with the last one fastest.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    layout: str


@dataclass(frozen=True)
class Manifest:
    """Everything one must know to use an exported network.

    Attributes:
        versions: Packages that wrote it.
        architecture: Space and choices, as `Architecture.to_json` writes them.
        architecture_key: `Architecture.key`.
        input: The images, already preprocessed.
        output: What the network gives.
        preprocessing: Mean, standard deviation, resolution, classes and whatever else the caller states.
        parity: How far each format is from the PyTorch network.
        files: Every file but the manifest.
        left_out: Formats that were asked for and could not be made, with the reason.
        onnx_operators: How often each operator stands in the ONNX graph.
        extra: Costs, metrics and the like.
    """

    versions: Mapping[str, str]
    architecture: Mapping[str, Any]
    architecture_key: str
    input: TensorEntry
    output: TensorEntry
    preprocessing: Mapping[str, Any]
    parity: Mapping[str, Parity]
    files: Mapping[str, FileEntry]
    left_out: Mapping[str, str] = field(default_factory=dict)
    onnx_operators: Mapping[str, int] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_payload(self) -> dict[str, Any]:
        """Return what stands in `manifest.json`."""
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_payload(cls, payload: Any) -> "Manifest":
        """Read what `to_payload` returns.

        Raises:
            ExportError: It is no manifest, of another version, or damaged.
        """
        if not isinstance(payload, dict) or payload.get("schema") != SCHEMA:
            raise ExportError(f'an export manifest must be a JSON object with "schema": "{SCHEMA}"')
        if payload.get("schema_version") != SCHEMA_VERSION:
            raise ExportError(
                f"this version reads export manifests of schema_version {SCHEMA_VERSION}, "
                f"got {payload.get('schema_version')!r}"
            )
        fields = {name: value for name, value in payload.items() if name not in ("schema", "schema_version")}
        try:
            for name in ("input", "output"):
                fields[name] = TensorEntry(**{**fields[name], "shape": tuple(fields[name]["shape"])})
            fields["parity"] = {name: Parity(**entry) for name, entry in fields["parity"].items()}
            fields["files"] = {name: FileEntry(**entry) for name, entry in fields["files"].items()}
            manifest = cls(**fields)
            canonical = json.dumps(manifest.architecture, sort_keys=True, separators=(",", ":"))
        except (AttributeError, KeyError, TypeError) as error:
            raise ExportError(f"the export manifest is damaged: {error}") from error
        if hashlib.sha256(canonical.encode()).hexdigest()[:16] != manifest.architecture_key:
            raise ExportError(
                f"the export manifest is damaged: architecture_key {manifest.architecture_key!r} is not the "
                "key of its architecture"
            )
        return manifest


def file_entry(path: Path) -> FileEntry:
    """Return checksum and size of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileEntry(digest.hexdigest(), path.stat().st_size)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into the folder, whole or not at all."""
    write_json(folder / MANIFEST, manifest.to_payload())


def verify_export(folder: Path) -> Manifest:
    """Check that every file of an export is there and unchanged.

    Returns:
        The manifest.

    Raises:
        ExportError: Names the file that is missing or damaged.
    """
    manifest = Manifest.from_payload(read_json(folder / MANIFEST, ExportError, "export manifest"))
    known = {name for names in FILES.values() for name in names}
    for name, expected in manifest.files.items():
        # The manifest is not trusted to lead out of the folder.
        if name not in known:
            raise ExportError(f"{folder / MANIFEST} lists {name!r}, which is no file of an export")
        path = folder / name
        if not path.is_file():
            raise ExportError(f"{path} is missing; export the network again")
        found = file_entry(path)
        if found != expected:
            raise ExportError(
                f"{path} is damaged: {found.size_bytes} bytes with SHA-256 {found.sha256}, the manifest says "
                f"{expected.size_bytes} bytes with {expected.sha256}; export the network again"
            )
    return manifest


def amend_manifest(folder: Path, extra: Mapping[str, Any]) -> Manifest:
    """Add facts that are known only after the export, such as the measured latency, to `extra`.

    Raises:
        ExportError: The export is damaged, or `extra` cannot be written as JSON.
    """
    manifest = verify_export(folder)
    merged = {**manifest.extra, **json_facts("extra", extra)}
    amended = dataclasses.replace(manifest, extra=merged)
    write_manifest(folder, amended)
    return amended


def json_facts(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts as JSON gives them back: lists for tuples, text for keys.

    Raises:
        ExportError: They hold something that JSON cannot, such as a tensor or `nan`.
    """
    try:
        result: dict[str, Any] = json.loads(json.dumps(dict(facts), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ExportError(
            f"{name} must hold finite numbers, text, lists and mappings only: {error}"
        ) from error
    return result


def load_exported(folder: Path) -> "nn.Module":
    """Verify an export and rebuild its network in plain PyTorch, on the CPU, in eval mode.

    Runs the loader of this package, not the copy in the folder: no code is read from there.

    Raises:
        ExportError: A file is missing or damaged, or the export has no safetensors.
    """
    from autocompress.export.loader import load

    manifest = verify_export(folder)
    if missing := [name for name in FILES["safetensors"] if name not in manifest.files]:
        reason = manifest.left_out.get("safetensors", "the format was not asked for")
        raise ExportError(f"{folder} has no {missing[0]}: {reason}; load network.pt2 or network.onnx instead")
    return load(folder)
