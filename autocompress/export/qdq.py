"""ONNX models of few bits: QuantizeLinear and DequantizeLinear where a network has quantizers.

The network is exported in floating point, then pairs are put around its layers: runtimes turn a layer
between two pairs into one on integers. Weights are stored as 8-bit integers, those of fewer bits in a
restricted range; inputs of fewer bits are clipped to their range. Biases become 32-bit integers at the
product of both scales, as integer kernels have them.
"""

import ast
import copy
from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn

from autocompress.errors import ExportError
from autocompress.quantize.grid import integers
from autocompress.quantize.layer import MOST_BIAS, QuantizedLayer, out_axis, quantized_layers
from autocompress.quantize.quantizer import Quantizer

MOST_BITS: Final = 8
RECTIFIERS: Final = ("Relu", "Clip")
LAYERS: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def in_floats(network: nn.Module) -> nn.Module:
    """Return a copy of a network without its quantizers."""
    found = copy.deepcopy(network)
    if isinstance(found, QuantizedLayer):
        return found.layer
    for name, layer in list(quantized_layers(found)):
        found.set_submodule(name, layer.layer)
    return found


def cannot_be_integers(network: nn.Module) -> str:
    """Say why a network has no form in integers; empty where it has one."""
    for name, layer in quantized_layers(network):
        for quantizer in (layer.weight, layer.input, layer.output):
            if not isinstance(quantizer, Quantizer):
                continue
            if quantizer.grid.bits > MOST_BITS:
                return (
                    f"layer {name} has {quantizer.grid.bits} bits; ONNX integers of opset 18 have at most 8"
                )
            if quantizer.grid.levels == "logarithmic":
                return f"layer {name} has logarithmic levels, which ONNX does not know"
    return ""


def insert_pairs(model: Any, network: nn.Module) -> Any:
    """Put the quantizers of a network into its ONNX model, which was exported from `in_floats`.

    Args:
        model: Changed in place; as PyTorch exported it, or with initializers by the names of parameters.
        network: What the quantizers are of.

    Returns:
        The model.

    Raises:
        ExportError: The network cannot be stored as integers, or a layer is not found in the model.
    """
    if reason := cannot_be_integers(network):
        raise ExportError(f"the network cannot be stored as integers: {reason}")
    _Pairs(model).insert(network)
    return model


