"""DARTS cells in PyTorch: as plain modules, as what a supernet shares, and as mixtures.

Source: Liu et al., DARTS, ICLR 2019, and its repository; see `search_spaces.darts_ops`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.elastic.layers import NORM_EPS, SharedParts
from autocompress.elastic.partial import identity, through_part, weighted
from autocompress.errors import SpaceError
from autocompress.network import DropPath
from autocompress.ops import EdgeMixture
from search_spaces.darts_ops import EDGES, INPUTS, STEPS, DartsCell, is_free, steps_of

Pair = tuple[Tensor, Tensor]
"""The output of the last cell but one, and of the last."""


class Twice(nn.Module):
    """One tensor as a pair."""

    def forward(self, x: Tensor) -> Pair:
        """Return the tensor twice."""
        return x, x


class Last(nn.Module):
    """The last of a pair."""

    def forward(self, pair: Pair) -> Tensor:
        """Return it."""
        return pair[1]


class FactorizedReduce(nn.Module):
    """ReLU, two 1x1 convolutions at stride 2, one of them shifted by a pixel, batch norm."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Make both convolutions, each for a half of the output."""
        super().__init__()
        first = out_channels // 2
        self.conv1 = nn.Conv2d(in_channels, first, 1, stride=2, bias=False)
        self.conv2 = nn.Conv2d(in_channels, out_channels - first, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, channels, height, width)` to half the height and width."""
        x = x.relu()
        found: Tensor = self.bn(torch.cat([self.conv1(x), self.conv2(x[:, :, 1:, 1:])], dim=1))
        return found


class Cell(nn.Module):
    """A cell with two edges a node.

    Args:
        prepared: What the two inputs go through.
        edges: Source and target to the module of the edge.
    """

    def __init__(self, prepared: Sequence[nn.Module], edges: dict[tuple[int, int], nn.Module]) -> None:
        """Name the parts."""
        super().__init__()
        self.preprocess0, self.preprocess1 = prepared
        self.incoming = [
            sorted(source for source, target in edges if target == node)
            for node in range(INPUTS, INPUTS + STEPS)
        ]
        for (source, target), edge in edges.items():
            self.add_module(f"edge_{source}_{target}", edge)

    def forward(self, pair: Pair) -> Pair:
        """Map a pair to the second and the joined nodes."""
        nodes = [self.preprocess0(pair[0]), self.preprocess1(pair[1])]
        for target, sources in enumerate(self.incoming, start=INPUTS):
            first, second = (self.get_submodule(f"edge_{s}_{target}")(nodes[s]) for s in sources)
            nodes.append(first + second)
        return pair[1], torch.cat(nodes[INPUTS:], dim=1)


def _padding(kernel: int, dilation: int) -> int:
    return dilation * (kernel - 1) // 2


def edge_module(operation: str, channels: int, stride: int) -> nn.Module:
    """Build what an edge other than `none` does."""
    if operation == "max_pool_3x3":
        return nn.MaxPool2d(3, stride, padding=1)
    if operation == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
    if operation == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, (kind, kernel, step, dilation) in steps_of(operation, stride):
        if kind == "relu":
            layers[name] = nn.ReLU()
        elif kind == "bn":
            layers[name] = nn.BatchNorm2d(channels)
        else:
            layers[name] = nn.Conv2d(
                channels,
                channels,
                kernel,
                stride=step,
                padding=_padding(kernel, dilation),
                dilation=dilation,
                groups=channels if kind == "depthwise" else 1,
                bias=False,
            )
    return nn.Sequential(layers)


def preprocessing(in_channels: int, out_channels: int, halved: bool) -> nn.Module:
    """Build what brings an input of a cell to its channels, and to its size."""
    if halved:
        return FactorizedReduce(in_channels, out_channels)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["relu"] = nn.ReLU()
    parts["conv"] = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    parts["bn"] = nn.BatchNorm2d(out_channels)
    return nn.Sequential(parts)


def cell_module(cell: DartsCell) -> nn.Module:
    """Build a cell with the edges that it keeps."""
    edges: dict[tuple[int, int], nn.Module] = {}
    for (source, target), operation in cell.kept.items():
        built = edge_module(operation, cell.channels, cell.stride(source))
        layers = {operation: built}
        if not is_free(operation, cell.stride(source)):
            layers["drop"] = DropPath()
        edges[source, target] = nn.Sequential(OrderedDict(layers))
    return Cell([op.module() for op in cell.prepared], edges)


def shared_cell(cells: Sequence[DartsCell]) -> nn.Module:
    """Build all operations of all edges of some cells."""
    one = cells[0]
    if any(cell.prepared != one.prepared or cell.reduction != one.reduction for cell in cells):
        raise SpaceError("cells at one place must have the same channels and sizes")
    used: dict[tuple[int, int], set[str]] = {edge: set() for edge in EDGES}
    for cell in cells:
        for edge, operation in cell.kept.items():
            used[edge].add(operation)
    edges = {
        f"edge_{source}_{target}": nn.ModuleDict(
            {name: edge_module(name, one.channels, one.stride(source)) for name in sorted(names)}
        )
        for (source, target), names in used.items()
    }
    first, second = (op.module() for op in one.prepared)
    return nn.ModuleDict({"preprocess0": first, "preprocess1": second, **edges})


def run_mixed_cell(
    cell: DartsCell, shared: SharedParts, pair: Pair, edges: Sequence[EdgeMixture], channels: int
) -> Pair:
    """Run a cell with all its edges, each a weighted sum of operations."""
    nodes = [
        _prepare(shared, f"preprocess{at}", x, op.halved)
        for at, (x, op) in enumerate(zip(pair, cell.prepared, strict=True))
    ]
    for node in range(INPUTS, INPUTS + STEPS):
        total: Tensor | None = None
        for (source, target), edge in zip(EDGES, edges, strict=True):
            if target != node:
                continue
            stride = cell.stride(source)
            mixed = partial(_mixed, shared, f"edge_{source}_{target}", stride, edge)
            added = through_part(mixed, nodes[source], channels, stride=stride)
            added = added if edge.scale is None else edge.scale.to(added.dtype) * added
            total = added if total is None else total + added
        nodes.append(total)  # type: ignore[arg-type]
    return pair[1], torch.cat(nodes[INPUTS:], dim=1)


def _mixed(shared: SharedParts, place: str, stride: int, edge: EdgeMixture, x: Tensor) -> Tensor:
    """Run the weighted sum of operations on an edge; convolutions use leading channels of their weights."""
    runs = (
        (partial(_run, shared, f"{place}.{name}", name, stride, edge.dropout.get(name, 0.0)), weight)
        for name, weight in edge.parts
        if name != "none"
    )
    total = weighted(x, runs)
    return torch.zeros_like(x[:, :, ::stride, ::stride]) if total is None else total


def _run(shared: SharedParts, place: str, operation: str, stride: int, dropout: float, x: Tensor) -> Tensor:
    """Run an operation of an edge on leading channels; an identity drops some of what it gives."""
    width = x.shape[1]
    if is_free(operation, stride):
        return identity(x, dropout)
    if operation == "skip_connect":
        return _halved(shared, place, x, width)
    if operation == "max_pool_3x3":
        return _without_scale(F.max_pool2d(x, 3, stride, padding=1))
    if operation == "avg_pool_3x3":
        return _without_scale(F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False))
    for name, (kind, kernel, step, dilation) in steps_of(operation, stride):
        path = f"{place}.{name}"
        if kind == "relu":
            x = x.relu()
        elif kind == "bn":
            x = shared.norm(path, x)
        else:
            weight = shared.parameter(f"{path}.weight")
            depthwise = kind == "depthwise"
            x = F.conv2d(
                x,
                weight[:width] if depthwise else weight[:width, :width],
                stride=step,
                padding=_padding(kernel, dilation),
                dilation=dilation,
                groups=width if depthwise else 1,
            )
    return x


def _prepare(shared: SharedParts, place: str, x: Tensor, halved: bool) -> Tensor:
    if halved:
        return _halved(shared, place, x, None)
    return shared.norm(f"{place}.bn", F.conv2d(x.relu(), shared.parameter(f"{place}.conv.weight")))


def _halved(shared: SharedParts, place: str, x: Tensor, width: int | None) -> Tensor:
    """Run a factorized reduction, on all its channels or on leading ones, which it keeps."""
    first, second = shared.parameter(f"{place}.conv1.weight"), shared.parameter(f"{place}.conv2.weight")
    if width is not None:
        first, second = first[: width // 2, :width], second[: width - width // 2, :width]
    x = x.relu()
    both = [F.conv2d(x, first, stride=2), F.conv2d(x[:, :, 1:, 1:], second, stride=2)]
    return shared.norm(f"{place}.bn", torch.cat(both, dim=1))


def _without_scale(x: Tensor) -> Tensor:
    """Normalise what a pool computes: in a mixture it competes with operations that end in a batch norm."""
    return F.batch_norm(x, None, None, None, None, training=True, eps=NORM_EPS)
