"""Bundles: profile a device that autocompress is not installed on.

`write_bundle` puts what a profile measures into one zip file: an ONNX model for each block and check network,
a manifest, and a runner that needs Python, numpy and onnxruntime only. The runner writes a file of samples,
and `import_samples` makes a latency table of it. Both files are read strictly: they may come from anywhere.
"""

import hashlib
import json
import lzma
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from autocompress import __version__
from autocompress.atomic import replacing
from autocompress.errors import TableError
from autocompress.latency.assemble import assemble
from autocompress.latency.measure import REFERENCE, Progress, Stopping, steady_samples
from autocompress.latency.plan import (
    MAX_ROWS,
    Asked,
    NetworkKeys,
    make_plan,
    row_name,
)
from autocompress.latency.reading import MAX_BYTES, parse_json
from autocompress.latency.runtime import Blocks
from autocompress.latency.samples import Rounds, read_rounds
from autocompress.latency.strict import Node
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import Target, read_target
from autocompress.space import SearchSpace

SCHEMA: Final = "autocompress.bundle"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
RUNNER: Final = "runner.py"
RUNTIME: Final = "onnxruntime"
NUMBER_FORMATS: Final = ("float32", "int8")
KEYS: Final = (
    "schema", "version", "autocompress", "target", "space", "seed", "granularity", "tolerance", "min_rounds",
    "max_rounds", "reference", "models_sha256", "rows", "networks",
)  # fmt: skip
HEADER_KEYS: Final = (
    "schema", "version", "unit", "started", "target", "device", "bundle", "platform", "python", "versions",
)  # fmt: skip

MAX_NETWORKS: Final = 1_000
MAX_FILES: Final = MAX_ROWS + MAX_NETWORKS + 4
# Twenty thousand rows with a hundred networks need a tenth of it.
MAX_BUNDLE_BYTES: Final = 2**30
LEAST_SAMPLES: Final = 6
"""Fewer say nothing about how certain a median is."""
# The record that ends a zip file without a comment, and the one before it that only large archives have.
ZIP_END_BYTES: Final = 22
ZIP64_LOCATOR_BYTES: Final = 20

# What zipfile raises on damaged bytes: also a wrong length, an unknown method, a password.
DAMAGED: Final = (
    OSError, ValueError, EOFError, RuntimeError, NotImplementedError, struct.error, zipfile.BadZipFile,
    zlib.error, lzma.LZMAError, AssertionError, IndexError, MemoryError, OverflowError,
)  # fmt: skip

START: Final = """import sys

from runner import main

sys.exit(main())
"""

README: Final = """A bundle of autocompress {version}: space {space}, target {target}.

1. Copy this file, {name}, to the device. It need not be unpacked.
2. There, with Python 3.8 or newer:  pip install numpy onnxruntime
3. Stop other programs, then:  python {name}
   It writes samples.jsonl, says how long it will take, and can be stopped and started again at any time.
   Options (--max-minutes, --memory, --output):  python {name} --help
4. Copy samples.jsonl back to where this file was made, and there:
   autocompress table import samples.jsonl --bundle {name} --output table.json
"""


@dataclass(frozen=True)
class Bundle:
    """A bundle that was written.

    Attributes:
        path: The zip file.
        rows: Blocks and operations in it.
        networks: Whole networks in it.
        models_bytes: Size of all models, as the runner reads them.
        largest_bytes: Size of the largest one.
        size_bytes: Size of the zip file.
        fingerprint: SHA-256 of the manifest, which has that of the models; the samples repeat it.
    """

    path: Path
    rows: int
    networks: int
    models_bytes: int
    largest_bytes: int
    size_bytes: int
    fingerprint: str

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.rows} blocks and operations, {self.networks} networks, "
            f"{self.size_bytes / 1e6:.1f} MB ({self.models_bytes / 1e6:.1f} MB of models, the largest "
            f"{self.largest_bytes / 1e6:.1f} MB)"
        )


