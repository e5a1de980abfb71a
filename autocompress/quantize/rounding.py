"""Rounding as a variable: between the level below a weight and the level above.

Source: Nagel et al., AdaRound, ICML 2020, equations 22 to 24.
"""

from typing import Final

import torch
from torch import Tensor, nn

from autocompress.quantize.grid import LEAST_SCALE, along, power_of_two
from autocompress.quantize.quantizer import Quantizer

ZETA, GAMMA = 1.1, -0.1
"""Ends to which the sigmoid is stretched, before it is clipped at 1 and 0: both can be reached."""

_EDGE: Final = 1e-4
# Fractions nearer to 0 or 1 start here: beyond, the sigmoid is clipped and nothing would be learned.


class SoftRounding(nn.Module):
    """What stands in for the quantizer of a layer's weights while their rounding is learned.

    Args:
        weight: The weights, in floating point.
        quantizer: Whose levels they are rounded to; its scale stays.

    Attributes:
        logits: In the shape of the weights (V); below 0 means down.
    """

    def __init__(self, weight: Tensor, quantizer: Quantizer) -> None:
        """Start where every weight is where it is."""
        super().__init__()
        self.grid = quantizer.grid
        scale = quantizer.scale.detach().clamp_min(LEAST_SCALE)
        if self.grid.levels == "power_of_two_scale":
            scale = power_of_two(scale)
        self.scale = along(scale, weight, quantizer.axis)
        self.zero_point = along(quantizer.zero_point.detach(), weight, quantizer.axis)
        unrounded = weight.detach() / self.scale + self.zero_point
        self.below = unrounded.floor()
        self.logits = nn.Parameter(logits_of(unrounded - self.below))

    def share(self) -> Tensor:
        """Return how much of the step up is taken, 0 to 1, in the shape of the weights (h)."""
        return (torch.sigmoid(self.logits) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)

    def undecided(self, beta: float) -> Tensor:
        """Return the sum over weights of 1 - |2h - 1|^beta: 0 where all are on one side."""
        return (1 - (2 * self.share() - 1).abs().pow(beta)).sum()

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weights as they are rounded now; `weight` itself is not needed."""
        return self._levels(self.share())

    def hard(self) -> Tensor:
        """Return the weights, each at one of two levels; numbers that the quantizer returns as they are."""
        return self._levels((self.logits.detach() >= 0).to(self.below))

    def _levels(self, share: Tensor) -> Tensor:
        q = (self.below + share).clamp(self.grid.qmin, self.grid.qmax)
        return (q - self.zero_point) * self.scale


def logits_of(fraction: Tensor) -> Tensor:
    """Return the logits at which the share is a fraction: the inverse of the stretched sigmoid."""
    return torch.logit((fraction.clamp(_EDGE, 1 - _EDGE) - GAMMA) / (ZETA - GAMMA))
