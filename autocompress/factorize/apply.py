"""A copy of a model in which layers are factorized, with a report."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from autocompress.count import count
from autocompress.errors import FactorizationError
from autocompress.factorize.candidates import (
    Candidate,
    Found,
    Inputs,
    Left,
    called,
    deep_copy,
    find,
    quiet_copy,
)
from autocompress.factorize.decompose import check_share, relative_error
from autocompress.factorize.layers import assembled, check_layer, kernel_of
from autocompress.factorize.methods import (
    METHODS,
    Method,
    Rank,
    applicable,
    check_rank,
    composed,
    decomposed,
    parts,
    rank_at_energy,
    weights_of,
)
from autocompress.factorize.plan import candidate_macs, saving_ranks


@dataclass(frozen=True)
class Rule:
    """One rule for all layers; those to which it does not apply, or where it saves nothing, stay as they are.

    Attributes:
        method: Linear layers and 1x1 convolutions take "svd" whatever it is; kernels of one line take "svd"
            for "spatial" and "cp".
        energy: The least rank that keeps this share of the squared norm of the weights, in (0, 1].
        ratio: Or: the greatest rank that needs at most this share of the layer's MACs, in (0, 1].
        least_channels: Layers with fewer inputs or outputs stay.
        skip: Names of layers that stay.
    """

    method: Method = "svd"
    energy: float | None = None
    ratio: float | None = None
    least_channels: int = 1
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check all but the names."""
        if self.method not in METHODS:
            raise FactorizationError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if (self.energy is None) == (self.ratio is None):
            raise FactorizationError(
                f"a rule has either an energy or a ratio, got energy {self.energy!r}, ratio {self.ratio!r}"
            )
        if self.energy is not None:
            check_share("energy", self.energy)
            if self.method == "cp":
                raise FactorizationError("cp has no singular values to keep a share of: give a ratio")
        else:
            check_share("ratio", self.ratio)
        if isinstance(self.least_channels, bool) or not isinstance(self.least_channels, int):
            raise FactorizationError(f"least_channels must be an integer, got {self.least_channels!r}")
        names: object = self.skip  # a text is a sequence of texts too
        if isinstance(names, str):
            raise FactorizationError(f"skip must be a tuple of names, got {self.skip!r}")


Settings = Mapping[str, tuple[Method, Rank]] | Rule
"""Name of a layer to its method and rank, or one rule for all."""


@dataclass(frozen=True)
class Replaced:
    """What became of a layer.

    Attributes:
        name: Of the module.
        method: How it was factorized.
        rank: Of its parts.
        macs_before: On the example, of all runs.
        macs_after: Likewise.
        params_before: Weights and bias.
        params_after: Likewise.
        weight_error: Norm of the difference of the weights, in parts of their norm.
    """

    name: str
    method: Method
    rank: Rank
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    weight_error: float


@dataclass(frozen=True, eq=False)
class Factorized:
    """A factorized model.

    Attributes:
        model: The copy, in the mode of the original. `model.NAME` is a sequence of parts for each layer.
        layers: Those that were replaced, in the order of the model.
        left: Layers that stayed; with given settings only those that no setting could be for.
        macs_before: Of the whole model on the example.
        macs_after: Likewise.
        params_before: Of the whole model.
        params_after: Likewise.
    """

    model: nn.Module
    layers: tuple[Replaced, ...]
    left: tuple[Left, ...]
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int


def factorize(model: nn.Module, settings: Settings, example: Inputs) -> Factorized:
    """Return a copy of a model with layers as sequences of smaller ones.

    A module that has several names, or runs several times, is replaced by one sequence everywhere. A batch
    norm behind a layer stays behind it; its statistics are those of the exact layer, so recompute them or
    train on.

    Args:
        model: Not changed.
        settings: Of each layer, such as from `ranks_under`, or one rule.
        example: What the model is called with; MACs are of this batch.

    Raises:
        FactorizationError: A setting is for no layer, or for one that cannot be factorized so; or the copy
            does not run.
    """
    found = find(model, example)
    left = list(found.left)
    if isinstance(settings, Rule):
        _check_names(settings.skip, model, "skip")
        chosen: dict[str, tuple[Method, Rank]] = {}
        for candidate in found.candidates:
            wanted = _by_rule(candidate, kernel_of(model.get_submodule(candidate.name)), settings)
            if isinstance(wanted, str):
                left.append(Left(candidate.name, wanted))
            else:
                chosen[candidate.name] = wanted
    else:
        chosen = _by_name(model, settings, found)
    made: dict[str, nn.Module] = {}
    replaced = []
    for candidate in found.candidates:
        if candidate.name in chosen:
            layer = model.get_submodule(candidate.name)
            made[candidate.name], report = _replaced(candidate, layer, *chosen[candidate.name])
            replaced.append(report)
    narrow = _with(model, made)
    given = example if isinstance(example, tuple) else (example,)
    _try(model, narrow, example)
    before, after = count(model, *given), count(narrow, *given)
    return Factorized(
        narrow, tuple(replaced), tuple(left), before.macs, after.macs, before.params, after.params
    )


