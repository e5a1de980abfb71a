"""Networks whose bits are chosen, small enough to look through."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.latency.target import Scheme
from autocompress.quantize.schemes import Bits
from autocompress.quantize.source import QuantizationSource

WIDTHS = tuple((w, a) for w in (2, 4, 8) for a in (4, 8))
INTEGERS = ((8, 8), (32, 32))
CHANNELS = Scheme((2, 4, 8), granularity=("per_channel",))


class Residual(nn.Module):
    """Two branches that read one tensor, an addition, an activation that is not ReLU, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(6)
        self.left = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.left_norm = nn.BatchNorm2d(8)
        self.after = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.right = nn.Conv2d(6, 8, 1, stride=2)
        self.swish = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        left = self.after(F.relu6(self.left_norm(self.left(x))))
        x = F.relu(left + self.right(x))
        x = F.hardswish(self.swish(x))
        x = torch.relu(self.last(x))
        return self.fc(x.mean((2, 3)))


def residual(seed: int = 0) -> Residual:
    """Make it with statistics of batch norm that are not those of its initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Residual()
    for norm in (model.stem_norm, model.left_norm):
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
        norm.bias.data.normal_(generator=generator)
    return model.eval()


def images(count: int = 16, side: int = 8, seed: int = 0) -> Tensor:
    """Return normal noise."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def source(
    model: nn.Module | None = None,
    widths: tuple[Bits, ...] = WIDTHS,
    *,
    scheme: Scheme = CHANNELS,
    outputs: bool = False,
) -> QuantizationSource:
    """Return a model with ranges of 16 images."""
    x = images()
    return QuantizationSource(
        model or residual(), x[:1], calibration=[x], widths=widths, scheme=scheme, outputs=outputs
    )
