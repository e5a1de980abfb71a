"""What holds for every distillation loss: gradients, precision, zeros, batches, refusals."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from autocompress.distill import dense_losses, feature_losses, losses, relation_losses
from autocompress.distill.contrastive import Contrastive
from autocompress.distill.factors import VariationalInformation
from autocompress.errors import DistillationError

pytestmark = pytest.mark.usefixtures("one_thread")

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A loss of two tensors, and what is claimed of it.

    `zero`: 0 with gradient 0 at equality. `batches`: the same for a batch and for its repetition. `refused`:
    shapes of student and teacher.
    """

    loss: Loss
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    refused: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    zero: bool = True
    batches: bool = True


LABELS = torch.tensor([0, 3, 1, 4])
REGIONS = torch.tensor([[[0, 0, 1, 1], [2, 0, 1, 1], [2, 2, 2, 1], [0, 2, 2, 9]]]).repeat(4, 1, 1)
BOXES = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(4, 4)


def labels(outputs: Tensor) -> Tensor:
    return LABELS.repeat(len(outputs) // 4)


def flow(student: Tensor, teacher: Tensor) -> Tensor:
    return feature_losses.flow(student, student[:, :2, ::2, ::2], teacher, teacher[:, :2, ::2, ::2])


def graph(student: Tensor, teacher: Tensor) -> Tensor:
    own, other = ([x, x[:, ::2, ::2, ::2], x[:, :2, 0, 0]] for x in (student, teacher))
    return relation_losses.instance_relation_graph(own, other, transformation=0.0)


def moving_graph(student: Tensor, teacher: Tensor) -> Tensor:
    own, other = ([x[:, :4], -2 * x[:, :2, ::2, ::2]] for x in (student, teacher))
    return relation_losses.instance_relation_graph(own, other)


def regions(student: Tensor, teacher: Tensor) -> Tensor:
    found = REGIONS[:1].repeat(len(student), 1, 1)
    return dense_losses.inter_region_affinity(student, teacher, found, 3)


def regression(student: Tensor, teacher: Tensor) -> Tensor:
    return dense_losses.bounded_regression(student, teacher, BOXES.repeat(len(student) // 4, 1), margin=0.5)


def information(student: Tensor, teacher: Tensor) -> Tensor:
    return VariationalInformation(3, 5, seed=1).to(student.dtype)(student, teacher)  # type: ignore[no-any-return]


def contrast(student: Tensor, teacher: Tensor) -> Tensor:
    module = Contrastive(12, 20, 9, negatives=5, dimension=4, temperature=0.5, seed=2)
    module.normalizers.fill_(9.0)  # otherwise estimated from the batch, and taken for constants
    return module.eval().to(student.dtype)(student, teacher, torch.arange(len(student)))  # type: ignore[no-any-return]


OUTPUTS = (4, 5), (4, 5)
OTHER_CLASSES = ((4, 5), (4, 6)), ((4, 5), (1, 5)), ((4, 5), (3, 5))
MAPS = (4, 3, 4, 4), (4, 5, 2, 2)
SAME_MAPS = (4, 4, 3, 3), (4, 4, 3, 3)
OTHER_MAPS = ((4, 4, 3, 3), (4, 5, 3, 3)), ((4, 4, 3, 3), (4, 4, 2, 2)), ((4, 4, 3, 3), (1, 4, 3, 3))
NO_MAPS = ((4, 3), (4, 3)), ((4, 3, 2, 2), (3, 3, 2, 2)), ((4, 3, 2, 2), (4, 12))
FEATURES = (5, 6), (5, 4)
OTHER_SAMPLES = ((5, 6), (4, 6)), ((1, 6), (1, 6)), ((5,), (5,))

CASES = {
    "hinton": Case(lambda s, t: losses.hinton(s, t, 4.0), *OUTPUTS, OTHER_CLASSES),
    "selective": Case(lambda s, t: losses.selective(s, t, 2.0, 3), *OUTPUTS, OTHER_CLASSES, zero=False),
    "selective, all": Case(lambda s, t: losses.selective(s, t, 2.0, 5), *OUTPUTS, OTHER_CLASSES),
    "decoupled": Case(
        lambda s, t: losses.decoupled(s, t, labels(s), 2.0),
        *OUTPUTS,
        (*OTHER_CLASSES, ((4, 5, 2), (4, 5, 2)), ((4, 1), (4, 1))),
    ),
    "dist": Case(
        lambda s, t: losses.dist(s, t, 2.0), *OUTPUTS, (*OTHER_CLASSES, ((1, 5), (1, 5)), ((4, 1), (4, 1)))
    ),
    "hint": Case(feature_losses.hint, *SAME_MAPS, OTHER_MAPS),
    "attention": Case(feature_losses.attention_transfer, *MAPS, NO_MAPS, zero=False),
    "attention, same": Case(feature_losses.attention_transfer, *SAME_MAPS, NO_MAPS),
    "boundary": Case(feature_losses.activation_boundary, *SAME_MAPS, OTHER_MAPS, zero=False),
    "factors": Case(feature_losses.factor_transfer, *SAME_MAPS, OTHER_MAPS),
    "factors, squared": Case(lambda s, t: feature_losses.factor_transfer(s, t, p=2), *SAME_MAPS, OTHER_MAPS),
    "selectivity": Case(feature_losses.neuron_selectivity, *MAPS, NO_MAPS, zero=False),
    "selectivity, same": Case(feature_losses.neuron_selectivity, *SAME_MAPS, NO_MAPS),
    "selectivity, linear": Case(
        lambda s, t: feature_losses.neuron_selectivity(s, t, kernel="linear"), *SAME_MAPS, NO_MAPS
    ),
    "cosine": Case(feature_losses.cosine, (4, 5), (4, 5), (*OTHER_CLASSES, ((4, 5, 2), (4, 5, 2)))),
    "cosine of maps": Case(feature_losses.cosine, (4, 5, 4, 4), (4, 5), OTHER_CLASSES, zero=False),
    "flow": Case(flow, *SAME_MAPS, (((4, 4, 3, 3), (4, 5, 3, 3)), ((4, 4, 3, 3), (3, 4, 3, 3)))),
    "information": Case(
        information,
        *MAPS,
        (((4, 4, 2, 2), (4, 5, 2, 2)), ((4, 3, 2, 2), (4, 4, 2, 2)), ((4, 3), (3, 5))),
        False,
    ),
    "similarity": Case(
        relation_losses.similarity_preserving, *FEATURES, OTHER_SAMPLES, zero=False, batches=False
    ),
    "correlation": Case(relation_losses.correlation, *FEATURES, OTHER_SAMPLES, zero=False, batches=True),
    "distance": Case(relation_losses.rkd_distance, *FEATURES, OTHER_SAMPLES, zero=False, batches=False),
    "angle": Case(
        relation_losses.rkd_angle, *FEATURES, (*OTHER_SAMPLES, ((2, 6), (2, 6))), zero=False, batches=False
    ),
    "probabilistic": Case(relation_losses.probabilistic, *FEATURES, OTHER_SAMPLES, zero=False, batches=False),
    **{
        f"{name}, same": Case(loss, (5, 6), (5, 6), OTHER_SAMPLES, batches=False)
        for name, loss in {
            "similarity": relation_losses.similarity_preserving,
            "correlation": relation_losses.correlation,
            "relational": relation_losses.relational,
            "probabilistic": relation_losses.probabilistic,
        }.items()
    },
    "graph": Case(
        graph,
        (5, 6, 4, 4),
        (5, 4, 3, 3),
        (((5, 6, 4, 4), (4, 6, 4, 4)), ((1, 2, 2, 2), (1, 2, 2, 2))),
        False,
        False,
    ),
    "moving graph": Case(
        moving_graph, (5, 6, 4, 4), (5, 6, 4, 4), (((5, 6, 4, 4), (4, 6, 4, 4)),), batches=False
    ),
    "contrast": Case(
        contrast, (4, 12), (4, 20), (((4, 12), (4, 19)), ((4, 11), (4, 20)), ((4, 12), (3, 20))), False, False
    ),
    "regions": Case(
        regions, (4, 3, 4, 4), (4, 5, 4, 4), (((4, 3), (4, 3)), ((4, 3, 4, 4), (3, 3, 4, 4))), zero=False
    ),
    "regions, same": Case(regions, (4, 3, 4, 4), (4, 3, 4, 4), ()),
    "channelwise": Case(
        lambda s, t: dense_losses.channelwise(s, t, 2.0), *SAME_MAPS, (*OTHER_MAPS, ((4, 4), (4, 4)))
    ),
    "regression": Case(
        regression, (4, 4), (4, 4), (((4, 4), (4, 3)), ((4, 3), (4, 3)), ((4, 4, 1), (4, 4, 1))), zero=False
    ),
    "weighted": Case(dense_losses.weighted_cross_entropy, *OUTPUTS, OTHER_CLASSES, zero=False),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def tensors(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = case.student, case.teacher
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return student.to(dtype), teacher.to(dtype)


@every
def test_the_gradient_is_that_of_finite_differences_and_the_teacher_gets_none(case: Case) -> None:
    student, teacher = (x.requires_grad_() for x in tensors(case))
    torch.autograd.gradcheck(lambda x: case.loss(x, teacher), (student,))
    loss = case.loss(student, teacher)
    loss.backward()
    assert loss.shape == ()
    assert student.grad is not None
    assert student.grad.abs().max() > 1e-6
    assert teacher.grad is None


@every
def test_sixteen_bits_and_autocast_are_computed_in_32_bits(case: Case) -> None:
    student, teacher = tensors(case, torch.bfloat16)
    found = case.loss(student.float(), teacher.float())
    assert found.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.loss(student.float(), teacher.float()), found)
    if case.loss not in (information, contrast):  # their weights have the type of the features here
        assert torch.equal(case.loss(student, teacher), found)
    wide = case.loss(student.double(), teacher.double())
    torch.testing.assert_close(found.double(), wide, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.zero], ids=[n for n, c in CASES.items() if c.zero]
)
def test_it_is_0_without_gradient_at_equality_and_positive_elsewhere(case: Case) -> None:
    student, teacher = tensors(case)
    student = student.requires_grad_()
    assert case.loss(student, teacher) > 1e-6
    loss = case.loss(student, student)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-7


@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.batches], ids=[n for n, c in CASES.items() if c.batches]
)
def test_it_does_not_depend_on_the_batch_size(case: Case) -> None:
    both = tensors(case)
    repeated = (x.repeat(3, *[1] * (x.dim() - 1)) for x in both)
    torch.testing.assert_close(case.loss(*repeated), case.loss(*both))


@pytest.mark.parametrize(
    ("case", "shapes"),
    [(case, shapes) for case in CASES.values() for shapes in case.refused],
    ids=[f"{name} {shapes}" for name, case in CASES.items() for shapes in case.refused],
)
def test_what_cannot_be_compared_is_refused(
    case: Case, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    with pytest.raises(DistillationError, match=r"got .*; (put a projector|make it anew)"):
        case.loss(*(torch.ones(shape) for shape in shapes))


def test_the_refusal_has_both_shapes() -> None:
    message = r"needs one shape, got \(2, 3\) of the student and \(2, 4\) of the teacher; put a projector"
    with pytest.raises(DistillationError, match=message):
        feature_losses.hint(torch.ones(2, 3), torch.ones(2, 4))
