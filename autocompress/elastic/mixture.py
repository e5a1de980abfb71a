"""A supernet run as a mixture: what the options of a choice compute, weighted by gates.

Cells decide several choices inside one operation and mix edge by edge (`ops.CellSpec`). Other blocks run
once for all widths, channels weighted by how probable they are (`elastic.marginal`), and mix whole outputs
over the settings of their other choices.
"""

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.elastic.layers import NORM_EPS, ElasticModule, Normalise
from autocompress.elastic.marginal import kept_units, run_gated
from autocompress.elastic.partial import weighted
from autocompress.elastic.supernet import Supernet, batch_statistics, resize
from autocompress.errors import SpaceError
from autocompress.ops import CellSpec, EdgeMixture, GatedSpec
from autocompress.space import Architecture, Block, Option


@final
@dataclass(frozen=True)
class Gate:
    """What of a choice is computed, and what it counts.

    Attributes:
        codes: Positions of the options that are computed, ascending; the others are not.
        weights: Of each of them, `(len(codes),)`.
        scale: Of the sum; `None` is 1. Cells multiply what an edge adds by it.
        dropout: Option to the rate, 0..1, at which cells drop what it gives (P-DARTS).
    """

    codes: tuple[int, ...]
    weights: Tensor
    scale: Tensor | None = None
    dropout: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def all(cls, weights: Tensor, scale: Tensor | None = None) -> "Gate":
        """Compute every option."""
        return cls(tuple(range(len(weights))), weights, scale)


Gates = Mapping[str, Gate]
"""Gates by the name of their variable: a choice, or an edge of which options of choices are made."""


def run_mixture(
    supernet: Supernet,
    x: Tensor,
    arch: Architecture,
    gates: Gates,
    *,
    affine: bool = True,
    channels: int = 1,
) -> Tensor:
    """Run a mixture of sub-networks with the batch-norm statistics of the batch.

    Args:
        supernet: The weights.
        x: `(batch, channels, height, width)`; resized when the architecture has another resolution.
        arch: Says the options of choices without a gate.
        gates: Of the others. A choice of widths (`marginal.width_choices`) weights channels: the largest
            width that is computed is run. Of other choices a block gives the weighted sum of its outputs
            over the options that are computed, its input standing for options that leave it out; where
            several of them are gated, weights multiply. A cell mixes each of its edges on its own.
        affine: Whether batch norms scale and shift. DARTS leaves that out: scales would make up for weights.
        channels: Cells mix one in so many channels and pass the others on (PC-DARTS).

    Raises:
        SpaceError: The architecture is of another space, or a gate cannot be applied.
    """
    space = supernet.space
    _check(supernet, gates)
    row = space.encode([arch])[0].tolist()
    (_, first), *_ = space.operations(space.encode([arch]))
    x = resize(x, first[0].in_shape[1:])
    normalise = batch_statistics if affine else _plain
    for block in space.blocks:
        chosen = {
            name: space.choices[space.positions[name]].options[row[space.positions[name]]]
            for name in block.choices
        }
        ops = block.operations(*chosen.values())
        edges = block.edges or block.choices
        if len(ops) == 1 and isinstance(ops[0], CellSpec) and any(name in gates for name in edges):
            x = _run_cell(supernet, block, ops[0], x, chosen, gates, normalise, channels)
        elif len(ops) == 1 and isinstance(ops[0], GatedSpec) and any(name in gates for name in block.choices):
            x = _run_whole(supernet, block, ops[0].full(), x, chosen, gates, normalise)
        else:
            x = _run_settings(supernet, block, x, chosen, gates, normalise)
    return x


@final
class Mixture(nn.Module):
    """A mixture as a network of its own: what a differentiable search has trained, and can teach."""

    def __init__(self, supernet: Supernet, arch: Architecture, gates: Gates, *, channels: int = 1) -> None:
        """Hold the supernet and the gates; see `run_mixture`."""
        super().__init__()
        self.supernet = supernet
        self._arch, self._gates, self._channels = arch, gates, channels

    def forward(self, x: Tensor) -> Tensor:
        """Map images to outputs, with the batch-norm statistics of the batch."""
        return run_mixture(self.supernet, x, self._arch, self._gates, affine=False, channels=self._channels)


def _plain(name: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float = NORM_EPS) -> Tensor:
    return F.batch_norm(x, None, None, None, None, training=True, eps=eps)


def _check(supernet: Supernet, gates: Gates) -> None:
    space = supernet.space
    for name, gate in gates.items():
        if name not in space.variables:
            raise SpaceError(f"gates name {name!r}, which is no choice or edge of space {space.name!r}")
        count = len(space.variables[name].options)
        if not gate.codes or list(gate.codes) != sorted(set(gate.codes) & set(range(count))):
            raise SpaceError(
                f"the gate of {name!r} names options {gate.codes}, which are not of 0..{count - 1}"
            )
        if gate.weights.shape != (len(gate.codes),):
            raise SpaceError(
                f"the gate of {name!r} has weights of shape {tuple(gate.weights.shape)}, not "
                f"({len(gate.codes)},)"
            )


