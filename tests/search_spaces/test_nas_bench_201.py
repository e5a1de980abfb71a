"""The NAS-Bench-201 space against published counts, and its network against the paper's rules by hand."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.cost import operation_cost
from autocompress.count import count
from autocompress.elastic.extract import extract
from autocompress.errors import SpaceError
from autocompress.export.export import export_network
from autocompress.network import build_network
from autocompress.space import Architecture, SearchSpace
from autocompress.testing.elastic import ElasticContract
from search_spaces.nas_bench_201 import CHOICES, arch_str, from_arch_str, nas_bench_201
from search_spaces.nas_bench_201_ops import (
    EDGES,
    OPERATIONS,
    Cell,
    NormReLU,
    Reduction,
    cell_operations,
    cell_text,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/nas_bench_201_cells.json").read_text())["rows"]
"""Published architectures with parameters and MACs (source in the file)."""
PUBLISHED = Path(__file__).parents[3] / "shared/data/nas_bench_201/accuracy.npz"
SPACE = nas_bench_201()
TINY = {"channels": 2, "cells": 1, "classes": 3, "resolution": 8}
EVERY = "|nor_conv_3x3~0|+|none~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_1x1~1|avg_pool_3x3~2|"
"""A cell with all five operations."""


class TestConvolutionsOrNone(ElasticContract):
    def space(self) -> SearchSpace:
        return nas_bench_201(**TINY, operations=("none", "nor_conv_3x3"))


class TestSkipOrPoint(ElasticContract):
    def space(self) -> SearchSpace:
        return nas_bench_201(**{**TINY, "cells": 2}, operations=("skip_connect", "nor_conv_1x1"))


@pytest.mark.parametrize(
    ("cell", "connected"),
    [
        (EVERY, True),
        ("|none~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|none~0|avg_pool_3x3~1|none~2|", False),
        ("|skip_connect~0|+|none~0|none~1|+|none~0|none~1|nor_conv_3x3~2|", False),
        ("|skip_connect~0|+|none~0|none~1|+|none~0|none~1|none~2|", False),
        ("|none~0|+|nor_conv_1x1~0|none~1|+|none~0|none~1|skip_connect~2|", True),
    ],
)
def test_a_cell_says_whether_its_output_depends_on_its_input(cell: str, connected: bool) -> None:
    """A second implementation: the output for two images."""
    op = Cell(4, 6, cell)
    assert op.connected == connected
    module = op.module().eval()
    outputs = [module(torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(i))) for i in (0, 1)]
    assert torch.equal(*outputs) == (not connected)


@given(st.tuples(*[st.sampled_from(OPERATIONS)] * 6))
@settings(max_examples=60, deadline=None)
def test_a_cell_says_whether_a_runtime_runs_all_of_it(operations: tuple[str, ...]) -> None:
    """A second implementation: what each edge gives follows the image, and the output follows the edge."""
    op = Cell(4, 6, cell_text(list(operations)))
    torch.manual_seed(0)
    module = op.module().eval()
    images = torch.randn(2, 1, 4, 6, 6)
    plain = module(images[0])
    needed = True
    for edge in module.children():
        given_off: list[torch.Tensor] = []

        def disturb(
            _: Any, __: Any, output: torch.Tensor, seen: list[torch.Tensor] = given_off
        ) -> torch.Tensor:
            seen.append(output)
            return output + 1 + torch.rand_like(output)

        handle = edge.register_forward_hook(disturb)
        outputs = [module(image) for image in images]
        handle.remove()
        needed &= not torch.equal(*given_off) and not torch.equal(outputs[0], plain)
    assert op.runs_all == (needed and op.connected)


# Counts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: str(row["macs"]))
def test_published_networks_have_the_published_parameters_and_macs(row: dict[str, int | str]) -> None:
    codes = SPACE.encode([from_arch_str(SPACE, str(row["cell"]))])
    ops = [op for _, block in SPACE.operations(codes) for op in block]
    assert sum(op.params for op in ops) == row["params"]
    assert sum(op.macs for op in ops) == row["macs"]


@pytest.mark.slow
def test_all_published_networks_have_the_published_parameters_and_macs() -> None:
    if not PUBLISHED.is_file():
        pytest.skip(f"{PUBLISHED} is absent: it holds the 15,625 published architectures")
    with np.load(PUBLISHED, allow_pickle=False) as file:
        published = {name: file[name] for name in ("arch_str", "params", "macs")}
    codes = SPACE.encode([from_arch_str(SPACE, text) for text in published["arch_str"].tolist()])
    assert len(np.unique(codes, axis=0)) == SPACE.size == 15_625
    for metric in ("params", "macs"):
        np.testing.assert_array_equal(operation_cost(SPACE, metric).of(codes), published[metric])


@pytest.mark.parametrize("text", [EVERY, cell_text(["nor_conv_3x3"] * 6), cell_text(["none"] * 6)])
def test_what_operations_state_is_what_runs(text: str) -> None:
    """A second implementation counts: PyTorch's own, on the module that is built."""
    space = nas_bench_201(channels=4, cells=2, classes=7, resolution=16)
    blocks = space.operations(space.encode([from_arch_str(space, text)]))
    ops = [op for _, block in blocks for op in block]
    counted = count(build_network(blocks), torch.zeros(1, 3, 16, 16))
    assert counted.macs == sum(op.macs for op in ops)
    assert counted.params == sum(op.params for op in ops)
    for op in ops:
        sizes = [parameter.numel() for parameter in op.module().parameters()]
        assert sorted(sizes) == sorted((*op.weight_tensors, *op.other_tensors))
        module = op.module().eval()
        assert module(torch.zeros(2, *op.in_shape)).flatten(1).shape[1] == np.prod(op.out_shape)


