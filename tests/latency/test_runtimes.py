"""Runtimes run what they are given, on the threads, the batch and in the number format of the target."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from autocompress.errors import PluginError, TableError
from autocompress.export.onnx_graph import onnx_model
from autocompress.export.quantized import quantized, quantized_blocks
from autocompress.latency import runtime
from autocompress.latency.measure import measure_onnx, measure_onnx_files
from autocompress.latency.memory import peak_memory_bytes
from autocompress.latency.runtime import pinned, prepare, prepare_onnx, reads_onnx, targets_here
from autocompress.latency.runtimes.pytorch_eager import prepare_module
from autocompress.latency.target import load_target
from autocompress.ops import Add, Conv2d, GlobalAvgPool, Linear, Ops, SqueezeExcite

Blocks = list[tuple[str, Ops]]
BLOCKS: Blocks = [("a", (Conv2d(3, 8, 6, 6, kernel=3, activation="relu"), Linear(8 * 36, 4)))]
# OpenVINO is an extra: without it, its targets are tested to say so.
HERE = targets_here()


def test_the_targets_that_run_here_are_those_whose_packages_are_installed() -> None:
    assert {"onnxruntime-cpu", "onnxruntime-cpu-int8", "pytorch-cpu"} <= set(HERE)
    assert ("openvino-cpu" in HERE) == (find_spec("openvino") is not None)
    assert ("pytorch-cuda" in HERE) == torch.cuda.is_available()
    assert "tensorrt" not in HERE


def test_without_openvino_its_targets_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    # As Python does for a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(PluginError, match=r"pip install 'autocompress\[openvino\]'"):
        prepare(BLOCKS, load_target("openvino-cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_its_targets_say_so() -> None:
    with pytest.raises(PluginError, match="needs a CUDA device"):
        prepare(BLOCKS, load_target("pytorch-cuda"))


@pytest.mark.parametrize("name", HERE)
def test_a_prepared_network_gives_finite_outputs_of_the_targets_batch(name: str) -> None:
    result = prepare(BLOCKS, load_target(name, batch=3))()
    output = np.asarray(result[0] if isinstance(result, list) else result)
    assert output.shape == (3, 4)
    assert np.isfinite(output).all()


@pytest.mark.parametrize("name", HERE)
def test_preparing_leaves_the_random_numbers_of_the_program_alone(name: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    prepare(BLOCKS, load_target(name))
    assert torch.equal(torch.rand(3), expected)


ATTENTIVE: Blocks = [
    ("a", (Conv2d(3, 8, 6, 6, kernel=3, activation="hard_swish"), SqueezeExcite(8, 6, 6, 4))),
    ("b", (Conv2d(8, 8, 6, 6), Add(8, 6, 6))),
    ("c", (GlobalAvgPool(8, 6, 6), Linear(8, 4))),
]


def test_runtimes_that_read_onnx_compute_the_same_from_the_same_file() -> None:
    model = onnx_model(ATTENTIVE, batch=2)
    readers = [name for name in HERE if reads_onnx(load_target(name))]
    outputs = {name: np.asarray(prepare_onnx(model, load_target(name, batch=2))()[0]) for name in readers}
    expected = outputs["onnxruntime-cpu"]
    # Two layers of 8 bits each lose some hundredths; bfloat16 has 8 bits of mantissa.
    tolerances = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.2}
    for name, output in outputs.items():
        error = np.abs(output - expected).max() / np.abs(expected).max()
        assert error <= tolerances[load_target(name).number_format], name
        if load_target(name).number_format == "int8":
            assert error > 1e-4


def test_an_8_bit_model_has_unsigned_activations_and_signed_weights_by_channel() -> None:
    graph = onnx.load_from_string(quantized_blocks(tuple(BLOCKS), 1)).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    zeros = {tensors[node.input[2]].data_type for node in graph.node if node.op_type == "QuantizeLinear"}
    assert zeros == {onnx.TensorProto.UINT8}
    weight = next(t for t in graph.initializer if len(t.dims) == 4)
    assert weight.data_type == onnx.TensorProto.INT8
    reader = next(n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] == weight.name)
    assert list(tensors[reader.input[1]].dims) == [8]


def test_a_damaged_model_is_not_quantized(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="cannot load the model"):
        quantized(b"no model", 1)
    with pytest.raises(TableError, match=r"none\.onnx"):
        prepare_onnx(tmp_path / "none.onnx", load_target("onnxruntime-cpu-int8"))


def test_a_module_runs_in_evaluation_mode_in_channels_last_without_gradients() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    output = prepare_module(module, (3, 6, 6), load_target("pytorch-cpu", batch=2))()
    assert isinstance(output, torch.Tensor)
    assert not output.requires_grad
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert not module.training


def test_more_threads_than_cores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cores", lambda: 2)
    with (
        pytest.raises(TableError, match="'onnxruntime-cpu' has 3 threads, and this process may use 2 cores"),
        pinned(load_target(threads=3)),
    ):
        pass


def test_threads_are_pinned_and_restored_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    other = 2 if before == 1 else 1
    monkeypatch.setattr(runtime, "cores", lambda: 2)

    def fail() -> None:
        with pinned(load_target("pytorch-cpu", threads=other)):
            assert torch.get_num_threads() == other
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "network.onnx"
    path.write_bytes(onnx_model(BLOCKS, batch=1))
    return path


def test_exported_files_are_measured_as_often_as_asked(path: Path) -> None:
    measured = measure_onnx_files({"one": path, "two": path}, load_target(), runs=5)
    assert {name: row.count for name, row in measured.items()} == {"one": 5, "two": 5}
    assert all(0 < row.median_ms <= row.p95_ms for row in measured.values())
    assert measure_onnx(path, load_target(), runs=3).count == 3


def test_peak_memory_counts_the_weights_of_the_network(tmp_path: Path) -> None:
    # 16 MiB of weights; the runtime may hold them twice while it loads, and packs them for its kernels.
    big: Blocks = [("a", (Linear(2048, 2048, bias=False),))]
    path = tmp_path / "big.onnx"
    path.write_bytes(onnx_model(big, batch=1))
    weights = 4 * 2048 * 2048
    assert weights <= peak_memory_bytes(path, load_target()) <= 6 * weights


def test_peak_memory_does_not_count_what_the_calling_process_holds(path: Path) -> None:
    ballast = np.ones(2**27, dtype=np.uint8)
    # Neither that, nor the 40 MiB and more of an interpreter with its libraries.
    assert peak_memory_bytes(path, load_target()) < ballast.nbytes / 4


@pytest.mark.parametrize(
    ("measured", "match"),
    [
        (measure_onnx, "does not run on pytorch, the runtime of 'pytorch-cpu'"),
        (peak_memory_bytes, "measured on onnxruntime with 32-bit floats; target 'pytorch-cpu' is of pytorch"),
    ],
)
def test_an_onnx_file_does_not_run_on_pytorch(path: Path, measured: object, match: str) -> None:
    with pytest.raises(TableError, match=match):
        measured(path, load_target("pytorch-cpu"))  # type: ignore[operator]


@pytest.mark.parametrize("measured", [measure_onnx, peak_memory_bytes])
def test_a_damaged_onnx_file_is_an_error_that_names_it(tmp_path: Path, measured: object) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(TableError, match=r"broken\.onnx"):
        measured(path, load_target())  # type: ignore[operator]


def test_a_damaged_model_in_memory_is_an_error() -> None:
    with pytest.raises(TableError, match="cannot load the model"):
        prepare_onnx(b"no model", load_target())
