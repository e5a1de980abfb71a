"""The distiller: what is added up by hand, every method in training, nothing left behind, bad input."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distill.test_finetune import (
    DATA,
    SIDE,
    TASK,
    gradients_of_first_step,
    settings,
    teacher_network,
)
from small_networks import assert_equal, small_network
from torch import Tensor, nn

from autocompress.distill.distiller import Distiller, Probe
from autocompress.distill.feature_losses import attention_transfer
from autocompress.distill.finetune import finetune
from autocompress.distill.methods import METHODS, OPTIONS
from autocompress.distill.places import Watch, embedding_of, stages_of
from autocompress.errors import DistillationError, RecipeError
from autocompress.recipe import DistillTerm, FinetuneSettings, parse_recipe
from autocompress.training.loop import training_batches

pytestmark = pytest.mark.usefixtures("one_thread")

DENSE = ("affinity",)
"""Losses of labels of pixels."""


def staged(width: int = 6, seed: int = 0) -> nn.Sequential:
    """A network of maps of two sizes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 3),
        )


def features(network: nn.Module, images: Tensor) -> Tensor:
    """What enters the last layer of `small_network`."""
    found: Tensor = network[:-1](images)  # type: ignore[index]
    return found


def distiller(
    *terms: Mapping[str, Any], student: nn.Module | None = None, teacher: nn.Module | None = None, **rest: Any
) -> Distiller:
    images = torch.randn(4, 3, *SIDE)
    student = student or small_network()
    probe = Probe(images, images, torch.arange(4) % 3, samples=64, classes=3)
    given: dict[str, Any] = {"alpha": 0.5, "temperature": 4.0, "seed": 0, **rest}
    teacher = teacher or teacher_network()
    return Distiller(student, student, teacher, [DistillTerm(**term) for term in terms], probe, **given)