def test_the_smallest_and_the_largest_network_stand_at_the_ends() -> None:
    macs = operation_cost(nas_bench_201(**TINY), "macs")
    space = nas_bench_201(**TINY)
    assert float(macs.of(space.smallest())[0]) == macs.minimum
    assert float(macs.of(space.largest())[0]) == macs.maximum


# The network ------------------------------------------------------------------------------------------


def by_hand(cell: nn.Module, operations: Sequence[str], x: Tensor) -> Tensor:
    """The cell, one sum after another; batch norm with the statistics of the batch."""

    def edge(index: int, value: Tensor) -> Tensor | float:
        source, target = EDGES[index]
        match operations[index]:
            case "none":
                return 0.0
            case "skip_connect":
                return value
            case "avg_pool_3x3":
                # The mean over the pixels that exist: sums over windows, divided by how many are inside.
                ones = torch.ones(1, 1, *value.shape[2:])
                window = torch.ones(1, 1, 3, 3)
                sums = F.conv2d(value.flatten(0, 1)[:, None], window, padding=1).view_as(value)
                return sums / F.conv2d(ones, window, padding=1)
        part = cell.get_submodule(f"edge_{source}_{target}.{operations[index]}")
        weight = part.get_parameter("conv.weight")
        y = F.conv2d(value.clamp_min(0), weight, padding=weight.shape[-1] // 2)
        mean, variance = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
        scale, shift = (part.get_parameter(f"bn.{name}").view(1, -1, 1, 1) for name in ("weight", "bias"))
        return (y - mean) / (variance + 1e-5).sqrt() * scale + shift

    zero = torch.zeros_like(x)
    first = zero + edge(0, x)
    second = zero + edge(1, x) + edge(2, first)
    return zero + edge(3, x) + edge(4, first) + edge(5, second)


@pytest.mark.parametrize("seed", range(8))
def test_a_cell_is_the_sum_of_its_edges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    operations = [str(name) for name in rng.choice(OPERATIONS, 6)]
    torch.manual_seed(seed)
    cell = Cell(3, 6, cell_text(operations)).module().train()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        x = torch.randn(4, 3, 6, 6)
        torch.testing.assert_close(cell(x.clone()), by_hand(cell, operations, x), rtol=1e-4, atol=1e-5)


def test_a_cell_of_nothing_gives_zeros_and_one_skip_gives_the_input() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(Cell(3, 4, cell_text(["none"] * 6)).module()(x), torch.zeros_like(x))
    only = cell_text(["none", "none", "none", "skip_connect", "none", "none"])
    assert torch.equal(Cell(3, 4, only).module()(x), x)


def test_a_reduction_adds_the_pooled_shortcut_to_two_convolutions() -> None:
    module = Reduction(2, 5, 6).module().eval()
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.randn_like(parameter) if "bn" not in name else parameter)
        x = torch.randn(3, 2, 6, 6)
        y = F.conv2d(x.clamp_min(0), parameters["edge_0_1.conv.weight"], stride=2, padding=1)
        y = y / (1 + 1e-5) ** 0.5
        y = F.conv2d(y.clamp_min(0), parameters["edge_1_2.conv.weight"], padding=1) / (1 + 1e-5) ** 0.5
        quarter = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        y = y + F.conv2d(quarter, parameters["edge_0_2.conv.weight"])
        torch.testing.assert_close(module(x), y, rtol=1e-4, atol=1e-4)


