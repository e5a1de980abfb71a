"""ProxylessNAS's and once-for-all's tables: keys of blocks, both meanings of `expand`, pooled resolutions."""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from autocompress.cost import compile_cost
from autocompress.errors import MissingRowError, TableError
from autocompress.latency.foreign.ofa import block_table, ofa_price, read_ofa
from autocompress.latency.foreign.ofa_keys import meaning_of_expand, ofa_keys
from autocompress.latency.foreign.rows import latency_table
from autocompress.latency.target import Target
from autocompress.ops import Activation, Add, Conv2d, GlobalAvgPool, Linear, Ops, SqueezeExcite, block_key
from search_spaces.mobilenet_v3 import mobilenet_v3

Change = Callable[[str, str, str], Path]

STEM = (Conv2d(3, 24, 224, 224, kernel=3, stride=2, activation="hard_swish"),)
FIRST = (
    Conv2d(24, 24, 112, 112, kernel=3, groups=24, activation="relu"),
    Conv2d(24, 24, 112, 112),
    Add(24, 112, 112),
)


def inverted(
    inputs: int,
    outputs: int,
    middle: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    activation: Activation = "relu6",
) -> Ops:
    after = 56 // stride
    return (
        Conv2d(inputs, middle, 56, 56, activation=activation),
        Conv2d(middle, middle, 56, 56, kernel=kernel, stride=stride, groups=middle, activation=activation),
        Conv2d(middle, outputs, after, after),
    )


ATTENTIVE = inverted(32, 48, 192, kernel=5, stride=2, activation="hard_swish")
ATTENTIVE = (*ATTENTIVE[:2], SqueezeExcite(192, 28, 28, 48), ATTENTIVE[2])


# Keys --------------------------------------------------------------------------------------------------


def test_the_keys_of_a_block_are_those_of_the_published_table() -> None:
    """Row names of the Note10 table at 224 pixels (once-for-all)."""
    size = 7
    head = (
        Conv2d(192, 1152, size, size, activation="hard_swish"),
        GlobalAvgPool(1152, size, size),
        Conv2d(1152, 1536, 1, 1, norm=False, activation="hard_swish"),
        Linear(1536, 1000),
    )
    assert [ofa_keys(ops, expand="channels", attention=True) for ops in (STEM, FIRST, head)] == [
        ["Conv-input:224x224x3-output:112x112x24"],
        ["expanded_conv-input:112x112x24-output:112x112x24-expand:24-kernel:3-stride:1-idskip:1-se:0-hs:0"],
        [
            "Conv_1-input:7x7x192-output:7x7x1152",
            "AvgPool2D-input:7x7x1152-output:1x1x1152",
            "Conv_2-input:1x1x1152-output:1x1x1536",
            "Logits-input:1x1x1536-output:1000",
        ],
    ]
    assert ofa_keys(ATTENTIVE, expand="channels", attention=True) == [
        "expanded_conv-input:56x56x32-output:28x28x48-expand:192-kernel:5-stride:2-idskip:0-se:1-hs:1"
    ]


def test_the_keys_of_proxylessnas_have_the_ratio_and_no_attention() -> None:
    """Source of the forms: ProxylessNAS's latency estimator."""
    ops = (*inverted(24, 24, 144), Add(24, 56, 56))
    assert ofa_keys(ops, expand="ratio", attention=False) == [
        "expanded_conv-input:56x56x24-output:56x56x24-expand:6-kernel:3-stride:1-idskip:1"
    ]
    assert ofa_keys(FIRST, expand="ratio", attention=False) == [
        "expanded_conv-input:112x112x24-output:112x112x24-expand:1-kernel:3-stride:1-idskip:1"
    ]
    head = (Conv2d(24, 48, 7, 7, activation="relu6"), GlobalAvgPool(48, 7, 7), Linear(48, 10))
    assert ofa_keys(head, expand="ratio", attention=False) == [
        "Conv_1-input:7x7x24-output:7x7x48",
        "Logits-input:7x7x48-output:10",
    ]


@pytest.mark.parametrize(
    ("ops", "match"),
    [
        ((), "no stem, inverted residual or head"),
        ((Linear(3, 4),), "no stem, inverted residual or head"),
        ((Conv2d(8, 8, 8, 8, kernel=3), Conv2d(8, 8, 8, 8)), "not expansion, depthwise"),
        (inverted(24, 24, 144)[:2], "not expansion, depthwise convolution and linear projection"),
        ((*inverted(24, 24, 144)[:2], Conv2d(144, 24, 56, 56, activation="relu")), "linear projection"),
        (inverted(24, 24, 144, activation="silu"), "activation is not one of relu, relu6, hard_swish"),
        (
            (Conv2d(24, 144, 56, 56, activation="relu"), *inverted(24, 24, 144)[1:]),
            "its activation is not one",
        ),
        (ATTENTIVE, "do not say squeeze-excite and hard swish"),
        (inverted(24, 24, 144, activation="hard_swish"), "do not say squeeze-excite and hard swish"),
        (inverted(24, 24, 132), "132 is no whole multiple of 24 channels"),
    ],
)
def test_a_block_that_no_key_says_is_refused(ops: Ops, match: str) -> None:
    with pytest.raises(TableError, match=match):
        ofa_keys(ops, expand="ratio", attention=False)