def write_bundle(
    path: Path,
    space: SearchSpace,
    target: Target,
    *,
    networks: int = 40,
    seed: int = 0,
    granularity: Asked = "auto",
    tolerance: float = 0.02,
    min_rounds: int = 24,
    max_rounds: int = 40,
    progress: Progress | None = None,
) -> Bundle:
    """Write what has to be measured of a space on another device, as one zip file.

    The same arguments give the same bytes. Weights are a short pattern, repeated
    (`autocompress.export.repeated`): times do not change by it, and the file is a seventieth of the models.

    Args:
        path: The zip file; an older one is replaced once the new one is whole.
        space: Its distinct blocks and operations become rows.
        target: What the device runs: `runtime` must be `onnxruntime` on a CPU.
        networks: Whole networks for the correction and the error report; 0 for none.
        seed: Of the networks and of the order of runs.
        granularity: `"block"`, `"op"` or `"auto"` for both; see `profile`.
        tolerance: Relative half width of the 95 % interval of a median at which measuring ends.
        min_rounds: Runs of each row and network, at least.
        max_rounds: And at most.
        progress: Told how many of the models are built.

    Raises:
        TableError: The target cannot be measured by the runner, the space has too many rows, the bundle would
            be too large, or an argument is out of its range.
        StorageError: The file cannot be written.
    """
    if target.runtime != RUNTIME or target.device != "cpu" or target.number_format not in NUMBER_FORMATS:
        raise TableError(
            f"a bundle is measured by ONNX Runtime on a CPU, in {' or '.join(NUMBER_FORMATS)}; target "
            f"{target.name!r} has runtime {target.runtime!r}, device {target.device!r}, number_format "
            f"{target.number_format!r}: write a target file with runtime {RUNTIME!r} for the device"
        )
    Stopping(tolerance, min_rounds, max_rounds)
    if not 0 <= networks <= MAX_NETWORKS:
        raise TableError(f"networks must be in 0..{MAX_NETWORKS}, got {networks}")
    plan = make_plan(space, granularity, networks, seed)
    row_files = {key: f"rows/{index:05d}.onnx" for index, key in enumerate(plan.rows)}
    network_files = [f"networks/{index:03d}.onnx" for index in range(len(plan.networks))]
    models: dict[str, Blocks] = {
        **{row_files[key]: (("block", ops),) for key, ops in plan.rows.items()},
        **dict(zip(network_files, plan.networks, strict=True)),
    }
    sizes: list[int] = []
    digest = hashlib.sha256()
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for done, (name, blocks) in enumerate(models.items(), start=1):
            model = _model(blocks, target)
            sizes.append(len(model))
            digest.update(f"{name} {hashlib.sha256(model).hexdigest()}\n".encode())
            _add(archive, name, model)
            if progress:
                progress(done, len(models))
        manifest = {
            "schema": SCHEMA,
            "version": VERSION,
            "autocompress": __version__,
            "target": target.describe(),
            "space": {"name": space.name, "fingerprint": space.fingerprint},
            "seed": seed,
            "granularity": granularity,
            "tolerance": tolerance,
            "min_rounds": min_rounds,
            "max_rounds": max_rounds,
            "reference": max(plan.rows, key=lambda key: sum(op.macs for op in plan.rows[key])),
            "models_sha256": digest.hexdigest(),
            "rows": row_files,
            "networks": [
                {"name": keys.name, "file": file, "blocks": keys.blocks}
                for keys, file in zip(plan.keys, network_files, strict=True)
            ],
        }
        text = json.dumps(manifest, indent=1, allow_nan=False).encode()
        _add(archive, MANIFEST, text)
        _add(archive, RUNNER, Path(__file__).with_name("bundle_runner.py").read_bytes())
        _add(archive, "__main__.py", START.encode())
        readme = README.format(version=__version__, space=space.name, target=target.name, name=path.name)
        _add(archive, "README.txt", readme.encode())
        archive.close()
        size = temporary.stat().st_size
        if size > MAX_BUNDLE_BYTES or len(text) > MAX_BYTES:
            raise TableError(
                f"the bundle would have {size} bytes and its manifest {len(text)}; at most "
                f"{MAX_BUNDLE_BYTES} and {MAX_BYTES} are read back: ask for fewer networks"
            )
    fingerprint = hashlib.sha256(text).hexdigest()
    return Bundle(path, len(row_files), len(network_files), sum(sizes), max(sizes), size, fingerprint)


