"""ONNX models built straight from operations, for timing: in milliseconds, not half a second a block.

The nodes are those of an exported network (batch norm folded into the convolution, means over the image as
GlobalAveragePool: `autocompress.export.formats`), so that a runtime fuses a timed block as it will fuse the
exported one.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from autocompress.errors import ExportError
from autocompress.ops import (
    Activation,
    Add,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool,
    Ops,
    OpSpec,
    SqueezeExcite,
)
from autocompress.prune.ops import Convolution
from autocompress.quantize.ops import Conversion, Quantized

if TYPE_CHECKING:
    from torch import nn

Array = NDArray[np.float32]
Parameters = dict[str, Array]

OPSET: Final = 18
# Read by every runtime that knows opset 18; onnx would write its own newest.
IR_VERSION: Final = 10
KNOWN: Final = frozenset({Add, Conv2d, GlobalAvgPool, Linear, MaxPool, SqueezeExcite})


def onnx_model(
    blocks: Sequence[tuple[str, Ops]], *, batch: int, seed: int = 0, network: "nn.Module | None" = None
) -> bytes:
    """Build the ONNX model that runs these blocks one after another.

    A list with operations of a space's own, which have no rule here, is exported by PyTorch as a whole, which
    gives the same input and output.

    A single operation on integers reads and gives integers: making them of floats is an operation of its own.

    Args:
        blocks: Name and operations of each active block, as `SearchSpace.operations` returns them.
        batch: Images at once, fixed in the model.
        seed: Of the random weights; they are scaled so that activations neither vanish nor overflow, which
            would change the timing.
        network: Made by `autocompress.network.build_network(blocks)`, in evaluation mode: its weights are
            taken instead, batch norm folded.

    Returns:
        A serialized model, `input (batch, *in_shape)` to `output`, 32-bit floats but for a single operation
        on integers.

    Raises:
        ExportError: No operations, or a batch below 1.
    """
    operations = [op for _, ops in blocks for op in ops]
    if not operations or batch < 1:
        raise ExportError(
            f"an ONNX model needs at least one operation and batch >= 1, got {len(operations)} operations "
            f"and batch {batch}"
        )
    shape = (batch, *operations[0].in_shape)
    if len(operations) == 1 and isinstance(operations[0], Quantized | Conversion):
        return _Graph(np.random.default_rng(seed)).alone(operations[0], batch)
    if not all(type(op) in KNOWN for op in operations):
        if network is None:
            return _random_by_torch(tuple(blocks), shape, seed)
        return _exported_by_torch(network, shape)
    graph = _Graph(np.random.default_rng(seed))
    value = "input"
    for name, ops in blocks:
        value = graph.block(name, ops, value, network)
    return graph.serialized(value, shape, operations[-1], batch)


# A profile builds everything several times.
@lru_cache(maxsize=1024)
def _random_by_torch(blocks: tuple[tuple[str, Ops], ...], shape: tuple[int, ...], seed: int) -> bytes:
    import torch

    from autocompress.network import build_network

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(blocks)
    return _exported_by_torch(network, shape)


def _exported_by_torch(network: "nn.Module", shape: tuple[int, ...]) -> bytes:
    """Export by the older exporter: the same operators in a hundredth of the time of the newer one.

    A profile of cells has forty whole networks. What leaves with a user is made by the newer one
    (`formats.write_onnx`), and so is here what the older one cannot (`channel_shuffle`), or leaves to the
    runtime, which refuses it (padding "same" of a dilated convolution).

    Raises:
        ExportError: Neither can.
    """
    import torch

    from autocompress.export.qdq import in_floats, insert_pairs
    from autocompress.quantize.layer import has_quantizers

    if has_quantizers(network):
        model = onnx_of(_exported_by_torch(in_floats(network), shape))
        paired: bytes = insert_pairs(model, network).SerializeToString()
        return paired
    try:
        model = _by_exporter(network, shape, dynamo=False)
        if not any(attribute.name == "auto_pad" for node in model.graph.node for attribute in node.attribute):
            serialized: bytes = model.SerializeToString()
            return serialized
    except torch.onnx.OnnxExporterError:
        pass
    try:
        serialized = _by_exporter(network, shape, dynamo=True).SerializeToString()
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"PyTorch cannot export the network as ONNX: {error}") from error
    return serialized


def onnx_of(model: bytes) -> Any:
    """Return a serialized model as ONNX's own object."""
    import onnx

    return onnx.load_from_string(model)


