"""Plain networks built from operations: names, residuals, devices."""

import pytest
import torch
from torch import nn

from autocompress.network import DropPath, Graph, Residual, build_network, module_name
from autocompress.ops import Add, Conv2d, GlobalAvgPool, Linear, Ops, SqueezeExcite

BLOCKS: list[tuple[str, Ops]] = [
    ("stem", (Conv2d(3, 8, 8, 8, 3, 2, activation="hard_swish"),)),
    ("stage1.block1", (Conv2d(8, 8, 4, 4, 3, groups=8), SqueezeExcite(8, 4, 4, 8), Add(8, 4, 4))),
    ("head", (GlobalAvgPool(8, 4, 4), Linear(8, 5))),
]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_network_is_its_operations_one_after_another_with_the_block_s_input_added(x: torch.Tensor) -> None:
    network = build_network(BLOCKS).eval()
    with torch.no_grad():
        y = network.stem[0](x)
        y = y + network.stage1_block1[1](network.stage1_block1[0](y))
        expected = network.head[1](network.head[0](y))
        assert torch.equal(network(x), expected)
    assert expected.shape == (2, 5)


def test_children_are_named_after_blocks_and_operations_by_position() -> None:
    network = build_network(BLOCKS)
    assert [name for name, _ in network.named_children()] == ["stem", "stage1_block1", "head"]
    assert isinstance(network.stage1_block1, Residual)
    assert not isinstance(network.stem, Residual)
    keys = set(network.state_dict())
    assert {"stem.0.conv.weight", "stem.0.bn.running_mean", "stage1_block1.1.reduce.bias"} <= keys
    assert "head.1.linear.weight" in keys
    assert module_name("stage1.block2") == "stage1_block2"


def test_an_uninitialised_network_draws_no_random_numbers_and_has_the_same_shapes() -> None:
    state = torch.get_rng_state()
    network = build_network(BLOCKS, initialise=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: tensor.shape for name, tensor in network.state_dict().items()} == {
        name: tensor.shape for name, tensor in build_network(BLOCKS).state_dict().items()
    }


def test_no_module_is_shared_between_equal_blocks() -> None:
    block: Ops = (Conv2d(8, 8, 4, 4), Add(8, 4, 4))
    network = build_network([("a", block), ("b", block)])
    assert len(set(map(id, network.parameters()))) == 2 * 3  # weight, scale and shift


def test_the_mode_and_the_gradients_are_those_of_any_pytorch_module(x: torch.Tensor) -> None:
    network = build_network(BLOCKS)
    assert network.training
    network(x).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert isinstance(network, nn.Sequential)


def test_a_graph_sums_what_edges_make_of_earlier_nodes() -> None:
    edges: dict[tuple[int, int], nn.Module] = {
        (1, 3): nn.Conv2d(2, 2, 1),
        (0, 1): nn.Conv2d(2, 2, 1),
        (0, 3): nn.Identity(),
    }
    graph = Graph(4, edges)
    assert [name for name, _ in graph.named_children()] == ["edge_1_3", "edge_0_1", "edge_0_3"]
    x = torch.randn(2, 2, 3, 3)
    torch.testing.assert_close(graph(x), x + edges[1, 3](edges[0, 1](x)))


def test_a_node_without_edges_is_zero() -> None:
    x = torch.randn(1, 2, 3, 3)
    assert torch.equal(Graph(2, {})(x), torch.zeros_like(x))
    # Zero is what the next edge reads, too: a bias comes through.
    edge = nn.Conv2d(2, 2, 1)
    expected = edge.bias.view(1, -1, 1, 1).expand_as(x)  # type: ignore[union-attr]
    torch.testing.assert_close(Graph(3, {(1, 2): edge})(x), expected)


def dropping(rate: float) -> DropPath:
    path = DropPath()
    path.rate = rate
    return path.train()


def test_dropped_paths_are_whole_images_and_the_mean_stays() -> None:
    x = torch.rand(4000, 2, 3, 3) + 1
    before = x.clone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y = dropping(0.2)(x)
    dropped = (y == 0).flatten(1)
    assert torch.equal(dropped.any(1), dropped.all(1))
    torch.testing.assert_close(y[~dropped[:, 0]], x[~dropped[:, 0]] / 0.8)
    # Binomial: four standard errors are 0.025; a false alarm in 6 of 100,000 seeds, and this one is fixed.
    assert dropped[:, 0].float().mean().item() == pytest.approx(0.2, abs=0.025)
    assert (y.mean() / x.mean()).item() == pytest.approx(1, abs=0.025 / 0.8 + 0.01)
    assert torch.equal(x, before)


def test_the_gradient_reaches_the_images_that_were_kept() -> None:
    x = torch.ones(64, 1, 2, 2, requires_grad=True)
    y = dropping(0.5)(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())  # 2 where it was kept, else 0


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3, 3)])
def test_a_drop_path_is_the_identity_in_evaluation_and_at_rate_0(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape)
    state = torch.get_rng_state()
    assert DropPath().rate == 0
    assert DropPath().train()(x) is x
    assert dropping(0.9).eval()(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_a_drop_path_leaves_no_trace_in_weights_and_traced_graphs(x: torch.Tensor) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    with_paths = nn.Sequential(*plain, dropping(0.3)).eval()
    assert list(with_paths.state_dict()) == list(plain.state_dict())
    operators = [
        [node.target for node in torch.export.export(network, (x,)).graph.nodes if node.op == "call_function"]
        for network in (plain, with_paths)
    ]
    assert operators[0] == operators[1]