# The loss --------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_labels_predictions_and_features_of_one_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terms = ["kd", {"loss": "cosine", "weight": 3.0}]
    chosen = settings(alpha=0.4, temperature=1.0, distill=terms)
    teacher = small_network(seed=4)
    network, plain, known = small_network(), small_network().train(), small_network(seed=4).eval()
    found = gradients_of_first_step(
        monkeypatch, network, DATA, TASK, chosen, resolution=SIDE, teacher=teacher
    )
    images, labels = next(training_batches(DATA, chosen, epoch=0, seed=chosen.seed))
    own, other = features(plain, images), features(known, images).detach()
    outputs, target = plain[-1](own), known(images).detach().softmax(1)  # type: ignore[index]
    distilled = (target * (target.log() - outputs.log_softmax(1))).sum(1).mean()
    cosine = (own * other).sum(1) / (own.norm(dim=1) * other.norm(dim=1))
    loss = 0.6 * F.cross_entropy(outputs, labels) + 0.4 * distilled + 3.0 * (1 - cosine).mean()
    loss.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_with_a_weight_soft_targets_are_added_to_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-entropy + 3 KL at temperature 1, as mmrazor trains on ImageNet."""
    chosen = settings(distill=[{"loss": "kd", "weight": 3.0, "options": {"temperature": 1.0}}])
    network, plain, known = small_network(), small_network().train(), teacher_network().eval()
    found = gradients_of_first_step(
        monkeypatch, network, DATA, TASK, chosen, resolution=SIDE, teacher=teacher_network()
    )
    images, labels = next(training_batches(DATA, chosen, epoch=0, seed=chosen.seed))
    outputs = plain(images)
    logs = known(images).detach().log_softmax(1)
    soft = F.kl_div(outputs.log_softmax(1), logs, log_target=True, reduction="batchmean")
    (F.cross_entropy(outputs, labels) + 3 * soft).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_named_layers_are_those_that_are_compared() -> None:
    student, teacher = small_network().eval(), teacher_network().eval()
    names = {"layers": ["0"], "teacher_layers": ["0"]}
    made = distiller({"loss": "at", "weight": 2.0, **names}, student=student, teacher=teacher)
    images, labels = torch.randn(4, 3, *SIDE), torch.arange(4)
    outputs, taught = made(images), teacher(images).detach()
    total = made.loss(torch.tensor(5.0), outputs, taught, labels, indices=labels, share=0.0)
    expected = 5.0 + 2.0 * attention_transfer(student[0](images), teacher[0](images))  # type: ignore[index]
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize(
    ("distill", "shares"),
    [
        ("kd", {0.0: "mixed", 0.99: "mixed"}),
        ("eskd", {0.0: "mixed", 0.65: "mixed", 0.66: "labels", 0.9: "labels"}),
        ("fitnets", {0.0: "alone", 0.29: "alone", 0.3: "mixed"}),
        ([{"loss": "kd", "weight": 1.0, "start": 0.5}], {0.49: "labels", 0.5: "added"}),
        ("sad", {0.66: "labels", 0.67: "added"}),
    ],
)
def test_terms_count_in_their_share_of_training(distill: Any, shares: dict[float, str]) -> None:
    terms = [term.model_dump() for term in FinetuneSettings(distill=distill).distill]
    student, teacher = staged().eval(), staged(width=9, seed=4).eval()
    made = distiller(*terms, student=student, teacher=teacher)
    images, on_labels = torch.randn(4, 3, *SIDE), torch.tensor(1000.0)
    for share, expected in shares.items():
        outputs, taught = made(images), teacher(images).detach()
        indices = torch.arange(4)
        total = made.loss(on_labels, outputs, taught, indices, indices=indices, share=share).item()
        kind = "mixed" if total < 1000 else "added"
        kind = "labels" if total == 1000 else "alone" if total < 400 else kind
        assert kind == expected, (share, total)
        assert made.asks_teacher(share) == (expected != "labels" and distill != "sad")


def test_a_teacher_that_no_term_asks_does_not_run() -> None:
    ran: list[int] = []
    teacher = teacher_network()
    teacher.register_forward_hook(lambda *_: ran.append(1))
    chosen = settings(epochs=4, distill=[{"loss": "kd", "end": 0.5}])
    finetune(small_network(), DATA, TASK, chosen, resolution=SIDE, teacher=teacher)
    assert len(ran) == 1 + 2 * 4  # once to try the losses, then four steps of two epochs


# Every method ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in METHODS if name not in DENSE])
def test_every_method_trains_a_student_of_another_width_and_leaves_nothing(name: str) -> None:
    network, teacher = staged(), staged(width=9, seed=4)
    first = {n: tensor.clone() for n, tensor in network.state_dict().items()}
    kept = {n: tensor.clone() for n, tensor in teacher.state_dict().items()}
    options = {"k": 2} if name == "topk" else {}
    term = {"loss": name, "options": options, "start": 0.0}
    alone = settings(epochs=1, distill="none")
    chosen = settings(epochs=1, distill=[term])
    finetune(network, DATA, TASK, chosen, resolution=SIDE, teacher=teacher, keep_best=False)
    plain = staged()
    finetune(plain, DATA, TASK, alone, resolution=SIDE, teacher=staged(width=9, seed=4), keep_best=False)
    assert network.state_dict().keys() == first.keys()
    assert any(not torch.equal(network.state_dict()[n], plain.state_dict()[n]) for n in first)
    assert_equal(teacher.state_dict(), kept)
    for module in (*network.modules(), *teacher.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in METHODS for option in OPTIONS.get(name, ())]
)
def test_every_option_is_one_of_its_loss(name: str, option: str) -> None:
    value: Any = {"kernel": "linear", "momentum": 0.5}.get(option, 1)
    options = ({"k": 2} if name == "topk" else {}) | {option: value}
    network, teacher = staged(), staged(width=9, seed=4)
    term = {"loss": name, "options": options, "start": 0.0}
    chosen = settings(epochs=1, distill=[term])
    scored = finetune(network, DATA, TASK, chosen, resolution=SIDE, teacher=teacher)
    assert 0 <= scored.mean <= 1
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())


@pytest.mark.parametrize("distill", ["kd+hint", "crd+vid"])
def test_training_goes_on_from_its_checkpoint_with_projectors_and_memories(
    tmp_path: Path, distill: str
) -> None:
    ends = []
    for stopped in (False, True):
        path = tmp_path / f"{stopped}.pt"
        network, calls = small_network(), iter(range(100))

        def progress(done: int, total: int, text: str, calls: Any = calls, stopped: bool = stopped) -> None:
            if stopped and next(calls) == 5:
                raise KeyboardInterrupt

        chosen = settings(epochs=3, distill=distill)
        rest = {"resolution": SIDE, "teacher": teacher_network(), "checkpoint": path, "keep_best": False}
        if stopped:
            with pytest.raises(KeyboardInterrupt):
                finetune(network, DATA, TASK, chosen, progress=progress, **rest)
            network = small_network()
        finetune(network, DATA, TASK, chosen, **rest)
        ends.append(network.state_dict())
    assert_equal(*ends)


def test_features_become_alike() -> None:
    def distance(weight: float) -> float:
        network, teacher = small_network(), small_network(seed=4)
        chosen = settings(epochs=12, distill=[{"loss": "cosine", "weight": weight}])
        finetune(network, DATA, TASK, chosen, resolution=SIDE, teacher=teacher, keep_best=False)
        images = torch.stack([DATA.validation[i][0] for i in range(16)])
        with torch.no_grad():
            own, other = features(network, images), features(teacher.eval(), images)
        return float(1 - F.cosine_similarity(own, other).mean())

    assert distance(5.0) < 0.5 * distance(0.0)


# Where it looks --------------------------------------------------------------------------------------------


def test_the_embedding_is_what_enters_the_linear_layer_that_runs_last() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first, self.idle = nn.Linear(4, 2), nn.Linear(3, 4), nn.Linear(9, 9)

        def forward(self, x: Tensor) -> Any:
            return self.last(self.first(x))

    network = Backwards().train()
    assert embedding_of(network, torch.zeros(1, 3)) == "last:in"
    assert network.training


def test_stages_are_the_last_layers_of_each_size_of_maps() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    assert stages_of(network, torch.zeros(1, 3, 8, 8)) == ["1", "2", "3"]


def test_what_is_watched_is_forgotten() -> None:
    network = small_network()
    watch = Watch(network, ["0", "0", "0:in"])
    images = torch.randn(2, 3, *SIDE)
    network(images)
    assert watch["0:in"] is images
    watch.forget()
    with pytest.raises(DistillationError, match="layer '0' did not run"):
        watch["0"]
    watch.close()
    assert not network[0]._forward_hooks
    assert not network[0]._forward_pre_hooks


# Bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "text"),
    [
        ({"loss": "kb"}, "no distillation loss 'kb'; did you mean"),
        ({"loss": "at", "layers": ["featurs"]}, r"has no layer 'featurs'; (the nearest are|it has)"),
        (
            {"loss": "at", "layers": ["0", "1"], "teacher_layers": ["0"]},
            "2 of the student .* 1 of the teacher",
        ),
        ({"loss": "kd", "layers": ["0"]}, "compares outputs, and looks at no layers"),
        ({"loss": "kd, at"}, r"joined by \+, got 'kd, at': write kd\+at"),
        ({"loss": "at", "options": {"powr": 2}}, "'at' has the options power, got powr"),
        ({"loss": "sp", "options": {"powr": 2}}, "'sp' has no options, got powr"),
        ({"loss": "topk"}, "'topk' with options .*missing.* 'k'"),
        ({"loss": "topk", "options": {"k": 9}}, r"k must be in 1\.\.classes \(3\), got 9"),
        ({"loss": "fsp", "layers": ["0"]}, "fsp looks at 2 layers or more, got 1"),
        ({"loss": "affinity"}, "labels .batch, height, width. of the same images, which are .4,."),
        ({"loss": "at", "layers": ["5:in"]}, "this loss needs maps"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(term: dict[str, Any], text: str) -> None:
    student, teacher = small_network(), teacher_network()
    with pytest.raises(DistillationError, match=text):
        distiller(term, student=student, teacher=teacher)
    for module in (*student.modules(), *teacher.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_teacher_of_other_classes_teaches_features_only() -> None:
    teacher = small_network(width=9, seed=4)
    teacher[-1] = nn.Linear(teacher[-1].in_features, 7)  # type: ignore[arg-type]
    with pytest.raises(DistillationError, match=r"outputs \(7,\) an image, the student \(3,\), and kd"):
        distiller({"loss": "kd"}, teacher=teacher)
    distiller({"loss": "at"}, {"loss": "rkd"}, teacher=teacher)


def test_without_a_teacher_only_what_needs_none_counts() -> None:
    ends = []
    for distill in ("none", "kd+at"):
        network = small_network()
        finetune(network, DATA, TASK, settings(distill=distill), resolution=SIDE, keep_best=False)
        ends.append(network.state_dict())
    assert_equal(*ends)


def test_what_is_no_list_of_terms_is_no_recipe() -> None:
    with pytest.raises(RecipeError, match=r"finetune.distill.0.weigth: unknown key; allowed here: beside"):
        parse_recipe({"finetune": {"distill": [{"loss": "at", "weigth": 1}]}})
    with pytest.raises(RecipeError, match=r"finetune.distill: .*takes names of losses, such as kd .*, got 3"):
        parse_recipe({"finetune": {"distill": 3}})
    (kd, at) = parse_recipe({"finetune": {"distill": "kd + at"}}).finetune.distill
    assert (kd.loss, at.loss, at.weight) == ("kd", "at", None)
