"""PC-DARTS: cells mix a part of the channels; edges have weights of their own.

Source: Xu et al., PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search, ICLR 2020.
One in K channels is mixed, which takes a K-th of DARTS's memory and lets the batch grow; edge normalisation,
a softmax over the edges that end in a node, makes up for the noise of the sampled channels.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from autocompress.differentiable import Images, Mixed, Moment
from autocompress.elastic.mixture import Gate, Gates
from autocompress.errors import SpaceError
from autocompress.ops import CellSpec
from autocompress.proposals import check_count
from autocompress.relaxation import INITIAL_SPREAD
from autocompress.space import SearchSpace
from strategies.relaxed import RelaxedSearch


@final
class PcDarts(RelaxedSearch):
    """DARTS of first order on one in K channels, with normalised edges."""

    computes_all = True

    def __init__(
        self,
        *args: Any,
        channels: int = 4,
        learning_rate: float = 6e-4,
        warmup: float = 0.3,
        **options: Any,
    ) -> None:
        """Make the search; the defaults are the paper's for CIFAR-10 (of 50 epochs, 15 are warm-up).

        Args:
            args: See `RelaxedSearch`.
            channels: K: one in so many channels is mixed.
            learning_rate: Of the logits.
            warmup: Share of the training in which the logits stand still.
            options: See `RelaxedSearch`.

        Raises:
            SpaceError: The space has no cells.
        """
        super().__init__(*args, learning_rate=learning_rate, warmup=warmup, **options)
        self.channels = check_count("channels", channels)
        self._groups = edge_groups(self._constraints.space)
        generator = torch.Generator().manual_seed(options["seed"] + 1)
        self._edges = nn.ParameterList(
            nn.Parameter(INITIAL_SPREAD * torch.randn(len(group), generator=generator, dtype=torch.float64))
            for group in self._groups
        )
        self._optimizer.add_param_group({"params": list(self._edges)})

    def weight_gates(self, moment: Moment) -> Gates:
        """Return the mixture."""
        return self.mixture()

    def gradients(self, network: Mixed, train: Images, held_out: Images, moment: Moment) -> None:
        """Differentiate the held-out loss by the logits of options and edges."""
        self.set_gradients(self.penalised(network.loss(held_out, self.soft_gates())))

    def weights(self) -> dict[str, Tensor]:
        """Return probabilities times the share of their edge, by which nodes keep their edges."""
        scales = self._scales()
        return {
            name: vector * scales.get(name, 1.0) for name, vector in self.relaxation.probabilities().items()
        }

    def soft_gates(self) -> dict[str, Gate]:
        """Return gates that compute every option, weighted by its probability, and edges by theirs."""
        scales = self._scales()
        given = self.relaxation.probabilities()
        return {name: Gate.all(vector, scales.get(name)) for name, vector in given.items()}

    def _scales(self) -> dict[str, Tensor]:
        scales: dict[str, Tensor] = {}
        for group, vector in zip(self._groups, self._edges, strict=True):
            shares = vector.softmax(0)
            scales |= {name: shares[at] for at, name in enumerate(group)}
        return scales

    def state_dict(self) -> dict[str, Any]:
        """Return what the relaxation has, and the logits of the edges."""
        return {**super().state_dict(), "edges": self._edges.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        super().load_state_dict(state)
        self._edges.load_state_dict(state["edges"])


def edge_groups(space: SearchSpace) -> tuple[tuple[str, ...], ...]:
    """Return the names of the edges that end in one node, node by node, for every kind of cell.

    Raises:
        SpaceError: The space has no cells.
    """
    groups: dict[tuple[str, ...], None] = {}
    for block in space.blocks:
        ops = block.operations(*next(iter(space.block_settings(block))))
        if len(ops) == 1 and isinstance(ops[0], CellSpec):
            targets = ops[0].targets
            for node in sorted(set(targets)):
                edges = block.edges or block.choices
                names = tuple(n for n, end in zip(edges, targets, strict=True) if end == node)
                groups[names] = None
    if not groups:
        raise SpaceError(
            f"space {space.name!r} has no cells, of which PC-DARTS mixes a part of the channels; take darts"
        )
    return tuple(groups)
