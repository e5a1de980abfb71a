"""Width sorting: the most important channels first, so that narrow slices hold them.

Source: Cai et al., Once-for-All, ICLR 2020, section 3.3 (elastic width); importance is the L1 norm of what
the next layer reads of a channel. The function of the largest network does not change.
"""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from autocompress.elastic.layers import ElasticConv2d, ElasticLayer, ElasticSqueezeExcite
from autocompress.elastic.supernet import Supernet
from autocompress.ops import OpSpec


@torch.no_grad()
def sort_channels(supernet: Supernet) -> None:
    """Sort the inner channels of every block of the largest network by importance, descending, in place.

    Inner are the channels between a convolution and the next one that mixes channels, with only depthwise
    convolutions and squeeze-excites between them. The hidden channels of squeeze-excites are sorted too.
    Channels stay where they are when the largest network has not all that the layer holds.
    Optimizer states are not permuted: sort before an optimizer is made, or clear its state.
    """
    (largest,) = supernet.space.decode(supernet.space.largest())
    for _, layers in supernet.plan(largest):
        for start, (producer, op) in enumerate(layers):
            if isinstance(producer, ElasticSqueezeExcite) and op.params == producer.full.params:
                _sort_hidden(producer)
            if producer is not None and _mixes(producer):
                _sort_outputs(producer, op, layers[start + 1 :])


def _mixes(layer: ElasticLayer) -> TypeGuard[ElasticConv2d]:
    return isinstance(layer, ElasticConv2d) and layer.full.groups == 1


def _sort_outputs(
    producer: ElasticConv2d, op: OpSpec, following: Sequence[tuple[ElasticLayer | None, OpSpec]]
) -> None:
    """Sort the outputs of a convolution, and with them all layers up to the one that reads them."""
    width = producer.full.out_channels
    between: list[ElasticConv2d | ElasticSqueezeExcite] = []
    for layer, _ in following:
        if op.out_shape[0] != width or not isinstance(layer, ElasticConv2d | ElasticSqueezeExcite):
            return
        if layer.full.in_shape[0] != width:
            return
        if _mixes(layer):
            _sort_between(producer, between, layer)
            return
        if isinstance(layer, ElasticConv2d) and not layer.full.depthwise:
            return
        between.append(layer)


def _sort_between(
    producer: ElasticConv2d,
    between: Sequence[ElasticConv2d | ElasticSqueezeExcite],
    consumer: ElasticConv2d,
) -> None:
    # (outputs, inputs, kernel, kernel) -> importance of each input channel
    order = consumer.weight.abs().sum((0, 2, 3)).argsort(descending=True, stable=True)
    _permute_outputs(producer, order)
    for layer in between:
        if isinstance(layer, ElasticConv2d):
            _permute_outputs(layer, order)
        else:
            _permute(layer.reduce_weight, order, axis=1)
            _permute(layer.expand_weight, order, axis=0)
            _permute(layer.expand_bias, order, axis=0)
    _permute(consumer.weight, order, axis=1)


def _permute_outputs(layer: ElasticConv2d, order: Tensor) -> None:
    for tensor in (layer.weight, layer.bias, layer.norm_weight, layer.norm_bias):
        _permute(tensor, order, axis=0)


def _sort_hidden(layer: ElasticSqueezeExcite) -> None:
    order = layer.expand_weight.abs().sum((0, 2, 3)).argsort(descending=True, stable=True)
    _permute(layer.reduce_weight, order, axis=0)
    _permute(layer.reduce_bias, order, axis=0)
    _permute(layer.expand_weight, order, axis=1)


def _permute(tensor: Tensor | None, order: Tensor, *, axis: int) -> None:
    if tensor is not None:
        tensor.copy_(tensor.index_select(axis, order))
