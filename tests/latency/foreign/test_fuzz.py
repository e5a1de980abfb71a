"""Whatever the bytes of a file are, a reader gives a valid table or a TableError that names the file."""

import gzip
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autocompress.errors import TableError
from autocompress.latency.foreign.bitfusion import read_bitfusion
from autocompress.latency.foreign.haq import read_haq
from autocompress.latency.foreign.hawq import read_hawq
from autocompress.latency.foreign.hw_nas_bench import read_hw_nas_bench
from autocompress.latency.foreign.ofa import read_ofa
from autocompress.latency.foreign.plain_csv import read_plain_csv

# For each file, how it is read and every cost that is in the table. Both files of HW-NAS-Bench are damaged.
READERS: dict[str, Callable[[Path], Iterable[float]]] = {
    "ofa.json": lambda path: [row.ms for row in read_ofa(path).rows.values()],
    "proxyless.yaml": lambda path: [row.ms for row in read_ofa(path).rows.values()],
    "haq.npy": lambda path: read_haq(path).rows.values(),
    "hawq.json": lambda path: [
        cost
        for table in (read_hawq(path).sensitivity, read_hawq(path).latency, read_hawq(path).bops)
        for cost in table.rows.values()
    ],
    "blocks.csv": lambda path: _additive(path, path.parent / "whole_base.json"),
    "base.json": lambda path: _additive(path.parent / "whole_blocks.csv", path),
    "bitfusion.csv": lambda path: read_bitfusion(path).latency_ms.rows.values(),
    "plain.csv": lambda path: [row.ms for row in read_plain_csv(path).values()],
}
# What tends to break readers, put in somewhere.
SNIPPETS = (
    *(b"nan", b"-1", b"1e999", b"1" * 400, b"0", b"\0", b"\xff", b"\r", b"\n", b'"', b"'", b","),
    *(b"{", b"}", b"[" * 50, b"]", b": ", b"&a ", b"*a", b"!!python/object/apply:os.system ", b"<<: "),
    *(b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"--- ", b"%YAML 1.1\n---\n", b"# ", b"? ", b"- ", b"| \n", b"null"),
    *(b"'|O'", b"'<f8'", b"(2, 8, 8)", b"True", b"__import__('os')", b"\\ud800", b"NaN", b"\\x00"),
)


def _additive(blocks: Path, base: Path) -> list[float]:
    table = read_hw_nas_bench(blocks, base, layers=2)
    return [table.cost(device).minimum for device in table.delta_ms]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, samples: dict[str, bytes]) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "whole_blocks.csv").write_bytes(samples["blocks.csv"])
    (folder / "whole_base.json").write_bytes(samples["base.json"])
    return folder


def check(place: Path, name: str, content: bytes) -> bool:
    """Read `content` as the file of that name; return whether it is a table."""
    path = place / name
    path.write_bytes(content)
    said = ""
    try:
        costs = list(READERS[name.removesuffix(".gz")](path))
    except TableError as error:
        said = str(error)
        costs = []
    if not costs:
        assert f"{name}: " in said
        return False
    assert all(type(cost) is float and math.isfinite(cost) and cost >= 0 for cost in costs)
    return True


edits = st.lists(
    st.tuples(
        st.sampled_from(["delete", "insert", "replace", "cut", "double", "snippet"]),
        st.floats(0, 1),
        st.integers(1, 30),
        st.binary(min_size=1, max_size=4),
        st.sampled_from(SNIPPETS),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, changes: list[tuple[str, float, int, bytes, bytes]]) -> bytes:
    for kind, where, length, some, snippet in changes:
        at = int(where * len(content))
        rest = content[at + length :]
        match kind:
            case "delete":
                content = content[:at] + rest
            case "insert":
                content = content[:at] + some + content[at:]
            case "replace":
                content = content[:at] + snippet + rest
            case "cut":
                content = content[:at]
            case "double":
                content = content[: at + length] + content[at:]
            case "snippet":
                content = content[:at] + snippet + content[at:]
    return content


@pytest.mark.parametrize("name", READERS)
def test_the_samples_themselves_are_tables(place: Path, samples: dict[str, bytes], name: str) -> None:
    assert check(place, name, samples[name])


@pytest.mark.parametrize("name", READERS)
@given(content=st.binary(max_size=200))
@example(content=b"")
@example(content=b"\x93NUMPY\x01\x00")
@settings(max_examples=150)
def test_random_bytes_are_no_table(place: Path, name: str, content: bytes) -> None:
    assert not check(place, name, content)


@pytest.mark.parametrize("name", READERS)
@given(changes=edits)
@settings(max_examples=300)
def test_a_damaged_file_is_a_table_or_refused(
    place: Path, samples: dict[str, bytes], name: str, changes: list[tuple[str, float, int, bytes, bytes]]
) -> None:
    check(place, name, edited(samples[name], changes))


@pytest.mark.parametrize("name", ["ofa.json.gz", "bitfusion.csv.gz"])
@given(changes=edits, packed=st.booleans())
@settings(max_examples=150)
def test_a_damaged_packed_file_is_a_table_or_refused(
    place: Path,
    samples: dict[str, bytes],
    name: str,
    changes: list[tuple[str, float, int, bytes, bytes]],
    packed: bool,
) -> None:
    plain = samples[name.removesuffix(".gz")]
    content = edited(gzip.compress(plain), changes) if packed else gzip.compress(edited(plain, changes))
    check(place, name, content)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("name", ["ofa.json", "proxyless.yaml", "hawq.json", "base.json"])
@given(data=st.data(), value=values)
@settings(max_examples=200)
def test_any_value_in_any_place_is_read_or_refused(
    place: Path, samples: dict[str, bytes], name: str, data: st.DataObject, value: object
) -> None:
    source = samples["ofa.json"] if name == "proxyless.yaml" else samples[name]
    tree = json.loads(source)
    parent, steps = tree, data.draw(st.integers(0, 2))
    for _ in range(steps):
        inner = [child for child in _children(parent) if isinstance(child, dict | list) and child]
        if inner:
            parent = data.draw(st.sampled_from(inner))
    if isinstance(parent, dict):
        parent[data.draw(st.sampled_from(sorted(parent)) | st.text(max_size=4))] = value
    else:
        parent[data.draw(st.integers(0, len(parent) - 1))] = value
    check(place, name, f"{json.dumps(tree)}\n".encode())


def _children(parent: dict[str, object] | list[object]) -> list[object]:
    return list(parent.values() if isinstance(parent, dict) else parent)
