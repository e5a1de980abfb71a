"""Distillation of features whose loss has weights of its own: variational information, factors.

They are trained along with the student, and are no part of it.
"""

import math
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.distill.pairs import in_full_precision, refusal, same_map
from autocompress.errors import DistillationError

# The learned variance never falls below it, so that its logarithm stays finite.
LEAST_VARIANCE = 1e-5


@final
class VariationalInformation(nn.Module):
    """A Gaussian of the teacher's features given the student's, whose likelihood is the loss (VID).

    Its mean are three 1x1 convolutions of the student's map; its variance is learned, one a channel.

    Source: Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019; first
    variance 5 and widths as in RepDistiller. Weight: 1.

    Args:
        channels_student: Channels or features of the student.
        channels_teacher: Channels or features of the teacher.
        variance: Of all channels at first, above `LEAST_VARIANCE`.
        seed: Of the first weights.

    Raises:
        DistillationError: The variance is too small.
    """

    def __init__(
        self, channels_student: int, channels_teacher: int, *, variance: float = 5.0, seed: int = 0
    ) -> None:
        super().__init__()
        if variance <= LEAST_VARIANCE:
            raise DistillationError(f"variance must be above {LEAST_VARIANCE:g}, got {variance:g}")
        self.channels = channels_student
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.mean = nn.Sequential(
                nn.Conv2d(channels_student, channels_teacher, 1, bias=False),
                nn.ReLU(),
                nn.Conv2d(channels_teacher, channels_teacher, 1, bias=False),
                nn.ReLU(),
                nn.Conv2d(channels_teacher, channels_teacher, 1, bias=False),
            )
        # What softplus makes the variance.
        start = math.log(math.expm1(variance - LEAST_VARIANCE))
        self.spread = nn.Parameter(torch.full((channels_teacher,), start))

    def variance(self) -> Tensor:
        """Return the variance of each channel, `(channels,)`."""
        return F.softplus(self.spread) + LEAST_VARIANCE

    @in_full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean of `((mu(F_s) - F_t)^2 / v + ln v) / 2` over all elements; it can be negative.

        Args:
            student: A map, or `(batch, features)`; the larger map is averaged to the size of the smaller.
            teacher: The same of the teacher.

        Raises:
            DistillationError: They are not maps, or not features, of the same samples, or have other
                channels than the module.
        """
        if list(student.shape[1:2]) != [self.channels] or teacher.shape[1:2] != self.spread.shape:
            rule = f"{self.channels} channels of the student and {len(self.spread)} of the teacher"
            raise refusal(rule, student, teacher)
        maps = (x[:, :, None, None] if x.dim() == 2 else x for x in (student, teacher))
        own, other = same_map(*maps)
        variance = self.variance()[:, None, None]
        squares: Tensor = (self.mean(own) - other).square()
        return (squares / variance + variance.log()).mean() / 2


@final
class Factor(nn.Module):
    """A convolutional encoder of a map into factors for `feature_losses.factor_transfer`.

    Three 3x3 convolutions with batch norm and leaky ReLU (.1). For the student it is the translator, trained
    along with it. For the teacher it is the first half of the paraphraser, an autoencoder that whoever uses
    it trains on the teacher's maps beforehand, and then leaves in evaluation mode.

    Source: Kim et al., "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018,
    section 3; there the teacher's factors are half as many as its channels.

    Args:
        channels: Of the map.
        factors: Channels of the result: as many for the student as for the teacher.
        seed: Of the first weights.
    """

    def __init__(self, channels: int, factors: int, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for entering in (channels, factors, factors):
                layers += [
                    nn.Conv2d(entering, factors, 3, padding=1, bias=False),
                    nn.BatchNorm2d(factors),
                    nn.LeakyReLU(0.1),
                ]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, channels, height, width)` to `(batch, factors, height, width)`."""
        factors: Tensor = self.layers(x)
        return factors
