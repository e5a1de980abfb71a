"""What is noted while the graph of a model is followed: labels, what they slice, and what layers make."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree

from autocompress.prune.graph import Graph, place, shape_of
from autocompress.prune.label_tensor import fixed, rows, spread
from autocompress.prune.labels import Labels, Reason, Unions
from autocompress.prune.pricing import Pricer


class Ledger:
    """Labels of nodes, and what is found on the way.

    Args:
        graph: Of the model.
        batch: Images in the batch that the graph was made for.

    Attributes:
        graph: Of the model.
        unions: Which labels are the same.
        labels: Node to the labels of what it gives; a list of them where that is several tensors.
        made: Name of each layer that makes channels, in order, to their labels.
        slices: Name of a parameter or buffer to its axes that hold channels, with their labels.
        reads: Those axes of parameters along which a layer reads its input.
        pricer: What has been priced.
    """

    def __init__(self, graph: Graph, batch: int) -> None:
        self.graph = graph
        self.unions = Unions()
        self.labels: dict[Node, Any] = {}
        self.made: dict[str, Labels] = {}
        self.slices: dict[str, dict[int, Labels]] = {}
        self.reads: set[tuple[str, int]] = set()
        self.pricer = Pricer(graph, self.slices, batch)

    def held(self, node: Any) -> Any:
        """Return the labels of what a node gives; a stored vector gets some when it is first asked for."""
        if node not in self.labels and node.name in self.graph.stored:
            shape = shape_of(node)
            axes = [axis for axis, size in enumerate(shape) if size > 1]
            self.labels[node] = fixed(shape)
            if len(axes) == 1:
                own = self.unions.fresh(shape[axes[0]])
                self.slice(self.graph.stored[node.name], axes[0], own)
                self.labels[node] = spread(own, axes[0], shape)
        return self.labels.get(node)

    def stored(self, value: Any) -> str | None:
        """Return the name of a parameter or buffer that is an input of the graph."""
        return self.graph.stored.get(value.name) if isinstance(value, Node) else None

    def is_matrix(self, node: Node) -> bool:
        """Return whether a node is a parameter or buffer of several axes, whose elements have no labels."""
        return self.stored(node) is not None and sum(size > 1 for size in shape_of(node)) > 1

    def layer(self, weight: str) -> str:
        """Return the name of a layer: that of its module, or of its weight in a module that has several."""
        return self.graph.first_names[weight].removesuffix(".weight")

    def channels(self, labels: Tensor, axis: int, node: Node) -> Labels:
        """Return the labels along one axis; those that meet at one position of it become the same."""
        table = rows(labels, axis)
        if table.shape[1] > 1:
            text = f"{place(node)} reads what channels and positions have been mixed into"
            self.unions.join(table[:, :1].repeat(table.shape[1], axis=1), table, Reason(text))
        return table[:, 0].copy()

    def slice(self, name: str, axis: int, labels: Labels) -> None:
        """Note that an axis of a parameter holds channels; of a parameter used twice they are the same."""
        axes = self.slices.setdefault(self.graph.first_names[name], {})
        known = axes.setdefault(axis, labels)
        if known is not labels:
            self.unions.join(known, labels, Reason(f"{name} is also used with channels that have to stay"))

    def leaving(self, weight: str, axis: int, count: int) -> Labels:
        """Return the labels of what a layer makes; of weights that are used twice, the same ones."""
        known: Mapping[int, Labels] = self.slices.get(self.graph.first_names[weight], {})
        return known[axis][:count] if axis in known else self.unions.fresh(count)

    def stuck(self, name: str, count: int, reason: Reason) -> None:
        """Note a layer that makes so many channels, all of which have to stay."""
        self.made.setdefault(name, self.unions.fresh(count))
        self.unions.fix(self.made[name], reason)


def unlabelled(node: Node) -> Any:
    """Return labels of what has to stay, in the shape of what a node gives."""
    return _pytree.tree_map_only(torch.Tensor, lambda part: fixed(part.shape), node.meta.get("val"))
