"""Write a network as ONNX, as a torch.export archive, and as safetensors with its operations."""

import copy
import dataclasses
import io
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from autocompress.export import loader, narrow_loader
from autocompress.export.qdq import in_floats, insert_pairs
from autocompress.export.quiet import quiet
from autocompress.network import model_of, module_name, unshared
from autocompress.ops import Ops, OpSpec, Shape
from autocompress.prune.network import NarrowNetwork
from autocompress.quantize.layer import has_quantizers
from autocompress.quantize.network import QuantizedNetwork

OPSET = 18
"""The exporter's own; a newer one gives the same graph and asks for a newer runtime."""

INPUT, OUTPUT, BATCH = "images", "outputs", "batch"

KINDS = ("Conv2d", "SqueezeExcite", "GlobalAvgPool", "MaxPool", "Linear", "Add")
"""Operations of `autocompress.ops` that the loader rebuilds."""


def trace(network: nn.Module, in_shape: Shape) -> torch.export.ExportedProgram:
    """Trace the network with a free batch size, batch norm folded into the convolutions.

    A network that makes a constant of the batch size, as `len(x)` does, is traced for one image.

    Args:
        network: On the CPU, in eval mode.
        in_shape: Channels, height, width.
    """
    folded = _fold_batch_norm(network)
    with quiet(), torch.no_grad():
        try:
            # Noise, never the user's images: the archive stores them. Batch 1 would be frozen in.
            program = torch.export.export(
                folded, (torch.zeros(2, *in_shape),), dynamic_shapes=({0: torch.export.Dim(BATCH)},)
            )
        except Exception as error:  # noqa: BLE001  (of many classes; raised again if another batch fails too)
            try:
                program = torch.export.export(folded, (torch.zeros(1, *in_shape),))
            except Exception:  # noqa: BLE001
                raise error from None
    for node in program.graph.nodes:
        # Paths of this machine, half of the archive.
        node.meta.pop("stack_trace", None)
    return program


def batch_of(program: torch.export.ExportedProgram) -> int | str:
    """Return the batch size that a traced network takes: `BATCH` where it is free."""
    (images,) = (n for n in program.graph.nodes if n.name in program.graph_signature.user_inputs)
    size = images.meta["val"].shape[0]
    return size if isinstance(size, int) else BATCH


def _fold_batch_norm(network: nn.Module) -> nn.Module:
    """Return a copy in which a batch norm that follows a convolution is part of its weights.

    The ONNX exporter would fold them itself, in more time; the torch.export archive would keep them, and on
    the largest network of `mobilenet_v3(preset="tiny")` take nearly twice as long for an image.
    """
    folded = copy.deepcopy(network)
    # Exactly these types: a subclass may run its layers in another order, or do more than its parent.
    for sequence in [module for module in folded.modules() if type(module) is nn.Sequential]:
        for (name, first), (after, second) in itertools.pairwise(list(sequence.named_children())):
            if type(first) is nn.Conv2d and type(second) is nn.BatchNorm2d and second.track_running_stats:
                sequence.set_submodule(name, fuse_conv_bn_eval(first, second))
                sequence.set_submodule(after, nn.Identity())
    return folded


def write_torch_export(path: Path, program: torch.export.ExportedProgram) -> None:
    """Write the traced network for `torch.export.load`."""
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer)
    # Not by PyTorch to the path: when the disk is full, its writer in C++ aborts the whole process.
    path.write_bytes(buffer.getvalue())


