"""Zero-cost proxies: scores of untrained networks, in the place of accuracy before anything is trained.

A proxy costs one forward (and backward) pass, or nothing. It is an `Evaluator` that is not paid for: search
it, or let `best_of` pick the rows that a paid search starts from (`WarmStart`). What a proxy says of
accuracy differs from space to space, and parameters or MACs alone are often as good; they stand here as
proxies too.
"""

import copy
from dataclasses import dataclass, field
from typing import Literal, Protocol, final, get_args

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.budget import Constraints
from autocompress.cost import Cost, Values, operation_cost
from autocompress.errors import EvaluationError, RecipeError
from autocompress.evaluator import Evaluator
from autocompress.network import SqueezeExcite, build_network
from autocompress.ops import Shape
from autocompress.proposals import Asked, check_count, fresh_sample, random_generator
from autocompress.space import Codes, SearchSpace

Proxy = Literal["synflow", "naswot", "params", "macs"]
PROXIES: tuple[Proxy, ...] = get_args(Proxy)

RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU)
"""Activations that block one side of zero: the codes of NASWOT say on which side each input is."""
GATES = (nn.Sigmoid, nn.Hardsigmoid)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

# Synflow is conserved in linear networks only; these would break it.
_BYPASSED = (*RECTIFIERS, *GATES, *NORMS, SqueezeExcite)


