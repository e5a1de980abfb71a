"""8-bit ONNX models for timing: static quantization by ONNX Runtime, calibrated on random inputs.

Activations are unsigned and asymmetric, weights signed, symmetric, one scale a channel: on x86 every other
pair leaves the fast kernels (int8 then loses to 32-bit floats by up to four times).
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from autocompress.export.onnx_graph import onnx_model
from autocompress.ops import Ops

CALIBRATION_BATCHES = 2


# Profiles build everything several times; a network of 90 convolutions takes about 2 s.
@lru_cache(maxsize=1024)
def quantized_blocks(blocks: Sequence[tuple[str, Ops]], batch: int) -> bytes:
    """Build the 8-bit ONNX model that runs these blocks, with random weights; see `onnx_model`."""
    return quantized(onnx_model(blocks, batch=batch), batch)


def quantized(model: bytes | Path, batch: int) -> bytes:
    """Quantize an ONNX model of 32-bit floats to 8 bits, in the QDQ form.

    Args:
        model: Serialized, or a file.
        batch: Of the random inputs it is calibrated on, where the model leaves it open. What they make of its
            accuracy is not looked at: such a model is for timing.

    Raises:
        TableError: The model cannot be read.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    loaded = _load(model)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "quantized.onnx"
        quantize_static(
            loaded,
            path,
            _random_inputs(loaded, batch),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return path.read_bytes()


def _load(model: bytes | Path) -> Any:
    from autocompress.errors import TableError

    try:
        return onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)
    except Exception as error:  # noqa: BLE001  (protobuf's own classes)
        what = "the model" if isinstance(model, bytes) else str(model)
        raise TableError(f"cannot load {what}: {error}") from None


def _random_inputs(model: Any, batch: int) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    weights = {tensor.name for tensor in model.graph.initializer}
    shapes = {
        value.name: [size.dim_value or batch for size in value.type.tensor_type.shape.dim]
        for value in model.graph.input
        if value.name not in weights
    }
    rng = np.random.default_rng(0)

    def draw() -> Iterator[dict[str, Any]]:
        for _ in range(CALIBRATION_BATCHES):
            yield {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}

    batches = draw()

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            return next(batches, None)

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the advice of the quantizer, to optimise a model before, off the screen: runtimes do that."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
