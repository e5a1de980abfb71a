"""Export a discovered network as files that need neither its supernet nor this package."""

import copy
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

import autocompress
from autocompress.errors import ExportError, StorageError
from autocompress.export import formats as writers
from autocompress.export.folder import replacing_folder
from autocompress.export.manifest import (
    FILES,
    MANIFEST,
    Manifest,
    Parity,
    TensorEntry,
    file_entry,
    json_facts,
    write_manifest,
)
from autocompress.export.parity import check_parity, outputs, parity_images, reload
from autocompress.export.qdq import cannot_be_integers, in_floats
from autocompress.ops import Ops, Shape
from autocompress.quantize.layer import has_quantizers
from autocompress.space import Architecture

Format = Literal["onnx", "torch_export", "safetensors"]

_Result = TypeVar("_Result")

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors")


def export_network(
    network: nn.Module,
    *,
    architecture: Architecture,
    blocks: Sequence[tuple[str, Ops]],
    in_shape: Shape,
    folder: Path,
    preprocessing: Mapping[str, Any],
    formats: Sequence[Format] = ("onnx", "torch_export", "safetensors"),
    sample: Tensor | None = None,
    extra: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the network in each format, load each back, compare, and put the folder in place.

    The folder is replaced as a whole at the end, or not at all. The network is written in 32-bit floats and
    contiguous memory format, whatever its own; it is not changed. One whose `forward` makes a constant of
    the batch size is written for one image at a time; the shapes in the manifest say so.

    Args:
        network: Plain PyTorch, in eval mode, `(batch, *in_shape)` to one tensor.
        architecture: Which network of which space it is.
        blocks: What it runs, as `SearchSpace.operations` returns it; none for a network of no space, which
            has a form as safetensors only with `origin`.
        in_shape: Channels, height, width.
        folder: Where to; may hold an earlier export and nothing else.
        preprocessing: What was done to the images: mean, standard deviation, resolution, classes.
        formats: Which to write.
        sample: Images `(n, *in_shape)` to compare on, besides noise. They are not stored.
        extra: Costs, metrics and the like, for the manifest.
        origin: For a network of no space that is a user's model with all or some of its channels: the name of
            its factory (`model`) and its `arguments`.

    Returns:
        The manifest, as it stands in the folder.

    Raises:
        ExportError: An argument is wrong, a format cannot be written, or differs from the PyTorch network
            by more than its tolerance. An earlier export is then unchanged.
    """
    left_out = _check_arguments(network, blocks, in_shape, formats, origin)
    facts, more = json_facts("preprocessing", preprocessing), json_facts("extra", extra or {})
    wanted = [name for name in FILES if name in formats and name not in left_out]
    if not wanted:
        raise ExportError(f"nothing is left to export: {left_out}; add 'onnx' or 'torch_export' to formats")
    own = {MANIFEST, *(name for names in FILES.values() for name in names)}
    # Before the seconds of work that follow: a folder that cannot be written is refused at once.
    with replacing_folder(folder, own) as fresh:
        reference = _reference(network)
        images = parity_images(in_shape, sample)
        expected = _expected(reference, images)
        operators, batch = _write(fresh, wanted, reference, blocks, in_shape, origin)
        quantized = has_quantizers(reference)
        parity = {name: _compare(name, fresh, images, expected, batch, quantized) for name in wanted}
        manifest = Manifest(
            versions={
                "autocompress": autocompress.__version__,
                "python": platform.python_version(),
                **{package: version(package) for package in PACKAGES},
            },
            architecture=json.loads(architecture.to_json()),
            architecture_key=architecture.key,
            input=TensorEntry(writers.INPUT, "float32", (batch, *in_shape), "NCHW"),
            output=_output_entry(expected[0], batch),
            preprocessing=facts,
            parity=parity,
            files={name: file_entry(fresh / name) for wanted_ in wanted for name in FILES[wanted_]},
            left_out=left_out,
            onnx_operators=operators,
            extra=more,
        )
        try:
            write_manifest(fresh, manifest)
        except StorageError as error:
            raise ExportError(str(error)) from error
    return manifest


def _check_arguments(
    network: nn.Module,
    blocks: Sequence[tuple[str, Ops]],
    in_shape: Shape,
    formats: Sequence[str],
    origin: Mapping[str, Any] | None,
) -> dict[str, str]:
    """Refuse wrong arguments; return the formats that this network cannot have, with the reason."""
    if unknown := [name for name in formats if name not in FILES]:
        raise ExportError(f"formats must be among {', '.join(FILES)}, got {unknown[0]!r}")
    if not formats:
        raise ExportError(f"formats must name at least one of {', '.join(FILES)}, got none")
    if not all(ops for _, ops in blocks):
        raise ExportError("each of the blocks must hold at least one operation")
    if blocks and origin:
        raise ExportError("origin is for a network of no space; leave it out, or blocks")
    first = blocks[0][1][0].in_shape if blocks else in_shape
    if tuple(in_shape) != tuple(first):
        raise ExportError(f"in_shape must be {tuple(first)}, as the first operation states, got {in_shape}")
    if training := [name or "the network" for name, module in network.named_modules() if module.training]:
        raise ExportError(f"the network must be in eval mode, but {training[0]} is not; call .eval() first")
    reasons = {
        "safetensors": writers.cannot_rebuild(blocks, origin) if "safetensors" in formats else "",
        "onnx": cannot_be_integers(network) if "onnx" in formats else "",
    }
    return {name: reason for name, reason in reasons.items() if reason}


def _reference(network: nn.Module) -> nn.Module:
    """Copy the network to 32-bit floats on the CPU, every tensor in the plain order of its axes."""
    reference = copy.deepcopy(network).to("cpu").to(torch.float32)
    for tensor in (*reference.parameters(), *reference.buffers()):
        # A 1x1 convolution in channels_last counts as contiguous too and would still be run as such, with
        # other rounding than the network that the loader makes; only a copy settles it.
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return reference


def _expected(reference: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
    expected = outputs(reference, images)
    for batch, output in zip(images, expected, strict=True):
        if not isinstance(output, Tensor) or not output.ndim or len(output) != len(batch):
            raise ExportError("the network must give one tensor with the batch as its first axis")
        if not output.isfinite().all():
            raise ExportError("the network gives values that are not finite; its weights are damaged")
    return expected


def _write(
    fresh: Path,
    wanted: Sequence[str],
    reference: nn.Module,
    blocks: Sequence[tuple[str, Ops]],
    in_shape: Shape,
    origin: Mapping[str, Any] | None,
) -> tuple[dict[str, int], int | str]:
    """Write the files; return the operators of the ONNX graph, and the batch size that was traced."""
    operators: dict[str, int] = {}
    batch: int | str = writers.BATCH
    if "safetensors" in wanted:
        _attempt(
            "safetensors", "written", lambda: writers.write_safetensors(fresh, reference, blocks, origin)
        )
    if "torch_export" in wanted:
        program = _attempt("torch_export", "traced", lambda: writers.trace(reference, in_shape))
        batch, path = writers.batch_of(program), fresh / "network.pt2"
        _attempt("torch_export", "written", lambda: writers.write_torch_export(path, program))
    if "onnx" in wanted:
        if "torch_export" not in wanted or has_quantizers(reference):
            program = _attempt("onnx", "traced", lambda: writers.trace(in_floats(reference), in_shape))
        batch, path = writers.batch_of(program), fresh / "network.onnx"
        operators = _attempt("onnx", "written", lambda: writers.write_onnx(path, program, reference))
    return operators, batch


def _compare(
    name: str,
    fresh: Path,
    images: Sequence[Tensor],
    expected: Sequence[Tensor],
    batch: int | str,
    quantized: bool,
) -> Parity:
    if name != "safetensors" and batch != writers.BATCH:
        images, expected = ([one for x in side for one in torch.split(x, 1)] for side in (images, expected))
    actual = _attempt(name, "loaded back", lambda: outputs(reload(name, fresh), images))
    return check_parity(name, expected, actual, quantized=quantized)


def _attempt(format_name: str, done: str, action: Callable[[], _Result]) -> _Result:
    """Run one step; the libraries raise errors of every kind, which become one that names the format."""
    try:
        return action()
    except Exception as error:
        raise ExportError(
            f"format {format_name!r} could not be {done}: {type(error).__name__}: {error}; leave it out of "
            "formats, or change the operation that it cannot express"
        ) from error


def _output_entry(output: Tensor, batch: int | str) -> TensorEntry:
    shape = (batch, *output.shape[1:])
    return TensorEntry(writers.OUTPUT, "float32", shape, {2: "NC", 4: "NCHW"}.get(output.ndim, ""))
