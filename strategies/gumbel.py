"""Gumbel-softmax: options are drawn, by a sample that gradients pass through.

Sources: Xie et al., SNAS, ICLR 2019 (soft samples: every option is computed); Dong & Yang, Searching for a
Robust Neural Architecture in Four GPU Hours (GDAS), CVPR 2019 (hard samples: the drawn option alone is
computed, and gradients are those of the soft sample); Jang et al., Categorical Reparameterization with
Gumbel-Softmax, ICLR 2017.
"""

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from autocompress.differentiable import Images, Mixed, Moment
from autocompress.elastic.marginal import width_choices
from autocompress.elastic.mixture import Gate, Gates
from autocompress.errors import RecipeError
from strategies.relaxed import RelaxedSearch


@final
class GumbelSoftmax(RelaxedSearch):
    """One sample a step, at a temperature that falls linearly."""

    def __init__(
        self,
        *args: Any,
        hard: bool = True,
        first_temperature: float = 10.0,
        last_temperature: float = 0.1,
        **options: Any,
    ) -> None:
        """Make the search.

        Args:
            args: See `RelaxedSearch`.
            hard: Whether only the drawn option of a choice is computed (GDAS), or all of them (SNAS). Of
                widths all channels are computed for the gradients, at the cost of one path in either case.
            first_temperature: At the start; 10 in GDAS.
            last_temperature: At the end; 0.1 in GDAS.
            options: See `RelaxedSearch`.

        Raises:
            RecipeError: An option is out of its range.
        """
        if not isinstance(hard, bool):
            raise RecipeError(f"hard must be true or false, got {hard!r}")
        for name, value in {
            "first_temperature": first_temperature,
            "last_temperature": last_temperature,
        }.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise RecipeError(f"{name} must be a positive number, got {value!r}")
        super().__init__(*args, **options)
        self._hard, self._first, self._last = hard, float(first_temperature), float(last_temperature)
        self._widths = frozenset(width_choices(self.relaxation.space))

    def weight_gates(self, moment: Moment) -> Gates:
        """Draw gates."""
        with torch.no_grad():
            return self._draw(moment)

    def gradients(self, network: Mixed, train: Images, held_out: Images, moment: Moment) -> None:
        """Differentiate the held-out loss by the logits, through one sample."""
        loss = network.loss(held_out, self._draw(moment))
        self.set_gradients(self.penalised(loss))

    def _draw(self, moment: Moment) -> dict[str, Gate]:
        temperature = self._first + (self._last - self._first) * moment.progress
        gates = {}
        for name, vector in zip(self.relaxation.relaxed, self.relaxation.logits, strict=True):
            soft = sample(vector, temperature, moment.generator)
            every = name in self._widths and torch.is_grad_enabled()
            gates[name] = straight_through(soft, every=every) if self._hard else Gate.all(soft)
        return gates


def sample(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Return one Gumbel-softmax sample of `logits (options,)`."""
    uniform = torch.rand(len(logits), generator=generator, dtype=logits.dtype)
    tiny = torch.finfo(logits.dtype).tiny
    gumbel = -(-uniform.clamp(min=tiny).log()).clamp(min=tiny).log()
    return ((logits.log_softmax(0) + gumbel) / temperature).softmax(0)


def straight_through(soft: Tensor, *, every: bool = False) -> Gate:
    """Return a gate whose value is 1 for the largest option alone, and its gradient that of the soft sample.

    Args:
        soft: `(options,)`.
        every: Whether the other options are computed too, with a value of 0. Widths need that: alone, the
            drawn option is a common factor of its channels, which the next batch norm takes out again.
    """
    code = int(soft.argmax())
    if every:
        return Gate.all(F.one_hot(soft.argmax(), len(soft)) + (soft - soft.detach()))
    picked = soft[code : code + 1]
    return Gate((code,), 1.0 + (picked - picked.detach()))