def _by_rule(candidate: Candidate, kernel: Tensor, rule: Rule) -> tuple[Method, Rank] | str:
    """Return method and rank of a layer, or why it stays."""
    geometry = candidate.geometry
    if candidate.name in rule.skip:
        return "it is to be skipped"
    if min(geometry.in_channels, geometry.out_channels) < rule.least_channels:
        return (
            f"it has {geometry.in_channels} inputs and {geometry.out_channels} outputs, fewer than "
            f"{rule.least_channels}"
        )
    method: Method = rule.method if rule.method in applicable(geometry) else "svd"
    if rule.energy is not None:
        rank = rank_at_energy(kernel, method, rule.energy)
        macs = candidate_macs(candidate, method, rank)
        if macs >= candidate.macs:
            return f"rank {rank} of {method} would need {macs} MACs, not fewer than its {candidate.macs}"
        return method, rank
    ranks = saving_ranks(candidate, method, (rule.ratio or 0) * candidate.macs)
    if not ranks:
        return f"even the lowest rank of {method} needs more than {rule.ratio:g} of its {candidate.macs} MACs"
    return method, ranks[-1]


def _by_name(
    model: nn.Module, settings: Mapping[str, tuple[Method, Rank]], found: Found
) -> dict[str, tuple[Method, Rank]]:
    """Check settings, and return them under the first names of the layers."""
    _check_names(settings, model, "settings")
    first = {module: name for name, module in model.named_modules()}
    known = {candidate.name: candidate for candidate in found.candidates}
    reasons = {left.layer: left.reason for left in found.left}
    chosen: dict[str, tuple[Method, Rank]] = {}
    for given, setting in settings.items():
        layer = model.get_submodule(given)
        name = first[layer]
        if name not in known:
            reason = reasons.get(name, f"{type(layer).__name__} is no layer")
            raise FactorizationError(f"layer {given!r} cannot be factorized: {reason}")
        if name in chosen:
            raise FactorizationError(f"{given!r} and {name!r} are one module: give one setting for both")
        if not isinstance(setting, tuple) or len(setting) != 2:
            raise FactorizationError(f"the setting of {given!r} must be (method, rank), got {setting!r}")
        method, rank = setting
        try:
            chosen[name] = method, check_rank(check_layer(layer, method), method, rank)
        except FactorizationError as error:
            raise FactorizationError(f"layer {given!r}: {error}") from error
    return chosen


def _check_names(names: Any, model: nn.Module, what: str) -> None:
    known = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 3)
            raise FactorizationError(
                f"{what}: {type(model).__name__} has no module {name!r}"
                + (f"; near are {', '.join(map(repr, near))}" if near else "")
            )


def _replaced(
    candidate: Candidate, layer: nn.Module, method: Method, rank: Rank
) -> tuple[nn.Sequential, Replaced]:
    kernel, found = kernel_of(layer), parts(candidate.geometry, method, rank)
    kernels = decomposed(kernel, method)(rank)
    report = Replaced(
        candidate.name,
        method,
        rank,
        candidate.macs,
        candidate_macs(candidate, method, rank),
        candidate.params,
        weights_of(found) + candidate.bias,
        relative_error(kernel, composed(method, rank, kernels)),
    )
    return assembled(layer, found, kernels), report


def _with(model: nn.Module, made: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy of a model with other modules in some places, under all names that they have."""
    copied = deep_copy(model)
    if "" in made:
        return made[""]
    places = {copied.get_submodule(name): module for name, module in made.items()}
    for parent in list(copied.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in places:
                parent._modules[name] = places[child]
    return copied


def _try(model: nn.Module, narrow: nn.Module, example: Inputs) -> None:
    """Run a copy once: a model may ask its layers for attributes that a sequence does not have.

    Raises:
        FactorizationError: It does not run, or gives something of another shape.
    """
    before = called(quiet_copy(model), example)
    try:
        after = called(quiet_copy(narrow), example)
    except FactorizationError as error:
        raise FactorizationError(
            f"the model does not run with its layers replaced: {error}; forward() may ask a layer for more "
            "than its output (such as .weight or .in_channels): skip that layer"
        ) from error
    if isinstance(before, Tensor) and getattr(after, "shape", None) != before.shape:
        raise FactorizationError(
            f"the factorized model gives {getattr(after, 'shape', type(after))}, the model {before.shape}"
        )
