"""What can be distilled: a table of losses, where each looks, and its published weight.

A method makes a function of what was seen of student and teacher in one pass. Projectors and other weights of
its own are a module, trained along with the student and no part of it.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autocompress.distill.contrastive import Contrastive
from autocompress.distill.dense_losses import channelwise, inter_region_affinity
from autocompress.distill.factors import Factor, VariationalInformation
from autocompress.distill.feature_losses import (
    activation_boundary,
    attention_transfer,
    cosine,
    factor_transfer,
    flow,
    hint,
    neuron_selectivity,
    self_attention,
)
from autocompress.distill.losses import decoupled, dist, hinton, selective
from autocompress.distill.pairs import pooled_alike
from autocompress.distill.relation_losses import (
    correlation,
    instance_relation_graph,
    probabilistic,
    relational,
    similarity_preserving,
)
from autocompress.errors import DistillationError

Where = Literal["outputs", "embedding", "last", "middle", "stages", "own stages"]
"""Where a method looks if no layers are named: at outputs only; at what enters the last linear layer; at the
last map, the middle one, or one of each size; at those of the student alone."""


@dataclass
class Seen:
    """What one pass gave.

    Attributes:
        outputs: Of the student, `(batch, ...)`.
        taught: Outputs of the teacher, without gradient; empty without a teacher.
        targets: Labels, `(batch, ...)`.
        indices: Which samples of the training part these are, `(batch,)`.
        student: What the student's places gave, one tensor each.
        teacher: What the teacher's places gave, as many; none where the student is compared with itself.
    """

    outputs: Tensor
    taught: Tensor
    targets: Tensor
    indices: Tensor
    student: Sequence[Tensor] = ()
    teacher: Sequence[Tensor] = ()


@dataclass
class Making:
    """What a method is made for.

    Attributes:
        student: What the student's places give for some images.
        teacher: What the teacher's places give.
        samples: Of the training part.
        classes: Of the data; 0 where labels are no classes.
        seed: Of first weights.
        options: Of the loss.
        distillation: Of a task whose outputs are no logits, for `kd`.
    """

    student: Sequence[Tensor]
    teacher: Sequence[Tensor]
    samples: int
    classes: int
    seed: int
    options: Mapping[str, Any]
    distillation: Callable[[Tensor, Tensor], Tensor] | None = None


Compare = Callable[[Seen], Tensor]
"""A scalar: how far the student is from what it should learn."""


@dataclass(frozen=True)
class Method:
    """One way to distill.

    Attributes:
        make: Makes what compares.
        where: The places it looks at by default.
        weight: Published beside cross-entropy; `None` mixes with the labels' loss by `alpha`.
        meaning: A line for people, with the source.
        start: From which share of training on it counts, by default.
    """

    make: Callable[[Making], Compare]
    where: Where
    weight: float | None
    meaning: str
    start: float = 0.0

    @property
    def taught(self) -> bool:
        """Whether there must be a teacher."""
        return self.where != "own stages"


class EachPair(nn.Module):
    """The sum over pairs of places of what a module makes of them.

    Args:
        parts: One a pair.
        compare: Called with a pair's module, the student's and the teacher's tensor, and all that was seen.
    """

    def __init__(
        self, parts: Sequence[nn.Module], compare: Callable[[Any, Tensor, Tensor, Seen], Tensor]
    ) -> None:
        super().__init__()
        self.parts, self.compare = nn.ModuleList(parts), compare

    def forward(self, seen: Seen) -> Tensor:
        """Return the loss."""
        pairs = zip(self.parts, seen.student, seen.teacher, strict=True)
        return torch.stack([self.compare(part, s, t, seen) for part, s, t in pairs]).sum()


class Flows(nn.Module):
    """FSP between each place and the next, the student's channels taken to the teacher's."""

    def __init__(self, making: Making) -> None:
        super().__init__()
        if len(making.student) < 2:
            raise DistillationError(f"fsp looks at 2 layers or more, got {len(making.student)}; name more")
        self.projectors = nn.ModuleList(regressors(making))

    def forward(self, seen: Seen) -> Tensor:
        """Return the loss."""
        own = [f(x.float()) for f, x in zip(self.projectors, seen.student, strict=True)]
        both = zip(pairwise(own), pairwise(seen.teacher), strict=True)
        return torch.stack([flow(*s, *t) for s, t in both]).sum()


class Factors(nn.Module):
    """Factor transfer: the student's translator against the teacher's paraphraser.

    The paraphraser is trained along, as an autoencoder of the teacher's map; in the paper it is trained
    beforehand. Its reconstruction has no gradient to the student.
    """

    def __init__(self, student: Tensor, teacher: Tensor, *, seed: int, p: Literal[1, 2] = 1) -> None:
        super().__init__()
        channels = teacher.shape[1]
        factors = max(1, channels // 2)
        self.p: Literal[1, 2] = p
        self.translator = Factor(student.shape[1], factors, seed=seed)
        self.paraphraser = Factor(channels, factors, seed=seed + 1)
        self.decoder = Factor(factors, channels, seed=seed + 2)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of the student's factors plus that of the reconstruction."""
        factors = self.paraphraser(teacher.float())
        own, other = pooled_alike(self.translator(student.float()), factors)
        return factor_transfer(own, other, p=self.p) + hint(self.decoder(factors), teacher)