def test_the_network_is_stem_three_stages_two_reductions_and_head() -> None:
    blocks = SPACE.operations(SPACE.largest())
    cells = [f"stage{stage}.cell{cell}" for stage in (1, 2, 3) for cell in range(1, 6)]
    assert [name for name, _ in blocks] == [
        "stem", *cells[:5], "reduction1", *cells[5:10], "reduction2", *cells[10:], "head",
    ]  # fmt: skip
    shapes = [op.out_shape for _, ops in blocks for op in ops]
    assert shapes == [
        *[(16, 32, 32)] * 6, *[(32, 16, 16)] * 6, *[(64, 8, 8)] * 7, (64, 1, 1), (10, 1, 1),
    ]  # fmt: skip
    chain = [op for _, ops in blocks for op in ops]
    assert all(np.prod(a.out_shape) == np.prod(b.in_shape) for a, b in itertools.pairwise(chain))
    head = build_network(blocks).get_submodule("head")
    assert [type(part).__name__ for part in head.modules()][2:4] == ["BatchNorm2d", "ReLU"]


def test_the_activations_that_are_alive_are_counted_by_hand() -> None:
    # Input of 10 numbers a node. All none: input and output.
    def nodes(*operations: str) -> int:
        return Cell(10, 1, cell_text(operations)).peak_elements // 10

    assert nodes(*["none"] * 6) == 2
    # Nodes 0, 1 and 2, the copies of them after ReLU one at a time, the partial sum: at 1->3 nodes 1 and 2,
    # partial sum, ReLU in place, result; at 0->2: nodes 0 and 1, ReLU of 0 (read again by 0->3), result.
    # At 1->2: nodes 0 and 1, partial sum, ReLU of 1, result: 5. Its addition: 0, 1 and three buffers: 5.
    assert nodes(*["nor_conv_3x3"] * 6) == 5
    # A chain of convolutions keeps nothing: ReLU in place, then the result.
    assert nodes("nor_conv_3x3", "none", "nor_conv_3x3", "none", "none", "nor_conv_3x3") == 2
    # Input, its ReLU copy and the result for 0->1; for 0->3 then the input, node 1 and the result; at 1->3
    # node 1, the partial sum and the result; the addition holds three.
    assert nodes("nor_conv_3x3", "none", "none", "nor_conv_3x3", "nor_conv_3x3", "none") == 3
    # The input is read again by 0->3, so its ReLU needs a copy: input, copy, result.
    assert nodes("nor_conv_3x3", "none", "none", "skip_connect", "none", "none") == 3
    # 2x8x8 in, 4x4x4 out: the input, its ReLU and the output of the first convolution.
    assert Reduction(2, 4, 8).peak_elements == 128 + 128 + 64


# Weight sharing ---------------------------------------------------------------------------------------


def test_networks_share_the_weights_of_an_operation_on_an_edge() -> None:
    space = nas_bench_201(**TINY)
    supernet = space.supernet()
    one, other = (from_arch_str(space, text) for text in (EVERY, EVERY.replace("none~0", "nor_conv_1x1~0")))
    name = "stage2_cell1.0.edge_0_1.nor_conv_3x3.conv.weight"
    weights = [dict(extract(supernet, arch).named_parameters())[name] for arch in (one, other)]
    assert torch.equal(*weights)
    supernet(torch.randn(4, 3, 8, 8), one).square().sum().backward()
    used = {name for name, parameter in supernet.named_parameters() if parameter.grad is not None}
    assert {name for name in used if "stage2" in name} == {
        f"layers.stage2_cell1.0_cell.module.{edge}.{part}"
        for edge in ("edge_0_1.nor_conv_3x3", "edge_1_3.nor_conv_1x1")
        for part in ("conv.weight", "bn.weight", "bn.bias")
    }
    # The supernet holds the largest network and a pointwise convolution on every edge.
    (largest,) = space.decode(space.largest())
    held = sum(parameter.numel() for parameter in supernet.parameters())
    alone = sum(parameter.numel() for parameter in extract(supernet, largest).parameters())
    assert held - alone == sum(6 * (width**2 + 2 * width) for width in (2, 4, 8))


