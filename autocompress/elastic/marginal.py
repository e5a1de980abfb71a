"""Marginal gates: elastic widths in a mixture, at the cost of one path.

Channels are prefixes, so that channel c is there exactly where the width is larger than c. The largest width
is run, and channel c is multiplied by the probability of that, m_c = sum of p(option) over the options whose
width is larger than c. At probabilities of 0 and 1 this is the slice itself: batch norm has its statistics
channel by channel, and a channel that is zero adds nothing to what comes after it.

Source: Guo et al., DMCP: Differentiable Markov Channel Pruning, CVPR 2020, equation 3, where the marginal is
a product of a Markov chain's transitions; here it is the sum over the options that the space has.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, cast, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocompress.elastic.layers import ElasticLayer, ElasticSqueezeExcite, Normalise
from autocompress.ops import (
    Add,
    Conv2d,
    GatedSpec,
    GlobalAvgPool,
    Linear,
    MaxPool,
    Ops,
    OpSpec,
    SqueezeExcite,
)
from autocompress.space import Block, Option, SearchSpace

if TYPE_CHECKING:
    from autocompress.elastic.mixture import Gate

# Operations of other classes may do anything with a channel, even read its neighbours by position.
_CHANNELS: dict[type[OpSpec], tuple[str, ...]] = {
    Add: ("channels",),
    Conv2d: ("in_channels", "out_channels"),
    GlobalAvgPool: ("channels",),
    Linear: ("in_features", "out_features"),
    MaxPool: ("channels",),
    SqueezeExcite: ("channels", "hidden"),
}

_Sizes = tuple[NDArray[np.int64] | None, ...]
"""For each operation of a block what is to be gated: its width, by the codes of the choices that change it;
an axis of a choice that does not has length 1. `None`: nothing is."""


def width_choices(space: SearchSpace) -> tuple[str, ...]:
    """Return the choices that change nothing but numbers of channels, in the order of the space.

    Such a choice leaves, all else equal, every block with the same operations at the same sizes, kernels and
    strides; channels (those of a depthwise convolution with its groups, the hidden ones of squeeze-excite)
    grow with the position of the option. Neither the input nor the output of the network changes. Other
    grouped convolutions, and operations of a space's own, must be the same for every option: prefixes of
    their channels are no slices.
    """
    found = {name for block in space.blocks for name in block.choices}
    for block in space.blocks:
        if gated_operation(space, block) is not None:
            continue  # its choices are widths throughout
        operations = cache(block.operations)
        for position, name in enumerate(block.choices):
            if name in found and not all(
                _only_widens(smaller, larger)
                and (block is not space.blocks[0] or _ends(smaller)[0] == _ends(larger)[0])
                and (block is not space.blocks[-1] or _ends(smaller)[1] == _ends(larger)[1])
                for series in _series(space, block, position)
                for smaller, larger in itertools.pairwise(operations(*setting) for setting in series)
            ):
                found.remove(name)
    return tuple(choice.name for choice in space.choices if choice.name in found)


def gated_operation(space: SearchSpace, block: Block) -> GatedSpec | None:
    """Return the operation of a block that is one whose widths its choices decide, at its full width."""
    ops = block.operations(*next(iter(space.block_settings(block))))
    return ops[0].full() if len(ops) == 1 and isinstance(ops[0], GatedSpec) else None


def kept_units(gate: "Gate", options: Sequence[Option]) -> Tensor:
    """Return the probability that each unit is kept, `(units,)`, of a choice of how many are."""
    sizes = np.array([int(options[code]) for code in gate.codes])
    larger = torch.from_numpy(sizes[:, None] > np.arange(int(options[-1])))
    weights = gate.weights if gate.scale is None else gate.scale * gate.weights
    return weights @ larger.to(weights)


def _series(space: SearchSpace, block: Block, position: int) -> Iterator[list[tuple[Option, ...]]]:
    """Yield, all else equal, the settings of a block for every option of one of its choices."""
    options = [space.choices[space.positions[name]].options for name in block.choices]
    for before in itertools.product(*options[:position]):
        for after in itertools.product(*options[position + 1 :]):
            yield [(*before, option, *after) for option in options[position]]


def _only_widens(smaller: Ops, larger: Ops) -> bool:
    return len(smaller) == len(larger) and all(
        one == other or _is_slice(one, other) for one, other in zip(smaller, larger, strict=True)
    )


def _is_slice(one: OpSpec, other: OpSpec) -> bool:
    if type(one) is not type(other):
        return False
    channels = _CHANNELS.get(type(one), ())
    if isinstance(one, Conv2d) and isinstance(other, Conv2d):
        if one.depthwise and other.depthwise:
            channels = (*channels, "groups")
        elif one.groups > 1:  # slices are prefixes inside the groups
            return False
    mine, its = ({f.name: getattr(op, f.name) for f in dataclasses.fields(op)} for op in (one, other))
    return all(mine[name] <= its[name] if name in channels else mine[name] == its[name] for name in mine)


def _ends(ops: Ops) -> tuple[object, object]:
    return (ops[0].in_shape, ops[-1].out_shape) if ops else (None, None)


@final
class MarginalGates:
    """The gates of the operations of a space whose widths are drawn.

    Attributes:
        choices: What `width_choices` returns.
    """

    def __init__(self, space: SearchSpace) -> None:
        """Look at every setting of every block."""
        self._space = space
        self.choices = frozenset(width_choices(space))
        self._known: dict[tuple[object, ...], _Sizes] = {}
        self._made: dict[tuple[object, ...], tuple[Ops, ...]] = {}

    def of(
        self, block: Block, setting: Mapping[str, Option], gates: Mapping[str, "Gate"]
    ) -> list[Tensor | None]:
        """Return the gate of each operation of a block, `(channels,)`; `None` where nothing is to be gated.

        The channels are those that a convolution or linear layer returns, and the hidden ones of
        squeeze-excite. They are gated by the choices that change them; where several do, these are drawn on
        their own. Where a depthwise convolution follows, it is gated instead, once: behind two gates of 0 a
        channel would have no gradient (DMCP gates both; its probabilities are never 0).

        Args:
            block: Of the space.
            setting: Its options; of the choices with a gate, the last option that is computed.
            gates: Of width choices of this block, by name.
        """
        key = _key(block, setting, tuple(gates))
        if key not in self._known:
            self._known[key] = self._sizes(block, setting, tuple(gates))
        return [None if sizes is None else _marginal(sizes, gates) for sizes in self._known[key]]

    def operations(
        self, block: Block, setting: Mapping[str, Option], names: tuple[str, ...]
    ) -> tuple[Ops, ...]:
        """Return the operations of a block at every combination of the options of width choices.

        Where they are equal, so is what the block computes.

        Args:
            block: Of the space.
            setting: Its other options.
            names: Width choices of this block.
        """
        key = _key(block, setting, names)
        if key not in self._made:
            options = [self._space.choices[self._space.positions[name]].options for name in names]
            settings = (dict(zip(names, values, strict=True)) for values in itertools.product(*options))
            self._made[key] = tuple(
                block.operations(*(given.get(n, setting[n]) for n in block.choices)) for given in settings
            )
        return self._made[key]

    def _sizes(self, block: Block, setting: Mapping[str, Option], names: tuple[str, ...]) -> _Sizes:
        made = self.operations(block, setting, names)
        shape = tuple(int(self._space.counts[self._space.positions[name]]) for name in names)
        return tuple(
            _by_choice(np.array([_width(ops, position) for ops in made]).reshape(shape))
            for position in range(len(made[0]))
        )


def _key(block: Block, setting: Mapping[str, Option], names: tuple[str, ...]) -> tuple[object, ...]:
    return (block.name, names, tuple(setting[n] for n in block.choices if n not in names))


def _width(ops: Ops, position: int) -> int:
    """Return how many channels there are to gate.

    Pooling and addition keep zeros, squeeze-excite does from input to output. Biases, the shift of batch norm
    and activations do not.
    """
    following = ops[position + 1] if position + 1 < len(ops) else None
    if isinstance(following, Conv2d) and following.depthwise:
        return 0
    match op := ops[position]:
        case Conv2d():
            return op.out_channels
        case Linear():
            return op.out_features
        case SqueezeExcite():
            return op.hidden
        case _:
            return 0


def _by_choice(sizes: NDArray[np.int64]) -> NDArray[np.int64] | None:
    for axis in range(sizes.ndim):
        first = sizes.take([0], axis)
        if (sizes == first).all():
            sizes = first
    return sizes if sizes.size > 1 else None


def _marginal(sizes: NDArray[np.int64], gates: Mapping[str, "Gate"]) -> Tensor:
    computed: list[tuple[int, ...]] = []
    weights: Tensor | None = None
    for count, gate in zip(sizes.shape, gates.values(), strict=True):
        if count == 1:
            computed.append((0,))
            continue
        computed.append(gate.codes)
        own = gate.weights if gate.scale is None else gate.scale * gate.weights
        weights = own if weights is None else (weights[:, None] * own).flatten()
    drawn = sizes[np.ix_(*computed)].reshape(-1)
    larger = torch.from_numpy(drawn[:, None] > np.arange(drawn.max()))
    weights = cast(Tensor, weights)  # some choice changes the width
    return weights @ larger.to(weights)


def run_gated(
    x: Tensor,
    layers: Sequence[tuple[ElasticLayer | None, OpSpec]],
    normalise: Normalise,
    gates: Sequence[Tensor | None],
) -> Tensor:
    """Run the operations of a block as `Supernet.bind` gives them, their channels times their gates.

    Args:
        x: `(batch, channels, height, width)`, gated where it was made.
        layers: Of the largest width.
        normalise: Batch norm.
        gates: What `MarginalGates.of` returns.
    """
    entry = x
    for (layer, op), gate in zip(layers, gates, strict=True):
        if layer is None:
            x = entry + x
        elif gate is None:
            x = layer(x, op, normalise)
        elif isinstance(layer, ElasticSqueezeExcite):
            x = layer(x, op, normalise, gate.to(x))
        else:
            x = layer(x, op, normalise)
            x = x * gate.to(x).view(-1, *(1 for _ in x.shape[2:]))
    return x