# expand --------------------------------------------------------------------------------------------------


def key(channels: int, expand: int) -> str:
    return (
        f"expanded_conv-input:8x8x{channels}-output:8x8x{channels}-expand:{expand}-kernel:3-stride:1-idskip:1"
    )


@pytest.mark.parametrize(
    ("pairs", "meaning"),
    [
        ([(16, 3), (24, 6)], "ratio"),
        ([(16, 1)], "ratio"),
        ([(16, 48), (24, 24)], "channels"),
        ([(4, 16), (4, 4)], "channels"),
        ([], None),
        ([(3, 3), (3, 6)], None),  # both meanings are possible
        ([(16, 3), (16, 96)], None),  # neither is
        ([(16, 12)], None),
    ],
)
def test_expand_is_decided_only_where_one_meaning_is_possible(
    pairs: list[tuple[int, int]], meaning: str | None
) -> None:
    assert meaning_of_expand(key(*pair) for pair in pairs) == meaning


def test_an_unclear_expand_is_refused_until_the_caller_says(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({key(3, 6): {"mean": 1}}), encoding="utf-8")
    with pytest.raises(TableError, match="not clear from its numbers; say expand='ratio'"):
        read_ofa(path)
    assert read_ofa(path, expand="channels").expand == "channels"
    with pytest.raises(TableError, match="expand must be one of ratio, channels, got 'width'"):
        read_ofa(path, expand="width")  # type: ignore[arg-type]


# Files ---------------------------------------------------------------------------------------------------


def test_times_are_means_in_ms_and_spreads_of_a_normal_distribution(folder: Path) -> None:
    table = read_ofa(folder / "ofa.json")
    assert (table.expand, table.attention) == ("channels", True)
    assert table.price(STEM) == 0.994418
    row = table.row(STEM)
    assert row.count == 500
    # Interquartile range of a normal distribution: 2 * 0.67449 deviations.
    assert row.spread_ms == pytest.approx(2 * 0.67449 * 0.01726798413249215, rel=1e-4)
    assert table.row(FIRST).spread_ms is None
    assert ofa_price(folder / "ofa.json", FIRST) == 1.75


def test_a_table_of_proxylessnas_has_variances(folder: Path) -> None:
    table = read_ofa(folder / "proxyless.yaml")
    assert (table.expand, table.attention) == ("ratio", False)
    stride = (
        Conv2d(16, 48, 112, 112, activation="relu6"),
        Conv2d(48, 48, 112, 112, kernel=5, stride=2, groups=48, activation="relu6"),
        Conv2d(48, 24, 56, 56),
    )
    row = table.row(stride)
    assert (row.ms, row.count) == (2.5, 10)
    assert row.spread_ms == pytest.approx(2 * 0.67449 * 0.2, rel=1e-4)
    assert table.price((*inverted(24, 24, 144), Add(24, 56, 56))) == 1.25
    head = (Conv2d(24, 48, 7, 7, activation="relu6"), GlobalAvgPool(48, 7, 7), Linear(48, 10))
    assert table.price(head) == 0.5 + 0.25


def test_json_yaml_and_packed_files_are_the_same_table(folder: Path) -> None:
    rows = yaml.safe_load((folder / "proxyless.yaml").read_text(encoding="utf-8"))
    expected = read_ofa(folder / "proxyless.yaml")
    for name, text in (("t.json", json.dumps(rows)), ("t.yml", yaml.safe_dump(rows))):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        for path in (folder / name, folder / f"{name}.gz"):
            assert read_ofa(path).rows == expected.rows


def test_runs_of_one_key_at_several_resolutions_are_pooled(tmp_path: Path) -> None:
    key = "Conv_2-input:1x1x8-output:1x1x8"
    tables = {
        "160": {key: {"mean": 1.0, "std": 0.0, "count": 30}, "Conv-input:9x9x3-output:9x9x8": {"mean": 7}},
        "224": {key: {"mean": 2.0, "std": 0.0, "count": 10}},
    }
    path = tmp_path / "table.json"
    path.write_text(json.dumps(tables), encoding="utf-8")
    row = read_ofa(path, expand="channels").rows[key]
    assert (row.ms, row.count) == (1.25, 40)
    # Thirty runs of 1 and ten of 2 have a variance of 0.75 * 0.25.
    assert row.spread_ms == pytest.approx(1.349 * (0.75 * 0.25) ** 0.5)
    assert read_ofa(path, expand="channels", resolution=224).rows[key].ms == 2
    assert len(read_ofa(path, expand="channels").rows) == 2
    with pytest.raises(TableError, match=r"resolution must be one of \[160, 224\], got 192"):
        read_ofa(path, expand="channels", resolution=192)


