"""Targets are found by name and checked when they are made."""

import pytest

from autocompress.errors import PluginError, TableError
from autocompress.latency.target import TARGETS, Target, describe_device, load_target


def test_the_default_target_is_onnx_runtime_on_one_thread_with_one_image() -> None:
    assert load_target().describe() == {
        "name": "onnxruntime-cpu",
        "runtime": "onnxruntime",
        "threads": 1,
        "batch": 1,
    }


@pytest.mark.parametrize("name", TARGETS)
def test_threads_and_batch_replace_those_of_a_built_in_target(name: str) -> None:
    target = load_target(name, threads=2, batch=8)
    assert (target.name, target.threads, target.batch) == (name, 2, 8)
    assert load_target(name).threads == 1


def test_an_unknown_target_is_an_error_that_lists_those_there_are() -> None:
    with pytest.raises(PluginError, match=r"no target 'gpu'; there are onnxruntime-cpu, pytorch-cpu"):
        load_target("gpu")


def test_an_unknown_runtime_is_an_error_that_lists_those_there_are() -> None:
    with pytest.raises(PluginError, match=r"no runtime 'tvm'; there are onnxruntime, pytorch"):
        Target("mine", "tvm")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "2"])
@pytest.mark.parametrize("name", ["threads", "batch"])
def test_threads_and_batch_are_positive_integers(name: str, value: object) -> None:
    with pytest.raises(TableError, match=rf"{name} must be an integer >= 1, got {value!r}"):
        Target("mine", "pytorch", **{name: value})  # type: ignore[arg-type]


def test_a_device_is_described_alike_each_time() -> None:
    assert describe_device() == describe_device()
    assert describe_device().keys() == {"cpu", "cores", "architecture"}
