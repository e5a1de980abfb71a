"""Width sorting: the most important channels first, so that narrow slices hold them.

Source: Cai et al., Once-for-All, ICLR 2020, section 3.3 (elastic width); importance is the L1 norm of what
the next layer reads of a channel. The function of the largest network does not change.
"""

from typing import cast

import torch
from torch import Tensor, nn

from autocompress.elastic.layers import ElasticConv2d, ElasticLayer, ElasticSqueezeExcite
from autocompress.elastic.supernet import Supernet


@torch.no_grad()
def sort_channels(supernet: Supernet) -> None:
    """Sort the inner channels of every block of the supernet by importance, descending, in place.

    Inner are the channels between a convolution and the next one that mixes channels, with only depthwise
    convolutions and squeeze-excites between them. The hidden channels of squeeze-excites are sorted too.
    Optimizer states are not permuted: sort before an optimizer is made.
    """
    for block in supernet.layers.values():
        layers = [cast(ElasticLayer, layer) for layer in cast(nn.ModuleDict, block).values()]
        for start, producer in enumerate(layers):
            if isinstance(producer, ElasticSqueezeExcite):
                _sort_hidden(producer)
            if not _mixes(producer):
                continue
            between: list[ElasticLayer] = []
            for layer in layers[start + 1 :]:
                if _mixes(layer):
                    _sort_between(cast(ElasticConv2d, producer), between, cast(ElasticConv2d, layer))
                    break
                if not _channelwise(layer):
                    break
                between.append(layer)


def _mixes(layer: ElasticLayer) -> bool:
    return isinstance(layer, ElasticConv2d) and layer.full.groups == 1


def _channelwise(layer: ElasticLayer) -> bool:
    depthwise = isinstance(layer, ElasticConv2d) and layer.full.depthwise
    return depthwise or isinstance(layer, ElasticSqueezeExcite)


def _sort_between(producer: ElasticConv2d, between: list[ElasticLayer], consumer: ElasticConv2d) -> None:
    if consumer.full.in_channels != producer.full.out_channels:
        return
    # (outputs, inputs, kernel, kernel) -> importance of each input channel
    order = consumer.weight.abs().sum((0, 2, 3)).argsort(descending=True, stable=True)
    _permute_outputs(producer, order)
    for layer in between:
        if isinstance(layer, ElasticConv2d):
            _permute_outputs(layer, order)
        elif isinstance(layer, ElasticSqueezeExcite):
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
