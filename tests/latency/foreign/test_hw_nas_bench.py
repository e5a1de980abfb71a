"""HW-NAS-Bench's latencies: the base and what each operation adds."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from autocompress.errors import TableError
from autocompress.latency.foreign.hw_nas_bench import HwNasBench, read_hw_nas_bench

Change = Callable[[str, str, str], Path]


def read(folder: Path) -> HwNasBench:
    return read_hw_nas_bench(folder / "blocks.csv", folder / "base.json", layers=2)


def test_a_network_costs_the_base_and_what_its_operations_add(folder: Path) -> None:
    table = read(folder)
    assert table.operations == ("k3_e1", "k5_e1", "skip")
    cost = table.cost("raspi4")
    assert cost.metric == "latency_ms"
    first, second = (0.595037342, 1.5, 0.0), (0.25, 0.75, 0.0)
    for a, b in itertools.product(range(3), range(3)):
        assert cost.of(np.array([[a, b]]))[0] == pytest.approx(7.5 + first[a] + second[b])
    assert cost.minimum == 7.5  # all skipped
    assert cost.maximum == 7.5 + 1.5 + 0.75
    assert table.cost("fpga").maximum == 2.5 + 8.5


def test_the_space_has_the_codes_of_the_cost(folder: Path) -> None:
    table = read(folder)
    space = table.space()
    assert space.size == 9
    assert space.counts.tolist() == list(table.cost("fpga").counts)
    best = space.decode(table.cost("raspi4").argmin())[0]
    assert dict(best.settings) == {"layer0": "skip", "layer1": "skip"}


def test_costs_do_not_share_memory_with_the_table(folder: Path) -> None:
    table = read(folder)
    table.cost("fpga").factors[0].values[:] = 99
    assert table.cost("fpga").maximum == 2.5 + 8.5


def test_an_unknown_device_is_refused(folder: Path) -> None:
    with pytest.raises(TableError, match="device must be one of raspi4, fpga, got 'pixel9'"):
        read(folder).cost("pixel9")


@pytest.mark.parametrize(
    ("name", "old", "new", "match"),
    [
        ("blocks.csv", "0.75,8.5", "-0.75,8.5", "line 6, column raspi4_delta_ms_vs_skip must be at least 0"),
        ("blocks.csv", "0.75,8.5", "nan,8.5", "raspi4_delta_ms_vs_skip must be a finite number, got 'nan'"),
        ("blocks.csv", "0.75,8.5", "1e999,8.5", "must be a finite number, got inf"),
        ("blocks.csv", "0.75,8.5", "0.75", "line 6 must have 6 values, got 5"),
        ("blocks.csv", "raspi4_delta_ms", "raspi4_delta_us", "line 1 must end with columns DEVICE_delta_ms"),
        ("blocks.csv", "op_index", "index", "line 1 must be layer,op_index,op,key"),
        ("blocks.csv", "raspi4_delta", "fpga_delta", "name every column once"),
        ("blocks.csv", "1,0,k3_e1", "0,0,k3_e1", "layer 0 must have each operation once"),
        ("blocks.csv", "1,0,k3_e1", "2,0,k3_e1", "line 5 must be layer 1, op_index 0, op k3_e1"),
        ("blocks.csv", "1,1,k5_e1", "1,1,k7_e1", "line 6 must be layer 1, op_index 1, op k5_e1"),
        (
            "blocks.csv",
            "1,2,skip,Skip_H32_W32_Cin16_Cout24_stride1,0.0,0.0\n",
            "",
            "must have 2 layers of 3 operations, got 5 rows: it is truncated",
        ),
        ("blocks.csv", "Cout24_stride1,0.0,0.0", "Cout24_stride1,0.5,0.0", "difference of skip to itself"),
        ("blocks.csv", "stride1,0.0,0.0\n1,0", "stride1,0.0,0.0\n\n1,0", "line 5 must have 6 values, got 0"),
        ("base.json", '"fpga": 0.0', '"fpga": -1', "fpga must be at least 0"),
        (
            "base.json",
            '"fpga"',
            '"eyeriss"',
            r"must have the devices of .*blocks\.csv: \['fpga', 'raspi4'\], got \['eyeriss', 'raspi4",
        ),
        (
            "base.json",
            '"fpga": 0.0',
            '"fpga": 0.0, "eyeriss": 1',
            r"must have the devices of .*got \['eyeriss', 'fpga', 'raspi4'\]",
        ),
    ],
)
def test_a_wrong_file_is_refused(changed: Change, name: str, old: str, new: str, match: str) -> None:
    path = changed(name, old, new)
    with pytest.raises(TableError, match=rf"HW-NAS-Bench .*{name}: .*{match}.*docs/foreign-tables\.md"):
        read(path.parent)


def test_a_table_without_devices_is_refused(folder: Path) -> None:
    (folder / "blocks.csv").write_text("layer,op_index,op,key\n0,0,skip,Skip\n", encoding="utf-8")
    with pytest.raises(TableError, match="line 1 must end with columns DEVICE_delta_ms_vs_skip, got"):
        read(folder)


def test_a_table_that_was_cut_is_refused(folder: Path) -> None:
    text = (folder / "blocks.csv").read_text(encoding="utf-8")
    for end in range(len(text)):
        (folder / "blocks.csv").write_text(text[:end], encoding="utf-8")
        with pytest.raises(TableError, match="HW-NAS-Bench table of blocks"):
            read(folder)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["raspi4", "pixel3", "fpga"])
def test_the_published_table_is_additive_on_three_devices(shared: Callable[[str], Path], device: str) -> None:
    """5,000 architectures that HELP lists, to the rounding of nine digits."""
    table = read_hw_nas_bench(
        shared("fbnet/block_latency_cifar100.csv"), shared("fbnet/base_latency_cifar100.json")
    )
    assert list(table.delta_ms) == ["raspi4", "pixel3", "eyeriss", "fpga"]
    with np.load(shared("fbnet/latency_5000.npz"), allow_pickle=False) as published:
        codes = published["op_idx"].astype(np.int64)
        assert tuple(published["op_names"].tolist()) == table.operations
        measured = published["latency_ms"][:, published["devices"].tolist().index(device)]
    table.space().validate(codes)
    assert codes.shape == (5000, 22)
    np.testing.assert_allclose(table.cost(device).of(codes), measured, rtol=0, atol=1e-8)
