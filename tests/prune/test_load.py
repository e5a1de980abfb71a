"""Models and weights from files: what is not what it should be is refused, and nothing is unpickled."""

import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autocompress.errors import ConversionError
from autocompress.prune.load import load_model, read_state, takes

SOURCE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, width=4, in_channels=3):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))

def make(num_classes: int = 5, **rest):
    from {sibling} import WIDTH
    return Net(num_classes, WIDTH, **rest)

def number():
    return 3

def broken():
    raise KeyError("nothing")

WIDTH = 4
"""


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder with a model and what it imports, of names that no other test has."""
    own = f"n{abs(hash(request.node.nodeid)) % 10**8}"
    (tmp_path / f"{own}_net.py").write_text(SOURCE.replace("{sibling}", f"{own}_sibling"), encoding="utf-8")
    (tmp_path / f"{own}_sibling.py").write_text("WIDTH = 6\n", encoding="utf-8")
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in (f"{own}_net", f"{own}_sibling"):
        sys.modules.pop(name, None)


def net(folder: Path) -> str:
    (path,) = folder.glob("*_net.py")
    return str(path)


# Models ------------------------------------------------------------------------------------------------


def test_a_model_comes_from_a_factory_or_a_class_of_a_file(folder: Path) -> None:
    made = load_model(f"{net(folder)}:make", {"num_classes": 7})
    assert made.fc.weight.shape == (7, 6)
    again = load_model(f"{net(folder)}:Net", {"classes": 2, "width": 3})
    assert again.fc.weight.shape == (2, 3)
    assert type(made) is type(again)


def test_a_model_of_a_file_can_be_pickled(folder: Path) -> None:
    made = load_model(f"{net(folder)}:Net", {"classes": 2})
    assert type(pickle.loads(pickle.dumps(made))) is type(made)
    assert str(folder.resolve()) in sys.path


def test_a_model_comes_from_a_module() -> None:
    made = load_model("autocompress.models.resnet_cifar:resnet20", {"width": 2})
    assert sum(parameter.numel() for parameter in made.parameters()) > 0


def test_the_arguments_that_a_factory_takes_are_known(folder: Path) -> None:
    assert takes(f"{net(folder)}:make") == {"num_classes", "rest"}
    assert takes(f"{net(folder)}:Net") == {"classes", "width", "in_channels"}
    assert takes("builtins:int") == set() or "x" in takes("builtins:int")
    with pytest.raises(ConversionError, match="has no 'absent' to call"):
        takes(f"{net(folder)}:absent")


def test_a_file_whose_name_another_module_has_is_refused(folder: Path) -> None:
    """Otherwise the other one would be used."""
    (folder / "json.py").write_text("make = 3", encoding="utf-8")
    with pytest.raises(ConversionError, match=r"cannot be imported as 'json': a module .* loaded .*rename"):
        load_model(f"{folder / 'json.py'}:make", {})
    (folder / "sys.py").write_text("make = 3", encoding="utf-8")
    with pytest.raises(ConversionError, match="loaded already, from Python itself"):
        load_model(f"{folder / 'sys.py'}:make", {})


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("{net}", {}, r"a model is file.py:factory or module:factory, got '.*_net.py'"),
        ("nothing", {}, "a model is file.py:factory or module:factory, got 'nothing'"),
        (":make", {}, "a model is file.py:factory"),
        ("{net}:", {}, "a model is file.py:factory"),
        ("missing.py:make", {}, "there is no file missing.py"),
        ("no.such.module:make", {}, "no.such.module cannot be imported: ModuleNotFoundError: No mod"),
        ("{net}:mke", {}, "has no 'mke' to call; it has Net, make, number, broken"),
        ("{net}:WIDTH", {}, "has no 'WIDTH' to call"),
        ("{net}:number", {}, "number must return a torch.nn.Module, got int"),
        ("{net}:broken", {}, r"broken\(\) raises KeyError: 'nothing'"),
        ("{net}:Net", {}, r"Net\(\) raises TypeError: .*'classes'"),
        ("{net}:Net", {"depth": 3}, r"Net\(depth=3\) raises TypeError: .*unexpected .* argument 'depth'"),
        ("autocompress.models.resnet_cifar:resnet20", {"width": 0}, "width must be an integer >= 1, got 0"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_refused(folder: Path, name: str, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConversionError, match=text):
        load_model(name.replace("{net}", net(folder)), arguments)


def test_a_file_with_an_error_is_refused_and_can_be_mended(folder: Path) -> None:
    file = folder / "n_broken_net.py"
    file.write_text("def make(:\n", encoding="utf-8")
    with pytest.raises(ConversionError, match=r"n_broken_net.py cannot be imported: SyntaxError"):
        load_model(f"{file}:make", {})
    file.write_text("from torch import nn\nmake = nn.Identity\n", encoding="utf-8")
    assert isinstance(load_model(f"{file}:make", {}), nn.Identity)


# Weights -----------------------------------------------------------------------------------------------


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


MODEL = "torch.nn:Sequential"


@pytest.fixture
def weights(folder: Path) -> dict[str, torch.Tensor]:
    made = load_model(f"{net(folder)}:Net", {"classes": 2})
    return {name: torch.randn_like(tensor) for name, tensor in made.state_dict().items()}


@pytest.mark.parametrize("form", ["plain", "nested", "model", "parallel", "compiled", "safetensors"])
def test_weights_are_read_from_what_training_scripts_write(
    folder: Path, weights: dict[str, torch.Tensor], form: str
) -> None:
    path = folder / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(weights, path)
    else:
        wrapped = {
            "plain": weights,
            "nested": {"epoch": 3, "state_dict": weights},
            "model": {"model": weights, "best": 0.5},
            "parallel": {f"module.{name}": tensor for name, tensor in weights.items()},
            "compiled": {"state_dict": {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}},
        }
        torch.save(wrapped[form], path)
    made = load_model(f"{net(folder)}:Net", {"classes": 2}, path)
    assert made.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in made.state_dict().items())


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_weights_is_never_run(folder: Path) -> None:
    path, trace = folder / "w.pt", folder / "was here"
    torch.save({"state_dict": Evil(trace)}, path)
    with pytest.raises(ConversionError, match=r"w.pt cannot be read: .*; a state dict is expected"):
        read_state(path)
    path.write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(ConversionError, match=r"w.pt cannot be read"):
        read_state(path)
    assert not trace.exists()