class _Pairs:
    """One graph, and what is put into it."""

    def __init__(self, model: Any) -> None:
        self._graph = model.graph
        self._stored = {tensor.name: tensor for tensor in self._graph.initializer}
        self._alias = {
            node.output[0]: node.input[0]
            for node in self._graph.node
            if node.op_type == "Identity" and node.input[0] in self._stored
        }
        # What is put before or behind a node, by its position.
        self._before: dict[int, list[Any]] = {}
        self._behind: dict[int, list[Any]] = {}
        self._entered: dict[tuple[str, bytes], str] = {}
        self._count = 0

    def insert(self, network: nn.Module) -> None:
        """Put all pairs in."""
        nodes = [(at, node) for at, node in enumerate(self._graph.node) if node.op_type in LAYERS]
        # Linear layers on more than two axes read transposed weights without a name, and equal weights are
        # stored once, by the name of one of them: the exporters' notes tell layers apart. A model of our own
        # making has none.
        by_module = {module: at for at, node in nodes if (module := _module_of(node)) is not None}
        by_weight = {self._alias.get(node.input[1], node.input[1]): at for at, node in nodes}
        for name, layer in quantized_layers(network):
            if layer.weight is None and layer.input is None:
                continue
            at = by_module.get(name, by_weight.get(f"{name}.weight" if name else "weight"))
            if at is None:
                raise ExportError(
                    f"layer {name} is not in the ONNX model by the name of its weights: PyTorch's exporter "
                    "changed it; leave it in floating point, or leave 'onnx' out of formats"
                )
            self._layer(at, layer)
        ordered = [
            one
            for at, node in enumerate(self._graph.node)
            for one in (*self._before.get(at, ()), node, *self._behind.get(at, ()))
        ]
        del self._graph.node[:]
        self._graph.node.extend(ordered)
        used = {name for node in ordered for name in node.input}
        kept = [tensor for tensor in self._stored.values() if tensor.name in used]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)

    def _layer(self, at: int, layer: QuantizedLayer) -> None:
        node = self._graph.node[at]
        scales: list[NDArray[Any]] = []
        if isinstance(layer.input, Quantizer):
            node.input[0] = self._input(at, node.input[0], layer.input)
            scales.append(_array(layer.input.step()))
        if isinstance(layer.weight, Quantizer):
            plain = cast(Any, layer.layer)
            node.input[1] = self._weight(at, plain, layer.weight, transposed=node.op_type == "MatMul")
            scales.append(_array(layer.weight.step()))
            if plain.bias is not None and len(scales) == 2:
                q = bias_integers(plain.bias, scale := scales[0] * scales[1])
                if len(node.input) > 2:
                    node.input[2] = self._bias(at, q, scale)
                else:
                    self._added(node.output[0], q * scale)
        if isinstance(layer.output, Quantizer):
            self._output(at, layer.output)

    def _input(self, at: int, value: str, quantizer: Quantizer) -> str:
        """Return the tensor that a layer reads; layers of one tensor at one scale share the pair."""
        key = value, repr((quantizer.grid, quantizer.step().tolist(), quantizer.zero_point.tolist())).encode()
        if key not in self._entered:
            self._entered[key] = self._pair(value, quantizer, self._before.setdefault(at, []))
        entered: str = self._entered[key]
        return entered

    def _output(self, at: int, quantizer: Quantizer) -> None:
        """Quantize what a layer, or the ReLU that alone reads it, gives: readers see the pair's output."""
        value = self._graph.node[at].output[0]
        readers = [n for n, node in enumerate(self._graph.node) if value in node.input]
        if len(readers) == 1 and self._graph.node[readers[0]].op_type in RECTIFIERS:
            at, value = readers[0], self._graph.node[readers[0]].output[0]
        raw = self._name("raw")
        self._graph.node[at].output[0] = raw
        nodes = self._behind.setdefault(at, [])
        self._pair(raw, quantizer, nodes)
        nodes[-1].output[0] = value

    def _pair(self, value: str, quantizer: Quantizer, nodes: list[Any]) -> str:
        grid, scale = quantizer.grid, _array(quantizer.step())
        kind: Any = np.int8 if grid.signed else np.uint8
        point = _array(quantizer.zero_point).round()
        full = np.iinfo(kind)
        if (grid.qmin, grid.qmax) != (full.min, full.max):
            bounds = [np.float32((q - point[0]) * scale[0]) for q in (grid.qmin, grid.qmax)]
            names = [self._store("bound", np.array(bound, dtype=np.float32)) for bound in bounds]
            value = self._node(nodes, "Clip", [value, *names])
        settings = [self._store("scale", scale[0]), self._store("zero", point[0].astype(kind))]
        return self._node(
            nodes, "DequantizeLinear", [self._node(nodes, "QuantizeLinear", [value, *settings]), *settings]
        )

    def _weight(self, at: int, layer: Any, quantizer: Quantizer, *, transposed: bool) -> str:
        q = stored_integers(layer.weight, quantizer)
        scale, point = _array(quantizer.step()), _array(quantizer.zero_point).round().astype(np.int8)
        one = quantizer.axis is None
        names = [
            self._store("weight", q.T if transposed else q),
            self._store("scale", scale[0] if one else scale),
            self._store("zero", point[0] if one else point),
        ]
        nodes = self._before.setdefault(at, [])
        axis = 1 if transposed else out_axis(layer)
        return self._node(nodes, "DequantizeLinear", names, **({} if one else {"axis": axis}))

    def _added(self, value: str, bias: NDArray[Any]) -> None:
        """Give the addition behind a MatMul the bias that integers can hold."""
        for node in self._graph.node:
            if node.op_type == "Add" and value in node.input:
                side = 1 - list(node.input).index(value)
                if self._alias.get(node.input[side], node.input[side]) in self._stored:
                    node.input[side] = self._store("bias", bias.astype(np.float32))

    def _bias(self, at: int, q: NDArray[np.int32], scale: NDArray[Any]) -> str:
        one = len(scale) == 1
        names = [self._store("bias", q), self._store("scale", scale[0] if one else scale)]
        nodes = self._before.setdefault(at, [])
        return self._node(nodes, "DequantizeLinear", names, **({} if one else {"axis": 0}))

    def _node(self, nodes: list[Any], kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = self._name(kind)
        nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def _store(self, kind: str, array: Any) -> str:
        name = self._name(kind)
        self._stored[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"quantized_{kind}_{self._count}"


def stored_integers(weight: Tensor, quantizer: Quantizer) -> NDArray[np.int8]:
    """Return weights as the 8-bit integers in which they are stored."""
    axis = quantizer.axis
    q = integers(
        weight.detach(),
        quantizer.step().detach(),
        quantizer.zero_point.detach().round(),
        quantizer.grid,
        axis,
    )
    return cast(NDArray[np.int8], q.cpu().numpy().astype(np.int8))


def bias_integers(bias: Tensor, scale: NDArray[Any]) -> NDArray[np.int32]:
    """Return a bias as multiples of the product of both scales."""
    q = np.rint(_array(bias).astype(np.float64) / scale)
    return cast(NDArray[np.int32], np.clip(q, -MOST_BIAS, MOST_BIAS).astype(np.int32))


def _module_of(node: Any) -> str | None:
    """Return the module whose `forward()` a node computes, as both of PyTorch's exporters note it."""
    for note in node.metadata_props:
        if note.key == "pkg.torch.onnx.name_scopes":
            scopes: list[str] = ast.literal_eval(note.value)
            return scopes[-2] if len(scopes) > 1 else None
    if not node.name.startswith("/"):
        return None
    # The older one: /blocks/blocks.0/linear/MatMul.
    path: list[str] = []
    for part in node.name.split("/")[1:-1]:
        path[-1 if path and part.startswith(f"{path[-1]}.") else len(path) :] = [part]
    return ".".join(path)


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy().astype(np.float32)
