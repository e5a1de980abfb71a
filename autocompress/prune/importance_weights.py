"""Importance of channels by the weights alone."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocompress.prune.group import Group
from autocompress.prune.labels import Labels
from autocompress.prune.layers import Layer, Norm, is_depthwise, leaving, tensors_of
from autocompress.prune.scores import Given, Scores, over_units

Matrix = NDArray[np.float64]


def random(given: Given) -> Scores:
    """Score at random: what every other criterion has to beat."""
    rng = np.random.default_rng(given.seed)
    return {group.name: rng.random(len(group)) for group in given.source.groups}


def first(given: Given) -> Scores:
    """Score the first channels highest, whatever they are."""
    return {group.name: np.arange(len(group), 0.0, -1.0) for group in given.source.groups}


def l1(given: Given) -> Scores:
    """Sum the magnitudes of a filter's weights.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, section 3.1. Depthwise
    convolutions make no channels of their own: their filters do not count; nor do biases.
    """
    return over_units(given.source, ((o, np.abs(w).sum(1)) for o, w in filters(given)))


def l2(given: Given) -> Scores:
    """Take the Euclidean norm of a filter, otherwise as `l1`."""
    return over_units(given.source, ((o, np.sqrt((w * w).sum(1))) for o, w in filters(given)))


def group_l2(given: Given) -> Scores:
    """Take the Euclidean norm of the weights that make a unit's channels and of those that read them, each.

    Biases, batch norm and other vectors do not count. It is the one criterion that scores every group: of
    layers that others do not look at, such as transposed convolutions, too.

    Source: Fang et al., "DepGraph", CVPR 2023, section 3.3 (the norm over all that depends on a channel).
    """
    tensors = tensors_of(given.source.model)
    return over_units(
        given.source,
        (
            (labels, np.linalg.norm(np.moveaxis(weight, axis, 0).reshape(len(labels), -1), axis=1))
            for name, axes in given.source.trace.slices.items()
            if tensors[name].dim() > 1
            for weight in (_numbers(tensors[name]),)
            for axis, labels in axes.items()
        ),
    )


def bn_scale(given: Given) -> Scores:
    """Take the magnitude of batch norm's scale (gamma), of all batch norms that a unit's channels go through.

    A group with a unit that goes through no batch norm is scored by `l2` as a whole: the two kinds of
    numbers cannot be compared within a group.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017,
    section 3.
    """
    tensors = tensors_of(given.source.model)
    scales = (
        (channels_of(given, norm), np.abs(_numbers(tensors[norm.scale]))) for norm in given.structure.norms
    )
    return {**l2(given), **over_units(given.source, scales)}


def fpgm(given: Given) -> Scores:
    """Sum the distances of a filter to all others of its layer: what lies in the middle can be replaced.

    Source: He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
    Acceleration", CVPR 2019, section 3.
    """
    return over_units(given.source, ((o, np.sqrt(squared_distances(w)).sum(1)) for o, w in filters(given)))


def similarity(given: Given) -> Scores:
    """Remove the unit whose like is kept and that matters least to what reads it; again, until one is left.

    The saliency of removing unit j for unit i is `mean(a_j^2) * |W_i - W_j|^2`: a what the readers multiply
    it with, W all that makes it (filters with batch norm folded in and bias, depthwise filters, batch norms
    that stand elsewhere, of all layers of the group). Then `a_i += a_j`. A score is the number of units
    removed before. Of equals the later one goes first.

    Source: Srinivas & Babu, "Data-free Parameter Pruning for Deep Neural Networks", BMVC 2015.
    """
    source = given.source
    tensors = tensors_of(source.model)
    makers: list[tuple[Labels, Matrix]] = []
    readers: list[tuple[Labels, Matrix]] = []
    folded = set()
    for layer in given.structure.layers:
        makers.append((leaving(source, layer), _folded(layer, tensors)))
        if layer.norm is not None:
            folded.add(layer.norm.scale)
        if not is_depthwise(source, layer):
            weight = _numbers(tensors[layer.weight])
            labels = source.trace.slices[layer.weight][1]
            readers.append((labels, weight.swapaxes(0, 1).reshape(len(labels), -1)))
    for norm in given.structure.norms:
        if norm.scale not in folded:
            makers.append((channels_of(given, norm), np.stack(_affine(norm, tensors), axis=1)))
    scores = {}
    for group in source.groups:
        read, made = _by_unit(group, readers), _by_unit(group, makers)
        if read.shape[1] and made.shape[1]:
            scores[group.name] = _removals(made, read)
    return scores


# Filters ---------------------------------------------------------------------------------------------------


def filters(given: Given) -> Iterator[tuple[Labels, Matrix]]:
    """Yield labels of the outputs and the filters, `(out, weights)`, of each layer that makes channels."""
    tensors = tensors_of(given.source.model)
    for layer in given.structure.layers:
        if not is_depthwise(given.source, layer):
            weight = _numbers(tensors[layer.weight])
            yield leaving(given.source, layer), weight.reshape(len(weight), -1)


def channels_of(given: Given, norm: Norm) -> Labels:
    """Return the labels of the channels of a batch norm."""
    return given.source.trace.slices[norm.scale][0]


def squared_distances(rows: Matrix) -> Matrix:
    """Return the squared Euclidean distance of each row to each other, `(rows, rows)`."""
    products = rows @ rows.T
    squares = np.diag(products)
    # Of equal rows the difference may come out just below zero.
    found: Matrix = np.maximum(squares[:, None] + squares[None, :] - 2.0 * products, 0.0)
    np.fill_diagonal(found, 0.0)
    return found


def _folded(layer: Layer, tensors: dict[str, Tensor]) -> Matrix:
    """Return the filters with bias, and batch norm folded in, `(out, weights + 1)`."""
    weight = _numbers(tensors[layer.weight])
    flat = weight.reshape(len(weight), -1)
    bias = np.zeros(len(flat)) if layer.bias is None else _numbers(tensors[layer.bias])
    if layer.norm is not None:
        scale, shift = _affine(layer.norm, tensors)
        flat, bias = flat * scale[:, None], shift + bias * scale
    return np.concatenate([flat, bias[:, None]], axis=1)


def _affine(norm: Norm, tensors: dict[str, Tensor]) -> tuple[Matrix, Matrix]:
    """Return by what batch norm multiplies in evaluation mode, and what it adds."""
    gamma, beta, mean, variance = (
        _numbers(tensors[name]) for name in (norm.scale, norm.shift, norm.mean, norm.variance)
    )
    scale = gamma / np.sqrt(variance + norm.eps)
    return scale, beta - mean * scale


def _numbers(tensor: Tensor) -> Matrix:
    found: Matrix = tensor.detach().to("cpu", torch.float64).numpy()
    return found


# Similarity ------------------------------------------------------------------------------------------------


def _by_unit(group: Group, parts: list[tuple[Labels, Matrix]]) -> Matrix:
    """Put the rows that carry a unit's label side by side: `(units, numbers)`.

    Where a layer has no row of a unit there are zeros: it adds nothing to that unit's channels.
    """
    places = {int(unit): place for place, unit in enumerate(group.units)}
    found = []
    for labels, rows in parts:
        seen: dict[int, int] = {}
        copies: list[Matrix] = []
        for label, row in zip(labels.tolist(), rows, strict=True):
            if label in places:
                copy = seen[label] = seen.get(label, -1) + 1
                if copy == len(copies):
                    copies.append(np.zeros((len(places), rows.shape[1])))
                copies[copy][places[label]] = row
        found += copies
    return np.concatenate([np.zeros((len(places), 0)), *found], axis=1)


def _removals(made: Matrix, read: Matrix) -> Matrix:
    """Return how many units are removed before each one."""
    count = len(made)
    distances = squared_distances(made)
    np.fill_diagonal(distances, np.inf)
    read = read.copy()
    energies = (read * read).mean(1)
    nearest = distances.argmin(0)
    alive = np.ones(count, dtype=np.bool_)
    removed = np.full(count, count - 1.0)
    for step in range(count - 1):
        left = np.flatnonzero(alive)
        saliency = energies[left] * distances[nearest[left], left]
        gone = int(left[len(left) - 1 - saliency[::-1].argmin()])
        stays = int(nearest[gone])
        removed[gone] = step
        alive[gone] = False
        read[stays] += read[gone]
        energies[stays] = (read[stays] * read[stays]).mean()
        distances[gone], distances[:, gone] = np.inf, np.inf
        orphans = np.flatnonzero(alive & (nearest == gone))
        nearest[orphans] = distances[:, orphans].argmin(0)
    return removed