def _model(blocks: Blocks, target: Target) -> bytes:
    from autocompress.export.onnx_graph import onnx_model
    from autocompress.export.quantized import quantized_blocks
    from autocompress.export.repeated import repeated_weights

    if target.number_format == "int8":
        return repeated_weights(quantized_blocks(tuple(blocks), target.batch))
    return repeated_weights(onnx_model(blocks, batch=target.batch))


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    # ZipInfo's own date is 1980-01-01: the same contents give the same file.
    entry = zipfile.ZipInfo(name)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, data)


def import_samples(samples: Path, bundle: Path, *, unfinished: bool = False) -> LatencyTable:
    """Make a latency table of what the runner of a bundle measured on another device.

    Drift of the device is taken out and the correction fitted as for a profile of this machine. The table is
    of the device that the samples name: `LatencyTable.check_target` refuses it for another. It is not saved.

    Args:
        samples: The file the runner wrote.
        bundle: The bundle it ran, unchanged.
        unfinished: Take samples of a runner that was stopped before every median was certain; each item must
            then have at least 6.

    Raises:
        TableError: One of the files is absent, damaged, too large or of another schema; the samples are of
            another bundle, are not complete, or name items that the bundle does not have.
    """
    manifest = _read_manifest(bundle)
    items = [*map(row_name, manifest.rows), *(keys.name for keys in manifest.networks)]
    try:
        taken = read_rounds(samples, [*items, REFERENCE])
        header = _read_header(taken.header, manifest)
        _check_complete(taken, items, unfinished)
    except TableError as error:
        raise TableError(f"samples {samples}: {error}") from None
    provenance = {
        "device": header["device"],
        "platform": header["platform"],
        "python": header["python"],
        "versions": header["versions"],
        "autocompress": manifest.autocompress,
        "measured": header["started"],
        "space": manifest.space,
        "bundle": manifest.fingerprint,
    }
    return assemble(
        manifest.target,
        steady_samples(taken.rounds, [*items, REFERENCE]),
        manifest.networks,
        manifest.rows,
        {},
        manifest.tolerance,
        provenance,
    )


@dataclass(frozen=True)
class _Manifest:
    """What an import needs of a manifest."""

    fingerprint: str
    autocompress: str
    target: Target
    space: Mapping[str, str]
    tolerance: float
    rows: tuple[str, ...]
    networks: tuple[NetworkKeys, ...]


def _read_manifest(path: Path) -> _Manifest:
    try:
        text = _manifest_text(path)
        return _parse_manifest(text)
    except TableError as error:
        raise TableError(f"bundle {path}: {error}") from None