def regressors(making: Making, *, connectors: bool = False) -> list[nn.Module]:
    """Return what takes the student's channels or features to the teacher's, at each pair of places.

    A 1x1 convolution or a linear map without bias, nothing where they are as many; as connectors (AB) in any
    case, and with batch norm after it.
    """
    found: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(making.seed)
        for student, teacher in zip(making.student, making.teacher, strict=True):
            sizes, flat = (student.shape[1], teacher.shape[1]), student.dim() == 2
            linear = nn.Linear(*sizes, bias=False) if flat else nn.Conv2d(*sizes, 1, bias=False)
            if connectors:
                found.append(nn.Sequential(linear, (nn.BatchNorm1d if flat else nn.BatchNorm2d)(sizes[1])))
            else:
                found.append(nn.Identity() if sizes[0] == sizes[1] else linear)
    return found


def _outputs(loss: Callable[..., Tensor], *, labels: bool = False) -> Callable[[Making], Compare]:
    def make(making: Making) -> Compare:
        def compare(seen: Seen) -> Tensor:
            given = (seen.targets,) if labels else ()
            return loss(seen.outputs, seen.taught, *given, **making.options)

        return compare

    return make


def _soft_targets(making: Making) -> Compare:
    if (loss := making.distillation) is not None:
        return lambda seen: loss(seen.outputs, seen.taught)
    return _outputs(hinton)(making)


def _pairs(
    loss: Callable[..., Tensor], made: Literal["as they are", "regressors", "connectors"] = "as they are"
) -> Callable[[Making], Compare]:
    def make(making: Making) -> Compare:
        def compare(part: nn.Module, student: Tensor, teacher: Tensor, _: Seen) -> Tensor:
            own, other = part(student.float()), teacher.float()
            if made != "as they are" and own.dim() == other.dim() == 4:
                own, other = pooled_alike(own, other)
            return loss(own, other, **making.options)

        if made == "as they are":
            return EachPair([nn.Identity() for _ in making.student], compare)
        return EachPair(regressors(making, connectors=made == "connectors"), compare)

    return make


def _parts(part: Callable[[Tensor, Tensor, Making, int], nn.Module]) -> Callable[[Making], Compare]:
    def make(making: Making) -> Compare:
        pairs = zip(making.student, making.teacher, strict=True)
        parts = [part(s, t, making, making.seed + 3 * n) for n, (s, t) in enumerate(pairs)]
        return EachPair(parts, lambda module, s, t, _: module(s, t))

    return make


def _variation(student: Tensor, teacher: Tensor, making: Making, seed: int) -> nn.Module:
    return VariationalInformation(student.shape[1], teacher.shape[1], seed=seed, **making.options)


def _factors(student: Tensor, teacher: Tensor, making: Making, seed: int) -> nn.Module:
    return Factors(student, teacher, seed=seed, **making.options)


def _contrast(making: Making) -> Compare:
    parts = [
        Contrastive(s[0].numel(), t[0].numel(), making.samples, seed=making.seed + n, **making.options)
        for n, (s, t) in enumerate(zip(making.student, making.teacher, strict=True))
    ]
    return EachPair(parts, lambda module, s, t, seen: module(s, t, seen.indices))


def _regions(making: Making) -> Compare:
    if not making.classes:
        raise DistillationError("affinity compares the regions of classes, and these labels are no classes")
    parts = [nn.Identity() for _ in making.student]
    return EachPair(parts, lambda _, s, t, seen: inter_region_affinity(s, t, seen.targets, making.classes))


def _graph(making: Making) -> Compare:
    # Maps and outputs cannot be subtracted, as the transformation between layers would.
    options = {"transformation": 0.0, **making.options}
    return lambda seen: instance_relation_graph(
        [*seen.student, seen.outputs], [*seen.teacher, seen.taught], **options
    )


