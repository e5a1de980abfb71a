"""Other teachers: models that are brought, several as one, networks that teach each other, made images."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from distill.test_finetune import DATA, SIDE, TASK, settings, teacher_network
from safetensors.torch import save_file
from small_networks import assert_equal, small_network, weights
from torch import nn

from autocompress.distill.data_free import without_training_data
from autocompress.distill.finetune import finetune
from autocompress.distill.mutual import train_mutually
from autocompress.distill.teachers import Ensemble, load_teacher
from autocompress.errors import ConversionError, DistillationError
from autocompress.recipe import TeacherSettings, load_recipe
from autocompress.training.data import batches
from autocompress.training.loop import training_batches

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = """
from torch import nn

def make(classes, width=6):
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(nn.Conv2d(3, width, 3), *pool, nn.Linear(width, classes))

def odd(classes):
    return nn.Sequential(nn.Conv2d(4, 6, 3))
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / f"teachers_{tmp_path.name}.py"
    path.write_text(MODEL)
    return path


def test_a_teacher_of_a_file_has_its_weights(model: Path, tmp_path: Path) -> None:
    first = TeacherSettings(model=f"{model}:make")
    kept = load_teacher([first], DATA, temperature=1.0)
    save_file(kept.state_dict(), tmp_path / "teacher.safetensors")
    again = TeacherSettings(model=f"{model}:make", weights=tmp_path / "teacher.safetensors")
    read = load_teacher([again], DATA, temperature=1.0)
    assert_equal(kept.state_dict(), read.state_dict())
    assert not read.training


def test_the_softened_outputs_of_an_ensemble_are_the_weighted_mean(model: Path) -> None:
    settings = [
        TeacherSettings(model=f"{model}:make", weight=3.0),
        TeacherSettings(model=f"{model}:make", arguments={"width": 9}),
    ]
    together = load_teacher(settings, DATA, temperature=2.0)
    assert isinstance(together, Ensemble)
    images = torch.randn(5, 3, 12, 12)
    one, other = ((teacher(images) / 2).softmax(1) for teacher in together.teachers)
    torch.testing.assert_close((together(images) / 2).softmax(1), 0.75 * one + 0.25 * other)


def test_a_teacher_that_does_not_fit_is_refused(model: Path) -> None:
    with pytest.raises(DistillationError, match=r"does not take images \(3, 12, 12\)"):
        load_teacher([TeacherSettings(model=f"{model}:odd")], DATA, temperature=1.0)
    with pytest.raises(ConversionError, match="has no 'none' to call"):
        load_teacher([TeacherSettings(model=f"{model}:none")], DATA, temperature=1.0)


def test_paths_of_teachers_are_relative_to_the_recipe(tmp_path: Path) -> None:
    text = "finetune: {teachers: [{model: 'big.py:make', weights: big.pt}, {model: 'package.big:make'}]}"
    (tmp_path / "recipe.yaml").write_text(text)
    one, other = load_recipe(tmp_path / "recipe.yaml").finetune.teachers
    assert (one.model, one.weights) == (f"{tmp_path / 'big.py'}:make", tmp_path / "big.pt")
    assert other.model == "package.big:make"


# Networks that teach each other ----------------------------------------------------------------------------


def test_the_first_step_of_mutual_learning_is_that_of_the_paper() -> None:
    chosen = settings(epochs=1, batch_size=64, learning_rate=0.1, momentum=0.0, weight_decay=0.0)
    chosen = chosen.model_copy(update={"warmup_epochs": 0.0, "gradient_clip": 1e9})
    pair = [small_network(), teacher_network()]
    plain = [small_network().train(), teacher_network().train()]
    train_mutually(pair, DATA, TASK, chosen, resolutions=[SIDE, SIDE])
    images, labels = next(training_batches(DATA, chosen, epoch=0, seed=chosen.seed))
    one, other = (network(images) for network in plain)
    for network, own, peer in ((plain[0], one, other), (plain[1], other, one)):
        target = peer.detach().softmax(1)
        divergence = (target * (target.log() - own.log_softmax(1))).sum(1).mean()
        (F.cross_entropy(own, labels) + divergence).backward()
        with torch.no_grad():
            for parameter in network.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
    for found, expected in zip(pair, plain, strict=True):
        for name, parameter in expected.named_parameters():
            torch.testing.assert_close(found.get_parameter(name), parameter, msg=name)


def test_mutual_learning_that_was_stopped_goes_on(tmp_path: Path) -> None:
    ends = []
    for stopped in (False, True):
        calls = iter(range(100))
        pair = [small_network(), teacher_network()]

        def progress(*_: object, calls: object = calls) -> None:
            if next(calls) == 5:  # type: ignore[call-overload]
                raise KeyboardInterrupt

        rest = {"resolutions": [SIDE, SIDE], "checkpoint": tmp_path / f"{stopped}.pt"}
        if stopped:
            with pytest.raises(KeyboardInterrupt):
                train_mutually(pair, DATA, TASK, settings(), progress=progress, **rest)  # type: ignore[arg-type]
            pair = [small_network(), teacher_network()]
        scores = train_mutually(pair, DATA, TASK, settings(), **rest)  # type: ignore[arg-type]
        ends.append(([weights(network) for network in pair], scores))
    (one, scores), (other, again) = ends
    assert scores == again
    for first, second in zip(one, other, strict=True):
        assert_equal(first, second)


def test_mutual_learning_takes_two() -> None:
    with pytest.raises(DistillationError, match=r"two networks or more, .* got 1 and 1"):
        train_mutually([small_network()], DATA, TASK, settings(), resolutions=[SIDE])


# Without data ----------------------------------------------------------------------------------------------


def test_images_made_of_a_teacher_have_its_statistics_and_train_a_student() -> None:
    teacher = small_network(width=9, seed=4)
    finetune(teacher, DATA, TASK, settings(epochs=8), resolution=SIDE)
    before = weights(teacher)
    made = without_training_data(teacher, DATA, images=64, batch=32, steps=30)
    assert_equal(before, weights(teacher))
    assert made.fingerprint != DATA.fingerprint
    images, labels = next(batches(made.train, 64, seed=None))
    assert images.shape == (64, 3, 12, 12)
    assert torch.equal(labels, teacher(images).argmax(1))
    norm = teacher[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        mean = teacher[0](images).mean((0, 2, 3))
        far = teacher[0](torch.randn(64, 3, 12, 12) + 2).mean((0, 2, 3))
    assert (mean - norm.running_mean).norm() < 0.2 * (far - norm.running_mean).norm()

    student = small_network()
    first = weights(student)
    chosen = settings(epochs=1, alpha=1.0)
    finetune(student, made, TASK, chosen, resolution=SIDE, teacher=teacher, keep_best=False)
    assert not torch.equal(student[0].weight, first["0.weight"])  # type: ignore[arg-type]


def test_too_few_images_are_refused() -> None:
    with pytest.raises(DistillationError, match="images must be at least batch"):
        without_training_data(teacher_network(), DATA, images=8, batch=32)