def _manifest_text(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BUNDLE_BYTES:
            raise TableError(f"must have at most {MAX_BUNDLE_BYTES} bytes, got {size}")
        with path.open("rb") as file:
            file.seek(max(0, size - ZIP_END_BYTES - ZIP64_LOCATOR_BYTES))
            _check_end(file.read(ZIP_END_BYTES + ZIP64_LOCATOR_BYTES))
        with zipfile.ZipFile(path) as archive, archive.open(MANIFEST) as member:
            # One byte more than allowed is read, never all that a small file may unpack to.
            text = member.read(MAX_BYTES + 1)
    except TableError:
        raise
    except KeyError:
        raise TableError(f"has no {MANIFEST}: it is another zip file") from None
    except DAMAGED as error:
        raise TableError(f"cannot be read or is damaged: {error}; copy it again") from None
    if len(text) > MAX_BYTES:
        raise TableError(f"{MANIFEST} must have at most {MAX_BYTES} bytes, unpacked, got more")
    return text


def _check_end(end: bytes) -> None:
    """Refuse what is no zip file as we write them, before its directory, of any length, is read."""
    record, before = end[-ZIP_END_BYTES:], end[:-ZIP_END_BYTES]
    # With a comment, zipfile would look for another such record.
    if not record.startswith(b"PK\5\6") or record[20:] != b"\0\0":
        raise TableError("must be a whole zip file, as `write_bundle` writes it: copy it again")
    entries = int.from_bytes(record[10:12], "little")
    directory_bytes = int.from_bytes(record[12:16], "little")
    if before.startswith(b"PK\6\7") or entries > MAX_FILES or directory_bytes > MAX_BYTES:
        raise TableError(f"must have at most {MAX_FILES} files, got {entries} or more")


def _parse_manifest(text: bytes) -> _Manifest:
    try:
        node = parse_json(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise TableError(f"{MANIFEST} must be text in UTF-8: {error}") from None
    node.object()
    node.member("schema").equal(SCHEMA)
    node.member("version").equal(VERSION)
    top = node.object(KEYS)
    space = {name: entry.text() for name, entry in top["space"].object(("name", "fingerprint")).items()}
    rows = {key: entry.text() for key, entry in top["rows"].object().items()}
    entries = top["networks"].list()
    if not 1 <= len(rows) <= MAX_ROWS:
        raise TableError(f"rows must be 1 to {MAX_ROWS}, got {len(rows)}")
    if len(entries) == 1 or len(entries) > MAX_NETWORKS:
        raise TableError(f"networks must be 0 or 2 to {MAX_NETWORKS}, got {len(entries)}")
    networks = tuple(_read_network(entry) for entry in entries)
    if len({keys.name for keys in networks}) < len(networks):
        raise top["networks"].wrong("a list of different networks")
    if top["reference"].text() not in rows:
        raise top["reference"].wrong("the key of a row")
    return _Manifest(
        hashlib.sha256(text).hexdigest(),
        top["autocompress"].text(),
        read_target(top["target"]),
        space,
        top["tolerance"].number(),
        tuple(rows),
        networks,
    )


def _read_network(node: Node) -> NetworkKeys:
    members = node.object(("name", "file", "blocks"))
    keys = tuple(tuple(key.text() for key in block.list()) for block in members["blocks"].list())
    if not keys or not all(keys):
        raise members["blocks"].wrong("a list of lists of operations, none of them empty")
    members["file"].text()
    return NetworkKeys(members["name"].text(), keys)


def _read_header(node: Node, manifest: _Manifest) -> dict[str, Any]:
    """Return what the header says of device and versions; refuse that of another bundle."""
    top = node.object(HEADER_KEYS)
    if top["bundle"].text() != manifest.fingerprint:
        raise TableError(f"they are of another bundle, {top['bundle'].value}, not of {manifest.fingerprint}")
    conditions = manifest.target.conditions()
    target = {name: entry.value for name, entry in top["target"].object(conditions).items()}
    if target != conditions:
        raise top["target"].wrong(f"{conditions}, the target of the bundle")
    device = top["device"].object(("cpu", "cores", "architecture"))
    return {
        "device": {
            "cpu": device["cpu"].text(),
            "cores": device["cores"].integer(1),
            "architecture": device["architecture"].text(),
        },
        "versions": {
            name: entry.text() for name, entry in top["versions"].object(("numpy", RUNTIME)).items()
        },
        **{name: top[name].text() for name in ("platform", "python", "started")},
    }


def _check_complete(taken: Rounds, items: Sequence[str], unfinished: bool) -> None:
    counts = Counter(item for times in taken.rounds for item in times)
    few = [item for item in items if counts[item] < LEAST_SAMPLES]
    if few:
        raise TableError(
            f"{len(few)} of {len(items)} items have fewer than {LEAST_SAMPLES} samples, the first is "
            f"{few[0]!r}: let the runner go on"
        )
    waiting = [item for item in items if item not in taken.finished]
    if waiting and not unfinished:
        raise TableError(
            f"{len(waiting)} of {len(items)} items are not finished, the first is {waiting[0]!r}: let the "
            "runner go on, or take them as they are (unfinished)"
        )
