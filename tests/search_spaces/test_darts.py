"""The DARTS space against published counts and genotypes; its mixtures against the rules of the paper."""

import itertools
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from autocompress.budget import Constraints
from autocompress.cost import operation_cost
from autocompress.count import count
from autocompress.elastic.mixture import Gate, run_mixture
from autocompress.errors import CostError, SpaceError
from autocompress.export.export import export_network
from autocompress.latency.plan import make_plan
from autocompress.network import build_network
from autocompress.peak_memory import peak_activation_cost
from autocompress.relaxation import Relaxation
from autocompress.space import Architecture, SearchSpace
from autocompress.testing.elastic import ElasticContract
from search_spaces.darts import KINDS, darts, drawing, from_genotype, genotype
from search_spaces.darts_ops import EDGES, INPUTS, OPERATIONS, STEPS, DartsCell, Edge, Preprocess, parse_node

TINY = {"channels": 4, "layers": 3, "classes": 3, "resolution": 8}

# cnn/genotypes.py of quark0/darts.
V2 = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), "
    "('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], "
    "normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), "
    "('max_pool_3x3', 1), ('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), "
    "('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])"
)
MIXED = (
    "Genotype(normal=[('sep_conv_5x5', 0), ('avg_pool_3x3', 1), ('dil_conv_5x5', 0), ('max_pool_3x3', 2), "
    "('skip_connect', 1), ('dil_conv_3x3', 3), ('sep_conv_3x3', 2), ('skip_connect', 4)], "
    "normal_concat=range(2, 6), reduce=[('sep_conv_3x3', 0), ('skip_connect', 1), ('dil_conv_3x3', 0), "
    "('avg_pool_3x3', 2), ('skip_connect', 0), ('sep_conv_5x5', 3), ('max_pool_3x3', 1), "
    "('dil_conv_5x5', 4)], reduce_concat=range(2, 6))"
)
"""Every operation, in both cells."""


class TestConvolutionsAndSkips(ElasticContract):
    def space(self) -> SearchSpace:
        return darts(**TINY, operations=("none", "skip_connect", "sep_conv_3x3"))  # type: ignore[arg-type]


class TestDilatedAndPools(ElasticContract):
    def space(self) -> SearchSpace:
        return darts(**TINY, operations=("max_pool_3x3", "dil_conv_5x5"))  # type: ignore[arg-type]


def tiny(*operations: str) -> SearchSpace:
    return darts(**TINY, operations=operations or OPERATIONS)  # type: ignore[arg-type]


# Counts -----------------------------------------------------------------------------------------------


def test_the_published_cell_has_the_published_parameters() -> None:
    """Golden: `param size = 3.349342MB` in logs of quark0/darts (`train.py`, `test.py`) with DARTS_V2."""
    space = darts(channels=36, layers=20)
    codes = space.encode([from_genotype(space, V2)])
    assert sum(op.params for _, ops in space.operations(codes) for op in ops) == 3_349_342
    assert operation_cost(space, "params").of(codes) == 3_349_342


def test_the_search_network_has_the_published_parameters() -> None:
    """Golden: `param size = 1.930618MB` in logs of `train_search.py`; its cells have norms without scale."""
    supernet = darts().supernet()
    counted = sum(
        parameter.numel()
        for name, parameter in supernet.named_parameters()
        if parameter.dim() > 1 or "stem" in name or "head" in name
    )
    assert counted == 1_930_618


def test_the_space_has_as_many_networks_as_the_paper_says() -> None:
    assert darts().size == (49 * 147 * 294 * 490) ** 2


@pytest.mark.parametrize("text", [V2, MIXED])
def test_what_operations_state_is_what_runs(text: str) -> None:
    """A second implementation counts: PyTorch's own, on the module that is built."""
    space = darts(channels=4, layers=6, classes=7, resolution=16)
    blocks = space.operations(space.encode([from_genotype(space, text)]))
    counted = count(build_network(blocks), torch.zeros(1, 3, 16, 16))
    assert counted.macs == sum(op.macs for _, ops in blocks for op in ops)
    assert counted.params == sum(op.params for _, ops in blocks for op in ops)


@pytest.mark.parametrize("operation", OPERATIONS[1:])
@pytest.mark.parametrize("stride", [1, 2])
def test_an_edge_has_the_shape_that_it_states(operation: str, stride: int) -> None:
    if (operation, stride) == ("skip_connect", 1):
        with pytest.raises(SpaceError, match="runs something"):
            Edge(6, 8, operation, stride)
        return
    edge = Edge(6, 8, operation, stride)
    assert edge.module()(torch.randn(2, *edge.in_shape)).shape == (2, *edge.out_shape)


# Genotypes --------------------------------------------------------------------------------------------


def test_a_genotype_comes_out_as_it_went_in() -> None:
    space = tiny()
    for arch in space.decode(space.sample(50, np.random.default_rng(0))):
        assert from_genotype(space, genotype(arch)) == arch
    # Sources ascend in what is printed; the published one has them in another order.
    assert genotype(from_genotype(space, MIXED)) == MIXED
    assert from_genotype(space, genotype(from_genotype(space, V2))) == from_genotype(space, V2)


