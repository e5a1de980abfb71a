"""A model that can be narrowed: its groups of channels, how many are kept, and the narrow model."""

import copy
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.errors import ConversionError
from autocompress.ops import OpSpec
from autocompress.prune.labels import FIXED, Labels
from autocompress.prune.trace import Kept, Priced, Trace, trace

Widths = tuple[int, ...]
"""How many units of each group are kept."""

TOLERANCE = 1e-3
"""Greatest difference of the narrow model from the masked one in a trial, in parts of the greatest output."""


@dataclass(frozen=True)
class Group:
    """Units of which some are kept; of one layer, or of several that an addition or the like ties together.

    Attributes:
        name: That of the first layer.
        layers: The layers that make its channels, each with the labels of these.
        units: Labels of the units, in the order of the channels of those layers.
    """

    name: str
    layers: Mapping[str, Labels]
    units: Labels = field(repr=False)

    def __len__(self) -> int:
        """Return the number of units."""
        return len(self.units)

    def order(self, scores: NDArray[np.float64]) -> tuple[Labels, int]:
        """Return the units from the most to the least important, and how many at least have to stay.

        The first ones are such that each layer keeps a channel.

        Args:
            scores: One number a unit; more matters more. Of equals the first comes first.
        """
        order = self.units[np.argsort(-scores, kind="stable")].tolist()
        first: dict[int, None] = {}
        for labels in self.layers.values():
            own = set(labels.tolist())
            if FIXED not in own and not own & first.keys():
                first[next(unit for unit in order if unit in own)] = None
        return np.array([*first, *(u for u in order if u not in first)], dtype=np.int64), max(len(first), 1)


