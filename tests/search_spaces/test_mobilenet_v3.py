"""The once-for-all MobileNetV3 space against published sub-networks, the paper's size and built modules."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.cost import operation_cost
from autocompress.errors import SpaceError
from autocompress.network import build_network
from autocompress.ops import Conv2d
from autocompress.space import SearchSpace
from search_spaces.mobilenet_v3 import mobilenet_v3

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/golden/mobilenet_v3_subnets.json").read_text(encoding="utf-8"))
PUBLISHED = ROOT.parent / "shared/data/ofa/ofa_mbv3_w10_imagenet_subnets.csv"


@pytest.fixture(scope="module")
def ofa() -> SearchSpace:
    return mobilenet_v3()


def codes_of(space: SearchSpace, row: dict[str, Any]) -> np.ndarray:
    """A published row as codes: 20 kernels, 20 expansions, 5 depths, four blocks a stage."""
    given: dict[str, Any] = {"resolution": row["resolution"]}
    for stage in range(5):
        given[f"stage{stage + 1}.depth"] = row["depth"][stage]
        for block in range(4):
            name = f"stage{stage + 1}.block{block + 1}"
            given[f"{name}.kernel"] = row["kernel"][4 * stage + block]
            given[f"{name}.expand"] = row["expand"][4 * stage + block]
    return space.encode([space.architecture(given)])


def check_published(space: SearchSpace, rows: list[dict[str, Any]]) -> None:
    codes = np.vstack([codes_of(space, row) for row in rows])
    for metric in ("macs", "params"):
        priced = operation_cost(space, metric).of(codes)
        assert priced.tolist() == [row[metric] for row in rows]


def test_published_subnetworks_have_exactly_the_published_parameters_and_macs(ofa: SearchSpace) -> None:
    assert len(GOLDEN["rows"]) == 26
    check_published(ofa, GOLDEN["rows"])


@pytest.mark.slow
def test_all_904_published_subnetworks_have_exactly_the_published_parameters_and_macs(
    ofa: SearchSpace,
) -> None:
    if not PUBLISHED.exists():
        pytest.skip(f"no {PUBLISHED}")
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        rows = [
            {
                name: [int(number) for number in text.split()] if " " in text else float(text)
                for name, text in row.items()
            }
            for row in csv.DictReader(file)
        ]
    assert len(rows) == 904
    check_published(ofa, rows)
    # The data set's README: genes of skipped blocks are without effect, 842 networks are distinct.
    assert len(np.unique(np.vstack([codes_of(ofa, row) for row in rows]), axis=0)) == 842


@pytest.mark.parametrize("resolutions", [(224,), (128, 160, 192, 224)])
def test_the_space_has_7371_to_the_fifth_networks_at_each_resolution(resolutions: tuple[int, ...]) -> None:
    # Section 3.1 of the paper: 9 kernel-expansion pairs a block, 2 to 4 blocks: 9^2 + 9^3 + 9^4 = 7371.
    assert mobilenet_v3(resolutions=resolutions).size == len(resolutions) * 7371**5


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    geometry=st.sampled_from(["imagenet", "small"]),
    width=st.sampled_from([0.25, 0.5, 1.0, 1.2]),
)
def test_every_network_of_the_space_runs_with_the_shapes_its_operations_state(
    seed: int, geometry: Any, width: float
) -> None:
    resolutions = (160, 224) if geometry == "imagenet" else (28, 32)
    space = mobilenet_v3(width=width, geometry=geometry, resolutions=resolutions, classes=7, in_channels=1)
    codes = space.sample(1, np.random.default_rng(seed))
    blocks = space.operations(codes)
    shape: tuple[int, ...] = (1, resolutions[int(codes[0, 0])], resolutions[int(codes[0, 0])])
    for _, ops in blocks:
        for op in ops:
            assert op.in_shape == shape
            shape = op.out_shape
    # Shapes do not depend on weights: initialising them would take most of the time.
    network = build_network(blocks, initialise=False).eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, *blocks[0][1][0].in_shape)).shape == (1, 7)
    params = sum(parameter.numel() for parameter in network.parameters())
    assert params == operation_cost(space, "params").of(codes)[0]


@pytest.mark.parametrize(
    ("geometry", "resolution", "final"), [("imagenet", 224, 7), ("small", 32, 4), ("small", 28, 4)]
)
def test_the_last_feature_map_has_the_geometry_s_size(geometry: Any, resolution: int, final: int) -> None:
    space = mobilenet_v3(geometry=geometry, resolutions=(resolution,))
    head = space.operations(space.largest())[-1][1]
    assert head[0].in_shape[1:] == (final, final)


def test_depth_leaves_out_the_last_blocks_of_a_stage(ofa: SearchSpace) -> None:
    names = [name for name, _ in ofa.operations(ofa.smallest())]
    stages = [f"stage{stage}.block{block}" for stage in range(1, 6) for block in (1, 2)]
    assert names == ["stem", "first", *stages, "head"]


def test_the_tiny_preset_holds_its_settings_and_lets_given_ones_win() -> None:
    tiny = mobilenet_v3(preset="tiny")
    assert tiny.choices[0].options == (24, 28, 32)
    assert tiny.choices[tiny.positions["stage1.block1.kernel"]].options == (3, 5)
    stem = tiny.operations(tiny.largest())[0][1][0]
    assert isinstance(stem, Conv2d)
    assert (stem.stride, stem.out_channels) == (2, 8)  # a quarter of 16 channels, at least 8
    assert mobilenet_v3(preset="tiny", resolutions=(16,)).choices[0].options == (16,)


def test_a_space_is_made_again_from_its_settings(ofa: SearchSpace) -> None:
    tiny = mobilenet_v3(preset="tiny", classes=10, depths=[1, 2])
    again = mobilenet_v3(**json.loads(json.dumps(dict(tiny.settings))))
    assert again.fingerprint == tiny.fingerprint
    assert ofa.fingerprint != tiny.fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "huge"}, "preset must be 'tiny' or empty, got 'huge'"),
        ({"geometry": "large"}, "geometry must be one of imagenet, small, got 'large'"),
        ({"kernels": (5, 3)}, r"kernels must be ascending.*got \(5, 3\)"),
        ({"kernels": (3, 4)}, r"kernels must be odd, got \(3, 4\)"),
        ({"depths": ()}, r"depths must be ascending.*got \(\)"),
        ({"expands": (3, 3)}, "expands must be ascending, without repetition"),
        ({"depths": (0, 1)}, "depths must be ascending, without repetition, at least 1"),
        ({"width": 0.0}, r"width must be positive and finite, got 0\.0"),
        ({"width": float("nan")}, "width must be positive and finite, got nan"),
        ({"resolutions": (32, 28)}, "resolutions must be ascending, at least 8"),
        ({"resolutions": (4,)}, r"resolutions must be ascending, at least 8, got \(4,\)"),
        ({"width": float("inf")}, "width must be positive and finite"),
        ({"classes": 0}, "classes must be .*1, got 0"),
        ({"in_channels": 0}, "in_channels must be .*1, got 0"),
    ],
)
def test_an_argument_out_of_range_is_refused_with_its_rule(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        mobilenet_v3(**arguments)