def test_a_missing_row_is_named_with_the_nearest(folder: Path) -> None:
    table = read_ofa(folder / "ofa.json")
    match = "no row 'Conv-input:160x160x3-output:80x80x24'; the nearest row is 'Conv-input:224x224x3-"
    with pytest.raises(MissingRowError, match=match):
        table.price((Conv2d(3, 24, 160, 160, kernel=3, stride=2),))


STEM_KEY = '"Conv-input:224x224x3-output:112x112x24"'


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"mean": 1.75', '"mean": -1.75', "mean must be at least 0, got -1.75"),
        ('"mean": 1.75', '"mean": NaN', "finite, got NaN"),
        ('"mean": 1.75', '"mean": 1e999', "mean must be a finite number, got inf"),
        ('"mean": 1.75', '"mean": true', "mean must be a finite number, got True"),
        ('"mean": 1.75', '"mean": "1.75 ms"', "mean must be a finite number, got '1.75 ms'"),
        ('"mean": 1.75', '"median": 1.75', "mean is missing"),
        ('"mean": 1.75', '"mean": 1.75, "mean_us": 1750', "mean_us is not known; allowed: mean, std, var"),
        ('"mean": 1.75', '"mean": 1.75, "std": 1, "var": 1', "must have std or var, got both"),
        ('"mean": 1.75', '"mean": 1.75, "std": -1', "std must be at least 0"),
        ('"count": 54', '"count": 0', "count must be an integer >= 1, got 0"),
        ('"count": 54', '"count": 54.5', "count must be an integer >= 1, got 54.5"),
        (STEM_KEY, '"Conv"', "a key must be TYPE-input:HxWxC-output:HxWxC"),
        (STEM_KEY, '"expanded_conv-input:8x8x3-output:8x8x3"', "a key must be TYPE"),
        (STEM_KEY, f'"{key(8, 8)}"', "either all expanded_conv keys or none must end in -se:-hs:"),
        (f"{STEM_KEY}: {{", f"{STEM_KEY}: 1, {STEM_KEY}: {{", "stands twice"),
    ],
)
def test_a_wrong_file_is_refused(changed: Change, old: str, new: str, match: str) -> None:
    path = changed("ofa.json", old, new)
    with pytest.raises(TableError, match=rf"OFA table .*ofa\.json: .*{match}.*docs/foreign-tables\.md"):
        read_ofa(path)


@pytest.mark.parametrize("text", ["{}", "[]", "1", '{"224": {}}', '{"224": 1}', '{"224": {}, "0224": {}}'])
def test_a_file_without_rows_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TableError, match=r"must be a JSON object|at least one row|stands twice"):
        read_ofa(path)


def test_a_resolution_that_stands_twice_is_refused(tmp_path: Path) -> None:
    rows = {"Conv-input:9x9x3-output:9x9x8": {"mean": 7}}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"224": rows, "0224": rows}), encoding="utf-8")
    with pytest.raises(TableError, match="resolution 224 stands twice; remove one"):
        read_ofa(path, expand="channels")


def test_yaml_that_was_cut_within_a_number_is_refused(folder: Path) -> None:
    text = (folder / "proxyless.yaml").read_text(encoding="utf-8")
    cut = text[: text.index("mean: 2.5") + len("mean: 2")]
    (folder / "proxyless.yaml").write_text(cut, encoding="utf-8")
    assert yaml.safe_load(cut)  # it is YAML, with another time
    with pytest.raises(TableError, match=r"end of a line, got .*: it may be truncated"):
        read_ofa(folder / "proxyless.yaml")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"its name must end in \.json, \.yaml, \.yml"):
        read_ofa(tmp_path / "table.pkl")


# Spaces --------------------------------------------------------------------------------------------------


