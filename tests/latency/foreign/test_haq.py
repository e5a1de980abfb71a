"""HAQ's array: index is bits minus one, widths do not wrap, nothing is unpickled."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from autocompress.errors import MissingRowError, TableError
from autocompress.latency.foreign.haq import read_haq


def saved(folder: Path, values: object) -> Path:
    np.save(folder / "haq.npy", np.asarray(values))
    return folder / "haq.npy"


def test_the_index_of_the_array_is_bits_minus_one(folder: Path) -> None:
    table = read_haq(folder / "haq.npy")
    assert table.unit == "cycles (assumed)"
    assert table.layers == ("0", "1")
    for layer in (0, 1):
        for weights in range(1, 9):
            for activations in range(1, 9):
                expected = 1000 * layer + 10 * weights + activations  # as the sample was made
                assert table.at(str(layer), weights, activations) == expected
    assert table.total([(8, 8), (1, 2)]) == 88 + 1012


def test_bits_below_one_and_above_eight_are_refused(folder: Path) -> None:
    table = read_haq(folder / "haq.npy")
    for bits in (-1, 0):
        with pytest.raises(TableError, match=rf"must be an integer in 1\.\.32, got {bits}"):
            table.at("0", 8, bits)
    with pytest.raises(MissingRowError, match="nearest row is layer '0' at 8 and 8"):
        table.at("0", 8, 9)


@pytest.mark.parametrize("dtype", ["<i4", ">i8", "<u2", "<f8", ">f4", "|u1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_type_of_number_and_order_is_read(tmp_path: Path, dtype: str, order: str) -> None:
    values = np.arange(128).reshape(2, 8, 8).astype(dtype, order=order)  # type: ignore[call-overload]
    table = read_haq(saved(tmp_path, values))
    assert table.at("1", 2, 3) == 64 + 8 + 2


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf"), 1e101])
def test_a_wrong_cost_is_named(tmp_path: Path, wrong: float) -> None:
    values = np.ones((2, 8, 8))
    values[1, 3, 4] = wrong
    with pytest.raises(
        TableError, match=r"layer 1 at 4 bits of weights and 5 of activations must be in 0\.\."
    ):
        read_haq(saved(tmp_path, values))


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 8, 1), (2, 7, 8), (2, 8, 9), (0, 8, 8)])
def test_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(TableError, match=r"must have shape \(layers, 8, 8\)|three dimensions"):
        read_haq(saved(tmp_path, np.ones(shape)))


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    values = np.full((2, 8, 8), Bomb(tmp_path / "exploded"), dtype=object)
    np.save(tmp_path / "haq.npy", values, allow_pickle=True)
    with pytest.raises(TableError, match="objects are never unpickled; got header"):
        read_haq(tmp_path / "haq.npy")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("dtype", ["c16", "?", "U3", "M8[s]", "i4,f4"])
def test_another_type_is_refused(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(TableError, match="must be an array of numbers"):
        read_haq(saved(tmp_path, np.zeros((2, 8, 8), dtype)))


def test_a_header_that_promises_more_than_the_file_has_is_refused(folder: Path) -> None:
    path = folder / "haq.npy"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(2, 8, 8)", b"(99999999, 8, 8)"))
    with pytest.raises(TableError, match=r"must be an array|must have 51199999488 bytes"):
        read_haq(path)
    for end in (-1, 128, 100, 9, 5):
        path.write_bytes(content[:end])
        with pytest.raises(TableError, match=r"haq\.npy: must"):
            read_haq(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(TableError, match=r"must have 1024 bytes of numbers .*, got 1025"):
        read_haq(path)


def test_a_folder_of_arrays_is_no_table(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, table=np.ones((2, 8, 8)))
    (tmp_path / "haq.npy").write_bytes(buffer.getvalue())
    with pytest.raises(TableError, match=r"must be a NumPy file of version 1\.0, got b'PK"):
        read_haq(tmp_path / "haq.npy")


@pytest.mark.slow
def test_the_published_table_has_the_published_sums(shared: Callable[[str], Path]) -> None:
    """ALGORITHMS A1.5: 39,624,933 at 8/8 and 15,716,150 at 4/4."""
    table = read_haq(shared("tables/haq_mobilenetv2_batch16_latency.npy"))
    assert len(table.layers) == 53
    assert table.total([(8, 8)] * 53) == 39_624_933
    assert table.total([(4, 4)] * 53) == 15_716_150


@pytest.mark.slow
def test_the_published_policy_costs_0_5965_of_8_bits(shared: Callable[[str], Path]) -> None:
    """With the activation that is not quantized charged at 8 bits; HAQ's own code wraps and gets 0.5914."""
    table = read_haq(shared("tables/haq_mobilenetv2_batch16_latency.npy"))
    policy = json.loads(shared("tables/haq_mobilenetv2_policy.json").read_text(encoding="utf-8"))["policy"]
    with pytest.raises(TableError, match="got -1; charge what is not quantized at a width"):
        table.total([(w, a) for w, a in policy])
    cost = table.total([(w, 8 if a == -1 else a) for w, a in policy])
    assert round(cost / table.total([(8, 8)] * 53), 4) == 0.5965
