"""A bundle is measured without autocompress, survives a kill, and comes back as a table or as an error."""

import ast
import gc
import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from autocompress.errors import StorageError, TableError
from autocompress.export.onnx_graph import onnx_model
from autocompress.export.quantized import quantized_blocks
from autocompress.export.repeated import PERIOD, repeated_weights
from autocompress.latency import bundle as bundle_module
from autocompress.latency import bundle_runner as runner
from autocompress.latency import measure as measure_module
from autocompress.latency import samples as samples_module
from autocompress.latency.assemble import assemble
from autocompress.latency.bundle import import_samples, write_bundle
from autocompress.latency.measure import REFERENCE, Stopping, steady_samples
from autocompress.latency.plan import make_plan, row_name
from autocompress.latency.runtime import prepare
from autocompress.latency.samples import SampleFile
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import describe_device, load_target
from autocompress.ops import Conv2d, Linear
from autocompress.space import SearchSpace

TARGET = load_target()
ROUNDS = {"networks": 6, "tolerance": 0.5, "min_rounds": 10, "max_rounds": 18}
RUNNER = Path(runner.__file__)

MADE: dict[str, Path] = {}
"""Files that tests read and never change; made once."""


@pytest.fixture
def made(space: SearchSpace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if not MADE:
        folder = tmp_path_factory.mktemp("bundle")
        write_bundle(folder / "device.zip", space, TARGET, **ROUNDS)
        arguments = [str(folder / "device.zip"), "--output", str(folder / "samples.jsonl")]
        assert runner.main(arguments) == 0
        MADE.update(bundle=folder / "device.zip", samples=folder / "samples.jsonl")
    return MADE


@pytest.fixture
def bundle(made: dict[str, Path]) -> Path:
    return made["bundle"]


@pytest.fixture
def samples(made: dict[str, Path]) -> Path:
    return made["samples"]


def without_autocompress(bundle: Path, *arguments: str) -> list[str]:
    """The command that runs a bundle as Python runs a zip file, with autocompress out of reach."""
    program = (
        "import runpy, sys; sys.modules.update(autocompress=None, torch=None, onnx=None, scipy=None); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return [sys.executable, "-I", "-c", program, str(bundle), *arguments]


def manifest_of(bundle: Path) -> dict[str, Any]:
    with zipfile.ZipFile(bundle) as archive:
        manifest: dict[str, Any] = json.loads(archive.read("manifest.json"))
    return manifest


def items_of(space: SearchSpace, networks: int = 6) -> list[str]:
    plan = make_plan(space, "auto", networks, 0)
    return [*map(row_name, plan.rows), *(keys.name for keys in plan.keys)]


# What is written.


def test_a_bundle_has_a_model_for_each_row_and_network_and_says_so(
    space: SearchSpace, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    written = write_bundle(
        tmp_path / "a.zip", space, TARGET, **ROUNDS, progress=lambda done, total: told.append((done, total))
    )
    plan = make_plan(space, "auto", 6, 0)
    manifest = manifest_of(tmp_path / "a.zip")
    assert manifest["rows"].keys() == plan.rows.keys()
    assert [network["blocks"] for network in manifest["networks"]] == [
        [list(block) for block in keys.blocks] for keys in plan.keys
    ]
    assert manifest["space"] == {"name": "toy", "fingerprint": space.fingerprint}
    assert (written.rows, written.networks) == (len(plan.rows), 6)
    assert told == [(done, len(plan.rows) + 6) for done in range(1, len(plan.rows) + 7)]
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        models = [entry for entry in archive.infolist() if entry.filename.endswith(".onnx")]
        assert sum(entry.file_size for entry in models) == written.models_bytes
        digests = [
            f"{entry.filename} {hashlib.sha256(archive.read(entry)).hexdigest()}\n" for entry in models
        ]
        assert manifest["models_sha256"] == hashlib.sha256("".join(digests).encode()).hexdigest()
        assert archive.read("runner.py") == RUNNER.read_bytes()
        assert len(archive.read("README.txt").splitlines()) == 9
        text = archive.read("manifest.json")
    assert written.fingerprint == hashlib.sha256(text).hexdigest()
    assert written.size_bytes == (tmp_path / "a.zip").stat().st_size
    assert f"{len(plan.rows)} blocks and operations, 6 networks" in str(written)


def test_the_same_arguments_give_the_same_bytes(space: SearchSpace, bundle: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "device.zip", space, TARGET, **ROUNDS)
    assert (tmp_path / "device.zip").read_bytes() == bundle.read_bytes()
    other = write_bundle(tmp_path / "other.zip", space, TARGET, **{**ROUNDS, "seed": 1})
    assert other.fingerprint != hashlib.sha256(json.dumps(manifest_of(bundle), indent=1).encode()).hexdigest()


def test_models_in_a_bundle_have_the_shapes_and_nodes_of_those_timed_here(
    space: SearchSpace, tmp_path: Path
) -> None:
    target = replace(TARGET, batch=3)
    write_bundle(tmp_path / "a.zip", space, target, **ROUNDS)
    plan = make_plan(space, "auto", 6, 0)
    manifest = manifest_of(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        for key, ops in plan.rows.items():
            assert_same_graph(archive.read(manifest["rows"][key]), onnx_model([("b", ops)], batch=3))
        for entry, network in zip(manifest["networks"], plan.networks, strict=True):
            assert_same_graph(archive.read(entry["file"]), onnx_model(network, batch=3))


def assert_same_graph(found: bytes, expected: bytes) -> None:
    graphs = [onnx.load_from_string(model).graph for model in (found, expected)]
    kinds, inputs, weights = zip(
        *(
            (
                [(node.op_type, list(node.input), str(node.attribute)) for node in graph.node],
                str(graph.input),
                [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in graph.initializer],
            )
            for graph in graphs
        ),
        strict=True,
    )
    assert kinds[0] == kinds[1]
    assert inputs[0] == inputs[1]
    assert weights[0] == weights[1]


def test_random_weights_do_not_compress_and_repeated_ones_do_a_hundredfold() -> None:
    model = onnx_model([("b", (Linear(1500, 1500), Linear(1500, 1500)))], batch=1)
    assert len(zlib.compress(model)) > 0.9 * len(model)
    repeated = repeated_weights(model)
    assert abs(len(repeated) - len(model)) < 16
    assert len(zlib.compress(repeated)) < len(model) / 100


def test_short_tensors_stay_and_long_ones_repeat_their_first_values() -> None:
    model = onnx_model([("b", (Conv2d(8, 24, 8, 8), Conv2d(24, 24, 8, 8)))], batch=1)
    before, after = (
        [numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(found).graph.initializer]
        for found in (model, repeated_weights(model))
    )
    assert [array.size for array in before] == [192, 24, 576, 24]
    for index in (0, 1, 3):
        np.testing.assert_array_equal(before[index], after[index])
    flat = after[2].ravel()
    np.testing.assert_array_equal(flat[PERIOD:], flat[: 576 - PERIOD])
    np.testing.assert_allclose(flat[:PERIOD], before[2].ravel()[:PERIOD], rtol=1 / 16)
    assert len(np.unique(flat[:PERIOD])) > 100
    assert not (flat.view(np.uint32) % 2**19).any()


def test_activations_of_repeated_weights_neither_vanish_nor_overflow() -> None:
    blocks = [(f"b{index}", (Conv2d(256, 256, 4, 4, activation="relu"),)) for index in range(60)]
    model = repeated_weights(onnx_model(blocks, batch=1))
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).standard_normal((1, 256, 4, 4), dtype=np.float32)
    (output,) = session.run(None, {"input": image})
    assert 1e-12 < float(np.abs(output).max()) < 1e12


def test_an_int8_target_gets_quantized_models(space: SearchSpace, tmp_path: Path) -> None:
    target = replace(TARGET, number_format="int8")
    write_bundle(tmp_path / "a.zip", space, target, **{**ROUNDS, "networks": 2})
    plan = make_plan(space, "auto", 2, 0)
    manifest = manifest_of(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        for entry, network in zip(manifest["networks"], plan.networks, strict=True):
            assert_same_graph(archive.read(entry["file"]), quantized_blocks(tuple(network), 1))
    loaded = runner.Bundle(tmp_path / "a.zip")
    for item in loaded.files:
        loaded.session(item)()


@pytest.mark.parametrize(
    "change",
    [{"runtime": "pytorch"}, {"runtime": ""}, {"device": "cuda"}, {"number_format": "float16"}],
)
def test_a_target_that_the_runner_cannot_measure_is_refused(
    space: SearchSpace, tmp_path: Path, change: dict[str, Any]
) -> None:
    name, value = next(iter(change.items()))
    with pytest.raises(TableError, match=rf"ONNX Runtime on a CPU.*{name} {value!r}.*write a target file"):
        write_bundle(tmp_path / "a.zip", space, replace(TARGET, **change))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"networks": 1}, "networks must be 0 or at least 2, got 1"),
        ({"networks": -1}, "networks must be in 0..1000, got -1"),
        ({"networks": 1001}, "networks must be in 0..1000, got 1001"),
        ({"min_rounds": 70}, "min_rounds must be in 1..max_rounds"),
        ({"tolerance": math.nan}, "tolerance must be >= 0"),
        ({"granularity": "layer"}, "granularity must be one of"),
    ],
)
def test_wrong_arguments_are_refused(
    space: SearchSpace, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(TableError, match=message):
        write_bundle(tmp_path / "a.zip", space, TARGET, **wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_space_with_an_absurd_number_of_rows_is_refused(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autocompress.latency.plan.MAX_ROWS", 5)
    with pytest.raises(TableError, match=r"'toy' has \d+ different blocks and operations; at most 5"):
        write_bundle(tmp_path / "a.zip", space, TARGET)


def test_a_bundle_that_could_not_be_read_back_is_not_written(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_module, "MAX_BUNDLE_BYTES", 1000)
    with pytest.raises(TableError, match=r"the bundle would have \d+ bytes .* fewer networks"):
        write_bundle(tmp_path / "a.zip", space, TARGET, **ROUNDS)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_whole_or_not_there(space: SearchSpace, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_text("older")

    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "a.zip", space, TARGET, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
    assert (tmp_path / "a.zip").read_text() == "older"
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_bundle(tmp_path / "file" / "a.zip", space, TARGET)


# The runner.


def test_the_runner_imports_nothing_but_the_standard_library_numpy_and_onnxruntime() -> None:
    tree = ast.parse(RUNNER.read_text(), feature_version=(3, 8))
    names = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert names - sys.stdlib_module_names == {"numpy", "onnxruntime"}
    # With Python 3.8 a subscripted abstract class may only stand in an annotation.
    assert "__future__" in names


def test_the_runner_repeats_what_it_cannot_import() -> None:
    assert (runner.SCHEMA, runner.VERSION) == (bundle_module.SCHEMA, bundle_module.VERSION)
    assert (runner.SAMPLES_SCHEMA, runner.SAMPLES_VERSION) == (samples_module.SCHEMA, samples_module.VERSION)
    for name in ("REFERENCE", "WARM_UP_RUNS", "UNSTABLE_SHARE", "CONFIDENCE"):
        assert getattr(runner, name) == getattr(measure_module, name)
    assert Stopping().rounds_per_load == runner.ROUNDS_PER_LOAD
    assert runner.describe_device() == describe_device()


def test_sessions_have_the_options_of_a_profile(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    class Options:
        def __init__(self) -> None:
            self.entries: dict[str, str] = {}
            made.append(self)

        def add_session_config_entry(self, name: str, value: str) -> None:
            self.entries[name] = value

    class Session:
        def __init__(self, model: bytes, options: Options, providers: list[str]) -> None:
            options.entries["providers"] = str(providers)

        def get_inputs(self) -> list[Any]:
            return []

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    target = replace(TARGET, threads=3)
    write_bundle(tmp_path / "device.zip", space, target, **ROUNDS)
    prepare(space.operations(space.smallest()[0]), target)
    runner.Bundle(tmp_path / "device.zip").session(REFERENCE)
    assert vars(made[0]) == vars(made[1])
    assert made[1].intra_op_num_threads == 3


def test_intervals_of_medians_are_those_of_a_profile() -> None:
    for count in range(1, 121):
        assert runner.bootstrap_positions(count) == measure_module.bootstrap_positions(count)
        times = np.random.default_rng(count).exponential(size=count).tolist()
        assert runner.half_width(times) == measure_module.half_width(sorted(times))


def test_a_bundle_is_measured_where_autocompress_cannot_be_imported(
    space: SearchSpace, bundle: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "device.zip"
    shutil.copy(bundle, alone)
    done = subprocess.run(
        without_autocompress(alone), cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "minutes left" in done.stderr
    assert "finished: give this file back (samples.jsonl)" in done.stderr
    table = import_samples(tmp_path / "samples.jsonl", bundle)
    assert table.rows.keys() == make_plan(space, "auto", 6, 0).rows.keys()
    assert {path.name for path in tmp_path.iterdir()} == {"device.zip", "samples.jsonl"}


def test_a_kill_loses_no_finished_round_and_the_next_run_goes_on(space: SearchSpace, tmp_path: Path) -> None:
    write_bundle(
        tmp_path / "device.zip", space, TARGET, networks=6, tolerance=0, min_rounds=90, max_rounds=90
    )
    output = tmp_path / "samples.jsonl"
    command = without_autocompress(tmp_path / "device.zip", "--output", str(output))
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not output.exists() or output.read_bytes().count(b'{"ms"') < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = output.read_bytes()
    whole = killed[: killed.rfind(b"\n") + 1]
    assert b'{"finished"' not in whole
    output.write_bytes(whole)
    with pytest.raises(TableError, match=r"fewer than 6 samples|are not finished"):
        import_samples(output, tmp_path / "device.zip")
    output.write_bytes(whole + b'{"ms": {"0": 0.0')
    subprocess.run(command, stderr=subprocess.DEVNULL, check=True, timeout=60)
    assert output.read_bytes().startswith(whole)
    table = import_samples(output, tmp_path / "device.zip")
    assert table.error_report is not None
    # No interval is as narrow as the tolerance of this bundle.
    assert table.error_report.unstable_rows == len(table.rows)
    counts = Counter(
        identity for line in output.read_text().splitlines() for identity in json.loads(line).get("ms", ())
    )
    assert set(counts.values()) == {90}
    # A finished measurement is not taken up again.
    text = output.read_bytes()
    subprocess.run(command, stderr=subprocess.DEVNULL, check=True, timeout=60)
    assert output.read_bytes() == text


class Machine:
    """A bundle without models: 50 blocks of 1 byte and 5 networks of 10; it remembers what was loaded."""

    def __init__(self, blocks: int = 50, networks: int = 5) -> None:
        self.networks = {f"network {index}" for index in range(networks)}
        self.items = [f"block {index}" for index in range(blocks)] + sorted(self.networks)
        self.manifest = {"seed": 0, "min_rounds": 9, "max_rounds": 9, "tolerance": 0.0}
        self.loads: list[list[str]] = []
        self.ran: Counter[str] = Counter()
        self.collecting: Counter[bool] = Counter()

    def size(self, item: str) -> int:
        return 10 if item in self.networks else 1

    def session(self, item: str) -> Callable[[], object]:
        if not self.loads or self.loads[-1][-1] == REFERENCE:
            self.loads.append([])
        self.loads[-1].append(item)
        return lambda: (self.ran.update([item]), self.collecting.update([gc.isenabled()]))

    def measure(self, path: Path, network_bytes: int = 1000) -> runner.Samples:
        samples = runner.Samples(path, {"schema": "test"})
        try:
            assert runner.measure(self, samples, network_bytes, math.inf, lambda waiting: None)  # type: ignore[arg-type]
        finally:
            gc.enable()
        return samples


def test_every_item_runs_once_a_round_and_all_is_built_anew_every_eight_rounds(tmp_path: Path) -> None:
    machine = Machine()
    samples = machine.measure(tmp_path / "samples.jsonl")
    assert samples.rounds == 9
    assert {item: len(times) for item, times in samples.taken.items()} == dict.fromkeys(
        [*machine.items, REFERENCE], 9
    )
    assert [sorted(load) for load in machine.loads] == [sorted([*machine.items, REFERENCE])] * 2
    # Each load warms up with 3 runs; garbage is collected during the first of them only.
    assert set(machine.ran.values()) == {9 + 2 * 3}
    assert machine.collecting == {True: 3 * 56, False: (9 + 3) * 56}
    rounds = [json.loads(line)["ms"] for line in samples._path.read_text().splitlines() if '"ms"' in line]
    assert len({tuple(times) for times in rounds}) == 9


def test_networks_that_do_not_fit_into_memory_together_take_turns(tmp_path: Path) -> None:
    machine = Machine()
    samples = machine.measure(tmp_path / "samples.jsonl", network_bytes=25)
    assert {len(samples.taken[item]) for item in machine.items} == {9}
    assert all(len(machine.networks & set(load)) <= 2 for load in machine.loads)
    # Blocks that have all their samples run untimed beside the networks that are left.
    blocks = set(machine.items) - machine.networks
    assert all(blocks <= set(load) for load in machine.loads)
    # Those with the fewest samples come first, and no round runs for the reference alone.
    assert set().union(*machine.loads[:3]) >= machine.networks
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert all(len(json.loads(line)["ms"]) > 1 for line in lines if '"ms"' in line)


@pytest.mark.parametrize(("network_bytes", "evictions"), [(25, 5 * 9), (1000, 0)])
def test_caches_are_evicted_before_networks_that_take_turns_and_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network_bytes: int, evictions: int
) -> None:
    """Alone among small blocks a network would find its weights in the cache."""
    sizes: list[int] = []

    class Buffer:
        def __init__(self, length: int) -> None:
            self.length = length

        def max(self) -> None:
            sizes.append(self.length)

    monkeypatch.setattr(runner.np, "ones", Buffer)
    Machine().measure(tmp_path / "samples.jsonl", network_bytes=network_bytes)
    assert sizes.count(runner.EVICTED_BYTES // 8) >= evictions
    assert (evictions > 0) == (runner.EVICTED_BYTES // 8 in sizes)


def test_a_network_that_does_not_fit_is_measured_alone(tmp_path: Path) -> None:
    machine = Machine(networks=3)
    samples = machine.measure(tmp_path / "samples.jsonl", network_bytes=1)
    assert {len(samples.taken[item]) for item in machine.items} == {9}
    assert all(len(machine.networks & set(load)) <= 1 for load in machine.loads)


@pytest.mark.parametrize(("blocks", "rounds"), [(60, 10), (10, 40)])
def test_one_uncertain_item_holds_up_few_others_and_not_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, rounds: int
) -> None:
    machine = Machine(blocks=blocks, networks=0)
    machine.manifest.update(min_rounds=10, max_rounds=40, tolerance=0.02)
    clock = iter(range(10**9))
    now = [0]

    def steady() -> int:
        # Between two readings lies 1 ms, or for block 7, which is unsteady, anything.
        now[0] += 10**6 + (next(clock) * 7919 % 10**6 if machine.ran["block 7"] != seen[0] else 0)
        seen[0] = machine.ran["block 7"]
        return now[0]

    seen = [0]
    monkeypatch.setattr(runner.time, "perf_counter_ns", steady)
    samples = machine.measure(tmp_path / "samples.jsonl")
    counts = {item: len(times) for item, times in samples.taken.items()}
    assert set(counts.values()) == {rounds}


def test_time_that_is_up_ends_the_run_and_unfinished_samples_can_be_taken(
    space: SearchSpace, bundle: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "samples.jsonl"
    assert runner.main([str(bundle), "--output", str(output), "--max-minutes", "1e-9"]) == 1
    assert "time is up: run the same command again" in capsys.readouterr().err
    lines = samples.read_text().splitlines(keepends=True)
    cut = [line for line in lines if not line.startswith('{"finished"')]
    output.write_text("".join(cut))
    with pytest.raises(TableError, match=r"items are not finished, the first is 'block Conv2d"):
        import_samples(output, bundle)
    table = import_samples(output, bundle, unfinished=True)
    assert table.rows == import_samples(samples, bundle).rows
    rounds = [line for line in cut if '"ms": {' in line]
    output.write_text("".join([*(line for line in cut if line not in rounds), *rounds[:5]]))
    with pytest.raises(TableError, match="have fewer than 6 samples"):
        import_samples(output, bundle, unfinished=True)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert runner.main(arguments) == 2
    said: str = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("refused: ")
    return said


def test_another_number_of_threads_is_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "made for threads = 1, not 2" in refused([str(bundle), "--threads", "2"], capsys)


def test_what_is_no_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.zip").write_text("not a zip")
    assert "is no bundle" in refused([str(tmp_path / "a.zip")], capsys)
    assert "is no bundle" in refused([str(tmp_path / "absent.zip")], capsys)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("manifest.json", '{"schema": "autocompress.bundle", "version": 2}')
    assert "version 1" in refused([str(tmp_path / "b.zip")], capsys)


def test_a_model_that_cannot_be_loaded_is_named(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(bundle) as old, zipfile.ZipFile(tmp_path / "a.zip", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"damaged" if name == "rows/00002.onnx" else old.read(name))
    said = refused([str(tmp_path / "a.zip"), "--output", str(tmp_path / "samples.jsonl")], capsys)
    assert "cannot load rows/00002.onnx" in said


@pytest.mark.parametrize("key", ["bundle", "device", "target", "python", "versions", "schema"])
def test_samples_of_something_else_are_not_gone_on_with(
    bundle: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    header, *rest = samples.read_text().splitlines()
    changed = {**json.loads(header), key: "other"}
    output = tmp_path / "samples.jsonl"
    output.write_text("\n".join([json.dumps(changed), *rest]) + "\n")
    before = output.read_bytes()
    assert f"{key} is other, not" in refused([str(bundle), "--output", str(output)], capsys)
    assert output.read_bytes() == before


def test_a_damaged_line_is_named_by_the_runner(
    bundle: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = samples.read_text().splitlines()
    (tmp_path / "samples.jsonl").write_text("\n".join([*lines[:3], "{}", *lines[3:]]) + "\n")
    assert "line 4 is damaged" in refused([str(bundle), "--output", str(tmp_path / "samples.jsonl")], capsys)


def test_an_unpacked_bundle_and_one_beside_the_runner_are_found(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(tmp_path / "unpacked")
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "unpacked" / "runner.py"))
    assert runner.find_bundle() == tmp_path / "unpacked"
    unpacked, packed = runner.Bundle(tmp_path / "unpacked"), runner.Bundle(bundle)
    assert unpacked.fingerprint == packed.fingerprint
    for item in packed.files:
        assert unpacked.size(item) == packed.size(item) == len(unpacked.read(unpacked.files[item]))
    (tmp_path / "beside").mkdir()
    shutil.copy(bundle, tmp_path / "beside" / "mine.zip")
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "beside" / "runner.py"))
    assert runner.find_bundle() == tmp_path / "beside" / "mine.zip"
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "beside" / "mine.zip" / "runner.py"))
    assert runner.find_bundle() == tmp_path / "beside" / "mine.zip"
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "runner.py"))
    with pytest.raises(runner.Refused, match="there are 0 zip files"):
        runner.find_bundle()


# What comes back.


def test_the_table_is_what_a_profile_makes_of_the_same_samples(
    space: SearchSpace, bundle: Path, samples: Path, tmp_path: Path
) -> None:
    table = import_samples(samples, bundle)
    plan = make_plan(space, "auto", 6, 0)
    shutil.copy(samples, tmp_path / "copy.jsonl")
    subject = {"target": TARGET.conditions(), "device": describe_device()}
    rounds = SampleFile(tmp_path / "copy.jsonl", subject).rounds
    steady = steady_samples(rounds, [*items_of(space), REFERENCE])
    expected = assemble(TARGET, steady, plan.keys, tuple(plan.rows), {}, 0.5, table.provenance)
    assert table == expected
    assert table.error_report is not None
    assert len(table.error_report.networks) == 6
    assert table.error_report.drift_percent is not None
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    assert table.cost(space).maximum > 0


def test_a_table_says_where_it_was_measured_and_is_refused_elsewhere(
    space: SearchSpace, bundle: Path, samples: Path, tmp_path: Path
) -> None:
    table = import_samples(samples, bundle)
    assert table.provenance["device"] == describe_device()
    assert table.provenance["space"] == {"name": "toy", "fingerprint": space.fingerprint}
    assert table.provenance["versions"]["onnxruntime"] == onnxruntime.__version__
    table.check_target(TARGET)
    header, *rest = samples.read_text().splitlines()
    phone = {"cpu": "Cortex-A76", "cores": 8, "architecture": "aarch64"}
    (tmp_path / "phone.jsonl").write_text(
        "\n".join([json.dumps({**json.loads(header), "device": phone}), *rest]) + "\n"
    )
    table = import_samples(tmp_path / "phone.jsonl", bundle)
    with pytest.raises(TableError, match="Cortex-A76"):
        table.check_target(TARGET)
    table.check_target(TARGET, device=phone)


def test_steady_samples_leave_out_other_items_and_know_of_missing_ones() -> None:
    rounds = [{"a": 1.0, "b": 2.0, "other": 5.0}, {"b": 2.0, "a": 1.0}]
    found = steady_samples(rounds, ["a", "b", "c"])
    assert found["a"].raw_ms == found["a"].steady_ms == pytest.approx((1.0, 1.0))
    assert found["b"].raw_ms == (2.0, 2.0)
    assert found["c"].raw_ms == found["c"].steady_ms == ()
    assert found.keys() == {"a", "b", "c"}


def change_line(text: str, number: int, change: Callable[[Any], Any]) -> str:
    lines = text.splitlines()
    lines[number] = json.dumps(change(json.loads(lines[number])))
    return "\n".join(lines) + "\n"


def first_round(text: str) -> int:
    return next(number for number, line in enumerate(text.splitlines()) if '"ms": {' in line)


def with_time(value: Any) -> Callable[[str], str]:
    return lambda text: change_line(text, first_round(text), lambda row: {"ms": {**row["ms"], "3": value}})


def with_header(**changes: Any) -> Callable[[str], str]:
    return lambda text: change_line(text, 0, lambda row: {**row, **changes})


def without(text: str, item: str) -> str:
    """Take an item out, as if it had never been measured."""
    rows = [json.loads(line) for line in text.splitlines()]
    identity = next(row["id"] for row in rows if row.get("item") == item)
    kept = []
    for row in rows:
        if "ms" in row:
            row["ms"].pop(str(identity), None)
        if "finished" in row:
            row["finished"] = [other for other in row["finished"] if other != identity]
        if row.get("item") != item:
            kept.append(json.dumps(row))
    return "\n".join(kept) + "\n"


DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda text: "", "end of a line"),
    "cut in a line": (lambda text: text[:-7], "end of a line"),
    "cut before a line": (lambda text: "".join(text.splitlines(True)[:-1]), "not finished"),
    "only a header": (lambda text: text.splitlines(True)[0], "fewer than 6 samples"),
    "not JSON": (lambda text: text + "nonsense\n", r"line \d+: must be JSON"),
    "not an object": (lambda text: text + "[1]\n", r"line \d+ must be a JSON object"),
    "an empty line": (lambda text: text + "\n", r"line \d+: must be JSON"),
    "another line": (lambda text: text + '{"pickle": "gASV"}\n', r"line \d+.ms is missing"),
    "other schema": (with_header(schema="autocompress.other"), "line 1.schema must be"),
    "other version": (with_header(version=2), "line 1.version must be 1, got 2"),
    "other unit": (with_header(unit="s"), "line 1.unit must be 'ms'"),
    "other bundle": (with_header(bundle="0" * 64), "another bundle, 0000"),
    "other threads": (with_header(target={**TARGET.conditions(), "threads": 2}), "target of the bundle"),
    "other target": (with_header(target=1), "line 1.target must be a JSON object"),
    "device without cores": (with_header(device={"cpu": "a", "architecture": "b"}), "cores is missing"),
    "device of no cores": (
        with_header(device={"cpu": "a", "cores": 0, "architecture": "b"}),
        "cores must be an integer >= 1",
    ),
    "unknown version of numpy": (with_header(versions={"onnxruntime": "1"}), "versions.numpy is missing"),
    "start that is no text": (with_header(started=5), "line 1.started must be a text"),
    "unknown key": (with_header(other=1), "line 1.other is not known"),
    "negative": (with_time(-0.5), "must be at least 0, got -0.5"),
    "infinite": (with_time(math.inf), "a number must be finite"),
    "not a number": (with_time(math.nan), "a number must be finite"),
    "huge": (with_time(1e300), r"ms.3 must be at most 3.6e\+06 ms"),
    "text": (with_time("0.5"), "must be a finite number"),
    "true": (with_time(True), "must be a finite number"),
    "no time": (with_time(None), "must be a finite number"),
    "unknown number": (lambda text: text + '{"ms": {"999": 1.0}}\n', "that a line before has named"),
    "unknown finished": (
        lambda text: text + '{"finished": [999], "tolerance": 0.5}\n',
        "that a line before has named",
    ),
    "unknown item": (lambda text: text + '{"id": 999, "item": "block X"}\n', "that was to be measured"),
    "item named twice": (
        lambda text: text + json.dumps({"id": 999, "item": REFERENCE}) + "\n",
        "was to be measured, named once",
    ),
    "number given twice": (lambda text: change_line(text, 2, lambda row: {**row, "id": 0}), "no other item"),
    "key that stands twice": (lambda text: text + '{"ms": {"0": 1.0, "0": 2.0}}\n', "stands twice"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_samples_are_refused(bundle: Path, samples: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    path = tmp_path / "samples.jsonl"
    path.write_text(damage(samples.read_text()))
    with pytest.raises(TableError, match=message) as caught:
        import_samples(path, bundle)
    assert str(path) in str(caught.value)


def test_a_missing_item_is_refused_whatever_it_is(
    space: SearchSpace, bundle: Path, samples: Path, tmp_path: Path
) -> None:
    for item in items_of(space):
        (tmp_path / "samples.jsonl").write_text(without(samples.read_text(), item))
        with pytest.raises(TableError, match=r"1 of \d+ items have fewer than 6 samples") as caught:
            import_samples(tmp_path / "samples.jsonl", bundle)
        assert repr(item) in str(caught.value)


def test_absent_and_oversized_files_are_refused_unread(
    bundle: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TableError, match=r"samples .*not found"):
        import_samples(tmp_path / "absent.jsonl", bundle)
    with pytest.raises(TableError, match=r"bundle .*cannot be read or is damaged: .*No such file"):
        import_samples(samples, tmp_path / "absent.zip")
    with pytest.raises(TableError, match=r"bundle .*cannot be read"):
        import_samples(samples, tmp_path)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(TableError, match="must have at most 67108864 bytes"):
        import_samples(tmp_path / "huge", bundle)
    with pytest.raises(TableError, match=r"must have at most 1073741824 bytes, got 2147483648"):
        import_samples(samples, tmp_path / "huge")


def rewritten(bundle: Path, path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Write a bundle with another manifest, and nothing else."""
    manifest = manifest_of(bundle)
    changed = change(manifest)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", json.dumps(manifest if changed is None else changed))
    return path


WRONG_MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "changed": (lambda manifest: manifest.update(tolerance=0.6), "they are of another bundle"),
    "other schema": (lambda manifest: manifest.update(schema="x"), "schema must be 'autocompress.bundle'"),
    "other version": (lambda manifest: manifest.update(version=2), "version must be 1, got 2"),
    "list": (lambda manifest: [1], "must be a JSON object"),
    "no rows": (lambda manifest: manifest.update(rows={}), "rows must be 1 to 20000, got 0"),
    "rows as a list": (lambda manifest: manifest.update(rows=[]), "rows must be a JSON object"),
    "one network": (lambda manifest: manifest["networks"].__delitem__(slice(1, None)), "0 or 2 to 1000"),
    "network twice": (
        lambda manifest: manifest["networks"].append(manifest["networks"][0]),
        "a list of different networks",
    ),
    "network of no blocks": (
        lambda manifest: manifest["networks"][0].update(blocks=[]),
        "none of them empty",
    ),
    "empty block": (lambda manifest: manifest["networks"][0]["blocks"].append([]), "none of them empty"),
    "network of another name": (
        lambda manifest: manifest["networks"][0].update(name="network 0"),
        "an item that was to be measured",
    ),
    "reference that is no row": (
        lambda manifest: manifest.update(reference="x"),
        "reference must be the key",
    ),
    "target": (lambda manifest: manifest["target"].update(threads=0), "target.threads must be an integer"),
    "negative tolerance": (lambda manifest: manifest.update(tolerance=-1), "tolerance must be at least 0"),
    "unknown key": (lambda manifest: manifest.update(other=1), "other is not known"),
    "missing key": (lambda manifest: manifest.__delitem__("seed"), "seed is missing"),
    "space": (lambda manifest: manifest.update(space={"name": "toy"}), "space.fingerprint is missing"),
}


@pytest.mark.parametrize("name", WRONG_MANIFESTS)
def test_wrong_manifests_are_refused(bundle: Path, samples: Path, tmp_path: Path, name: str) -> None:
    change, message = WRONG_MANIFESTS[name]
    with pytest.raises(TableError, match=message):
        import_samples(samples, rewritten(bundle, tmp_path / "wrong.zip", change))


def test_what_is_no_bundle_cannot_be_imported(
    bundle: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "wrong.zip"
    whole = bundle.read_bytes()
    for content in (b"", b"text", whole[:-1], whole[:5000], whole[:-2] + b"\1\0"):
        path.write_bytes(content)
        with pytest.raises(TableError, match="must be a whole zip file"):
            import_samples(samples, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other.json", "{}")
    with pytest.raises(TableError, match=r"has no manifest.json"):
        import_samples(samples, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", b"\xff")
    with pytest.raises(TableError, match="text in UTF-8"):
        import_samples(samples, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = b"hidden"
        archive.writestr("manifest.json", "{}")
    with pytest.raises(TableError, match="must be a whole zip file"):
        import_samples(samples, path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", b" " * 2_000_000)
    monkeypatch.setattr(bundle_module, "MAX_BYTES", 1_000_000)
    with pytest.raises(TableError, match="must have at most 1000000 bytes, unpacked"):
        import_samples(samples, path)
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(30):
            archive.writestr(str(index), "")
    monkeypatch.setattr(bundle_module, "MAX_FILES", 20)
    with pytest.raises(TableError, match="at most 20 files, got 30 or more"):
        import_samples(samples, path)


FUZZ = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def table_or_error(samples: Path, bundle: Path, folder: Path) -> None:
    """The law of the importer: a table that can be saved and read, or a TableError."""
    try:
        table = import_samples(samples, bundle)
    except TableError:
        return
    table.save(folder / "table.json")
    assert LatencyTable.load(folder / "table.json").rows == table.rows


@FUZZ
@given(content=st.binary(max_size=200))
def test_random_bytes_are_a_table_or_an_error(
    bundle: Path, samples: Path, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "random"
    path.write_bytes(content)
    table_or_error(path, bundle, tmp_path)
    table_or_error(samples, path, tmp_path)
    path.write_bytes(samples.read_bytes() + content + b"\n")
    table_or_error(path, bundle, tmp_path)


@FUZZ
@given(data=st.data())
def test_changed_bytes_are_a_table_or_an_error(
    bundle: Path, samples: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """Near both ends of the file, where a zip file has what is read."""
    small = tmp_path / "small.zip"
    if not small.exists():
        rewritten(bundle, small, lambda manifest: None)
    for original in (samples, small):
        content = bytearray(original.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(-150, 250))
            content[place % len(content)] = data.draw(st.integers(0, 255))
        path = tmp_path / "changed"
        path.write_bytes(content)
        table_or_error(*((path, bundle) if original == samples else (samples, path)), tmp_path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def mutated(value: Any, data: st.DataObject) -> Any:
    """Replace, remove or double one part of a JSON value, anywhere in it."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 4)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[data.draw(st.integers(0, len(keys) - 1))]
        changed = value.copy()
        match data.draw(st.sampled_from(["in", "in", "remove", "replace"])):
            case "in":
                changed[key] = mutated(value[key], data)
            case "remove":
                del changed[key]
            case _:
                changed[key] = data.draw(VALUES)
        return changed
    return data.draw(VALUES)


@FUZZ
@given(data=st.data())
def test_mutated_json_is_a_table_or_an_error(
    bundle: Path, samples: Path, tmp_path: Path, data: st.DataObject
) -> None:
    lines = samples.read_text().splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    lines[number] = json.dumps(mutated(json.loads(lines[number]), data))
    path = tmp_path / "mutated.jsonl"
    path.write_text("\n".join(lines) + "\n")
    table_or_error(path, bundle, tmp_path)
    # The samples then say the fingerprint of the mutated manifest, so that all of it is looked at.
    wrong = rewritten(bundle, tmp_path / "wrong.zip", lambda manifest: mutated(manifest, data))
    with zipfile.ZipFile(wrong) as archive:
        fingerprint = hashlib.sha256(archive.read("manifest.json")).hexdigest()
    path.write_text(with_header(bundle=fingerprint)(samples.read_text()))
    table_or_error(path, wrong, tmp_path)
