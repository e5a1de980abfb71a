"""The reader on generated archives of the published format; the published ones in a slow test."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autocompress.cost import operation_cost
from autocompress.errors import DataError, SpaceError
from autocompress.evaluation.nas_bench_201_table import (
    ACCURACIES,
    EDGES,
    OPERATIONS,
    nas_bench_201_latencies,
    nas_bench_201_table,
)
from autocompress.space import Choice, SearchSpace
from search_spaces.nas_bench_201 import arch_str, nas_bench_201

PUBLISHED = Path(__file__).parents[3] / "shared/data/nas_bench_201"
# The published counts are of larger networks; those of the generated files are of these.
SPACE = nas_bench_201(channels=2, cells=1, resolution=4)
SMALLER = nas_bench_201(
    channels=2, cells=1, resolution=4, operations=("none", "nor_conv_3x3", "avg_pool_3x3")
)
Arrays = dict[str, Any]


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    """An archive with rows in a random order and random accuracies."""
    rng = np.random.default_rng(0)
    ops = np.array(list(itertools.product(range(5), repeat=6)), dtype=np.int8)[rng.permutation(5**6)]
    names = [[OPERATIONS[code] for code in row] for row in ops.tolist()]
    text = "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|"
    codes = np.array([[SPACE.choices[0].code(name) for name in row] for row in names], dtype=np.int64)
    accuracy = {name: rng.uniform(10, 95, len(ops)).astype(np.float32) for name in ACCURACIES}
    accuracy["c10_test_200ep_s2"][7] = np.nan
    return {
        "arch_str": np.array([text.format(*row) for row in names]),
        "ops": ops,
        "op_names": np.array(OPERATIONS),
        "edges": np.array(EDGES),
        "params": operation_cost(SPACE, "params").of(codes).astype(np.int32),
        "macs": operation_cost(SPACE, "macs").of(codes).astype(np.int64),
        **accuracy,
    }


def written(folder: Path, arrays: Arrays, **changes: Any) -> Path:
    np.savez(folder / "accuracy.npz", **{**arrays, **changes})
    return folder


def test_every_row_is_the_network_of_its_name(tmp_path: Path, arrays: Arrays) -> None:
    table = nas_bench_201_table(written(tmp_path, arrays), SPACE, macs_per_second=1e9)
    found = [arch_str(arch) for arch in SPACE.decode(table.codes)]
    assert found == arrays["arch_str"].tolist()
    assert set(table.columns) == {*ACCURACIES, "simulated_s"}
    for name in ACCURACIES:
        np.testing.assert_array_equal(table.columns[name], arrays[name].astype(np.float64))
    np.testing.assert_allclose(table.columns["simulated_s"], 3 * arrays["macs"] * 25_000 * 12 / 1e9)
    evaluator = table.evaluator(paid=False)
    assert not evaluator.paid
    assert evaluator(table.codes[11:12])["c10_val_12ep"][0] == arrays["c10_val_12ep"][11]
    assert np.isnan(evaluator(table.codes[7:8])["c10_test_200ep_s2"][0])


def test_a_space_of_fewer_operations_keeps_their_rows(tmp_path: Path, arrays: Arrays) -> None:
    table = nas_bench_201_table(written(tmp_path, arrays), SMALLER)
    assert len(table.codes) == SMALLER.size == 3**6
    names = [arch_str(arch) for arch in SMALLER.decode(table.codes)]
    assert names == arrays["arch_str"][table.kept].tolist()
    np.testing.assert_array_equal(table.columns["c10_val_12ep"], arrays["c10_val_12ep"][table.kept])


def test_latencies_are_costs_by_device(tmp_path: Path, arrays: Arrays) -> None:
    table = nas_bench_201_table(written(tmp_path, arrays), SMALLER)
    milliseconds = np.random.default_rng(1).exponential(size=(5**6, 2))
    np.savez(tmp_path / "latency.npz", latency_ms=milliseconds, devices=np.array(["one", "two"]))
    costs = nas_bench_201_latencies(tmp_path, table)
    assert list(costs) == ["one", "two"]
    for column, cost in enumerate(costs.values()):
        assert cost.metric == "latency_ms"
        np.testing.assert_array_equal(cost.of(table.codes), milliseconds[table.kept, column])
        assert cost.minimum == milliseconds[table.kept, column].min()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latency_ms": np.ones((5**6, 1))}, r"must have shape \(15625, 2\), a column for each of"),
        ({"devices": np.array(["one", "one"])}, r"must have shape \(15625, 2\)"),
        ({"latency_ms": np.zeros((5**6, 2))}, "latency_ms of one must be positive, got 0"),
        ({"latency_ms": np.full((5**6, 2), np.nan)}, "latency_ms of one must be positive, got nan"),
        ({"latency_ms": np.full((5**6, 2), np.inf)}, "latency_ms of one must be finite"),
        ({"latency_ms": np.full((5**6, 2), "1")}, "latency_ms of one must be numbers"),
    ],
)
def test_damaged_latencies_are_refused(tmp_path: Path, arrays: Arrays, changes: Arrays, message: str) -> None:
    table = nas_bench_201_table(written(tmp_path, arrays), SMALLER)
    whole = {"latency_ms": np.ones((5**6, 2)), "devices": np.array(["one", "two"])}
    np.savez(tmp_path / "latency.npz", **{**whole, **changes})
    with pytest.raises(DataError, match=message):
        nas_bench_201_latencies(tmp_path, table)


def changed(arrays: Arrays, name: str, value: Any, at: Any = 3) -> Arrays:
    column = arrays[name].copy()
    column[at] = value
    return {name: column}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("op_names", "conv", "op_names must be"),
        ("edges", "3->0", "edges must be"),
        ("ops", 5, r"ops must be integers 0\.\.4 of shape \(15625, 6\), got int8"),
        ("ops", -1, r"ops must be integers 0\.\.4"),
        ("ops", 0, "ops must hold every architecture once; some stand there twice"),
        ("arch_str", "|none~0|", r"row 3 is called '\|none~0\|', but its ops are '\|"),
        ("c10_val_12ep", 101.0, r"c10_val_12ep must be in percent, 0\.\.100, got 101"),
        ("c100_val_12ep", -1.0, "c100_val_12ep must be in percent"),
        ("c10_test_200ep_s0", np.inf, "c10_test_200ep_s0 must be finite"),
        ("macs", 1, "macs of row 3 are 1 in the table and"),
        ("params", 1, "params of row 3 are 1 in the table and"),
    ],
)
def test_damaged_archives_are_refused(
    tmp_path: Path, arrays: Arrays, name: str, value: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        nas_bench_201_table(written(tmp_path, arrays, **changed(arrays, name, value)), SPACE)


@pytest.mark.parametrize("name", ["ops", "arch_str", "macs", "c10_val_12ep"])
def test_arrays_of_other_lengths_are_refused(tmp_path: Path, arrays: Arrays, name: str) -> None:
    with pytest.raises(DataError, match=f"{name} must (be|have)"):
        nas_bench_201_table(written(tmp_path, arrays, **{name: arrays[name][:-1]}), SPACE)


def test_what_is_no_archive_is_refused(tmp_path: Path, arrays: Arrays) -> None:
    with pytest.raises(DataError, match=r"accuracy\.npz cannot be read"):
        nas_bench_201_table(tmp_path, SPACE)
    path = written(tmp_path, arrays) / "accuracy.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read as a numpy archive"):
        nas_bench_201_table(tmp_path, SPACE)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read as a numpy archive"):
        nas_bench_201_table(tmp_path, SPACE)
    np.savez(path, **{name: values for name, values in arrays.items() if name != "macs"})
    with pytest.raises(DataError, match="lacks macs; it has arch_str"):
        nas_bench_201_table(tmp_path, SPACE)
    with path.open("wb") as file:
        np.save(file, arrays["ops"])
    with pytest.raises(DataError, match="cannot be read as a numpy archive"):
        nas_bench_201_table(tmp_path, SPACE)
    np.savez(path, allow_pickle=True, **{**arrays, "ops": np.array([object()])})
    with pytest.raises(DataError, match="cannot be read as a numpy archive"):
        nas_bench_201_table(tmp_path, SPACE)


def test_other_spaces_are_refused(tmp_path: Path, arrays: Arrays) -> None:
    written(tmp_path, arrays)
    with pytest.raises(DataError, match=r"the table is of nas_bench_201\(channels=16, cells=5, classes=10\)"):
        nas_bench_201_table(tmp_path, nas_bench_201(channels=4, cells=1, resolution=4))
    with pytest.raises(DataError, match=r"the choices of the space must be edge_0_1, .*, got a"):
        nas_bench_201_table(tmp_path, SearchSpace("other", (Choice("a", (1,)),), ()))
    choices = tuple(Choice(choice.name, ("none", "max_pool")) for choice in SPACE.choices)
    with pytest.raises(SpaceError, match="has 64 networks, of which the table has 1"):
        nas_bench_201_table(tmp_path, SearchSpace("other", choices, ()))


@pytest.mark.slow
def test_the_published_archives_have_the_known_optima() -> None:
    """Optima: ../shared/data/README.md; HW-NAS-Bench and HELP have eight devices between them."""
    if not PUBLISHED.is_dir():
        pytest.skip(f"{PUBLISHED} is absent: it holds the published accuracies and latencies")
    table = nas_bench_201_table(PUBLISHED, nas_bench_201())
    optimum = table.evaluator().optimum
    assert optimum("c10_val_200ep")[1] == pytest.approx(91.607, abs=5e-4)
    assert optimum("c10_test_200ep")[1] == pytest.approx(94.373, abs=5e-4)
    assert optimum("c100_test_200ep_nats")[1] == pytest.approx(73.513, abs=5e-4)
    costs = nas_bench_201_latencies(PUBLISHED, table)
    assert len(costs) == 8
    macs = operation_cost(table.space, "macs").of(table.codes)
    for device, cost in costs.items():
        # The rows of both files have one order: otherwise there would be no correlation.
        assert np.corrcoef(cost.of(table.codes), macs)[0, 1] > 0.6, device
