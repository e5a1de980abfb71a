"""What HAQ's agent is told of the layer of a choice, for any space whose blocks say what they compute.

Source: Wang et al., HAQ, CVPR 2019, section 3.1, and its repository (mit-han-lab/haq,
`lib/env/linear_quantize_env.py`). There the indicator is the one of the decision before, here that of the
decision to be made.
"""

import numpy as np
from numpy.typing import NDArray

from autocompress.ops import Conv2d, Linear, OpSpec
from autocompress.quantize.ops import Quantized
from autocompress.quantize.tables import TableLayer, plain
from autocompress.space import Block, Codes, SearchSpace

COLUMNS = (
    "depthwise",
    "in_channels",
    "out_channels",
    "stride",
    "kernel",
    "weights",
    "in_pixels",
    "layer",
    "of_weights",
)
"""Columns of `layer_features`; the tenth number of a published state is the action before."""


def layer_features(space: SearchSpace) -> NDArray[np.float64]:
    """Return what is known of the first layer that each choice has a say in, `(choices, 9)`.

    Shapes are those in the largest network. Without a convolution or linear layer the first seven numbers
    are 0. `of_weights` is 0 where a choice decides the bits of inputs alone.
    """
    largest = space.largest()
    rows = []
    for position, choice in enumerate(space.choices):
        indices = [i for i, block in enumerate(space.blocks) if choice.name in block.choices]
        ops = [op for index in indices for op in _operations(space, space.blocks[index], largest)]
        shapes = [numbers for op in ops if (numbers := _shape(plain(op))) is not None]
        smaller = largest.copy()
        smaller[0, position] = 0
        changed = [op for index in indices for op in _operations(space, space.blocks[index], smaller)]
        index = float(indices[0] if indices else position)
        rows.append([*(shapes[0] if shapes else (0.0,) * 7), index, _of_weights(ops, changed)])
    return np.array(rows, dtype=np.float64)


def _operations(space: SearchSpace, block: Block, codes: Codes) -> tuple[OpSpec, ...]:
    positions = [space.positions[name] for name in block.choices]
    return block.operations(*(space.choices[p].options[int(codes[0, p])] for p in positions))


def _shape(op: OpSpec | None) -> tuple[float, ...] | None:
    """Return the first seven columns; a linear layer has stride 0, kernel 1 and one pixel, as published."""
    if isinstance(op, Conv2d):
        # As published: a convolution of one channel and one group counts too.
        depthwise = float(op.groups == op.in_channels)
        sizes = (op.in_channels, op.out_channels, op.stride, op.kernel, sum(op.weight_tensors))
        return (depthwise, *map(float, sizes), float(op.height * op.width))
    if isinstance(op, Linear):
        sizes = (op.in_features, op.out_features, 0, 1, sum(op.weight_tensors))
        return (0.0, *map(float, sizes), 1.0)
    return None


def _of_weights(largest: tuple[OpSpec, ...] | list[OpSpec], smaller: list[OpSpec]) -> float:
    """Return 0 if between two settings of a choice only bits of inputs change."""
    widths = [
        [(op.weight_bits, op.activation_bits) for op in ops if isinstance(op, TableLayer | Quantized)]
        for ops in (largest, smaller)
    ]
    pairs = list(zip(*widths, strict=False))
    inputs = any(one[1] != other[1] for one, other in pairs)
    return 0.0 if inputs and all(one[0] == other[0] for one, other in pairs) else 1.0