def _own_attention(making: Making) -> Compare:
    return lambda seen: self_attention(seen.student, **making.options)


METHODS: dict[str, Method] = {
    "kd": Method(_soft_targets, "outputs", None, "soft targets (Hinton 2015)"),
    "topk": Method(_outputs(selective), "outputs", None, "soft targets of the teacher's k best classes"),
    "dkd": Method(_outputs(decoupled, labels=True), "outputs", 1.0, "decoupled: label, others (Zhao 2022)"),
    "dist": Method(_outputs(dist), "outputs", 2.0, "correlation instead of divergence (Huang 2022)"),
    "hint": Method(_pairs(hint, "regressors"), "middle", 100.0, "FitNets: squared error (Romero 2015)"),
    "at": Method(_pairs(attention_transfer), "stages", 1000.0, "attention maps (Zagoruyko 2017)"),
    "fsp": Method(Flows, "stages", 50.0, "flow between layers (Yim 2017)"),
    "nst": Method(_pairs(neuron_selectivity), "last", 50.0, "neuron selectivity, MMD (Huang 2017)"),
    "ab": Method(_pairs(activation_boundary, "connectors"), "stages", 1.0, "signs of activations (Heo 2019)"),
    "ft": Method(_parts(_factors), "last", 200.0, "factor transfer (Kim 2018)"),
    "vid": Method(_parts(_variation), "stages", 1.0, "variational information (Ahn 2019)"),
    "cwd": Method(_pairs(channelwise, "regressors"), "last", 1.0, "channel-wise, dense tasks (Shu 2021)"),
    "affinity": Method(_regions, "last", 1.0, "affinity of regions, dense tasks (Hou 2020)"),
    "cosine": Method(_pairs(cosine, "regressors"), "embedding", 1.0, "angle of features (Aghli 2021)"),
    "sp": Method(_pairs(similarity_preserving), "last", 3000.0, "similarities of samples (Tung 2019)"),
    "cc": Method(_pairs(correlation, "regressors"), "embedding", 0.02, "correlation congruence (Peng 2019)"),
    "rkd": Method(_pairs(relational), "embedding", 1.0, "distances, angles of samples (Park 2019)"),
    "pkt": Method(_pairs(probabilistic), "embedding", 3e4, "probabilities of similarity (Passalis 2018)"),
    "irg": Method(_graph, "stages", 1.0, "graph of samples: edges, moves (Liu 2019)"),
    "crd": Method(_contrast, "embedding", 0.8, "contrast with other samples (Tian 2020)"),
    "sad": Method(_own_attention, "own stages", 0.1, "own deeper attention (Hou 2019)", start=2 / 3),
}
"""Weights are those of RepDistiller (Tian et al., 2020) on CIFAR-100 where it has the method, else those of
the paper; of `affinity` and `irg` ours."""

OPTIONS: dict[str, tuple[str, ...]] = {
    "kd": ("temperature",),
    "topk": ("temperature", "k"),
    "dkd": ("temperature", "alpha", "beta"),
    "dist": ("temperature", "between_classes", "within_classes"),
    "at": ("power",),
    "nst": ("kernel",),
    "ab": ("margin",),
    "ft": ("p",),
    "vid": ("variance",),
    "cwd": ("temperature",),
    "cc": ("gamma", "order"),
    "rkd": ("distance", "angle"),
    "irg": ("vertices", "edges"),
    "crd": ("negatives", "dimension", "temperature", "momentum"),
}
"""Of the methods that have any."""


def method_of(name: str, options: Iterable[str] = ()) -> Method:
    """Return a method by its name.

    Args:
        name: A key of `METHODS`.
        options: Names of those that it is to have.

    Raises:
        DistillationError: There is none, or it has no such option; names the nearest, or all options.
    """
    if name not in METHODS:
        several = name.replace(",", " ").split()
        if len(several) > 1 and set(several) <= set(METHODS):
            raise DistillationError(f"losses are joined by +, got {name!r}: write {'+'.join(several)}")
        near = difflib.get_close_matches(name, METHODS, 3) or list(METHODS)
        raise DistillationError(f"no distillation loss {name!r}; did you mean {', '.join(near)}?")
    known = OPTIONS.get(name, ())
    if unknown := [option for option in options if option not in known]:
        text = f"has the options {', '.join(known)}" if known else "has no options"
        raise DistillationError(f"distillation by {name!r} {text}, got {', '.join(unknown)}")
    return METHODS[name]