def write_onnx(
    path: Path, program: torch.export.ExportedProgram, network: nn.Module | None = None
) -> dict[str, int]:
    """Write the traced network as one ONNX file, weights inside.

    The exporter keeps HardSwish whole; `tests/export` holds it to that, because a graph of Add, Clip, Mul
    and Div takes a third longer than the one that was priced.

    Args:
        path: Of the file.
        program: The traced network.
        network: If it has quantizers, the program is that of `qdq.in_floats` of it; they are put in.

    Returns:
        How often each operator stands in the graph.
    """
    with quiet():
        exported = torch.onnx.export(
            program,
            (),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    if exported is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    model: onnx.ModelProto = exported.model_proto
    _pool_globally(model.graph)
    if network is not None and has_quantizers(network):
        insert_pairs(model, network)
    _strip(model.graph)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def onnx_of(network: nn.Module, in_shape: Shape, path: Path) -> None:
    """Write any network as one ONNX file, with its quantizers where it has some; nothing is compared."""
    write_onnx(path, trace(in_floats(network) if has_quantizers(network) else network, in_shape), network)


def _pool_globally(graph: Any) -> None:
    """Turn means over height and width into GlobalAveragePool.

    ONNX Runtime keeps its blocked memory layout through the latter only. On the largest network of
    `mobilenet_v3(preset="tiny")` this saves 3 to 5 % of the latency.
    """
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in constants:
            continue
        axes = {int(axis) % 4 for axis in numpy_helper.to_array(constants[node.input[1]]).flatten()}
        keeps = all(attribute.i == 1 for attribute in node.attribute if attribute.name == "keepdims")
        if axes == {2, 3} and keeps and ranks.get(node.input[0]) == 4:
            node.op_type = "GlobalAveragePool"
            del node.input[1:]
            del node.attribute[:]
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _strip(graph: Any) -> None:
    """Drop what the exporter notes for debugging, a quarter of a small file, and name the batch axis."""
    traced = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output):
        for size in value.type.tensor_type.shape.dim:
            if traced and size.dim_param == traced:
                size.dim_param = BATCH
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.value_info[:]


def cannot_rebuild(blocks: Sequence[tuple[str, Ops]], origin: Mapping[str, Any] | None = None) -> str:
    """Say why no loader can rebuild these blocks, or a model of this origin; empty when one can."""
    if not blocks:
        return "" if origin else "its layers are of no space and of no factory: network.pt2 has them"
    if any(isinstance(op, QuantizedNetwork) for _, ops in blocks for op in ops):
        return (
            "a network of few bits is loaded from ONNX or torch.export: its quantizers are no part of PyTorch"
        )
    narrow = _narrow(blocks)
    if narrow is not None:
        made = narrow.source.origin
        return "" if made else "the model was given as an object: nothing says how to make it again"
    for name, ops in blocks:
        for op in ops:
            if type(op).__module__ != OpSpec.__module__ or type(op).__name__ not in KINDS:
                return (
                    f"block {name!r} runs {type(op).__qualname__}, an operation of {type(op).__module__}; "
                    f"the loader rebuilds only {', '.join(KINDS)}"
                )
    return ""


def _narrow(blocks: Sequence[tuple[str, Ops]]) -> NarrowNetwork | None:
    """Return the user's own model, made narrower, if that is what runs."""
    found = [op for _, ops in blocks for op in ops if isinstance(op, NarrowNetwork)]
    return found[0] if found else None


def write_safetensors(
    folder: Path,
    network: nn.Module,
    blocks: Sequence[tuple[str, Ops]],
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write the weights, the operations, and the loader that makes a network of them.

    Of a user's own model the weights have its own names, and the loader asks its own factory: that of the
    blocks, or `origin` where there are no blocks.
    """
    narrow = _narrow(blocks)
    if narrow is not None:
        payload: dict[str, Any] = dict(narrow.source.origin)
        weights: Mapping[str, torch.Tensor] = model_of(network).state_dict()
    elif origin is not None:
        payload, weights = dict(origin), network.state_dict()
    else:
        payload = {
            "blocks": [
                {
                    "name": module_name(name),
                    "ops": [{"kind": type(op).__name__, **dataclasses.asdict(op)} for op in ops],
                }
                for name, ops in blocks
            ]
        }
        weights = network.state_dict()
    path = folder / "network.safetensors"
    save_file(unshared(weights), path)
    # safetensors makes files that only their owner can read.
    path.chmod(0o644)
    (folder / "network.json").write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
    travels = loader if narrow is None and origin is None else narrow_loader
    shutil.copyfile(str(travels.__file__), folder / "loader.py")
