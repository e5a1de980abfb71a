"""DARTS: every option is computed and weighted by its probability; gradients by the held-out loss.

Source: Liu et al., DARTS: Differentiable Architecture Search, ICLR 2019, section 2.3, with the constants of
its repository.
"""

from typing import Any, cast, final

import torch
from torch import Tensor

from autocompress.differentiable import Images, Mixed, Moment
from autocompress.elastic.mixture import Gates
from autocompress.errors import RecipeError
from strategies.relaxed import RelaxedSearch

# The finite difference moves the weights so far in all (footnote 2 of the paper).
DIFFERENCE = 0.01


@final
class Darts(RelaxedSearch):
    """First order: the weights are taken as they are. Second order: as they will be after their next step.

    The next step is that of SGD with momentum (Nesterov's or not) and weight decay; clipping of gradients is
    left out, as in the paper.
    """

    computes_all = True

    def __init__(self, *args: Any, order: int = 1, **options: Any) -> None:
        """Make the search.

        Args:
            args: See `RelaxedSearch`.
            order: 1, or 2 for the gradient through one step of the weights (equations 7 and 8).
            options: See `RelaxedSearch`.

        Raises:
            RecipeError: The order is another one.
        """
        if order not in (1, 2) or isinstance(order, bool):
            raise RecipeError(f"order must be 1 or 2, got {order!r}")
        super().__init__(*args, **options)
        self._order = order

    def weight_gates(self, moment: Moment) -> Gates:
        """Return the mixture."""
        return self.mixture()

    def gradients(self, network: Mixed, train: Images, held_out: Images, moment: Moment) -> None:
        """Differentiate the held-out loss by the logits."""
        if self._order == 1:
            self.set_gradients(self.penalised(network.loss(held_out, self.soft_gates())))
            return
        weights = [weight for weight, _ in network.weights]
        before = [weight.detach().clone() for weight in weights]
        rates = self._unroll(network, train, self.weight_gates(moment))
        logits = list(self.relaxation.logits)
        loss = self.penalised(network.loss(held_out, self.soft_gates()))
        direct = torch.autograd.grad(loss, [*logits, *weights], allow_unused=True)
        outer = [
            torch.zeros_like(weight) if gradient is None else rate * gradient
            for weight, gradient, rate in zip(weights, direct[len(logits) :], rates, strict=True)
        ]
        implicit = self._implicit(network, train, weights, before, outer)
        for vector, gradient, correction in zip(logits, direct, implicit, strict=False):
            vector.grad = (torch.zeros_like(vector) if gradient is None else gradient) - correction
        _set(weights, before)

    def _unroll(self, network: Mixed, train: Images, gates: Gates) -> list[float]:
        """Move the weights as their optimizer will; return by how much of its gradient each moves."""
        weights = network.weights
        loss = network.loss(train, gates)
        gradients = cast(
            list[Tensor | None],
            torch.autograd.grad(loss, [weight for weight, _ in weights], allow_unused=True),
        )
        rates = []
        with torch.no_grad():
            for (weight, group), gradient in zip(weights, gradients, strict=True):
                if "momentum" not in group:
                    raise RecipeError(
                        "order 2 looks ahead by a step of SGD, but the weights have another optimizer: set "
                        "train.optimizer to sgd, or order to 1"
                    )
                momentum, nesterov = group["momentum"], group["nesterov"]
                rates.append(float(group["lr"]) * (1.0 + momentum if nesterov else 1.0))
                if gradient is None:
                    continue
                step = gradient + group["weight_decay"] * weight
                if momentum:
                    known = network.velocity(weight)
                    velocity = step if known is None else momentum * known + step
                    step = step + momentum * velocity if nesterov else velocity
                weight.sub_(group["lr"] * step)
        return rates

    def _implicit(
        self,
        network: Mixed,
        train: Images,
        weights: list[torch.nn.Parameter],
        before: list[Tensor],
        outer: list[Tensor],
    ) -> list[Tensor]:
        """Return `d/dalpha (grad_w L_train . outer)` by a central difference along `outer` (equation 8)."""
        norm = float(torch.sqrt(sum((part**2).sum() for part in outer)))  # type: ignore[arg-type]
        logits = list(self.relaxation.logits)
        if norm == 0.0:
            return [torch.zeros_like(vector) for vector in logits]
        epsilon = DIFFERENCE / norm
        sides = []
        for sign in (1.0, -1.0):
            _set(weights, [b + sign * epsilon * part for b, part in zip(before, outer, strict=True)])
            sides.append(torch.autograd.grad(network.loss(train, self.soft_gates()), logits))
        return [(plus - minus) / (2 * epsilon) for plus, minus in zip(*sides, strict=True)]


def _set(weights: list[torch.nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)
