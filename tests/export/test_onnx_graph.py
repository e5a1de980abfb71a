"""ONNX graphs from operations compute what the PyTorch network of the same operations computes."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from autocompress.errors import ExportError
from autocompress.export.onnx_graph import onnx_model
from autocompress.network import build_network
from autocompress.ops import (
    ACTIVATIONS,
    Add,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool,
    Ops,
    OpSpec,
    Shape,
    SqueezeExcite,
)
from search_spaces.mobilenet_v3 import mobilenet_v3

Blocks = list[tuple[str, Ops]]


def outputs(model: bytes, x: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x.numpy()})[0]


def trained_like(blocks: Blocks) -> nn.Module:
    """A network whose batch norms are far from the identity, as after training."""
    torch.manual_seed(0)
    network = build_network(blocks).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.bias, -1.0, 1.0)
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2.0)
    return network


def check_parity(blocks: Blocks, batch: int = 2) -> None:
    network = trained_like(blocks)
    x = torch.randn(batch, *blocks[0][1][0].in_shape)
    with torch.no_grad():
        expected = network(x).numpy()
    actual = outputs(onnx_model(blocks, batch=batch, network=network), x)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_the_one_of_pytorch(activation: str) -> None:
    check_parity([("a", (Conv2d(3, 8, 6, 6, kernel=3, activation=activation),))])
    check_parity([("a", (Linear(12, 5, activation=activation),))])


@pytest.mark.parametrize(
    "op",
    [
        Conv2d(4, 6, 7, 9, kernel=5, stride=2),
        Conv2d(4, 8, 7, 7, kernel=3, groups=2, bias=True),
        Conv2d(8, 8, 6, 6, kernel=7, groups=8, norm=False),
        Conv2d(4, 8, 6, 6, kernel=2, norm=False, bias=True),
        SqueezeExcite(8, 5, 4, 2),
        GlobalAvgPool(6, 5, 3),
        MaxPool(4, 9, 7),
        MaxPool(4, 9, 7, kernel=3, stride=2),
        Linear(24, 7, bias=False),
    ],
    ids=lambda op: op.key,
)
def test_every_operation_is_the_one_of_pytorch(op: OpSpec) -> None:
    check_parity([("only", (op,))])


def test_a_residual_block_adds_its_own_input_not_that_of_the_network() -> None:
    first: Ops = (Conv2d(3, 8, 6, 6, kernel=3, activation="relu"),)
    second: Ops = (Conv2d(8, 8, 6, 6, kernel=3), Conv2d(8, 8, 6, 6), Add(8, 6, 6))
    check_parity([("stage1.block1", first), ("stage1.block2", second)], batch=3)


def test_a_whole_network_of_a_space_has_the_outputs_of_pytorch() -> None:
    space = mobilenet_v3(preset="tiny", in_channels=1, classes=10)
    check_parity(space.operations(space.largest()))


@dataclass(frozen=True)
class Blur(OpSpec):
    """An operation that only its own space knows."""

    channels: int
    size: int

    @property
    def in_shape(self) -> Shape:
        return self.channels, self.size, self.size

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    @property
    def macs(self) -> int:
        return 0

    @property
    def params(self) -> int:
        return self.channels

    def module(self) -> nn.Module:
        return nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.PReLU(self.channels))


# torch's exporter itself uses what Python has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_an_operation_of_a_spaces_own_is_exported_by_pytorch() -> None:
    check_parity([("a", (Conv2d(3, 4, 6, 6, kernel=3), Blur(4, 6)))])


class Shuffle(Blur):
    """Calls what the older exporter of PyTorch cannot convert."""

    def module(self) -> nn.Module:
        return nn.ChannelShuffle(2)


class Dilated(Blur):
    """What the older exporter leaves to a runtime that refuses it."""

    def module(self) -> nn.Module:
        return nn.Conv2d(self.channels, self.channels, 3, padding="same", dilation=2)


class Unknown(Blur):
    """What no exporter converts."""

    def module(self) -> nn.Module:
        module = nn.Module()
        module.forward = lambda x: torch.linalg.matrix_exp(x)  # type: ignore[method-assign]
        return module


@pytest.mark.parametrize("op", [Shuffle(4, 6), Dilated(4, 6)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_newer_exporter_does_what_the_older_cannot(op: Blur, capfd: pytest.CaptureFixture[str]) -> None:
    check_parity([("a", (Conv2d(3, 4, 6, 6, kernel=3), op))])
    assert not capfd.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_what_no_exporter_converts_is_an_error_of_ours() -> None:
    with pytest.raises(ExportError, match="PyTorch cannot export the network as ONNX"):
        onnx_model([("a", (Unknown(4, 6),))], batch=1)


def test_equal_seeds_give_equal_models_and_others_do_not() -> None:
    blocks: Blocks = [("a", (Conv2d(3, 8, 6, 6),))]
    assert onnx_model(blocks, batch=1, seed=3) == onnx_model(blocks, batch=1, seed=3)
    assert onnx_model(blocks, batch=1, seed=3) != onnx_model(blocks, batch=1, seed=4)


def test_random_weights_keep_activations_of_one_size_through_a_deep_network() -> None:
    # Subnormal or infinite activations would change what is timed.
    space = mobilenet_v3(preset="tiny", in_channels=1, classes=10)
    blocks = space.operations(space.largest())
    y = outputs(onnx_model(blocks, batch=1), torch.randn(1, 1, 32, 32))
    assert 1e-6 < np.abs(y).max() < 1e6


def test_a_convolution_with_batch_norm_is_one_node_with_a_bias() -> None:
    blocks: Blocks = [("a", (Conv2d(3, 8, 6, 6, activation="hard_swish"),))]
    graph = onnx.load_model_from_string(onnx_model(blocks, batch=4)).graph
    onnx.checker.check_model(onnx.load_model_from_string(onnx_model(blocks, batch=4)))
    assert Counter(node.op_type for node in graph.node) == {"Conv": 1, "HardSwish": 1, "Identity": 1}
    assert len(graph.node[0].input) == 3
    assert [size.dim_value for size in graph.input[0].type.tensor_type.shape.dim] == [4, 3, 6, 6]


@pytest.mark.parametrize(("blocks", "batch"), [([], 1), ([("a", (Conv2d(3, 8, 6, 6),))], 0)])
def test_nothing_to_run_and_empty_batches_are_refused(blocks: Blocks, batch: int) -> None:
    with pytest.raises(ExportError, match="at least one operation and batch >= 1"):
        onnx_model(blocks, batch=batch)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_spaces_own_operation_with_random_weights_is_exported_once() -> None:
    blocks: Blocks = [("a", (Blur(4, 6),))]
    first = onnx_model(blocks, batch=1)
    assert onnx_model(blocks, batch=1) is first
    assert outputs(first, torch.randn(1, 4, 6, 6)).shape == (1, 4, 6, 6)