def test_a_drawing_has_every_edge() -> None:
    text = drawing(from_genotype(tiny(), V2))
    assert "5 = skip_connect(0) + dil_conv_3x3(2)" in text
    assert text.count("\n") == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a genotype has normal="),
        (V2.replace("normal_concat=[2,", "normal_concat=["), "normal_concat of nodes 2 to 5"),
        (V2.replace("('sep_conv_3x3', 0), ", "", 1), "of 8 edges"),
        (V2.replace("'sep_conv_3x3', 0", "'sep_conv_3x3', '0'", 1), "of 8 edges"),
        (V2.replace("'sep_conv_3x3', 0", "'sep_conv_3x3', __import__('os').getpid()", 1), "of 8 edges"),
        (V2.replace("sep_conv_3x3", "sep_conv_7x7"), "reads nodes 0 to 1 by one of max_pool_3x3"),
        (V2.replace("('sep_conv_3x3', 1)", "('sep_conv_3x3', 0)", 1), "normal cell reads one node twice"),
        (V2.replace("('skip_connect', 0), ('dil_conv_3x3', 2)", "('skip_connect', 0), ('dil_conv_3x3', 5)"),
         "got .'dil_conv_3x3', 5."),
    ],
)  # fmt: skip
def test_what_is_no_genotype_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        from_genotype(tiny(), text)


def test_the_named_tuple_of_other_repositories_is_read() -> None:
    genotype_of = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")
    edges = [("sep_conv_3x3", at) for _ in range(4) for at in (0, 1)]
    arch = from_genotype(tiny(), genotype_of(edges, range(2, 6), edges, [2, 3, 4, 5]))
    assert set(dict(arch.settings).values()) == {"sep_conv_3x3~0+sep_conv_3x3~1"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 2}, "layers must be at least 3"),
        ({"resolution": 30}, "multiple of 4"),
        ({"channels": 0}, "channels must be an integer >= 1, got 0"),
        ({"operations": ("none",)}, "one of them not none"),
        ({"operations": ("skip_connect", "conv")}, "operations must be different ones"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        darts(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "a~0+b~1", "sep_conv_3x3~1+skip_connect~0", "none~0+skip_connect~1"])
def test_what_is_no_node_is_refused(text: str) -> None:
    with pytest.raises(SpaceError, match="a node is written"):
        parse_node(text)


# Mixture and derivation -------------------------------------------------------------------------------


