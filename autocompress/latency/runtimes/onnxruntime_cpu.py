"""ONNX Runtime on the CPU: 32-bit floats, or 8 bits as static QDQ."""

from pathlib import Path
from typing import Any, Final

import numpy as np

from autocompress.errors import TableError
from autocompress.latency.runtime import Blocks, Run, Runtime, random_input
from autocompress.latency.target import Target


def _prepare(blocks: Blocks, target: Target) -> Run:
    from autocompress.export.onnx_graph import onnx_model
    from autocompress.export.quantized import quantized_blocks

    if target.number_format == "int8":
        return _session(quantized_blocks(tuple(blocks), target.batch), target)
    return _session(onnx_model(blocks, batch=target.batch), target)


def _prepare_onnx(model: bytes | Path, target: Target) -> Run:
    if target.number_format == "int8":
        from autocompress.export.quantized import quantized

        return _session(quantized(model, target.batch), target)
    return _session(model, target)


def _session(model: bytes | Path, target: Target) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Threads that spin while they wait take the cores from whatever is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # noqa: BLE001  (onnxruntime has a dozen unrelated exception classes)
        what = "the model" if isinstance(model, bytes) else str(model)
        raise TableError(f"ONNX Runtime cannot load {what}: {error}") from None
    rng = np.random.default_rng(0)
    feeds = {}
    for argument in session.get_inputs():
        shape = [size if isinstance(size, int) else target.batch for size in argument.shape]
        feeds[argument.name] = random_input(rng, shape, integers=argument.type == "tensor(uint8)")

    def run() -> Any:
        return session.run(None, feeds)

    return run


RUNTIME: Final = Runtime(
    package="onnxruntime",
    install="pip install onnxruntime",
    packages=("onnxruntime",),
    runs={"cpu": ("float32", "int8")},
    prepare=_prepare,
    prepare_onnx=_prepare_onnx,
)
