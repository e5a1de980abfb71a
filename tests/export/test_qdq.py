"""Networks of few bits as ONNX: ONNX Runtime computes on integers what PyTorch computes in simulation."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from quantized_networks import INTEGERS, images, residual, source
from torch import nn

from autocompress.errors import ExportError
from autocompress.export.formats import trace, write_onnx
from autocompress.export.onnx_graph import onnx_model
from autocompress.export.qdq import cannot_be_integers, in_floats, insert_pairs, stored_integers
from autocompress.latency.runtime import prepare
from autocompress.latency.target import Scheme, load_target
from autocompress.network import build_network
from autocompress.ops import Conv2d, Linear
from autocompress.prune.ops import Convolution
from autocompress.quantize.layer import quantized_layers
from autocompress.quantize.ops import Conversion, Quantized, at_bits
from autocompress.quantize.schemes import weights_of
from autocompress.quantize.source import Policy, QuantizationSource
from search_spaces.bits import bit_space

FLOATS = (32, 32)


def by_runtime(model: bytes, *, optimised: bool, x: torch.Tensor) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    return found


def exported(found: QuantizationSource, policy: Policy, batch: int) -> tuple[bytes, nn.Module]:
    """Return the ONNX model of a policy as a profile builds it, and the network in PyTorch."""
    space = bit_space(found, ends=None)
    ((name, (op,)),) = space.operations(space.smallest())
    blocks = [(name, (op.at(policy),))]
    network = build_network(blocks).eval()
    return onnx_model(blocks, batch=batch, network=network), network


@pytest.mark.parametrize("optimised", [True, False])
@pytest.mark.parametrize("quantized", [range(7), (), (0,), (1, 2), (4,), (6,), (0, 2, 4, 6)])
def test_integers_of_the_runtime_are_those_of_the_simulation(
    quantized: tuple[int, ...], optimised: bool
) -> None:
    found = source(
        widths=INTEGERS,
        outputs=True,
        scheme=Scheme((8,), activations="asymmetric", granularity=("per_channel",)),
    )
    policy = tuple((8, 8) if n in quantized else FLOATS for n in range(7))
    # Layers of one tensor are decided together.
    policy = (*policy[:3], policy[1], *policy[4:])
    x = images(8, seed=3)
    model, network = exported(found, policy, len(x))
    with torch.no_grad():
        expected = network(x).numpy()
    found_outputs = by_runtime(model, optimised=optimised, x=x)
    # A sum that is rounded the other way moves an output by a level or so.
    tolerance = 1e-5 if not quantized else 0.03
    assert np.abs(found_outputs - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("bits", [(2, 4), (4, 8), (8, 4)])
def test_fewer_bits_are_stored_as_8_bit_integers_in_a_restricted_range(bits: tuple[int, int]) -> None:
    found = source()
    policy = (bits,) * 7
    x = images(8, seed=3)
    model, network = exported(found, policy, len(x))
    with torch.no_grad():
        expected = network(x).numpy()
    assert np.abs(by_runtime(model, optimised=True, x=x) - expected).max() <= 0.05 * np.abs(expected).max()
    stored = [
        numpy_helper.to_array(tensor)
        for tensor in onnx.load_from_string(model).graph.initializer
        if tensor.name.startswith("quantized_weight")
    ]
    assert len(stored) == 7
    assert all(array.dtype == np.int8 for array in stored)
    grid = weights_of(found.scheme, bits[0])
    assert min(array.min() for array in stored) >= grid.qmin
    assert max(array.max() for array in stored) <= grid.qmax
    assert {len(np.unique(array)) for array in stored} <= set(range(2, 2 ** bits[0] + 1))


def test_a_quantized_layer_runs_on_integers_in_the_runtime(tmp_path: object) -> None:
    found = source(
        widths=INTEGERS,
        outputs=True,
        scheme=Scheme((8,), activations="asymmetric", granularity=("per_channel",)),
    )
    model, _ = exported(found, ((8, 8),) * 7, 1)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = f"{tmp_path}/optimised.onnx"
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert kinds.count("QLinearConv") == 6
    assert "Conv" not in kinds
    assert "QGemm" in kinds


class Tokens(nn.Module):
    """Linear layers over patches: two have equal weights, one has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.last = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 5)
        # Defined in another order than they run in.
        self.second, self.first = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.load_state_dict(self.first.state_dict())
        self.plain = nn.Linear(6, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.second(self.first(x).relu())
        x = self.plain(x)
        return self.last(x.mean(1))


@pytest.mark.parametrize("newer", [True, False])
@pytest.mark.parametrize("policy", [((8, 8),) * 5, ((8, 8), FLOATS, (8, 8), FLOATS, (8, 8))])
def test_linear_layers_over_patches_are_integers_too(policy: Policy, newer: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = source(Tokens().eval(), INTEGERS)
    x = images(8, seed=3)
    model, network = exported(found, policy, len(x))
    if newer:
        write_onnx(tmp_path / "network.onnx", trace(in_floats(network), (3, 8, 8)), network)
        model = (tmp_path / "network.onnx").read_bytes()
    with torch.no_grad():
        expected = network(x).numpy()
    difference = np.abs(by_runtime(model, optimised=False, x=x) - expected).max()
    assert difference <= 0.02 * np.abs(expected).max()
    stored = [
        t for t in onnx.load_from_string(model).graph.initializer if t.data_type == onnx.TensorProto.INT8
    ]
    weights = [tensor for tensor in stored if tensor.name.startswith("quantized_weight")]
    assert len(weights) == sum(bits != FLOATS for bits in policy)


def test_the_floats_of_a_network_are_those_of_the_model() -> None:
    found = source()
    network = found.network(((4, 4),) * 7)
    plain = in_floats(network)
    assert not list(quantized_layers(plain))
    with torch.no_grad():
        assert torch.equal(plain(images()), found.model(images()))
    assert list(quantized_layers(network))


def test_stored_integers_stand_for_the_simulated_weights() -> None:
    network = source().network(((4, 4),) * 7)
    for _, layer in quantized_layers(network):
        q = torch.from_numpy(stored_integers(layer.layer.weight, layer.weight)).float()
        scale = layer.weight.scale.reshape(-1, *[1] * (q.dim() - 1))
        with torch.no_grad():
            assert torch.allclose(q * scale, layer.weight(layer.layer.weight), atol=1e-6)


def test_a_layer_that_the_model_does_not_have_is_named() -> None:
    network = source().network(((8, 8),) * 7)
    other = onnx.load_from_string(onnx_model([("other", (Conv2d(3, 2, 8, 8),))], batch=1))
    with pytest.raises(ExportError, match="layer stem is not in the ONNX model"):
        insert_pairs(other, network)


@pytest.mark.parametrize(
    ("scheme", "bits", "text"),
    [
        (Scheme((16,)), (16, 16), "has 16 bits"),
        (Scheme((4,), "logarithmic"), (4, 4), "logarithmic levels"),
    ],
)
def test_what_onnx_cannot_hold_is_said(scheme: Scheme, bits: tuple[int, int], text: str) -> None:
    network = source(residual(), (bits,), scheme=scheme).network((bits,) * 7)
    assert text in cannot_be_integers(network)
    with pytest.raises(ExportError, match=text):
        insert_pairs(onnx.ModelProto(), network)


ROWS = [
    (at_bits(Conv2d(4, 6, 8, 8, kernel=3, activation="relu"), 8, 8), "uint8", "uint8"),
    (at_bits(Conv2d(4, 4, 8, 8, kernel=3, groups=4), 8, 8), "uint8", "uint8"),
    (at_bits(Conv2d(4, 6, 8, 8, activation="hard_swish"), 8, 8), "uint8", "float"),
    (at_bits(Linear(4, 3), 8, 8), "uint8", "float"),
    (at_bits(Convolution(4, 6, 8, 8, (1, 3), (1, 2), (0, 1), (1, 2)), 8, 8), "uint8", "uint8"),
    (at_bits(Convolution(4, 6, 8, 8, (3, 3), (2, 2), (1, 1), transposed=True), 8, 8), "uint8", "uint8"),
    (Conversion("quantize", 4, 8, 8), "float", "uint8"),
    (Conversion("dequantize", 4, 8, 8), "uint8", "float"),
]


@pytest.mark.parametrize(("op", "given", "made"), ROWS)
def test_a_row_of_a_table_is_between_integers_as_in_a_network(
    op: Quantized | Conversion, given: str, made: str
) -> None:
    model = onnx_model([("row", (op,))], batch=2)
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (entry,), (result,) = session.get_inputs(), session.get_outputs()
    assert entry.type == f"tensor({given})"
    assert result.type == f"tensor({made})"
    assert entry.shape == [2, *op.in_shape]
    numbers = np.zeros(entry.shape, dtype=np.float32 if given == "float" else np.uint8)
    assert session.run(None, {entry.name: numbers})[0].size == 2 * np.prod(op.out_shape)


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "openvino-cpu"])
def test_rows_and_networks_run_on_every_runtime_that_has_both_precisions(name: str) -> None:
    target = load_target(name)
    for op, _, _ in ROWS:
        prepare([("row", (op,))], target)()
    space = bit_space(source(widths=INTEGERS, outputs=True))
    for codes in (space.smallest(), space.largest(), *space.sample(2, np.random.default_rng(0))[:, None]):
        prepare(space.operations(codes), target)()


def test_there_are_no_rows_of_widths_without_kernels() -> None:
    with pytest.raises(ExportError, match="kernels for 8 bits alone"):
        onnx_model([("row", (at_bits(Conv2d(4, 6, 8, 8), 4, 8),))], batch=1)