def published_keys(resolution: int) -> Iterator[str]:
    """The keys of width 1.2 as once-for-all's network classes name them: a second implementation."""
    half = (resolution + 1) // 2
    yield f"Conv-input:{resolution}x{resolution}x3-output:{half}x{half}x24"
    first = f"expanded_conv-input:{half}x{half}x24-output:{half}x{half}x24-expand:24"
    yield f"{first}-kernel:3-stride:1-idskip:1-se:0-hs:0"
    size, inputs = half, 24
    stages = ((32, 2, 0, 0), (48, 2, 1, 0), (96, 2, 0, 1), (136, 1, 1, 1), (192, 2, 1, 1))
    for outputs, stride, attention, hard_swish in stages:
        after = (size + stride - 1) // stride
        for start, pixels, step in ((inputs, size, stride), (outputs, after, 1)):
            for ratio in (3, 4, 6):
                for kernel in (3, 5, 7):
                    yield (
                        f"expanded_conv-input:{pixels}x{pixels}x{start}-output:{after}x{after}x{outputs}"
                        f"-expand:{start * ratio}-kernel:{kernel}-stride:{step}"
                        f"-idskip:{int(start == outputs)}-se:{attention}-hs:{hard_swish}"
                    )
        size, inputs = after, outputs
    yield f"Conv_1-input:{size}x{size}x192-output:{size}x{size}x1152"
    yield f"AvgPool2D-input:{size}x{size}x1152-output:1x1x1152"
    yield "Conv_2-input:1x1x1152-output:1x1x1536"
    yield "Logits-input:1x1x1536-output:1000"


def test_every_block_of_the_space_has_its_rows(tmp_path: Path) -> None:
    """Row k has k + 1 ms: a block says which row it is from."""
    keys = list(published_keys(224))
    assert len(keys) == len(set(keys)) == 96  # as the published table
    times = {key: float(number + 1) for number, key in enumerate(keys)}
    path = tmp_path / "table.json"
    rows = {key: {"mean": ms, "std": 0.1, "count": 9} for key, ms in times.items()}
    path.write_text(json.dumps(rows), encoding="utf-8")
    table = read_ofa(path)
    space = mobilenet_v3(width=1.2)
    blocks = block_table(space, table)
    # Four rows make the head; the other 92 are a block each.
    assert sorted(row.ms for row in blocks.values())[:-1] == list(map(float, range(1, 93)))
    assert max(row.ms for row in blocks.values()) == 93 + 94 + 95 + 96
    cost = compile_cost(space, table.price, "latency_ms")
    codes = space.sample(20, np.random.default_rng(0))
    by_hand = [sum(blocks[block_key(ops)].ms for _, ops in space.operations(row)) for row in codes]
    np.testing.assert_allclose(cost.of(codes), by_hand)
    ours = latency_table(blocks, Target("phone", ""), source="made up", device={})
    np.testing.assert_allclose(ours.cost(space).of(codes), by_hand)
    del rows[keys[40]]
    path.write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(MissingRowError, match=keys[40]):
        block_table(space, read_ofa(path))


def test_the_python_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {key: {"mean": 1.0, "std": 0.1, "count": 9} for key in published_keys(224)}
    (tmp_path / "note10.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[3] / "docs" / "foreign-tables.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, page.name, "exec"), names)
    # Stem, first block, five stages of two to four blocks, and four rows of the head.
    assert (names["milliseconds"].minimum, names["milliseconds"].maximum) == (2 + 10 + 4, 2 + 20 + 4)


@pytest.mark.slow
def test_the_published_table_prices_the_space_it_was_made_for(shared: Callable[[str], Path]) -> None:
    path = shared("tables/ofa_note10_latency.json.gz")
    table = read_ofa(path)
    assert (table.expand, table.attention, len(table.rows)) == ("channels", True, 870)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        published = json.load(file)
    assert set(published["224"]) == set(published_keys(224))
    assert set(published["172"]) == set(published_keys(172))
    space = mobilenet_v3(width=1.2, resolutions=tuple(range(160, 228, 4)))
    assert len(block_table(space, table)) == 865
    # The largest network at 224 pixels, row by row; four blocks a stage, kernel 7, expand 6.
    largest = read_ofa(path, resolution=224)
    cost = compile_cost(mobilenet_v3(width=1.2), largest.price, "latency_ms")
    rows = published["224"]
    by_hand = 0.0
    for key in published_keys(224):
        if "expanded_conv" not in key or "112x112x24-output:112x112x24" in key:
            by_hand += rows[key]["mean"]
        elif "kernel:7" in key:
            inputs, expand = (
                int(key.split(mark)[1].split("-")[0].split("x")[-1]) for mark in ("input:", "expand:")
            )
            if expand == 6 * inputs:
                by_hand += rows[key]["mean"] * (3 if "idskip:1" in key else 1)
    space = mobilenet_v3(width=1.2)
    assert cost.of(space.largest())[0] == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.slow
def test_another_width_than_the_published_one_has_missing_rows(shared: Callable[[str], Path]) -> None:
    table = read_ofa(shared("tables/ofa_note10_latency.json.gz"))
    with pytest.raises(MissingRowError, match="use the space, width and resolutions that the table was made"):
        block_table(mobilenet_v3(width=1.0), table)
