"""The passes of a compression policy: each takes a trained network and returns another one.

What a pass is given is not changed. Passes that are turned off (ratio 0, method `none`, 32 bits, no epochs)
return what they were given.
"""

import copy
import difflib
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from autocompress.count import count
from autocompress.distill.finetune import finetune
from autocompress.distill.methods import method_of
from autocompress.elastic.supernet import resize
from autocompress.errors import PolicyError
from autocompress.factorize.apply import Rule, factorize
from autocompress.factorize.candidates import Candidate, find
from autocompress.factorize.layers import depthwise_separable, fire
from autocompress.factorize.methods import METHODS
from autocompress.latency.target import Target
from autocompress.prune.importance import CRITERIA, comparable, importance
from autocompress.prune.scores import Scores
from autocompress.prune.source import Source, Widths
from autocompress.quantize.layer import has_quantizers
from autocompress.quantize.ops import FULL_PRECISION
from autocompress.quantize.schemes import legal_widths
from autocompress.quantize.source import QuantizationSource
from autocompress.recipe import FinetuneSettings
from autocompress.training.data import DataSet, batches
from autocompress.training.evaluate import calibration_batches
from autocompress.training.statistics import recalibrate
from autocompress.training.task import Task

Setting = str | int | float
CHECKPOINTS = "checkpoints"
"""Folder of `Context.checkpoint`, to be removed when a policy's network is kept."""
IMAGES, BATCH = 512, 64
"""Training images that passes look at, and how many at a time."""
KINDS = ("none", "depthwise", "fire")
RANGES = ("mse", "minmax", "percentile", "kl")
SQUEEZE = 8
"""SqueezeNet squeezes to an eighth; layers of fewer channels stay as they are."""