def _run_cell(
    supernet: Supernet,
    block: Block,
    op: CellSpec,
    x: Tensor,
    chosen: Mapping[str, object],
    gates: Gates,
    normalise: Normalise,
    channels: int,
) -> Tensor:
    space = supernet.space
    ((layer, _),) = supernet.bind(block.name, (op,))
    edges: list[EdgeMixture] = []
    settled = dict(chosen)
    for name in block.choices:
        if terms := space.choices[space.positions[name]].terms:
            settled |= terms[space.choices[space.positions[name]].options.index(chosen[name])]
    for name in block.edges or block.choices:
        options = space.variables[name].options
        gate = gates.get(name)
        if gate is None:
            edges.append(EdgeMixture([(str(settled[name]), None)] if name in settled else []))
        else:
            parts = [(str(options[code]), gate.weights[at]) for at, code in enumerate(gate.codes)]
            edges.append(EdgeMixture(parts, gate.scale, gate.dropout))
    return op.mixture(cast(ElasticModule, layer).parts(normalise), x, edges, channels)


def _run_whole(
    supernet: Supernet,
    block: Block,
    op: GatedSpec,
    x: Tensor,
    chosen: Mapping[str, Option],
    gates: Gates,
    normalise: Normalise,
) -> Tensor:
    """Run an operation once: a slice of it, or all of it with its channels times how probable they are."""
    space = supernet.space
    if all(len(gates[name].codes) == 1 for name in block.choices if name in gates):
        options = {n: space.choices[space.positions[n]].options[gates[n].codes[0]] for n in gates}
        (narrow,) = block.operations(*(options.get(name, chosen[name]) for name in block.choices))
        ((layer, _),) = supernet.bind(block.name, (narrow,))
        return cast(Tensor, cast(ElasticModule, layer)(x, narrow, normalise))
    kept = []
    for name in block.choices:
        options_ = space.choices[space.positions[name]].options
        code = options_.index(chosen[name])
        gate = gates.get(name) or Gate((code,), torch.ones(1, dtype=torch.float64))
        kept.append(kept_units(gate, options_))
    ((layer, _),) = supernet.bind(block.name, (op,))

    def gated(name: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float = NORM_EPS) -> Tensor:
        y = normalise(name, x, weight, bias, eps)
        gate = op.channel_gate(name.removeprefix(f"{cast(ElasticModule, layer).name}."), kept)
        return y if gate is None else y * gate.to(y).view(-1, *(1 for _ in y.shape[2:]))

    return cast(Tensor, cast(ElasticModule, layer)(x, op, gated))


def _run_settings(
    supernet: Supernet,
    block: Block,
    x: Tensor,
    chosen: dict[str, Option],
    gates: Gates,
    normalise: Normalise,
) -> Tensor:
    space = supernet.space
    marginal = supernet.marginal_gates
    widths = {name: gates[name] for name in block.choices if name in gates and name in marginal.choices}
    gated = [name for name in block.choices if name in gates and name not in widths]
    largest = {name: gate.codes[-1] for name, gate in widths.items()}
    shapes: set[tuple[int, ...]] = set()

    def setting_of(codes: tuple[int, ...]) -> dict[str, Option]:
        setting = dict(chosen)
        for name, code in (*zip(gated, codes, strict=True), *largest.items()):
            setting[name] = space.choices[space.positions[name]].options[code]
        return setting

    def run(codes: tuple[int, ...], x: Tensor) -> Tensor:
        setting = setting_of(codes)
        ops = block.operations(*setting.values())
        # Layers run on images of any size, so only the shapes tell that a setting does not fit.
        if ops and math.prod(ops[0].in_shape) != math.prod(_last(x).shape[1:]):
            raise SpaceError(
                f"block {block.name!r} takes {ops[0].in_shape} with {setting}, got "
                f"{tuple(_last(x).shape[1:])}; a choice that changes more of a shape than channels "
                "(resolution) cannot be gated"
            )
        channels = marginal.of(block, setting, widths)
        output = run_gated(x, supernet.bind(block.name, ops), normalise, channels)
        shapes.add(tuple(_last(output).shape))
        if len(shapes) > 1:
            raise SpaceError(
                f"block {block.name!r} has outputs of different shapes under gates on {gated}; a choice that "
                "changes more of a shape than channels (resolution) cannot be gated"
            )
        return output

    # Options of which a block runs the same, such as depths that all have it, are run once.
    merged: dict[Hashable, tuple[tuple[int, ...], Tensor | None]] = {}
    for codes, weight in _combinations([gates[name] for name in gated]):
        same = marginal.operations(block, setting_of(codes), tuple(widths))
        first, known = merged.get(same, (codes, None))
        merged[same] = (first, weight if known is None or weight is None else known + weight)
    parts = ((partial(run, codes), weight) for codes, weight in merged.values())
    return cast(Tensor, weighted(x, parts))


def _last(x: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return what a block passes on; of several tensors, the shapes of operations are those of the last."""
    return x if isinstance(x, Tensor) else x[-1]


def _combinations(gates: Sequence[Gate]) -> Iterator[tuple[tuple[int, ...], Tensor | None]]:
    """Yield the codes of every combination of options, and its weight."""
    for places in itertools.product(*(range(len(gate.codes)) for gate in gates)):
        weight: Tensor | None = None
        for gate, place in zip(gates, places, strict=True):
            own = gate.weights[place] if gate.scale is None else gate.scale * gate.weights[place]
            weight = own if weight is None else weight * own
        yield tuple(gate.codes[place] for gate, place in zip(gates, places, strict=True)), weight
