"""How each layer of a model can be factorized, at which cost and with which error."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from autocompress.count import count
from autocompress.errors import FactorizationError
from autocompress.factorize.activations import energy, inputs_of
from autocompress.factorize.candidates import Candidate, Inputs, Left, find
from autocompress.factorize.decompose import relative_error
from autocompress.factorize.layers import kernel_of
from autocompress.factorize.methods import (
    METHODS,
    Method,
    Rank,
    applicable,
    composed,
    decomposed,
    macs_of,
    parts,
    ranks_below,
    weights_of,
)

CHEAP: tuple[Method, ...] = ("svd", "spatial", "tucker")
"""Without "cp", which takes minutes on large layers, and "depthwise", which has to be trained on."""


@dataclass(frozen=True)
class Offer:
    """One way to factorize a layer.

    Attributes:
        method: How.
        rank: Of the parts.
        macs: Multiply-accumulates on the example, of all runs of the layer.
        params: Of the parts, the bias included.
        weight_error: Norm of the difference of the weights, in parts of their norm.
        output_error: The same of what the layer gives for the images, without its bias; `None` if there
            are none.
    """

    method: Method
    rank: Rank
    macs: int
    params: int
    weight_error: float
    output_error: float | None = None

    @property
    def error(self) -> float:
        """Of the output where it is known, of the weights otherwise."""
        return self.weight_error if self.output_error is None else self.output_error


@dataclass(frozen=True)
class Site:
    """A layer that can be factorized.

    Attributes:
        name: Of the module.
        kind: Name of its class.
        shape: Of its weight.
        runs: How often it runs in a pass.
        macs: Multiply-accumulates on the example, of all runs.
        params: Weights and bias.
        energy: Mean over the images of the squared norm of what it gives, without its bias; `None` without
            images.
        offers: All that need fewer MACs than the layer, by method and rising rank.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    runs: int
    macs: int
    params: int
    energy: float | None
    offers: tuple[Offer, ...]


@dataclass(frozen=True)
class Plan:
    """What of a model can be factorized.

    Attributes:
        sites: Layers that can be, in the order of the model.
        left: Layers that cannot, or for which it does not pay.
        macs: Of the whole model on the example.
        params: Of the whole model.
    """

    sites: tuple[Site, ...]
    left: tuple[Left, ...]
    macs: int
    params: int

    def site(self, name: str) -> Site:
        """Return the layer of a name.

        Raises:
            FactorizationError: There is none.
        """
        for site in self.sites:
            if site.name == name:
                return site
        names = ", ".join(site.name for site in self.sites)
        raise FactorizationError(f"no layer {name!r} can be factorized; those that can: {names or 'none'}")


def make_plan(
    model: nn.Module,
    example: Inputs,
    *,
    methods: Sequence[Method] = CHEAP,
    ranks: int = 8,
    images: Inputs | None = None,
) -> Plan:
    """Look at how each layer of a model can be factorized.

    Args:
        model: Not changed; looked at in evaluation mode.
        example: What the model is called with; MACs are of this batch.
        methods: Which to offer; each has them where it applies.
        ranks: How many of each method, evenly spread over those that save MACs.
        images: A batch of what the model is called with, to measure the errors of outputs. All that goes
            into its layers is held at once.

    Raises:
        FactorizationError: The model cannot be copied or run, or an argument is out of range.
    """
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise FactorizationError(f"ranks must be an integer >= 1, got {ranks!r}")
    check_methods(methods)
    found = find(model, example)
    whole = count(model, *(example if isinstance(example, tuple) else (example,)))
    names = [candidate.name for candidate in found.candidates]
    read = {} if images is None else inputs_of(model, names, images)
    batch = 0 if images is None else len(images[0] if isinstance(images, tuple) else images)
    sites: list[Site] = []
    left = list(found.left)
    for candidate in found.candidates:
        layer = model.get_submodule(candidate.name)
        usable = [method for method in methods if method in applicable(candidate.geometry)]
        offered = [(method, rank) for method in usable for rank in _ladder(candidate, method, ranks)]
        if not offered:
            left.append(Left(candidate.name, f"it is too small: {_saves_nothing(candidate, methods)}"))
            continue
        sites.append(_site(candidate, layer, offered, read.pop(candidate.name, []), batch))
    return Plan(tuple(sites), tuple(left), whole.macs, whole.params)


def check_methods(methods: Sequence[str]) -> None:
    """Check names of methods.

    Raises:
        FactorizationError: There are none, or one is unknown.
    """
    unknown = [method for method in methods if method not in METHODS]
    if isinstance(methods, str) or unknown or not methods:
        raise FactorizationError(f"methods must be some of {', '.join(METHODS)}, got {methods!r}")


def candidate_macs(candidate: Candidate, method: Method, rank: Rank) -> int:
    """Return the multiply-accumulates of a layer in parts, of all runs on the example."""
    found = parts(candidate.geometry, method, rank)
    return sum(call.count * macs_of(found, call.size) for call in candidate.calls)


def saving_ranks(candidate: Candidate, method: Method, macs: float) -> list[Rank]:
    """Return all ranks, rising, with which a layer needs at most so many multiply-accumulates."""
    every = ranks_below(candidate.geometry, method, candidate.calls[0].size, float("inf"))
    low, high = 0, len(every)
    while low < high:
        middle = (low + high) // 2
        if candidate_macs(candidate, method, every[middle]) <= macs:
            low = middle + 1
        else:
            high = middle
    return every[:low]


def _ladder(candidate: Candidate, method: Method, ranks: int) -> list[Rank]:
    """Return some of the ranks that save MACs, the greatest one among them."""
    every = saving_ranks(candidate, method, candidate.macs - 1)
    steps = (-(-len(every) * step // ranks) - 1 for step in range(1, ranks + 1))
    return [every[at] for at in sorted({step for step in steps if step >= 0})]


def _saves_nothing(candidate: Candidate, methods: Sequence[Method]) -> str:
    usable = [method for method in methods if method in applicable(candidate.geometry)]
    if not usable:
        return f"of the methods only {', '.join(applicable(candidate.geometry))} would apply"
    return f"even the lowest rank of {' or '.join(usable)} saves none of its {candidate.macs} MACs"


def _site(
    candidate: Candidate,
    layer: nn.Module,
    offered: Sequence[tuple[Method, Rank]],
    read: Sequence[Tensor],
    images: int,
) -> Site:
    kernel = kernel_of(layer)
    whole = energy(layer, read, kernel)
    offers = []
    kernels = {method: decomposed(kernel, method) for method, _ in offered}
    for method, rank in offered:
        near = composed(method, rank, kernels[method](rank))
        # Of a layer that gives zeros, no approximation by SVD gives more.
        error = (energy(layer, read, kernel.double() - near) / whole) ** 0.5 if whole else 0.0
        offers.append(
            Offer(
                method,
                rank,
                candidate_macs(candidate, method, rank),
                weights_of(parts(candidate.geometry, method, rank)) + candidate.bias,
                relative_error(kernel, near),
                error if images else None,
            )
        )
    return Site(
        candidate.name,
        candidate.kind,
        tuple(layer.get_parameter("weight").shape),
        len(candidate.calls),
        candidate.macs,
        candidate.params,
        whole / images if images else None,
        tuple(offers),
    )
