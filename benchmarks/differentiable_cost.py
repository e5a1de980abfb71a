"""Memory and time of a step of every differentiable search, against the number of candidate operations.

    python benchmarks/differentiable_cost.py [--quick] [--repeats N] [--output FILE]

NAS-Bench-201 cells, 16 channels, one a stage, batch 32 of 32 px. Memory is what autograd keeps from the
forward pass for the backward pass, without the weights: exact, and the greater part of the peak of training.
One path is a plain training step on the path that the method runs (ProxylessNAS, GDAS), or on one drawn
evenly (others).
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from record import Figure, parser, report, use_one_core
from torch import Tensor

from autocompress.budget import Constraints
from autocompress.cost import operation_cost
from autocompress.differentiable import Differentiable, Moment
from autocompress.elastic.mixture import Gate, Gates, run_mixture
from autocompress.elastic.supernet import Supernet
from autocompress.plugins import load_strategy
from autocompress.space import SearchSpace
from search_spaces.nas_bench_201 import nas_bench_201

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "DARTS": ("darts", {}),
    "DARTS, second order": ("darts", {"order": 2}),
    "PC-DARTS, 1 in 4": ("pc_darts", {}),
    "P-DARTS, first phase": ("p_darts", {}),
    "GDAS": ("gumbel", {}),
    "SNAS": ("gumbel", {"hard": False}),
    "ProxylessNAS": ("proxyless", {}),
}
CANDIDATES = {
    2: ("skip_connect", "nor_conv_3x3"),
    3: ("skip_connect", "nor_conv_1x1", "nor_conv_3x3"),
    5: ("none", "skip_connect", "avg_pool_3x3", "nor_conv_1x1", "nor_conv_3x3"),
}
MOST_PROXYLESS, MOST_PARTIAL = 1.3, 0.5


class Network:
    """A supernet with a loss, which notes what its forward passes keep."""

    def __init__(self, space: SearchSpace, channels: int, arch: Any, batch: int) -> None:
        """Make the weights."""
        self.supernet: Supernet = space.supernet()
        self._arch, self._channels = arch, channels
        self._weights = {p.untyped_storage().data_ptr() for p in self.supernet.parameters()}
        self.kept_bytes: list[int] = []
        self.gates: list[Gates] = []
        self.group = {"lr": 0.05, "momentum": 0.9, "weight_decay": 3e-4, "nesterov": True}
        generator = torch.Generator().manual_seed(0)
        self.batch = (
            torch.randn(batch, 3, 32, 32, generator=generator),
            torch.randint(0, 10, (batch,), generator=generator),
        )

    def loss(self, batch: tuple[Tensor, Tensor], gates: Gates) -> Tensor:
        """Return the loss; note the bytes that are kept for its gradient."""
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = run_mixture(
                self.supernet, batch[0], self._arch, gates, affine=False, channels=self._channels
            )
            found: Tensor = F.cross_entropy(outputs, batch[1])
        self.kept_bytes.append(sum(kept.values()))
        self.gates.append(gates)
        return found

    @property
    def weights(self) -> list[Any]:
        """The weights with the settings of SGD."""
        return [(weight, self.group) for weight in self.supernet.parameters()]

    def velocity(self, weight: Any) -> None:
        """No momentum yet."""


def one_path(network: Network, gates: Gates, rng: np.random.Generator) -> int:
    """Return what a plain step keeps: on the path that the gates run, or an even draw where they mix."""
    alone = {}
    for name, gate in gates.items():
        weights = gate.weights.detach().tolist()
        codes = [code for code, weight in zip(gate.codes, weights, strict=True) if weight == 1.0]
        code = codes[0] if len(codes) == 1 else int(rng.choice(gate.codes))
        alone[name] = Gate((code,), torch.ones(1))
    network.loss(network.batch, alone)
    return network.kept_bytes[-1]


def steps(make: Callable[[], Differentiable], space: SearchSpace, count: int, batch: int) -> dict[str, Any]:
    """Return, over some steps, the memory of a search step, that of one path, and the seconds."""
    strategy = make()
    (arch,) = space.decode(strategy.start)
    network = Network(space, strategy.channels, arch, batch)
    rng = np.random.default_rng(0)
    memory, alone, seconds = [], [], []
    for step in range(count):
        moment = Moment(90, 100, torch.Generator().manual_seed(step), per_epoch=100)
        network.kept_bytes.clear()
        start = time.process_time()
        strategy.architecture_step(network, network.batch, network.batch, moment)
        network.loss(network.batch, strategy.weight_gates(moment)).backward()  # type: ignore[no-untyped-call]
        seconds.append(time.process_time() - start)
        network.supernet.zero_grad(set_to_none=True)
        memory.append(max(network.kept_bytes))
        at_most = network.gates[int(np.argmax(network.kept_bytes))]
        network.gates.clear()
        alone.append(one_path(network, at_most, rng))
        network.gates.clear()
    ratios = np.array(memory) / np.array(alone)
    return {"memory": memory, "ratio": ratios, "seconds": seconds}


def main() -> None:
    """Measure every method at every number of candidates."""
    options = parser((__doc__ or "").splitlines()[0], repeats=10).parse_args()
    use_one_core()
    count, batch = (2, 4) if options.quick else (options.repeats, 32)
    figures, darts = [], {}
    for number, operations in CANDIDATES.items():
        space = nas_bench_201(channels=16, cells=1, operations=operations)
        limits = Constraints(space, {"macs": operation_cost(space, "macs")}, {})
        for name, (plugin, settings) in METHODS.items():
            found = steps(
                lambda p=plugin, s=settings, c=limits: load_strategy(p)(c, seed=0, **s),  # type: ignore[misc]
                space,
                count,
                batch,
            )
            title = f"{number} candidates, {name}"
            memory = np.array(found["memory"]) / 1e6
            darts.setdefault(number, float(memory.mean()))
            figures.append(Figure(f"{title}: kept", float(memory.mean()), "MB", memory.min(), memory.max()))
            ratios = found["ratio"]
            proxyless = name == "ProxylessNAS"
            figures.append(
                Figure(
                    f"{title}: of one path",
                    float(ratios.mean()),
                    "times",
                    ratios.min(),
                    ratios.max(),
                    f"<= {MOST_PROXYLESS}" if proxyless else "",
                    bool(ratios.mean() <= MOST_PROXYLESS) if proxyless else None,
                )
            )
            partial = name.startswith("PC-DARTS")
            share = float(memory.mean()) / darts[number]
            figures.append(
                Figure(
                    f"{title}: of DARTS",
                    share,
                    "times",
                    share,
                    share,
                    f"<= {MOST_PARTIAL}" if partial else "",
                    share <= MOST_PARTIAL if partial else None,
                )
            )
            taken = sorted(found["seconds"])
            figures.append(Figure(f"{title}: a step", taken[len(taken) // 2], "s", taken[0], taken[-1]))
    report("differentiable_cost", figures, settings={"batch": batch, "steps": count}, options=options)


if __name__ == "__main__":
    main()