class Source:
    """A model, and how its channels hang together.

    Args:
        model: Copied; the user's own is never changed.
        image: A batch it takes, `(batch, channels, height, width)`.
        ignore: Names of layers, or of modules that hold them, whose outputs stay as they are.

    Attributes:
        model: The copy, in evaluation mode.
        groups: What can be narrowed.
        ranking: Units of each group, from the most to the least important.
        least: How many units of each group have to stay.
        origin: How the model is made again: `model`, the name of its factory, and `arguments`; empty if it
            was given as an object.

    Raises:
        ConversionError: The model cannot be traced, has a weight that is not finite, or nothing of it can be
            narrowed.
    """

    def __init__(self, model: nn.Module, image: Tensor, *, ignore: Sequence[str] = ()) -> None:
        """Trace the model, and try out that what is left of it computes the same."""
        self.origin: Mapping[str, Any] = {}
        self.model = copy.deepcopy(model).eval()
        for name, tensor in self.model.named_parameters():
            if not bool(torch.isfinite(tensor).all()):
                raise ConversionError(f"parameter {name} of {type(model).__name__} holds nan or infinity")
        self._hold(_ignoring(trace(self.model, image), ignore))
        while broken := _broken(self, image):
            self._hold(_fixing(self.trace, broken))

    def _hold(self, found: Trace) -> None:
        self.__dict__.pop("_places", None)
        self.trace = found
        self.groups: tuple[Group, ...] = tuple(_groups(found.made))
        if not self.groups:
            reasons = "; ".join(f"{kept.layer}: {kept.reason}" for kept in found.kept[:3])
            raise ConversionError(f"no channel of {type(self.model).__name__} can be removed: {reasons}")
        # A ranking says which channels matter; without one the first are kept.
        orders = [group.order(np.zeros(len(group))) for group in self.groups]
        self.ranking: tuple[Labels, ...] = tuple(order for order, _ in orders)
        self.least: Widths = tuple(least for _, least in orders)

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What has to stay, with the reason."""
        return self.trace.kept

    def ranked(self, scores: Mapping[str, NDArray[np.float64]]) -> "Source":
        """Return the same model with its units in the order of importance.

        Args:
            scores: Name of a group to one number a unit; more matters more. Of equals the first is kept.
        """
        other = copy.copy(self)
        for name in ("_places", "digest"):
            other.__dict__.pop(name, None)
        orders = [group.order(scores[group.name]) for group in self.groups]
        other.ranking = tuple(order for order, _ in orders)
        other.least = tuple(least for _, least in orders)
        return other

    @cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        """Unit to its group and its place in the ranking."""
        return {
            int(unit): (number, place)
            for number, order in enumerate(self.ranking)
            for place, unit in enumerate(order)
        }

    def places(self, labels: Labels) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the group of each channel, -1 for what always stays, and its unit's place in the ranking."""
        found = [self._places.get(label, (-1, 0)) for label in labels.tolist()]
        return np.array([number for number, _ in found]), np.array([place for _, place in found])

    def counts(self, labels: Labels) -> tuple[int, dict[int, NDArray[np.int64]]]:
        """Return how many of some channels are kept.

        Returns:
            How many always are, and group to how many more are kept with so many units, `(units + 1,)`.
        """
        always = 0
        firsts: dict[int, NDArray[np.int64]] = {}
        for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
            if int(label) not in self._places:
                always += int(count)
                continue
            number, place = self._places[int(label)]
            added = firsts.setdefault(number, np.zeros(len(self.ranking[number]) + 1, dtype=np.int64))
            added[place + 1] += int(count)
        return always, {number: np.cumsum(added) for number, added in sorted(firsts.items())}

    def kept_positions(self, labels: Labels, widths: Widths) -> NDArray[np.int64]:
        """Return which of some channels are kept, ascending."""
        kept = np.ones(len(labels), dtype=np.bool_)
        for position, label in enumerate(labels.tolist()):
            if label in self._places:
                number, place = self._places[label]
                kept[position] = place < widths[number]
        return np.flatnonzero(kept)

    @property
    def full(self) -> Widths:
        """All units of every group."""
        return tuple(len(group) for group in self.groups)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of the weights, the groups and the ranking."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        for group, order in zip(self.groups, self.ranking, strict=True):
            digest.update(group.name.encode())
            digest.update(order.tobytes())
        return digest.hexdigest()[:16]

    def masked(self, widths: Widths) -> nn.Module:
        """Return the whole model with the inputs that removed channels would give set to zero.

        It computes what the narrow model does: another way to the same, for tests and trials.
        """
        model = copy.deepcopy(self.model)
        tensors = dict(model.named_parameters())
        with torch.no_grad():
            for name, axis, kept in self.positions(widths):
                if axis > 0 and name in tensors:
                    gone = torch.ones(tensors[name].shape[axis], dtype=torch.bool)
                    gone[kept] = False
                    tensors[name].index_fill_(axis, gone.nonzero().flatten(), 0.0)
        return model

    # The narrow model --------------------------------------------------------------------------------

    def positions(self, widths: Widths) -> Iterator[tuple[str, int, Tensor]]:
        """Yield name, axis and kept positions of every tensor that is cut at these widths."""
        for name, axes in self.trace.slices.items():
            for axis, labels in axes.items():
                kept = self.kept_positions(labels, widths)
                if len(kept) < len(labels):
                    yield name, axis, torch.from_numpy(kept)

    def narrowed(self, widths: Widths) -> nn.Module:
        """Return the model with so many units of each group: a plain PyTorch model, in evaluation mode.

        Forward hooks, buffers and shared modules are as they were; at full width it is a copy, bit for bit.
        """
        model = copy.deepcopy(self.model)
        self._cut(model, widths)
        return model

    def empty(self, widths: Widths) -> nn.Module:
        """Return the narrow model without values, on the meta device."""
        model = copy.deepcopy(self._skeleton)
        self._cut(model, widths)
        return model

    def filled(self, empty: nn.Module, widths: Widths) -> nn.Module:
        """Give a model of `empty` random weights, as its layers initialise themselves.

        What no layer initialises (parameters of the user's own modules, buffers) is as in the model.
        """
        filled = empty.to_empty(device=torch.get_default_device())
        values = self.narrowed(widths).state_dict()
        with torch.no_grad():
            for name, tensor in filled.state_dict(keep_vars=True).items():
                tensor.copy_(values[name])
            for module in filled.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
        return filled

    @cached_property
    def _skeleton(self) -> nn.Module:
        return copy.deepcopy(self.model).to("meta")

    def _cut(self, model: nn.Module, widths: Widths) -> None:
        cuts: dict[str, Tensor] = {}
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, axis, kept in self.positions(widths):
            tensor = cuts.get(name, tensors[name].detach())
            cuts[name] = tensor.index_select(axis, kept.to(tensor.device))
        replaced = {id(tensors[name]): cut for name, cut in cuts.items()}
        made: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for own, old in list(module._parameters.items()):
                if old is not None and id(old) in replaced:
                    new = nn.Parameter(replaced[id(old)], requires_grad=old.requires_grad)
                    module._parameters[own] = made.setdefault(id(old), new)
            for own, buffer in list(module._buffers.items()):
                if buffer is not None and id(buffer) in replaced:
                    module._buffers[own] = replaced[id(buffer)]
            _restate(module)


