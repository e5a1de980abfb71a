"""ProxylessNAS: one path in memory; binary gates drawn by the probabilities, two of them compared at a time.

Source: Cai et al., ProxylessNAS, ICLR 2020, section 3.2 and equation 4, with the rescaling of its repository
(`search/modules/mix_op.py`): of two drawn options both are moved, then both are shifted together so that the
probabilities of the others stay as they were.
"""

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from autocompress.differentiable import Images, Mixed, Moment
from autocompress.elastic.mixture import Gate, Gates
from strategies.relaxed import RelaxedSearch


@final
class ProxylessNas(RelaxedSearch):
    """Weights learn on one drawn path; the logits by the difference of two."""

    def __init__(
        self,
        *args: Any,
        learning_rate: float = 1e-3,
        betas: Sequence[float] = (0.0, 0.999),
        weight_decay: float = 0.0,
        warmup: float = 0.25,
        **options: Any,
    ) -> None:
        """Make the search; the defaults are the paper's (of 160 epochs, 40 are warm-up).

        Args:
            args: See `RelaxedSearch`.
            learning_rate: Of the logits.
            betas: Of Adam.
            weight_decay: Of the logits.
            warmup: Share of the training in which paths are drawn, but the logits stand still.
            options: See `RelaxedSearch`.
        """
        super().__init__(
            *args,
            learning_rate=learning_rate,
            betas=betas,
            weight_decay=weight_decay,
            warmup=warmup,
            **options,
        )

    def weight_gates(self, moment: Moment) -> Gates:
        """Draw one option a choice."""
        gates = {}
        for name, p in self.relaxation.probabilities().items():
            code = int(torch.multinomial(p.detach(), 1, generator=moment.generator))
            gates[name] = Gate((code,), torch.ones(1, dtype=p.dtype))
        return gates

    def gradients(self, network: Mixed, train: Images, held_out: Images, moment: Moment) -> None:
        """Draw two options a choice, run one of them, and compare both.

        The gradient by a gate is the inner product of what comes back with what the option computes; that
        by the logits of the two follows through the softmax over these two.
        """
        self._pairs, gates, shares = [], {}, {}
        for name, vector in zip(self.relaxation.relaxed, self.relaxation.logits, strict=True):
            drawn = min(2, len(vector))
            pair = torch.multinomial(vector.detach().softmax(0), drawn, generator=moment.generator)
            pair = pair.sort().values
            share = vector[pair].softmax(0)
            one = torch.multinomial(share.detach(), 1, generator=moment.generator)
            binary = torch.zeros(drawn, dtype=vector.dtype).scatter_(0, one, 1.0)
            # The binary gate, whose gradient is that of the share. In another order of the sum it would miss
            # 1 by a rounding error in a quarter of the draws, and both parts would be kept in memory.
            gates[name] = Gate(tuple(pair.tolist()), binary + (share - share.detach()))
            # For the expected cost: the share within the pair, the others as they are.
            mass = vector.detach().softmax(0)
            shares[name] = mass.scatter(0, pair, mass[pair].sum() * share)
            self._pairs.append(pair)
        self.set_gradients(self.penalised(network.loss(held_out, gates), shares))

    def move(self) -> None:
        """Move the logits of each pair, and leave the other probabilities where they are."""
        logits = list(self.relaxation.logits)
        before = [vector.detach().clone() for vector in logits]
        super().move()
        with torch.no_grad():
            for vector, old, pair in zip(logits, before, self._pairs, strict=True):
                moved = vector[pair].clone()
                vector.copy_(old)
                vector[pair] = rescaled(moved, old[pair])


def rescaled(moved: Tensor, before: Tensor) -> Tensor:
    """Shift logits so that the sum of their exponentials is what it was: other probabilities stay."""
    shift = float(moved.logsumexp(0) - before.logsumexp(0))
    if not math.isfinite(shift):
        return moved
    return moved - shift
