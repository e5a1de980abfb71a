"""Load an exported file back and compare it with the PyTorch network."""

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from autocompress.errors import ExportError
from autocompress.export.manifest import Parity
from autocompress.export.quiet import quiet
from autocompress.ops import Shape

RELATIVE_TOLERANCE = {"onnx": 1e-4, "torch_export": 1e-4, "safetensors": 0.0}
"""Largest allowed difference of an output over the largest absolute output. The loader rebuilds the very
same layers, so nothing but equal bits will do there; the others may fuse and reorder."""

QUANTIZED_TOLERANCE = 0.1
"""The same of a network of few bits. A sum that was added up in another order can be rounded to the next
level, and the layers after it go on from there: outputs differ by some levels, decisions hardly ever."""

AGREEMENT = 0.995
"""Least share of the sample's images in which such a network and its exported form have the same greatest
output; images whose two greatest are nearer than `TIE` of all outputs' scale decide nothing."""

TIE = 0.01

BATCHES = (1, 3)
"""One for the most common use, and one that differs from the batch that was traced."""


def parity_images(in_shape: Shape, sample: Tensor | None) -> list[Tensor]:
    """Return normal noise in the batch sizes to be compared, and the sample if there is one.

    Raises:
        ExportError: The sample is not `(n, *in_shape)` with n >= 1.
    """
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(batch, *in_shape, generator=generator) for batch in BATCHES]
    if sample is not None:
        if tuple(sample.shape[1:]) != tuple(in_shape) or not len(sample):
            raise ExportError(
                f"sample must be (n, {', '.join(map(str, in_shape))}), got {tuple(sample.shape)}"
            )
        images.append(sample.detach().to("cpu", torch.float32).contiguous())
    return images


def outputs(network: nn.Module | Callable[[Tensor], Tensor], images: Sequence[Tensor]) -> list[Tensor]:
    """Run the network on each batch, without gradients."""
    with torch.no_grad():
        return [network(batch) for batch in images]


def reload(format_name: str, folder: Path) -> Callable[[Tensor], Tensor]:
    """Load one format back from its files, as a user would."""
    if format_name == "onnx":
        return _load_onnx(folder / "network.onnx")
    if format_name == "torch_export":
        with quiet():
            return torch.export.load(folder / "network.pt2").module()
    # The copy that will travel, in a namespace of its own; `import` would leave a __pycache__ beside it.
    loaded: nn.Module = runpy.run_path(str(folder / "loader.py"))["load"](folder)
    return loaded


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])


def check_parity(
    format_name: str, expected: Sequence[Tensor], actual: Sequence[Tensor], *, quantized: bool = False
) -> Parity:
    """Compare the outputs of a reloaded network with those of the PyTorch network.

    Args:
        format_name: Format, for the tolerance and the message.
        expected: Outputs of the PyTorch network, one tensor a batch, all finite.
        actual: Outputs of the reloaded network.
        quantized: Whether the network has few bits; then decisions on all batches behind those of noise are
            compared too, where outputs are scores of classes.

    Raises:
        ExportError: A shape differs, a difference exceeds the tolerance (`nan` always does), or too many
            decisions differ.
    """
    shapes = [[tuple(output.shape) for output in side] for side in (expected, actual)]
    if shapes[0] != shapes[1]:
        raise ExportError(f"format {format_name!r} gives outputs of shapes {shapes[1]}, PyTorch {shapes[0]}")
    # Noise drives some networks to outputs that no image does.
    first = len(BATCHES) if quantized and len(expected) > len(BATCHES) else 0
    compared = list(zip(expected[first:], actual[first:], strict=True))
    scale = max(float(left.abs().max()) for left, _ in compared)
    tolerance = (QUANTIZED_TOLERANCE if quantized else RELATIVE_TOLERANCE[format_name]) * scale
    # torch.max hands nan on, Python's max may drop it.
    difference = float(torch.stack([(left - right).abs().max() for left, right in compared]).max())
    if not difference <= tolerance:
        raise ExportError(
            f"format {format_name!r} differs from the PyTorch network by {difference:.3g}, more than the "
            f"tolerance {tolerance:.3g} (outputs reach {scale:.3g})"
        )
    count = sum(len(output) for output in expected)
    agreement = _agreement(expected, actual) if quantized else None
    if agreement is not None and agreement < AGREEMENT:
        raise ExportError(
            f"format {format_name!r} has another greatest output than the PyTorch network for "
            f"{1 - agreement:.1%} of the images, more than {1 - AGREEMENT:.1%}; the runtime computes the "
            "integers differently: please report it with the model"
        )
    return Parity(difference, tolerance, scale, count, agreement)


def _agreement(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float | None:
    """Return the share of the sample of which both have the same greatest output; `None` without classes."""
    sample = list(zip(expected, actual, strict=True))[len(BATCHES) :]
    pairs = [pair for pair in sample if pair[0].dim() == 2 and pair[0].shape[1] > 1]
    if not pairs:
        return None
    scale = max(float(left.abs().max()) for left, _ in pairs)
    same = [
        (left.argmax(1) == right.argmax(1)) | (left.topk(2).values.diff().abs()[:, 0] < TIE * scale)
        for left, right in pairs
    ]
    return float(torch.cat(same).double().mean())