def _restate(module: nn.Module) -> None:
    """Make a module say the widths that its tensors have."""
    if isinstance(module, nn.Conv2d):
        out, per_group = module.weight.shape[:2]
        if module.groups > 1 and module.groups == module.in_channels:
            multiplier = module.out_channels // module.in_channels
            module.groups = out // multiplier
        module.in_channels, module.out_channels = per_group * module.groups, out
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        for tensor in (module.weight, module.running_mean):
            if tensor is not None:
                module.num_features = len(tensor)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def _groups(made: Mapping[str, Labels]) -> Iterator[Group]:
    """Yield the groups: layers that share units are one."""
    joined: list[tuple[list[str], dict[int, None]]] = []
    for layer, labels in made.items():
        members = [layer]
        own = dict.fromkeys(unit for unit in labels.tolist() if unit != FIXED)
        for other in [entry for entry in joined if entry[1].keys() & own.keys()]:
            joined.remove(other)
            members, own = other[0] + members, {**other[1], **own}
        joined.append((members, own))
    order = {layer: number for number, layer in enumerate(made)}
    for members, own in sorted(joined, key=lambda entry: order[entry[0][0]]):
        if len(own) > 1:
            layers = {layer: made[layer] for layer in members}
            yield Group(members[0], layers, np.array(list(own), dtype=np.int64))


def _ignoring(found: Trace, patterns: Sequence[str]) -> Trace:
    """Keep the channels of layers that the user names, by patterns like those of file names."""
    units: dict[int, None] = {}
    kept = []
    for pattern in patterns:
        layers = [n for n in found.made if fnmatchcase(n, pattern) or n.startswith(f"{pattern}.")]
        if not layers:
            raise ConversionError(
                f"ignore has {pattern!r}, which is no layer that makes channels; there are "
                f"{', '.join(found.made)}"
            )
        units.update(dict.fromkeys(int(u) for layer in layers for u in found.made[layer]))
        kept += [Kept(n, len(found.made[n]), "it is on the list of those to ignore", "") for n in layers]
    return _without(found, units, kept)


def _fixing(found: Trace, groups: Sequence[Group]) -> Trace:
    """Keep the channels of groups that cannot be removed after all."""
    reason = "the model computes something else without some of its channels, or does not run"
    advice = "write sizes in views and slices of forward() as x.shape, not as numbers"
    kept = [Kept(layer, len(group), reason, advice) for group in groups for layer in group.layers]
    return _without(found, [int(unit) for group in groups for unit in group.units], kept)


def _without(found: Trace, units: Iterable[int], kept: Sequence[Kept]) -> Trace:
    fixed = np.array(list(units), dtype=np.int64)

    def left(labels: Labels) -> Labels:
        return np.where(np.isin(labels, fixed), FIXED, labels)

    return dataclasses.replace(
        found,
        made={name: left(labels) for name, labels in found.made.items()},
        slices={n: {a: left(v) for a, v in axes.items()} for n, axes in found.slices.items()},
        priced=tuple(Priced(p.name, p.op, {f: left(v) for f, v in p.widths.items()}) for p in found.priced),
        kept=(*found.kept, *kept),
    )


def _broken(source: Source, image: Tensor) -> list[Group]:
    """Return groups without some of whose channels the model does not run, or computes something else.

    All groups are tried together, on norms with random values; only where that fails, halves of them are.
    """
    trial = copy.copy(source)
    trial.model = copy.deepcopy(source.model)
    generator = torch.Generator().manual_seed(0)
    for module in trial.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.running_var):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5, generator=generator)
    rng = np.random.default_rng(0)
    orders = [group.order(rng.random(len(group))) for group in source.groups]
    trial.ranking = tuple(order for order, _ in orders)
    images = torch.randn(image.shape, generator=generator).to(image)

    def same(chosen: Sequence[int]) -> bool:
        widths = list(trial.full)
        for number in chosen:
            widths[number] = max(orders[number][1], len(source.groups[number]) // 2)
        trial.__dict__.pop("_places", None)
        with torch.no_grad():
            expected = trial.masked(tuple(widths))(images)
            try:
                found = trial.narrowed(tuple(widths))(images)
            except (RuntimeError, ValueError, IndexError):
                return False
        scale = float(expected.abs().max()) or 1.0
        return found.shape == expected.shape and float((found - expected).abs().max()) <= TOLERANCE * scale

    def search(chosen: list[int]) -> list[int]:
        if same(chosen):
            return []
        if len(chosen) == 1:
            return chosen
        half = len(chosen) // 2
        found = search(chosen[:half]) + search(chosen[half:])
        # Groups that only fail together: none of them is safe.
        return found or chosen

    return [source.groups[number] for number in search(list(range(len(source.groups))))]


def at_widths(priced: Priced, source: Source, widths: Widths) -> OpSpec:
    """Return an operation of a model as the narrow model has it."""
    counts: dict[str, Any] = {
        name: len(source.kept_positions(labels, widths)) for name, labels in priced.widths.items()
    }
    return dataclasses.replace(priced.op, **counts)