def _by_exporter(network: "nn.Module", shape: tuple[int, ...], *, dynamo: bool) -> Any:
    import torch

    from autocompress.export.quiet import quiet, quieter

    buffer = io.BytesIO()
    with quiet() if dynamo else quieter():
        torch.onnx.export(
            network.eval(),
            (torch.zeros(shape),),
            buffer,  # type: ignore[arg-type]  # the annotation knows paths only
            input_names=["input"],
            output_names=["output"],
            opset_version=OPSET,
            dynamo=dynamo,
            external_data=False,
            verbose=False,
        )
    return onnx_of(buffer.getvalue())


class _Graph:
    """Nodes and weights as they are added; values are named by number."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._nodes: list[Any] = []
        self._weights: list[Any] = []

    def serialized(self, value: str, shape: tuple[int, ...], last: OpSpec, batch: int) -> bytes:
        """Close the graph at `value`."""
        out_shape = (batch, last.out_features) if isinstance(last, Linear) else (batch, *last.out_shape)
        self._nodes.append(helper.make_node("Identity", [value], ["output"]))
        return self._model((TensorProto.FLOAT, TensorProto.FLOAT), shape, out_shape)

    def alone(self, op: Quantized | Conversion, batch: int) -> bytes:
        """Return the model of one operation on 8-bit integers, which reads and gives integers."""
        floats = TensorProto.FLOAT, TensorProto.UINT8
        if isinstance(op, Conversion):
            way = floats if op.kind == "quantize" else floats[::-1]
            kind = "QuantizeLinear" if op.kind == "quantize" else "DequantizeLinear"
            scale = [self._constant(np.array(value)) for value in (np.float32(0.02), np.uint8(128))]
            self._nodes.append(helper.make_node(kind, ["input", *scale], ["output"]))
            return self._model(way, (batch, *op.in_shape), (batch, *op.out_shape))
        if (op.weight_bits, op.activation_bits) != (8, 8):
            raise ExportError(f"runtimes here have kernels for 8 bits alone, not for {op.key}")
        if not isinstance(op.op, Conv2d | Convolution | Linear):
            raise ExportError(f"no ONNX rule for {op.key}")
        value = self._dequantized("input", 0.02, 128)
        bare = replace(op.op, activation="none") if not isinstance(op.op, Linear) else op.op
        rectified = op.op.activation in ("relu", "relu6")
        if isinstance(bare, Linear):
            weights = self._quantized_weights((bare.out_features, bare.in_features), bias=bare.bias)
            value = self._node("Gemm", self._node("Flatten", value, axis=1), *weights, transB=1)
            shape: tuple[int, ...] = (batch, bare.out_features)
        else:
            kind, size, axis, geometry = _geometry(bare)
            weights = self._quantized_weights(size, bias=bare.bias or bare.norm, axis=axis)
            value = self._node(kind, value, *weights, **geometry)
            shape = (batch, *bare.out_shape)
        if rectified:
            value = self._node("Relu", value)
        if isinstance(bare, Linear) or (op.op.activation != "none" and not rectified):
            # Floats leave: of the last layer, and of activations that have no kernel on integers.
            if not isinstance(bare, Linear):
                pair = [self._constant(np.array(v)) for v in (np.float32(0.05), np.uint8(128))]
                value = self._node("DequantizeLinear", self._node("QuantizeLinear", value, *pair), *pair)
            value = self._activation(op.op.activation if not rectified else "none", value)
            self._nodes.append(helper.make_node("Identity", [value], ["output"]))
            return self._model((floats[1], floats[0]), (batch, *op.in_shape), shape)
        zero = np.uint8(0 if rectified else 128)
        pair = [self._constant(np.array(v)) for v in (np.float32(0.05), zero)]
        self._nodes.append(helper.make_node("QuantizeLinear", [value, *pair], ["output"]))
        return self._model((floats[1], floats[1]), (batch, *op.in_shape), shape)

    def _dequantized(self, value: str, scale: float, zero: int) -> str:
        pair = [self._constant(np.array(v)) for v in (np.float32(scale), np.uint8(zero))]
        return self._node("DequantizeLinear", value, *pair)

    def _quantized_weights(self, shape: tuple[int, ...], *, bias: bool, axis: int = 0) -> list[str]:
        """Store random 8-bit weights with a scale a channel, and a 32-bit bias if there is one."""
        scale = np.full(shape[axis], math.sqrt(2 / math.prod(shape[1:])) / 64, dtype=np.float32)
        q = self._rng.integers(-127, 128, shape).astype(np.int8)
        zero = np.zeros(shape[axis], dtype=np.int8)
        stored = [self._constant(array) for array in (q, scale, zero)]
        found = [self._node("DequantizeLinear", *stored, axis=axis)]
        if bias:
            stored = [
                self._constant(array)
                for array in (
                    self._rng.integers(-100, 101, shape[axis]).astype(np.int32),
                    scale * np.float32(0.02),
                )
            ]
            found.append(self._node("DequantizeLinear", *stored, axis=0))
        return found

    def _model(self, kinds: tuple[int, int], in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> bytes:
        graph = helper.make_graph(
            self._nodes,
            "blocks",
            [helper.make_tensor_value_info("input", kinds[0], in_shape)],
            [helper.make_tensor_value_info("output", kinds[1], out_shape)],
            self._weights,
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
        )
        serialized: bytes = model.SerializeToString()
        return serialized

    def block(self, name: str, ops: Ops, value: str, network: "nn.Module | None") -> str:
        """Append one block; return the name of its output."""
        start = value
        module = None
        if network is not None:
            from autocompress.network import module_name

            module = network.get_submodule(module_name(name))
        for position, op in enumerate(ops):
            if isinstance(op, Add):
                value = self._node("Add", start, value)
                continue
            given = None if module is None else _parameters(module.get_submodule(str(position)))
            value = self._operation(op, value, given)
        return value

    def _operation(self, op: OpSpec, value: str, given: Parameters | None) -> str:
        if isinstance(op, Conv2d):
            return self._conv(op, value, given)
        if isinstance(op, Linear):
            weights = given or self._random("linear", (op.out_features, op.in_features), bias=op.bias)
            inputs = [self._node("Flatten", value, axis=1), *self._stored(weights, "linear")]
            return self._activation(op.activation, self._node("Gemm", *inputs, transB=1))
        if isinstance(op, SqueezeExcite):
            return self._squeeze_excite(op, value, given)
        if isinstance(op, MaxPool):
            return self._node(
                "MaxPool",
                value,
                kernel_shape=[op.kernel] * 2,
                strides=[op.stride] * 2,
                pads=[op.padding] * 4,
            )
        if isinstance(op, GlobalAvgPool):
            return self._mean(value)
        raise ExportError(f"no ONNX rule for operation {op.key}")

    def _conv(self, op: Conv2d, value: str, given: Parameters | None) -> str:
        shape = (op.out_channels, op.in_channels // op.groups, op.kernel, op.kernel)
        weights = given or self._random("conv", shape, bias=op.bias or op.norm)
        value = self._node(
            "Conv",
            value,
            *self._stored(weights, "conv"),
            kernel_shape=[op.kernel] * 2,
            strides=[op.stride] * 2,
            pads=[op.kernel // 2] * 4,
            group=op.groups,
        )
        return self._activation(op.activation, value)

    def _squeeze_excite(self, op: SqueezeExcite, value: str, given: Parameters | None) -> str:
        weights = given or {
            **self._random("reduce", (op.hidden, op.channels, 1, 1), bias=True),
            **self._random("expand", (op.channels, op.hidden, 1, 1), bias=True),
        }
        scale = self._node("Conv", self._mean(value), *self._stored(weights, "reduce"), kernel_shape=[1, 1])
        scale = self._node("Relu", scale)
        scale = self._node("Conv", scale, *self._stored(weights, "expand"), kernel_shape=[1, 1])
        return self._node("Mul", value, self._activation("hard_sigmoid", scale))

    def _mean(self, value: str) -> str:
        return self._node("GlobalAveragePool", value)

    def _activation(self, activation: Activation, value: str) -> str:
        match activation:
            case "none":
                return value
            case "relu":
                return self._node("Relu", value)
            case "relu6":
                bounds = (self._constant(np.array(bound, dtype=np.float32)) for bound in (0, 6))
                return self._node("Clip", value, *bounds)
            case "hard_swish":
                return self._node("HardSwish", value)
            case "hard_sigmoid":
                return self._node("HardSigmoid", value, alpha=1 / 6, beta=0.5)
            case "sigmoid":
                return self._node("Sigmoid", value)
            case "silu":
                return self._node("Mul", value, self._node("Sigmoid", value))

    def _node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def _constant(self, array: NDArray[Any]) -> str:
        name = f"w{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(array, name))
        return name

    def _stored(self, weights: Parameters, part: str) -> list[str]:
        """Store weight and bias of a part; return their names, one where there is no bias."""
        names = (f"{part}.weight", f"{part}.bias")
        return [self._constant(weights[name]) for name in names if name in weights]

    def _random(self, part: str, shape: tuple[int, ...], *, bias: bool) -> Parameters:
        # Variance 2 / fan-in keeps activations of one size through any depth (He et al., ICCV 2015).
        scale = np.float32(math.sqrt(2 / math.prod(shape[1:])))
        result = {f"{part}.weight": self._rng.standard_normal(shape, dtype=np.float32) * scale}
        if bias:
            result[f"{part}.bias"] = self._rng.standard_normal(shape[0], dtype=np.float32) * np.float32(0.1)
        return result


def _geometry(op: Conv2d | Convolution) -> tuple[str, tuple[int, ...], int, dict[str, Any]]:
    """Return kind of node, shape of weights, their axis of output channels, and attributes."""
    if isinstance(op, Conv2d):
        op = Convolution(
            op.in_channels, op.out_channels, op.height, op.width, (op.kernel,) * 2, (op.stride,) * 2,
            (op.kernel // 2,) * 2, groups=op.groups,
        )  # fmt: skip
    attributes = {
        "kernel_shape": list(op.kernel),
        "strides": list(op.stride),
        "pads": [*op.padding, *op.padding],
        "dilations": list(op.dilation),
        "group": op.groups,
    }
    if op.transposed:
        attributes["output_padding"] = list(op.output_padding)
        return "ConvTranspose", (op.in_channels, op.out_channels // op.groups, *op.kernel), 1, attributes
    return "Conv", (op.out_channels, op.in_channels // op.groups, *op.kernel), 0, attributes


def _parameters(module: "nn.Module") -> Parameters:
    """Return weights and biases by name, a batch norm `bn` folded into the convolution `conv` before it."""
    state = {name: tensor.detach().cpu().double().numpy() for name, tensor in module.state_dict().items()}
    if "bn.running_var" in state:
        epsilon = float(module.get_submodule("bn").eps)  # type: ignore[arg-type]
        scale = state["bn.weight"] / np.sqrt(state["bn.running_var"] + epsilon)
        shift = state.get("conv.bias", 0.0) - state["bn.running_mean"]
        state["conv.weight"] = state["conv.weight"] * scale[:, None, None, None]
        state["conv.bias"] = shift * scale + state["bn.bias"]
    return {
        name: np.ascontiguousarray(array, dtype=np.float32)
        for name, array in state.items()
        if not name.startswith("bn.")
    }
