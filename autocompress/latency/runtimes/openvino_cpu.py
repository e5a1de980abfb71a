"""OpenVINO's CPU plug-in: 32-bit floats, bfloat16, or 8 bits by the same QDQ models as ONNX Runtime."""

from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from autocompress.errors import TableError
from autocompress.latency.runtime import Blocks, Run, Runtime, random_input
from autocompress.latency.target import Target

PRECISIONS: Final = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}
"""Precision of what is not quantized. Left alone, the plug-in takes bfloat16 where the processor has it."""


def _prepare(blocks: Blocks, target: Target) -> Run:
    from autocompress.export.onnx_graph import onnx_model
    from autocompress.export.quantized import quantized_blocks

    if target.number_format == "int8":
        return _compiled(quantized_blocks(tuple(blocks), target.batch), target)
    return _compiled(onnx_model(blocks, batch=target.batch), target)


def _prepare_onnx(model: bytes | Path, target: Target) -> Run:
    if target.number_format == "int8":
        from autocompress.export.quantized import quantized

        return _compiled(quantized(model, target.batch), target)
    return _compiled(model, target)


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _compiled(model: bytes | Path, target: Target) -> Run:
    what = "the model" if isinstance(model, bytes) else str(model)
    settings = {
        "INFERENCE_NUM_THREADS": target.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": PRECISIONS[target.number_format],
    }
    try:
        network = _core().read_model(model if isinstance(model, bytes) else str(model))
        shapes = {
            argument: [
                size.get_length() if size.is_static else target.batch for size in argument.partial_shape
            ]
            for argument in network.inputs
        }
        network.reshape(shapes)
        request = _core().compile_model(network, "CPU", settings).create_infer_request()
    except Exception as error:  # noqa: BLE001  (openvino raises RuntimeError and its own, unrelated classes)
        raise TableError(f"OpenVINO cannot load {what}: {error}") from None
    rng = np.random.default_rng(0)
    inputs = [
        random_input(rng, list(shape), integers=argument.element_type.get_type_name() == "u8")
        for argument, shape in shapes.items()
    ]

    def run() -> Any:
        return list(request.infer(inputs, share_inputs=True, share_outputs=True).values())

    return run


RUNTIME: Final = Runtime(
    package="openvino",
    install="pip install 'autocompress[openvino]'",
    packages=("openvino",),
    runs={"cpu": ("float32", "bfloat16", "int8")},
    prepare=_prepare,
    prepare_onnx=_prepare_onnx,
)