@dataclass(frozen=True)
class Context:
    """What passes work on besides the network.

    Attributes:
        teacher: The network as it was brought: who teaches.
        data: Train part for what is learned, validation part for the choice of epochs.
        task: Losses and metric.
        target: Says which bits are legal.
        size: Height and width of the images that the network takes.
        seed: Of everything that is drawn.
        checkpoint: Folder of checkpoints of training; none are written without.
        after_epoch: Told each finished epoch, counted from 1, and its validation score.
        finetune: Settings of training that no pass has.
    """

    teacher: nn.Module
    data: DataSet
    task: Task
    target: Target
    size: tuple[int, int]
    seed: int = 0
    checkpoint: Path | None = None
    after_epoch: Callable[[int, float], None] | None = None
    finetune: Mapping[str, Any] = field(default_factory=dict)

    @property
    def image(self) -> Tensor:
        """One image of zeros."""
        return torch.zeros(1, self.data.in_shape[0], *self.size)

    def images(self) -> list[Tensor]:
        """Return training images in batches, not augmented."""
        return [resize(part, self.size) for part in calibration_batches(self.data, IMAGES, seed=self.seed)]

    def labelled(self) -> list[tuple[Tensor, Tensor]]:
        """Return training images with their labels."""
        found = itertools.islice(batches(self.data.train, BATCH, seed=self.seed), IMAGES // BATCH)
        return [(resize(images, self.size), labels) for images, labels in found]


def prune(
    network: nn.Module, context: Context, *, criterion: str = "taylor", ratio: float = 0.0, multiple: int = 0
) -> nn.Module:
    """Remove the channels that matter least, everywhere at once, until a share of the MACs is gone.

    Statistics of batch norm are computed anew.

    Args:
        network: A plain network, not quantized.
        context: Says images and loss.
        criterion: Of importance, one of `autocompress.prune.importance.CRITERIA`.
        ratio: Share of the MACs to remove, in [0, 1).
        multiple: What channel counts are multiples of, where there are as many; by default the target's
            alignment. Kernels work on 8 or 16 channels at a time: fewer channels, in other counts, can be
            slower.

    Raises:
        ConversionError: The network cannot be narrowed, or there is no such criterion.
        PolicyError: The ratio is out of range, or more than can be removed.
    """
    if not 0 <= ratio < 1:
        raise PolicyError(f"ratio of pruning must be in [0, 1), got {ratio!r}")
    if multiple < 0:
        raise PolicyError(f"multiple of pruning must be 1 or more, or 0 for the target's, got {multiple!r}")
    if not ratio:
        return network
    source = Source(network, context.image)
    loss = context.task.training_loss(0.0)
    found = importance(source, criterion, batches=context.labelled(), loss=loss, seed=context.seed)
    scores = comparable(found, criterion)
    source = source.ranked(scores)
    step = multiple or context.target.channel_alignment
    narrow = source.narrowed(above_threshold(source, scores, 1 - ratio, step))
    recalibrate(narrow, context.images())
    return narrow


def above_threshold(source: Source, scores: Scores, share: float, multiple: int = 1) -> Widths:
    """Return the widths that keep every unit above a threshold, the lowest that leaves a share of the MACs.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017,
    section 3: one threshold for all layers.

    Args:
        source: Ranked by these scores.
        scores: Name of a group to one number a unit, comparable between groups.
        share: Of the MACs of all units, at most.
        multiple: Widths are rounded up to multiples of it, or to all units of a group.

    Raises:
        PolicyError: Even the fewest units need more.
    """
    limit = share * _macs(source, source.full)
    thresholds = np.unique(np.concatenate([scores[group.name] for group in source.groups]))
    low, high = 0, len(thresholds)  # of `thresholds[:low]` removed it is too much still, of `[:high]` not
    if (least := _macs(source, _above(source, scores, np.inf, multiple))) > limit:
        whole = _macs(source, source.full)
        raise PolicyError(
            f"pruning cannot leave {share:.0%} of the MACs: the fewest channels need {least / whole:.1%}; "
            "take a smaller ratio"
        )
    while low < high:
        middle = (low + high) // 2
        if _macs(source, _above(source, scores, thresholds[middle], multiple)) <= limit:
            high = middle
        else:
            low = middle + 1
    return _above(source, scores, thresholds[min(low, len(thresholds) - 1)], multiple)


def _above(source: Source, scores: Scores, threshold: float, multiple: int) -> Widths:
    kept = [int((scores[group.name] > threshold).sum()) for group in source.groups]
    wanted = (max(least, count) for least, count in zip(source.least, kept, strict=True))
    rounded = (math.ceil(count / multiple) * multiple for count in wanted)
    return tuple(min(full, count) for full, count in zip(source.full, rounded, strict=True))


def _macs(source: Source, widths: Widths) -> int:
    return sum(op.macs for op in source.operations(widths))


def low_rank(network: nn.Module, context: Context, *, method: str = "none", ratio: float = 0.5) -> nn.Module:
    """Replace layers by low-rank ones, each with at most a share of its MACs; statistics are computed anew.

    Args:
        network: A plain network, not quantized.
        context: Says images.
        method: One of `autocompress.factorize.methods.METHODS`, or `none`.
        ratio: Share of a layer's MACs that is left, in (0, 1].

    Raises:
        FactorizationError: There is no such method, or the ratio is out of range.
    """
    if method == "none":
        return network
    made = factorize(network, Rule(method, ratio=ratio), context.image)  # type: ignore[arg-type]
    recalibrate(made.model, context.images())
    return made.model


def compact(network: nn.Module, context: Context, *, kind: str = "none", share: float = 1.0) -> nn.Module:
    """Replace large convolutions by depthwise separable ones or fire modules, which have to be trained.

    Depthwise separable ones start as the nearest to the layer, fire modules from random weights.

    Sources: Howard et al., "MobileNets", arXiv 2017; Iandola et al., "SqueezeNet", arXiv 2016.

    Args:
        network: A plain network, not quantized.
        context: Says images.
        kind: `none`, `depthwise`, or `fire` with an eighth of the outputs squeezed.
        share: Of the convolutions that can be replaced, those of the most MACs, in (0, 1].

    Raises:
        PolicyError: There is no such kind, or the share is out of range.
    """
    if kind not in KINDS or not 0 < share <= 1:
        raise PolicyError(
            f"compact takes none, depthwise or fire and a share in (0, 1], got {kind!r} and {share!r}"
        )
    if kind == "none":
        return network
    possible = [c for c in find(network, context.image).candidates if _can_be_compact(c, kind)]
    chosen = sorted(possible, key=lambda c: -c.macs)[: math.ceil(share * len(possible))]
    made = copy.deepcopy(network)
    for candidate in chosen:
        layer = made.get_submodule(candidate.name)
        if not isinstance(layer, nn.Conv2d):
            raise PolicyError(f"{candidate.name} is no convolution")
        squeeze = max(1, layer.out_channels // SQUEEZE)
        new = depthwise_separable(layer) if kind == "depthwise" else fire(layer, squeeze, seed=context.seed)
        made.set_submodule(candidate.name, new)
    recalibrate(made, context.images())
    return made


def _can_be_compact(candidate: Candidate, kind: str) -> bool:
    geometry = candidate.geometry
    if candidate.kind != "Conv2d" or geometry.points == 1 or min(geometry.kernel) == 1:
        return False
    # The first layer has three inputs, and little to save.
    wide = geometry.in_channels >= SQUEEZE and geometry.out_channels >= SQUEEZE
    reach = tuple(d * (k - 1) for d, k in zip(geometry.dilation, geometry.kernel, strict=True))
    twice = None if isinstance(geometry.padding, str) else tuple(2 * p for p in geometry.padding)
    return wide and (kind == "depthwise" or geometry.padding == "same" or twice == reach)


def quantize(
    network: nn.Module, context: Context, *, bits: int = FULL_PRECISION, ranges: str = "mse"
) -> nn.Module:
    """Quantize weights and inputs of every layer that can be, as the target does; batch norm is folded.

    Args:
        network: Not quantized.
        context: Says images and target.
        bits: Of weights and inputs; 32 leaves all as it is.
        ranges: How ranges are found: `mse`, `minmax`, `percentile`, `kl`.

    Raises:
        QuantizationError: The target does not run these bits, or nothing can be quantized.
    """
    if bits == FULL_PRECISION:
        return network
    scheme, widths = legal_widths(context.target, [bits])
    source = QuantizationSource(
        network,
        context.image,
        calibration=context.images(),
        widths=widths,
        scheme=scheme,
        weight_ranges="minmax" if ranges == "kl" else ranges,
        activation_ranges=ranges,
    )
    return source.network(tuple((bits, bits) for _ in source.plan.sites))


def distill(
    network: nn.Module,
    context: Context,
    *,
    losses: str = "kd",
    temperature: float = 4.0,
    alpha: float = 0.9,
    learning_rate: float = 0.01,
    epochs: int = 3,
) -> nn.Module:
    """Finetune, taught by the network as it was brought; what is quantized learns through rounding.

    Args:
        network: Any.
        context: Says data, task and teacher.
        losses: As in `finetune.distill`: `kd`, `kd+at`, `none`.
        temperature: Of soft targets.
        alpha: Of soft targets.
        learning_rate: At its highest.
        epochs: 0 leaves the network as it is.

    Raises:
        DistillationError: A loss is unknown or does not fit.
        TrainingError: Training collapsed.
    """
    if not epochs:
        return network
    given = {"precision": "fp32", "memory_format": "contiguous", "seed": context.seed, **context.finetune}
    settings = FinetuneSettings(
        **given | {"distill": losses, "temperature": temperature, "alpha": alpha,
                   "learning_rate": learning_rate, "epochs": epochs}
    )  # fmt: skip
    made = copy.deepcopy(network)
    finetune(
        made,
        context.data,
        context.task,
        settings,
        resolution=context.size,
        teacher=context.teacher,
        teacher_resolution=context.size,
        checkpoint=None if context.checkpoint is None else context.checkpoint / "distill.pt",
        after_epoch=context.after_epoch,
    )
    return made


@dataclass(frozen=True)
class Pass:
    """One kind of pass.

    Attributes:
        run: What it does; its keyword arguments are the settings.
        off: Settings that turn it off.
        strength: The setting that says how much is taken away, and whether less is more; `None` of what
            takes nothing away.
    """

    run: Callable[..., nn.Module]
    off: Mapping[str, Setting]
    strength: tuple[str, bool] | None = None


PASSES: dict[str, Pass] = {
    "prune": Pass(prune, {"ratio": 0.0}, ("ratio", False)),
    "factorize": Pass(low_rank, {"method": "none"}, ("ratio", True)),
    "compact": Pass(compact, {"kind": "none"}, ("share", False)),
    "quantize": Pass(quantize, {"bits": FULL_PRECISION}, ("bits", True)),
    "distill": Pass(distill, {"epochs": 0}),
}
"""By name. What is quantized can only be distilled after it."""

# What values of settings may be, in words, and whether one is that; others the passes check themselves.
RULES: dict[tuple[str, str], tuple[str, Callable[[Any], bool]]] = {
    ("prune", "ratio"): ("a share in [0, 1)", lambda value: 0 <= value < 1),
    ("prune", "criterion"): (", ".join(CRITERIA), lambda value: value in CRITERIA),
    ("prune", "multiple"): ("1 or more, or 0 for the target's", lambda value: value in range(1 << 20)),
    ("factorize", "method"): (", ".join(["none", *METHODS]), lambda value: value in ("none", *METHODS)),
    ("factorize", "ratio"): ("a share in (0, 1]", lambda value: 0 < value <= 1),
    ("compact", "kind"): (", ".join(KINDS), lambda value: value in KINDS),
    ("compact", "share"): ("a share in (0, 1]", lambda value: 0 < value <= 1),
    ("quantize", "bits"): ("a whole number of bits", lambda value: isinstance(value, int)),
    ("quantize", "ranges"): (", ".join(RANGES), lambda value: value in RANGES),
}

Policy = Sequence[tuple[str, Mapping[str, Setting]]]
"""Names of passes with their settings, in the order in which they run."""


def settings_of(name: str) -> dict[str, Setting]:
    """Return the settings of a pass with their defaults.

    Raises:
        PolicyError: There is no such pass.
    """
    if name not in PASSES:
        near = difflib.get_close_matches(name, PASSES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PolicyError(f"a pass is one of {', '.join(PASSES)}, got {name!r}{hint}")
    parameters = inspect.signature(PASSES[name].run).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def is_off(name: str, settings: Mapping[str, Setting]) -> bool:
    """Whether settings of a pass turn it off; what is left out has its default."""
    ((switch, off),) = PASSES[name].off.items()
    return settings.get(switch, settings_of(name)[switch]) == off


def structure_of(policy: Policy) -> Policy:
    """Return a policy without training: it gives a network of the same costs."""
    return [(name, settings) for name, settings in policy if name != "distill"]


def policy_text(policy: Sequence[Any]) -> str:
    """Return a policy in a line, without what is turned off."""
    parts = []
    for name, settings in policy:
        if is_off(name, settings):
            continue
        parts.append(f"{name}({', '.join(f'{key} {value}' for key, value in settings.items())})")
    return " > ".join(parts) or "nothing"


def counted_costs(network: nn.Module, image: Tensor) -> dict[str, float]:
    """Return `macs` and `params` of what passes made, which no table prices; without scales of quantizers.

    Args:
        network: Any, quantized or not.
        image: What it takes, `(1, channels, height, width)`.
    """
    from autocompress.export.qdq import in_floats

    # Scales are parameters in training only.
    found = count(in_floats(network) if has_quantizers(network) else network, image)
    return {"macs": float(found.macs), "params": float(found.params)}


def check(policy: Policy) -> None:
    """Refuse passes and settings that there are not, and orders that cannot be.

    Raises:
        PolicyError: Names the pass.
    """
    quantized = trained = False
    for name, settings in policy:
        known = settings_of(name)
        if unknown := [key for key in settings if key not in known]:
            raise PolicyError(f"pass {name!r} has the settings {', '.join(known)}, not {', '.join(unknown)}")
        if quantized and name != "distill":
            raise PolicyError(
                f"{name!r} works on floating point, and stands behind 'quantize': put it before"
            )
        if trained and name == "prune" and not is_off(name, settings):
            raise PolicyError(
                "'prune' stands behind 'distill': what is pruned would hang on training, but costs are "
                "measured before anything is trained; put it before, or compress what comes out once more"
            )
        quantized = quantized or name == "quantize"
        trained = trained or (name == "distill" and not is_off(name, settings))
        for key, value in settings.items():
            # Options of a space are lists.
            options: Any = value
            for one in options if isinstance(options, list | tuple) else [options]:
                _check_value(name, key, one)


def _check_value(name: str, key: str, value: Setting) -> None:
    allowed, holds = RULES.get((name, key), ("", lambda _: True))
    try:
        right = holds(value)
    except TypeError:
        right = False
    if not right:
        raise PolicyError(f"{key} of pass {name!r} must be {allowed}, got {value!r}")
    if name == "distill" and value != PASSES[name].off.get(key):
        try:
            finetuned = FinetuneSettings.model_validate({"distill" if key == "losses" else key: value})
        except ValidationError as error:
            raise PolicyError(f"{key} of pass {name!r}: {error.errors()[0]['msg']}, got {value!r}") from None
        for term in finetuned.distill:
            method_of(term.loss, term.options)


def apply(network: nn.Module, policy: Policy, context: Context) -> nn.Module:
    """Run the passes of a policy one after the other.

    Args:
        network: Trained; not changed.
        policy: Passes and settings; what a pass leaves out has its default.
        context: What they work on.

    Returns:
        A network in evaluation mode.

    Raises:
        PolicyError: There is no such pass or setting, or passes are in an order that cannot be.
        AutocompressError: A pass cannot do what it should.
    """
    check(policy)
    for number, (name, settings) in enumerate(policy):
        # A pass may come twice: each has checkpoints of its own.
        own = None if context.checkpoint is None else context.checkpoint / str(number)
        network = PASSES[name].run(network, replace(context, checkpoint=own), **settings)
    return network.eval()
