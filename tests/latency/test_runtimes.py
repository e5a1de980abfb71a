"""Runtimes run what they are given, on the threads and the batch of the target."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.errors import TableError
from autocompress.export.onnx_graph import onnx_model
from autocompress.latency.measure import measure_onnx, measure_onnx_files
from autocompress.latency.memory import peak_memory_bytes
from autocompress.latency.runtimes import pinned, prepare, prepare_module, prepare_onnx
from autocompress.latency.target import Target, load_target
from autocompress.ops import Conv2d, Linear, Ops

Blocks = list[tuple[str, Ops]]
BLOCKS: Blocks = [("a", (Conv2d(3, 8, 6, 6, kernel=3, activation="relu"), Linear(8 * 36, 4)))]


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "pytorch-cpu"])
def test_a_prepared_network_gives_finite_outputs_of_the_targets_batch(name: str) -> None:
    result = prepare(BLOCKS, load_target(name, batch=3))()
    output = np.asarray(result[0] if isinstance(result, list) else result)
    assert output.shape == (3, 4)
    assert np.isfinite(output).all()


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "pytorch-cpu"])
def test_preparing_leaves_the_random_numbers_of_the_program_alone(name: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    prepare(BLOCKS, load_target(name))
    assert torch.equal(torch.rand(3), expected)


def test_a_module_runs_in_evaluation_mode_in_channels_last_without_gradients() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    output = prepare_module(module, (3, 6, 6), load_target("pytorch-cpu", batch=2))()
    assert isinstance(output, torch.Tensor)
    assert not output.requires_grad
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert not module.training


def test_threads_are_pinned_and_restored_even_after_an_error() -> None:
    before = torch.get_num_threads()
    other = before + 1

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


@pytest.mark.parametrize("measured", [measure_onnx, peak_memory_bytes])
def test_an_onnx_file_does_not_run_on_pytorch(path: Path, measured: object) -> None:
    target = Target("eager", "pytorch")
    with pytest.raises(TableError, match="runs on onnxruntime; target 'eager' is of pytorch"):
        measured(path, target)  # type: ignore[operator]


@pytest.mark.parametrize("measured", [measure_onnx, peak_memory_bytes])
def test_a_damaged_onnx_file_is_an_error_that_names_it(tmp_path: Path, measured: object) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(TableError, match=r"broken\.onnx"):
        measured(path, load_target())  # type: ignore[operator]


def test_a_damaged_model_in_memory_is_an_error() -> None:
    with pytest.raises(TableError, match="cannot load the model"):
        prepare_onnx(b"no model", load_target())