def test_a_whole_model_is_not_unpickled(folder: Path) -> None:
    torch.save(small(), folder / "w.pt")
    with pytest.raises(
        ConversionError, match=r"torch.save\(model.state_dict\(\), path\): whole models are never"
    ):
        read_state(folder / "w.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a file of weights", bytes(100)])
def test_damaged_weights_are_refused(folder: Path, suffix: str, content: bytes) -> None:
    path = folder / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=f"weights .*w.{suffix} cannot be read: "):
        read_state(path)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_that_are_cut_off_are_refused(folder: Path, suffix: str) -> None:
    path = folder / f"w.{suffix}"
    state = {"weight": torch.randn(100, 100)}
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ConversionError, match="cannot be read"):
        read_state(path)


@pytest.mark.parametrize("content", [[torch.ones(1)], {"lr": 0.1, "weight": torch.ones(1)}, torch.ones(2)])
def test_what_is_no_state_dict_is_refused(folder: Path, content: Any) -> None:
    torch.save(content, folder / "w.pt")
    with pytest.raises(ConversionError, match=r"must be a state dict, names to tensors, (got|but)"):
        read_state(folder / "w.pt")


def test_missing_weights_are_refused(folder: Path) -> None:
    for path in (folder / "absent.pt", folder):
        with pytest.raises(
            ConversionError, match=r"weights must be a file, but .* (does not exist|is a directory)"
        ):
            read_state(path)


def test_weights_of_another_model_are_refused_in_a_few_words(
    folder: Path, weights: dict[str, torch.Tensor]
) -> None:
    weights["conv.weight"] = torch.ones(9, 3, 3, 3)
    weights["fc2.weight"] = weights.pop("fc.weight")
    torch.save(weights, folder / "w.pt")
    text = (
        r"w.pt does not hold the weights of .*:Net: of 4 tensors 1 missing, such as fc.weight; 1 not in the "
        r"model, such as fc2.weight; 1 of another shape, such as conv.weight \(9, 3, 3, 3\) instead of "
        r"\(4, 3, 3, 3\)"
    )
    with pytest.raises(ConversionError, match=text):
        load_model(f"{net(folder)}:Net", {"classes": 2}, folder / "w.pt")
    torch.save(models_state(), folder / "w.pt")
    with pytest.raises(ConversionError) as caught:
        load_model(f"{net(folder)}:Net", {"classes": 2}, folder / "w.pt")
    assert len(str(caught.value)) < 500


def models_state() -> dict[str, torch.Tensor]:
    return load_model("autocompress.models.resnet_cifar:resnet56", {"width": 1}).state_dict()
