"""Importance of channels by what the next layers make of them."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocompress.errors import ConversionError
from autocompress.prune.layers import Layer, is_depthwise, layer_of, names_of, run, tensors_of
from autocompress.prune.samples import POSITIONS, inputs_at, sample
from autocompress.prune.scores import Given, Scores, over_units

BLOCK: Final = 1 << 22
"""Numbers of a product that are held at once: 32 MB in double precision."""

Matrix = NDArray[np.float64]

Products = Callable[[Layer, Tensor, Tensor, torch.Generator], Tensor]
"""Of a layer, its weights `(out, in / groups, points)` and what it reads `(rows, in, points)`: the products
of what each two inputs add to the layer's sums, over all of these sums, `(in / groups, in / groups)`."""


def thinet(given: Given) -> Scores:
    """Remove the unit without which the next layer's sums change least; again, until none is left.

    The sums are those of one random output channel at each of `POSITIONS` random positions an image; the
    change, squared, is that by all units removed so far. A score is a unit's place in the order of removal,
    in parts of their number; of a group that several layers read, the mean over these. Depthwise
    convolutions are passed over: they sum nothing.

    Source: Luo et al., "ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression", ICCV
    2017, sections 3.2.1 and 3.2.2, algorithm 1.
    """

    def of_one(layer: Layer, weight: Tensor, read: Tensor, generator: torch.Generator) -> Tensor:
        rows = torch.arange(len(read), device=read.device)
        chosen = torch.randint(len(weight), rows.shape, generator=generator).to(read.device)
        block = chosen // (len(weight) // layer.groups)
        blocks = read.view(len(read), layer.groups, *weight.shape[1:])
        parts = (blocks[rows, block] * weight[chosen]).sum(2)
        products: Tensor = parts.T @ parts
        return products

    return _by_readers(given, of_one, _removals)


def lasso(given: Given) -> Scores:
    """Order units by when they enter a LASSO regression of the next layer's sums on the units' parts in them.

    The sums are those of all output channels at `POSITIONS` random positions an image, without what channels
    outside of the group add. The penalty falls from where all coefficients are zero; the sooner a unit's
    leaves zero, the more the unit matters, and of those that never do, the greater part does. Scores, and
    groups that several layers read, are as in `thinet`.

    Source: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, section 3.1,
    equation 2. The whole path is computed, by least angle regression (Efron et al., Annals of Statistics
    2004), in the place of a search for the penalty of one width; for 1,024 units and one layer that reads
    them it takes 7 s on a core, growing with the third power.
    """

    def of_all(layer: Layer, weight: Tensor, read: Tensor, _: torch.Generator) -> Tensor:
        blocks = zip(read.chunk(layer.groups, 1), weight.chunk(layer.groups), strict=True)
        return torch.stack([_sums_of_products(*block) for block in blocks]).sum(0)

    return _by_readers(given, of_all, _entries)


def _by_readers(given: Given, products: Products, order: Callable[[Matrix], Matrix]) -> Scores:
    """Score the units of each group by an order for each layer that reads them.

    Args:
        given: The model and batches.
        products: Of channels.
        order: Given the products of units, `(units, units)`; the place of each, the last one matters most.
    """
    source = given.source
    names, tensors = names_of(source.model), tensors_of(source.model)
    readers = {
        layer.weight: layer.name for layer in given.structure.layers if not is_depthwise(source, layer)
    }
    generator = torch.Generator().manual_seed(given.seed)
    totals: dict[str, Tensor] = {}

    def see(
        function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        found = layer_of(names, function, args, kwargs)
        if found is not None and found[0].weight in readers:
            layer, x = found
            read = inputs_at(layer, x, output, sample(layer, output, POSITIONS, generator))
            weight = tensors[layer.weight].double()
            added = products(layer, weight.reshape(*weight.shape[:2], -1), read, generator).cpu()
            totals[layer.weight] = totals.get(layer.weight, 0) + added

    for images, _ in given.batches():
        run(source.model, images, see)
    scores = []
    for name, total in totals.items():
        if not bool(total.isfinite().all()):
            raise ConversionError(f"layer {readers[name]} reads nan or infinity")
        labels = source.trace.slices[name][1]
        for group in source.groups:
            units = group.units[np.isin(group.units, labels)]
            if len(units):
                carries = (labels[:, None] == units).astype(np.float64)
                places = order(carries.T @ total.numpy() @ carries)
                scores.append((units, (places + 1) / len(units)))
    return over_units(source, scores)


def _sums_of_products(read: Tensor, weight: Tensor) -> Tensor:
    """Return the products of what each two inputs add to a layer's sums, over all rows and output channels.

    Input j adds `sum_k x_jk w_ojk` at a row: so the products are sums over pairs of points of the kernel of
    (x^T x) * (w^T w), and the parts, `(rows, out, in)`, need not be held.
    """
    inputs, points = read.shape[1:]
    x, w = read.flatten(1), weight.flatten(1)
    step = max(BLOCK // (inputs * points * points), 1)
    rows = []
    for start in range(0, inputs, step):
        block = slice(start * points, (start + step) * points)
        pairs = (x[:, block].T @ x) * (w[:, block].T @ w)
        rows.append(pairs.view(-1, points, inputs, points).sum((1, 3)))
    return torch.cat(rows)


def _removals(products: Matrix) -> Matrix:
    """Return the place of each unit in the order of removal, the smallest sum of all removed ones first."""
    count = len(products)
    own, others = np.diag(products), np.zeros(count)
    places = np.full(count, -1.0)
    for step in range(count):
        left = np.flatnonzero(places < 0)
        costs = own[left] + 2 * others[left]
        # Of equals the last one goes first, as the first one stays in a ranking.
        gone = left[len(left) - 1 - costs[::-1].argmin()]
        places[gone] = step
        others += products[gone]
    return places


def _entries(products: Matrix) -> Matrix:
    """Return the place of each unit in the order of entering a LASSO regression; the first one comes last."""
    # Its import takes a second, and no other criterion needs it.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lars_path_gram

    count = len(products)
    # All coefficients are one without penalty: the sums are those of the parts.
    towards = products.sum(1)
    scale = np.abs(towards).max()
    entered = np.full(count, count)
    if scale > 0:
        with warnings.catch_warnings():
            # Of units that always add alike one enters; it says so at each.
            warnings.simplefilter("ignore", ConvergenceWarning)
            # Its tolerances are absolute: the largest correlation is made one.
            _, _, path = lars_path_gram(
                towards / scale, products / scale, n_samples=1, method="lasso", max_iter=8 * count
            )
        moved = path != 0
        entered = np.where(moved.any(1), moved.argmax(1), path.shape[1])
    order = np.lexsort((-np.arange(count), np.diag(products), -entered))
    places = np.empty(count)
    places[order] = np.arange(count)
    return places
