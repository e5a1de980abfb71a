"""The distiller: what a student is trained to, besides or instead of its labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.distill.methods import METHODS, Compare, Making, Method, Seen, method_of
from autocompress.distill.places import Watch, embedding_of, stages_of
from autocompress.errors import DistillationError
from autocompress.recipe import DistillTerm
from autocompress.training.task import Loss

PROBES = 4
"""Images on which losses are tried before training: some compare samples with each other."""
# Options of losses that a recipe sets for all of them.
SOFTENED = ("kd", "topk", "dkd")


@dataclass(frozen=True)
class Probe:
    """Some images on which layers are found and losses tried, before training.

    Attributes:
        student: `(PROBES, channels, height, width)`, of the size that the student takes.
        teacher: The same images, of the size that the teacher takes.
        targets: Their labels.
        samples: Of the training part.
        classes: Of the data; 0 where labels are no classes.
    """

    student: Tensor
    teacher: Tensor
    targets: Tensor
    samples: int
    classes: int


@dataclass
class _Active:
    """A term, the places it looks at, and what compares them."""

    term: DistillTerm
    method: Method
    own: list[str]
    others: list[str]
    compare: Compare

    @property
    def weight(self) -> float | None:
        return self.method.weight if self.term.weight is None else self.term.weight

    def counts(self, share: float) -> bool:
        start = self.method.start if self.term.start is None else self.term.start
        return start <= share < self.term.end


class Distiller(nn.Module):
    """Watches student and teacher while they run, and adds up losses; it is trained in the student's place.

    Neither network is changed. Where channels differ, projectors are trained along: they are parameters of
    this module. `close` leaves nothing behind in student and teacher.

    Args:
        trained: What is run and trained: the student, or a module that runs it.
        student: The network that learns.
        teacher: The network it learns from; `None` if all terms do without.
        terms: What is compared, when, and how much it counts.
        probe: On what layers are found and losses tried.
        alpha: Weight of the terms without a weight, against `1 - alpha` for the loss on labels.
        temperature: Of soft targets whose term names none.
        seed: Of the first weights of projectors.
        distillation: Takes the place of soft targets (`kd`) where outputs are no logits.

    Raises:
        DistillationError: A loss or a layer is unknown, an option is wrong, a term needs a teacher, or shapes
            do not fit.
    """

    def __init__(
        self,
        trained: nn.Module,
        student: nn.Module,
        teacher: nn.Module | None,
        terms: Sequence[DistillTerm],
        probe: Probe,
        *,
        alpha: float,
        temperature: float,
        seed: int,
        distillation: Loss | None = None,
    ) -> None:
        super().__init__()
        self.trained, self.alpha = trained, alpha
        found = [_places(term, student, teacher, probe) for term in terms]
        self._student = Watch(student, [name for own, _ in found for name in own])
        others = [name for _, names in found for name in names]
        # Not a part of this module, which is trained.
        self._teacher = Watch(nn.Identity() if teacher is None else teacher, others)
        try:
            seen = _seen_on(student, teacher, probe)
            check_outputs(seen, terms)
            self._terms = []
            for number, (term, (own, names)) in enumerate(zip(terms, found, strict=True)):
                self._look(seen, own, names)
                options = dict(term.options)
                if term.loss in SOFTENED:
                    options.setdefault("temperature", temperature)
                method = METHODS[term.loss]
                making = Making(
                    seen.student,
                    seen.teacher,
                    probe.samples,
                    probe.classes,
                    seed + 31 * number,
                    options,
                    distillation,
                )
                self._terms.append(_Active(term, method, own, names, _tried(term, method, making, seen)))
            modules = [a.compare for a in self._terms if isinstance(a.compare, nn.Module)]
            self.parts = nn.ModuleList(modules)
        except BaseException:
            self.close()
            raise

    def forward(self, x: Tensor) -> Any:
        """Run what is trained."""
        return self.trained(x)

    def asks_teacher(self, share: float) -> bool:
        """Whether a term counts at this share of training for which the teacher must run."""
        return any(active.method.taught and active.counts(share) for active in self._terms)

    def loss(
        self,
        on_labels: Tensor,
        outputs: Tensor,
        taught: Tensor | None,
        targets: Tensor,
        *,
        indices: Tensor,
        share: float,
    ) -> Tensor:
        """Return what is minimised, from the last runs of both networks.

        `on_labels + sum of weight * loss`; where terms without a weight count, `(1 - alpha) * on_labels +
        alpha * mean of those losses` takes the place of `on_labels`. While a term counts that
        stands beside nothing, nothing else does.

        Args:
            on_labels: The loss on labels, a scalar.
            outputs: Of the student.
            taught: Of the teacher, without gradient.
            targets: Labels.
            indices: Which samples of the training part these are, `(batch,)`.
            share: Of training that is done, from 0 to below 1.
        """
        seen = Seen(outputs, outputs.new_empty(0) if taught is None else taught, targets, indices)
        counting = [active for active in self._terms if active.counts(share)]
        alone = [active for active in counting if active.term.beside == "nothing"]
        mixed, added = [], []
        for active in alone or counting:
            self._look(seen, active.own, active.others)
            value = active.compare(seen)
            if active.weight is None:
                mixed.append(value)
            else:
                added.append(active.weight * value)
        self._student.forget()
        self._teacher.forget()
        if alone:
            return torch.stack([*mixed, *added]).sum()
        total = on_labels
        if mixed:
            total = (1 - self.alpha) * on_labels + self.alpha * torch.stack(mixed).mean()
        return torch.stack([total, *added]).sum()

    def close(self) -> None:
        """Watch no more."""
        self._student.close()
        self._teacher.close()

    def _look(self, seen: Seen, own: Sequence[str], others: Sequence[str]) -> None:
        seen.student = [self._student[name] for name in own]
        seen.teacher = [self._teacher[name] for name in others]


def _seen_on(student: nn.Module, teacher: nn.Module | None, probe: Probe) -> Seen:
    training = student.training
    with torch.no_grad():
        outputs = student.eval()(probe.student)
        taught = outputs.new_empty(0) if teacher is None else teacher.eval()(probe.teacher)
    student.train(training)
    return Seen(outputs, taught, probe.targets, torch.arange(len(outputs)))


def check_outputs(seen: Seen, terms: Sequence[DistillTerm]) -> None:
    """Refuse a teacher of other classes where outputs are compared.

    Raises:
        DistillationError: Its outputs have another shape than the student's.
    """
    own, other = tuple(seen.outputs.shape[1:]), tuple(seen.taught.shape[1:])
    if own != other and (comparing := [t.loss for t in terms if METHODS[t.loss].where == "outputs"]):
        raise DistillationError(
            f"the teacher gives outputs {other} an image, the student {own}, and {', '.join(comparing)} "
            "compare them: take a teacher of the same classes, or losses of features, such as at, sp or rkd"
        )


def _places(
    term: DistillTerm, student: nn.Module, teacher: nn.Module | None, probe: Probe
) -> tuple[list[str], list[str]]:
    """Return the places of student and teacher that a term looks at, in pairs."""
    method = method_of(term.loss, term.options)
    named, of_teacher = list(term.layers), list(term.teacher_layers or term.layers)
    if not method.taught:
        return named or stages_of(student, probe.student), []
    if teacher is None:
        raise DistillationError(f"distillation by {term.loss!r} needs a teacher, and there is none")
    if method.where == "outputs" and (named or of_teacher):
        raise DistillationError(f"{term.loss!r} compares outputs, and looks at no layers: leave them out")
    if len(named) != len(of_teacher):
        raise DistillationError(
            f"{term.loss!r} compares layers in pairs, got {len(named)} of the student (layers) and "
            f"{len(of_teacher)} of the teacher (teacher_layers)"
        )
    if named or method.where == "outputs":
        return named, of_teacher
    if method.where == "embedding":
        return [embedding_of(student, probe.student)], [embedding_of(teacher, probe.teacher)]
    own, others = stages_of(student, probe.student), stages_of(teacher, probe.teacher)
    # Stages correspond from the last one back: a teacher of larger images has more of them.
    count = min(len(own), len(others))
    chosen = slice(None)
    if method.where == "last":
        chosen = slice(-1, None)
    elif method.where == "middle":
        chosen = slice((count - 1) // 2, (count + 1) // 2)
    return own[-count:][chosen], others[-count:][chosen]


def _tried(term: DistillTerm, method: Method, making: Making, seen: Seen) -> Compare:
    """Make what compares, and compare once: what does not fit is refused before any training."""
    try:
        compare = method.make(making)
        if isinstance(compare, nn.Module):
            compare.eval()
        with torch.no_grad():
            value = compare(seen)
    except DistillationError as error:
        raise DistillationError(f"distillation by {term.loss!r}: {error}") from None
    except TypeError as error:
        raise DistillationError(
            f"distillation by {term.loss!r} with options {making.options}: {error}"
        ) from None
    if value.dim():
        raise DistillationError(f"distillation by {term.loss!r} gave {tuple(value.shape)}, not one number")
    if isinstance(compare, nn.Module):
        compare.train()
    return compare