def test_a_network_leaves_supernet_and_package_as_onnx(tmp_path: Path) -> None:
    space = nas_bench_201(**TINY)
    arch = from_arch_str(space, EVERY)
    blocks = space.operations(space.encode([arch]))
    network = build_network(blocks).eval()
    manifest = export_network(
        network,
        architecture=arch,
        blocks=blocks,
        in_shape=(3, 8, 8),
        folder=tmp_path / "exported",
        preprocessing={},
        formats=("onnx", "safetensors"),
    )
    assert set(manifest.parity) == {"onnx"}
    assert "Cell" in manifest.left_out["safetensors"]
    assert manifest.onnx_operators["AveragePool"] == 2 * 3 + 2


# Names and arguments ----------------------------------------------------------------------------------


def test_names_are_read_and_written_as_published() -> None:
    for row in GOLDEN:
        arch = from_arch_str(SPACE, row["cell"])
        assert arch_str(arch) == row["cell"]
    arch = from_arch_str(SPACE, EVERY)
    assert arch == Architecture(
        "nas_bench_201",
        (
            ("edge_0_1", "nor_conv_3x3"),
            ("edge_0_2", "none"),
            ("edge_1_2", "avg_pool_3x3"),
            ("edge_0_3", "skip_connect"),
            ("edge_1_3", "nor_conv_1x1"),
            ("edge_2_3", "avg_pool_3x3"),
        ),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a cell is written"),
        (EVERY + "|", "a cell is written"),
        (EVERY.replace("~1", "~0"), "a cell is written"),
        (EVERY.replace("none", "max_pool_3x3"), "got 'max_pool_3x3'"),
    ],
)
def test_what_is_no_cell_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        cell_operations(text)
    with pytest.raises(SpaceError, match=message):
        Cell(4, 8, text)


def test_a_space_of_fewer_operations_has_fewer_networks_and_refuses_the_others() -> None:
    space = nas_bench_201(**TINY, operations=["nor_conv_3x3", "none"])
    assert space.choices[0].options == ("none", "nor_conv_3x3")
    assert space.size == 64
    with pytest.raises(SpaceError, match="no option 'avg_pool_3x3'"):
        from_arch_str(space, EVERY)
    assert [choice.name for choice in space.choices] == list(CHOICES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be an integer >= 1, got 0"),
        ({"cells": 1.5}, "cells must be an integer >= 1, got 1.5"),
        ({"classes": True}, "classes must be an integer >= 1, got True"),
        ({"resolution": 30}, "resolution must be a multiple of 4"),
        ({"operations": ()}, "operations must be different ones of"),
        ({"operations": ("none", "none")}, "operations must be different ones of"),
        ({"operations": ("max_pool",)}, "operations must be different ones of"),
        ({"operations": "none"}, None),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, object], message: str | None) -> None:
    if message is None:
        assert nas_bench_201(**arguments).size == 1  # type: ignore[arg-type]
        return
    with pytest.raises(SpaceError, match=message):
        nas_bench_201(**arguments)  # type: ignore[arg-type]


def test_operations_check_their_shapes() -> None:
    with pytest.raises(SpaceError, match=r"Reduction.size must be even, got 7"):
        Reduction(2, 4, 7)
    with pytest.raises(SpaceError, match=r"NormReLU.channels must be an integer >= 1, got 0"):
        NormReLU(0, 4)
    with pytest.raises(SpaceError, match=r"must have the same channels, got \[2, 3\]"):
        Cell.shared_module([Cell(2, 4, EVERY), Cell(3, 4, EVERY)])
