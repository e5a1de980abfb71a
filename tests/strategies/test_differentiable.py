"""The contract of differentiable strategies, on cells, on nodes of two edges, and on chains of blocks."""

from autocompress.budget import Constraints
from autocompress.space import SearchSpace
from autocompress.testing.differentiable import DifferentiableContract
from search_spaces.darts import darts
from search_spaces.nas_bench_201 import nas_bench_201
from strategies.darts import Darts
from strategies.gumbel import GumbelSoftmax
from strategies.p_darts import PDarts
from strategies.pc_darts import PcDarts
from strategies.proxyless import ProxylessNas
from strategies.relaxed import RelaxedSearch


class Cells(DifferentiableContract):
    def space(self) -> SearchSpace:
        operations = ("none", "skip_connect", "avg_pool_3x3", "nor_conv_1x1")
        return nas_bench_201(channels=4, cells=1, operations=operations, resolution=4, classes=2)


class Nodes(DifferentiableContract):
    budget = "macs=95%,params=95%"  # two of the eight edges of a cell may be skips

    def space(self) -> SearchSpace:
        operations = ("none", "skip_connect", "dil_conv_3x3")
        return darts(channels=2, layers=3, operations=operations, classes=2, resolution=4)


class Watched(DifferentiableContract):
    eigenvalue: bool | None = False  # of the Hessian, which takes most of the time


class OfDarts(Watched):
    def make(self, constraints: Constraints, seed: int, candidates: int) -> RelaxedSearch:
        return Darts(constraints, seed=seed, candidates=candidates, eigenvalue=self.eigenvalue)


class OfSecondOrderDarts(Watched):
    def make(self, constraints: Constraints, seed: int, candidates: int) -> RelaxedSearch:
        return Darts(constraints, seed=seed, candidates=candidates, eigenvalue=self.eigenvalue, order=2)


class OfPcDarts(Watched):
    warmup = 0.3

    def make(self, constraints: Constraints, seed: int, candidates: int) -> RelaxedSearch:
        return PcDarts(constraints, seed=seed, candidates=candidates, eigenvalue=self.eigenvalue)


class OfPDarts(Watched):
    warmup = 0.4

    def make(self, constraints: Constraints, seed: int, candidates: int) -> RelaxedSearch:
        return PDarts(constraints, seed=seed, candidates=candidates, eigenvalue=self.eigenvalue)


class OfHardGumbel(Watched):
    def make(self, constraints: Constraints, seed: int, candidates: int) -> RelaxedSearch:
        return GumbelSoftmax(constraints, seed=seed, candidates=candidates, eigenvalue=self.eigenvalue)


class OfSoftGumbel(Watched):
    def make(self, constraints: Constraints, seed: int, candidates: int) -> RelaxedSearch:
        return GumbelSoftmax(
            constraints, seed=seed, candidates=candidates, eigenvalue=self.eigenvalue, hard=False
        )


class OfProxyless(Watched):
    warmup = 0.25

    def make(self, constraints: Constraints, seed: int, candidates: int) -> RelaxedSearch:
        return ProxylessNas(constraints, seed=seed, candidates=candidates, eigenvalue=self.eigenvalue)


class TestDarts(OfDarts, Cells):
    """On cells, with the eigenvalue."""

    eigenvalue = None


class TestSecondOrderDarts(OfSecondOrderDarts, Cells):
    """On cells."""


class TestPcDarts(OfPcDarts, Cells):
    """On cells, with the eigenvalue."""

    eigenvalue = None


class TestPDarts(OfPDarts, Cells):
    """On cells, with the eigenvalue."""

    eigenvalue = None


class TestHardGumbel(OfHardGumbel, Cells):
    """On cells."""


class TestSoftGumbel(OfSoftGumbel, Cells):
    """On cells, with the eigenvalue."""

    eigenvalue = True


class TestProxyless(OfProxyless, Cells):
    """On cells."""


class TestDartsOnChains(OfDarts):
    """On a chain."""


class TestSecondOrderDartsOnChains(OfSecondOrderDarts):
    """On a chain."""


class TestPDartsOnChains(OfPDarts):
    """On a chain."""


class TestHardGumbelOnChains(OfHardGumbel):
    """On a chain."""


class TestSoftGumbelOnChains(OfSoftGumbel):
    """On a chain."""


class TestProxylessOnChains(OfProxyless):
    """On a chain."""


class TestPDartsOnNodes(OfPDarts, Nodes):
    """On nodes, by integer programming."""


class TestHardGumbelOnNodes(OfHardGumbel, Nodes):
    """On nodes, by integer programming."""
