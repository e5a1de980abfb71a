"""Targets are JSON files, found by name or path, read strictly; what they cannot do is said."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.errors import PluginError, TableError
from autocompress.latency.runtime import RUNTIMES, load_runtime, prepare
from autocompress.latency.strict import Node
from autocompress.latency.target import (
    Target,
    describe_device,
    load_target,
    load_target_file,
    read_target,
    targets,
)
from autocompress.ops import Conv2d


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "mine.json"
    path.write_text(json.dumps({**load_target().describe(), **changes}))
    return path


def test_the_default_target_is_onnx_runtime_on_one_thread_with_one_image() -> None:
    target = load_target()
    assert target.conditions() == {
        "runtime": "onnxruntime",
        "threads": 1,
        "batch": 1,
        "device": "cpu",
        "number_format": "float32",
    }


@pytest.mark.parametrize("name", targets())
def test_every_target_that_ships_is_read_as_it_describes_itself(name: str) -> None:
    target = load_target(name)
    assert read_target(Node(json.loads(json.dumps(target.describe())), "")) == target
    assert target.name == name
    assert target.description


@pytest.mark.parametrize("name", targets())
def test_threads_and_batch_replace_those_of_a_target(name: str) -> None:
    target = load_target(name, threads=2, batch=8)
    assert (target.name, target.threads, target.batch) == (name, 2, 8)
    assert load_target(name).threads == 1


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        # Public documentation, as collected in ALGORITHMS.md part G.
        ("tensorrt", (8,)),
        ("nvidia-int4", (4, 8)),
        ("hisilicon-nnie", (8, 16)),
        ("arm-cpu-low-bit", (2, 3, 4, 5, 6, 7, 8)),
        ("qualcomm-adreno", ()),
        ("onnxruntime-cpu", (8,)),
    ],
)
def test_bit_widths_are_those_the_device_documents(name: str, bits: tuple[int, ...]) -> None:
    assert load_target(name).bit_widths == bits


def test_a_target_is_found_by_the_path_of_its_file(tmp_path: Path) -> None:
    path = written(tmp_path, name="mine", threads=2, channel_alignment=16)
    assert load_target(str(path)) == replace(load_target(), name="mine", threads=2, channel_alignment=16)


def test_an_unknown_target_is_an_error_that_lists_those_there_are() -> None:
    with pytest.raises(PluginError, match=r"no target 'gpu'; there are onnxruntime-cpu, .*pytorch-cpu"):
        load_target("gpu")


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "2"])
@pytest.mark.parametrize("name", ["threads", "batch", "channel_alignment"])
def test_counts_are_positive_integers(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(TableError, match=rf"{name} must be an integer >= 1, got {value!r}"):
        Target("mine", "pytorch", **{name: value})  # type: ignore[arg-type]
    with pytest.raises(TableError, match=rf"mine\.json: {name} must be an integer >= 1, got {value!r}"):
        load_target_file(written(tmp_path, **{name: value}))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"schema": "x"}, "schema must be 'autocompress.target', got 'x'"),
        ({"version": 2}, "version must be 1, got 2"),
        ({"device": "tpu"}, "device must be 'cpu' or 'cuda' or 'other', got 'tpu'"),
        ({"number_format": "fp8"}, "number_format must be .*'int8', got 'fp8'"),
        ({"runtime": 3}, "runtime must be a text, got 3"),
        ({"schemes": [{"bits": [8, 4]}]}, r"schemes\[0\]\.bits must be a list of widths in 1\.\.16, asc"),
        ({"schemes": [{"bits": [32]}]}, r"schemes\[0\]\.bits must be"),
        ({"schemes": [{}]}, r"schemes\[0\]\.bits is missing"),
        ({"schemes": [{"bits": [8], "levels": "odd"}]}, r"schemes\[0\]\.levels must be 'uniform'"),
        ({"bit_widths": [8]}, "bit_widths is not known; allowed: schema, version, name"),
    ],
)
def test_a_wrong_value_is_named_by_its_path(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(TableError, match=match):
        load_target(str(written(tmp_path, **changes)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(name=st.sampled_from([*load_target().describe()]), value=JSON)
def test_any_value_in_any_key_is_a_target_or_an_error_of_ours(name: str, value: Any) -> None:
    try:
        found = read_target(Node({**load_target().describe(), name: value}, ""))
    except TableError:
        return
    assert isinstance(found, Target)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"target .*: not found"):
        load_target(str(tmp_path / "none.json"))


def test_a_device_is_described_alike_each_time() -> None:
    assert describe_device() == describe_device()
    assert describe_device().keys() == {"cpu", "cores", "architecture"}
    assert describe_device("cuda").keys() == {"cpu", "cores", "architecture", "gpu"}


BLOCKS = [("a", (Conv2d(3, 8, 6, 6),))]


def test_a_target_of_capabilities_only_says_how_a_table_is_got() -> None:
    with pytest.raises(PluginError, match=r"'tensorrt' only states capabilities.*--bundle"):
        prepare(BLOCKS, load_target("tensorrt"))


def test_an_unknown_runtime_is_an_error_that_lists_those_there_are() -> None:
    with pytest.raises(PluginError, match=rf"no runtime 'tvm'; there are {', '.join(RUNTIMES)}"):
        load_runtime(Target("mine", "tvm"))


def test_a_runtime_of_ones_own_is_named_by_module_and_attribute() -> None:
    place = "autocompress.latency.runtimes.pytorch_eager:RUNTIME"
    assert load_runtime(Target("mine", place)) is load_runtime(load_target("pytorch-cpu"))
    with pytest.raises(PluginError, match="must be a Runtime, got dict"):
        load_runtime(Target("mine", "autocompress.latency.runtime:RUNTIMES"))
    with pytest.raises(PluginError, match="cannot be loaded from nowhere:RUNTIME"):
        load_runtime(Target("mine", "nowhere:RUNTIME"))


def test_a_runtime_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load_runtime(load_target())
    absent = replace(runtime, package="not_installed", install="pip install it")
    monkeypatch.setattr("autocompress.latency.runtimes.onnxruntime_cpu.RUNTIME", absent)
    with pytest.raises(PluginError, match=r"needs not_installed, which cannot be imported.*pip install it"):
        load_runtime(load_target())


def test_a_number_format_the_runtime_lacks_is_refused() -> None:
    with pytest.raises(TableError, match="does not run float16 on cpu; it runs cpu: float32, int8"):
        load_runtime(replace(load_target(), number_format="float16"))
