"""The laws of narrow models over random graphs: whatever is offered can be removed, at its price."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from prune.zoo import macs_of, params_of, run, seeded
from torch import Tensor, nn

from autocompress.errors import ConversionError
from autocompress.prune.network import NarrowNetwork
from autocompress.prune.source import Source

KINDS = (
    "conv", "grouped", "depthwise", "transposed", "norm", "relu", "prelu", "pool", "add", "multiply", "gate",
    "cat", "chunk", "shuffle", "scale", "slice", "halves", "constant", "again", "glu", "pad",
)  # fmt: skip

Step = tuple[str, int, int, int]
"""Kind; two maps made before, counted from the last; a size."""


class Random(nn.Module):
    """Runs steps on maps of 4 x 4 pixels, each of which gives one or two new ones; the last go out."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, int, int, Any]] = []
        self.widths = [3]
        for kind, first, second, size in [("conv", 0, 0, 4), *steps]:
            one, two = (len(self.widths) - 1 - back % len(self.widths) for back in (first, second))
            self._add(kind, one, two, size)
        self.head = nn.Linear(sum(self.widths[-2:]), 3)

    def _add(self, kind: str, one: int, two: int, size: int) -> None:
        c, same = self.widths[one], self.widths[one] == self.widths[two]
        layer: Any = None
        new = [c]
        match kind:
            case "conv":
                layer, new = nn.Conv2d(c, size, 3, padding=1, bias=size % 2 == 0), [size]
            case "grouped" if c % 2 == 0:
                layer, new = nn.Conv2d(c, 2 * size, 3, padding=1, groups=2), [2 * size]
            case "depthwise":
                layer, new = nn.Conv2d(c, c * (1 + size % 2), 3, padding=1, groups=c), [c * (1 + size % 2)]
            case "transposed":
                layer, new = nn.ConvTranspose2d(c, size, 3, padding=1), [size]
            case "norm":
                layer = nn.BatchNorm2d(c)
            case "prelu":
                layer = nn.PReLU(c)
            case "scale":
                layer = nn.ParameterList([torch.rand(1, c, 1, 1) + 0.5])
            case "again":
                known = [
                    n for n, m in enumerate(self.layers) if isinstance(m, nn.Conv2d) and m.in_channels == c
                ]
                if not known:
                    return
                self.steps.append((kind, one, two, known[0]))
                self.widths.append(self.layers[known[0]].out_channels)
                return
            case "cat" if c + self.widths[two] <= 24:
                new = [c + self.widths[two]]
            case "chunk" | "glu" if c % 2 == 0:
                new = [c // 2, c // 2] if kind == "chunk" else [c // 2]
            case "slice" | "halves" if c > size:
                new = [size] if kind == "slice" else [c // 2]
            case "pad":
                new = [c + 1]
            case "relu" | "pool":
                pass
            case "add" | "multiply" | "gate" if same:
                pass
            case "shuffle" | "constant" if c % 2 == 0:
                pass
            case _:
                return
        self.steps.append((kind, one, two, len(self.layers) if layer is not None else (size, c)))
        self.widths += new
        if layer is not None:
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for kind, one, two, detail in self.steps:
            maps += self._step(kind, maps[one], maps[two], detail)
        return self.head(torch.cat(maps[-2:], 1).mean((2, 3)))

    def _step(self, kind: str, x: Tensor, y: Tensor, detail: Any) -> list[Tensor]:
        n, c, h, w = x.shape
        match kind:
            case "scale":
                return [x * self.layers[detail][0]]
            case "relu":
                return [F.relu(x)]
            case "pool":
                return [F.max_pool2d(x, 3, 1, 1)]
            case "add":
                return [x + y]
            case "multiply":
                return [x * torch.sigmoid(y)]
            case "gate":
                return [x * torch.sigmoid(y.mean((2, 3), keepdim=True))]
            case "cat":
                return [torch.cat([x, y], 1)]
            case "chunk":
                return list(x.chunk(2, 1))
            case "glu":
                return [F.glu(x, 1)]
            case "shuffle":
                return [x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)]
            case "constant":
                return [x.reshape(n, 2, detail[1] // 2, h, w).transpose(1, 2).reshape(n, detail[1], h, w)]
            case "slice":
                return [x[:, : detail[0]]]
            case "halves":
                return [x[:, : c // 2]]
            case "pad":
                return [F.pad(x, (0, 0, 0, 0, 1, 0))]
        return [self.layers[detail](x)]


steps = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 3), st.integers(0, 3), st.integers(2, 6)),
    min_size=3,
    max_size=12,
)


@settings(max_examples=30)
@given(steps, st.integers(0, 1000))
def test_whatever_is_offered_can_be_removed_at_its_price(steps: list[Step], seed: int) -> None:
    network = seeded(lambda: Random(steps))
    try:
        source = Source(network.double(), torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    except ConversionError as error:
        assert str(error).startswith("no channel of Random can be removed")  # noqa: PT017
        return
    layers = [layer for group in source.groups for layer in group.layers]
    assert len(layers) == len(set(layers))
    assert len({kept.layer for kept in source.kept}) == len(source.kept)
    assert {*layers, *(kept.layer for kept in source.kept)} == source.trace.units.keys()
    rng = np.random.default_rng(seed)
    image = torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ranked = source.ranked({group.name: rng.random(len(group)) for group in source.groups})
    for draw in range(3):
        widths = tuple(
            int(rng.integers(least, full + 1)) if draw else least
            for least, full in zip(ranked.least, ranked.full, strict=True)
        )
        narrow = ranked.narrowed(widths)
        expected = run(ranked.masked(widths), image)
        torch.testing.assert_close(run(narrow, image), expected, rtol=1e-9, atol=1e-9)
        priced = NarrowNetwork("", ranked.digest, widths, ranked)
        assert (priced.macs, priced.params) == (macs_of(narrow, image), params_of(narrow))