def synaptic_flow(network: nn.Module, in_shape: Shape) -> dict[str, float]:
    """Return the synaptic flow through every parameter, `sum |theta| * dR / d|theta|`, in 64-bit floats.

    R is the sum of the outputs for an image of ones through the network with absolute parameters. In a
    chain of layers every layer carries the same flow, R; a branch carries its part.

    Source: Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic
    flow, NeurIPS 2020, theorems 1 and 2; summed as a score of networks by Abdelfattah et al., Zero-Cost
    Proxies for Lightweight NAS, ICLR 2021. As in their code, batch norm is bypassed. So are activations
    (ReLU is the identity on what is positive, but hard-swish is not) and squeeze-excite, whose gate is no
    linear map; biases are zero.

    Args:
        network: Not changed. Activations must be modules, not functions.
        in_shape: Channels, height and width of an image.

    Returns:
        Name of a parameter to its flow; 0 for biases and for what is bypassed.
    """
    linear = copy.deepcopy(network).to("cpu", torch.float64).eval()
    for module in list(linear.modules()):
        # Not `named_children`, which leaves out a module that stands in two places.
        for name, child in list(module._modules.items()):
            if isinstance(child, _BYPASSED):
                setattr(module, name, nn.Identity())
    parameters = dict(linear.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.abs_()
            if name.rpartition(".")[2] == "bias":
                parameter.zero_()
            parameter.requires_grad_()
    with torch.enable_grad():
        output: Tensor = linear(torch.ones(1, *in_shape, dtype=torch.float64))
        gradients = torch.autograd.grad(output.sum(), list(parameters.values()), allow_unused=True)
    flows = dict.fromkeys((name for name, _ in network.named_parameters()), 0.0)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        if gradient is not None:
            flows[name] = float((parameter.detach() * gradient).sum())
    return flows


def naswot(network: nn.Module, images: Tensor) -> float:
    """Return the log-determinant of how alike the activation codes of images are; -inf if two are the same.

    Entry (i, j) of the matrix is the number of units that are on the same side of zero for images i and j.
    Units are the inputs of `RECTIFIERS` that are modules; gates, and what a module calls as a function (the
    hidden layer of squeeze-excite), do not count. Batch norm normalises by the batch, as in the authors'
    code.

    Source: Mellor et al., Neural Architecture Search without Training, ICML 2021, section 3.

    Args:
        network: Not changed.
        images: `(n, channels, height, width)`, n at least 2.

    Raises:
        EvaluationError: The network has no rectifier, or there are fewer than two images.
    """
    if len(images) < 2:
        raise EvaluationError(f"naswot compares images: there must be 2 or more, got {len(images)}")
    network = copy.deepcopy(network).train()
    agreement = torch.zeros(len(images), len(images), dtype=torch.float64)

    def compare(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # +1 and -1: the product counts agreements minus disagreements.
        signs = torch.where(inputs[0].detach().flatten(1) > 0, 1.0, -1.0)
        agreement.add_((signs @ signs.T + signs.shape[1]).double() / 2)

    counted = [module for module in network.modules() if isinstance(module, RECTIFIERS)]
    if not counted:
        names = ", ".join(kind.__name__ for kind in RECTIFIERS)
        raise EvaluationError(f"naswot counts the units of {names}; the network has no such module")
    for module in counted:
        module.register_forward_pre_hook(compare)
    with torch.no_grad():
        network(images)
    return float(torch.linalg.slogdet(agreement).logabsdet)


class _Score(Protocol):
    def __call__(self, network: nn.Module, in_shape: Shape) -> float:
        """Return the score of an untrained network."""


@final
@dataclass(frozen=True)
class Synflow:
    """The logarithm of the whole synaptic flow: sums of the order of 10^30 rank the same."""

    def __call__(self, network: nn.Module, in_shape: Shape) -> float:
        """Return the score.

        Raises:
            EvaluationError: The flow is zero, or too large for 64 bits.
        """
        total = sum(synaptic_flow(network, in_shape).values())
        if not 0 < total < float("inf"):
            raise EvaluationError(f"the synaptic flow of the network is {total}: its logarithm is no score")
        return float(np.log(total))


@final
@dataclass(frozen=True, eq=False)
class Naswot:
    """`naswot` on given images, resized to the input of each network, or on normal noise in its shape.

    Attributes:
        images: `(n, channels, height, width)`, normalised as for training; `None` for noise.
        count: How many images of noise.
        seed: Of the noise.
    """

    images: Tensor | None = None
    count: int = 32
    seed: int = 0

    def __call__(self, network: nn.Module, in_shape: Shape) -> float:
        """Return the score.

        Raises:
            EvaluationError: See `naswot`.
        """
        if self.images is None:
            generator = torch.Generator().manual_seed(self.seed)
            return naswot(network, torch.randn(self.count, *in_shape, generator=generator))
        images = self.images
        if images.shape[2:] != in_shape[1:]:
            images = nn.functional.interpolate(images, in_shape[1:], mode="bilinear", antialias=True)
        return naswot(network, images)


@final
@dataclass(frozen=True, eq=False)
class NetworkProxy:
    """An `Evaluator` that builds each network, initialises it under a seed, and scores it.

    Attributes:
        space: The space of the rows.
        metric: The name of the score; larger is better.
        score: What scores an untrained network.
        seed: Of the parameters; every row starts from it anew, so its score does not depend on other rows.
        paid: False: no trial is made of a proxy.
    """

    space: SearchSpace
    metric: str
    score: _Score = field(repr=False)
    seed: int = 0
    paid: bool = False

    def __call__(self, codes: Codes) -> dict[str, Values]:
        """Return the score of every row, `(n,)`; -inf, a failed evaluation, where there is none."""
        return {self.metric: np.array([self._of(row) for row in codes], dtype=np.float64)}

    def _of(self, row: Codes) -> float:
        blocks = self.space.operations(row)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = build_network(blocks)
            try:
                return self.score(network, blocks[0][1][0].in_shape)
            except EvaluationError:
                return -np.inf


@final
@dataclass(frozen=True, eq=False)
class CostProxy:
    """An `Evaluator` that says a cost: more parameters or MACs are often more accurate.

    Attributes:
        cost: Any cost of the space.
        paid: False: no trial is made of a proxy.
    """

    cost: Cost
    paid: bool = False

    @property
    def metric(self) -> str:
        """The name of the cost."""
        return self.cost.metric

    def __call__(self, codes: Codes) -> dict[str, Values]:
        """Return the cost of every row, `(n,)`."""
        return {self.metric: self.cost.of(codes)}


def zero_cost_proxy(
    name: Proxy, space: SearchSpace, *, images: Tensor | None = None, seed: int = 0
) -> NetworkProxy | CostProxy:
    """Make a proxy by name; it gives the metric of that name.

    Args:
        name: One of `PROXIES`.
        space: The space.
        images: For NASWOT, see `Naswot`; others look at no data.
        seed: Of parameters and noise.

    Raises:
        RecipeError: There is no such proxy.
    """
    match name:
        case "synflow":
            return NetworkProxy(space, name, Synflow(), seed)
        case "naswot":
            return NetworkProxy(space, name, Naswot(images, seed=seed), seed)
        case "params" | "macs":
            return CostProxy(operation_cost(space, name))
    raise RecipeError(f"a zero-cost proxy is one of {', '.join(PROXIES)}, got {name!r}")


def best_of(
    evaluator: Evaluator, constraints: Constraints, n: int, *, draws: int, seed: int, metric: str
) -> Codes:
    """Return the best of random feasible rows by a proxy, best first: what a paid search can start from.

    Args:
        evaluator: Scores the rows.
        constraints: What fits.
        n: How many rows are wanted.
        draws: How many distinct rows are scored; fewer where the feasible space is smaller.
        seed: Draws them.
        metric: The evaluator's metric to rank by; larger is better.

    Returns:
        Distinct canonical feasible rows `(m, choices)`; m < n where fewer have a finite score.

    Raises:
        RecipeError: `n` is not in 1..draws, or the seed is none.
        EvaluationError: The evaluator does not give the metric.
    """
    check_count("n", n, at_most=check_count("draws", draws))
    rows = fresh_sample(constraints, draws, random_generator(seed), Asked(constraints.space))
    scores = evaluator(rows)
    if metric not in scores:
        raise EvaluationError(f"the proxy gives {', '.join(scores)}, not {metric!r}")
    finite = np.isfinite(scores[metric])
    rows, values = rows[finite], scores[metric][finite]
    return rows[np.argsort(-values, kind="stable")[:n]]