def at_random(relaxation: Relaxation, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for vector in relaxation.logits:
            vector.copy_(2 * torch.randn(len(vector), generator=generator, dtype=torch.float64))


def by_the_paper(space: SearchSpace, relaxation: Relaxation) -> Architecture:
    """Section 2.4, as `genotype` of `cnn/model_search.py`: two edges of the strongest operation but none."""
    probabilities = {name: vector.detach().numpy() for name, vector in relaxation.probabilities().items()}
    settings = {}
    for kind in KINDS:
        for node in range(INPUTS, INPUTS + STEPS):
            strongest = {}
            for source in range(node):
                p = probabilities[f"{kind}.edge_{source}_{node}"][1:]  # none is the first
                strongest[source] = (p.max(), OPERATIONS[1 + int(p.argmax())])
            kept = sorted(strongest, key=lambda source: -strongest[source][0])[:2]
            settings[f"{kind}.node{node}"] = "+".join(f"{strongest[s][1]}~{s}" for s in sorted(kept))
    return space.architecture(settings)


@pytest.mark.parametrize("seed", range(5))
def test_without_a_budget_the_cell_is_derived_that_darts_derives(seed: int) -> None:
    space = tiny()
    relaxation = Relaxation(space, seed=0)
    at_random(relaxation, seed)
    derived = relaxation.derive(Constraints(space, {"macs": operation_cost(space, "macs")}, {}))
    assert space.decode(derived.codes) == [by_the_paper(space, relaxation)]


def test_the_expected_cost_is_the_mean_over_all_networks() -> None:
    """Law: enumerated; of two operations, a node has as many options as pairs of sources, times four."""
    space = darts(**TINY, operations=("none", "sep_conv_3x3", "skip_connect"))  # type: ignore[arg-type]
    relaxation = Relaxation(space, seed=0, fixed={"normal.node5": "sep_conv_3x3~0+skip_connect~4"})
    at_random(relaxation, 3)
    cost = operation_cost(space, "macs")
    edges = {name: vector.detach().numpy() for name, vector in relaxation.probabilities().items()}
    total = weights = 0.0
    names = [choice.name for choice in space.choices]
    free = [name for name in names if name.startswith("normal") and name != "normal.node5"]
    rest = {name: space.choices[space.positions[name]].options[0] for name in names if name not in free}
    rest["normal.node5"] = "sep_conv_3x3~0+skip_connect~4"
    # The reduction cell adds to every network alike: it is fixed here, and relaxed there below.
    other = Relaxation(space, seed=0, fixed=rest)
    other.load_state_dict(
        {f"logits.{i}": relaxation.logits[relaxation.relaxed.index(n)] for i, n in enumerate(other.relaxed)}
    )
    codes, shares = [], []
    for picked in itertools.product(*(space.choices[space.positions[name]].options for name in free)):
        share = 1.0
        for name, option in zip(free, picked, strict=True):
            choice = space.choices[space.positions[name]]
            for edge, operation in choice.terms[choice.options.index(option)]:
                share *= edges[edge][space.variables[edge].code(operation)]
        codes.append(space.encode([space.architecture({**rest, **dict(zip(free, picked, strict=True))})]))
        shares.append(share)
    weights = np.array(shares) / np.sum(shares)
    total = float(weights @ cost.of(np.vstack(codes)))
    assert float(other.expected(cost).detach()) == pytest.approx(total, rel=1e-12)


def test_a_mixture_of_one_network_is_its_slice() -> None:
    """Law: with every edge that is not kept at none, the mixture computes what the supernet's slice does."""
    space = tiny("none", "skip_connect", "sep_conv_3x3", "dil_conv_5x5")
    supernet = space.supernet().double()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for arch in space.decode(space.sample(5, np.random.default_rng(1))):
        gates = {}
        for kind in KINDS:
            kept = {}
            for node in range(INPUTS, INPUTS + STEPS):
                for operation, source in parse_node(str(arch[f"{kind}.node{node}"])):
                    kept[source, node] = operation
            for source, node in EDGES:
                name = f"{kind}.edge_{source}_{node}"
                code = space.variables[name].code(kept.get((source, node), "none"))
                gates[name] = Gate((code,), torch.ones(1, dtype=torch.float64))
        torch.testing.assert_close(run_mixture(supernet, x, arch, gates), supernet(x, arch))


def test_a_mixture_with_gates_of_one_cell_keeps_the_other_as_it_is() -> None:
    space = tiny("none", "skip_connect", "sep_conv_3x3")
    supernet = space.supernet()
    arch = space.decode(space.sample(1, np.random.default_rng(1)))[0]
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    gates = {}
    for source, node in EDGES:
        kept = {s: operation for operation, s in parse_node(str(arch[f"normal.node{node}"]))}
        name = f"normal.edge_{source}_{node}"
        gates[name] = Gate((space.variables[name].code(kept.get(source, "none")),), torch.ones(1))
    torch.testing.assert_close(run_mixture(supernet, x, arch, gates), supernet(x, arch))


def test_partial_channels_reach_every_operation() -> None:
    space = tiny()
    supernet, relaxation = space.supernet(), Relaxation(space, seed=0)
    (arch,) = space.decode(space.largest())
    gates = {name: Gate.all(p) for name, p in relaxation.probabilities().items()}
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    run_mixture(supernet, x, arch, gates, affine=False, channels=2).square().sum().backward()
    assert all(float(vector.grad.abs().sum()) > 0 for vector in relaxation.logits)  # type: ignore[union-attr]


# Prices and exports -----------------------------------------------------------------------------------


def test_a_profile_has_a_row_an_operation_and_place() -> None:
    plan = make_plan(darts(channels=4, layers=6, resolution=16), "auto", 4, 0)
    kinds = [type(ops[0]).__name__ for ops in plan.rows.values()]
    assert kinds.count("Edge") <= 7 * 5
    assert "DartsCell" not in kinds
    assert all(len(ops) == 1 or type(ops[-1]).__name__ == "Linear" for ops in plan.rows.values())


def test_peak_memory_cannot_be_limited_and_says_so() -> None:
    with pytest.raises(CostError, match="split the block"):
        peak_activation_cost(tiny())


def test_geometry_is_checked() -> None:
    nodes = ("sep_conv_3x3~0+skip_connect~1",) * STEPS
    with pytest.raises(SpaceError, match="must be even, got 7"):
        DartsCell(4, 4, 4, 7, True, False, nodes)
    with pytest.raises(SpaceError, match="has 4 nodes, got 3"):
        DartsCell(4, 4, 4, 8, False, False, nodes[1:])
    with pytest.raises(SpaceError, match="reads earlier ones only"):
        DartsCell(4, 4, 4, 8, False, False, ("sep_conv_3x3~0+skip_connect~2", *nodes[1:]))
    with pytest.raises(SpaceError, match="must be even, got 5"):
        Preprocess(4, 4, 5, True)


@pytest.mark.slow
def test_a_network_leaves_as_onnx(tmp_path: Path) -> None:
    space = tiny()
    arch = from_genotype(space, MIXED)
    blocks = space.operations(space.encode([arch]))
    manifest = export_network(
        build_network(blocks).eval(),
        architecture=arch,
        blocks=blocks,
        in_shape=(3, 8, 8),
        folder=tmp_path / "exported",
        preprocessing={},
        formats=("onnx",),
        sample=torch.randn(4, 3, 8, 8),
    )
    assert set(manifest.parity) == {"onnx"}
