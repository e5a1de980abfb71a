import dataclasses
import inspect
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import autocompress.ops
from autocompress.errors import ExportError
from autocompress.export import export, formats, loader
from autocompress.export.export import export_network
from autocompress.export.manifest import (
    Manifest,
    amend_manifest,
    load_exported,
    verify_export,
)
from autocompress.export.parity import check_parity
from autocompress.network import build_network
from autocompress.ops import (
    Add,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool,
    Ops,
    OpSpec,
    Shape,
    SqueezeExcite,
)
from autocompress.space import Architecture
from search_spaces.mobilenet_v3 import mobilenet_v3

SPACE = mobilenet_v3(preset="tiny", depths=(1, 2), kernels=(3, 5), expands=(3,), classes=7)
CODES = SPACE.largest()
BLOCKS = SPACE.operations(CODES)
ARCHITECTURE = SPACE.decode(CODES)[0]
IN_SHAPE: Shape = (3, 32, 32)
PREPROCESSING = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "resolution": 32, "classes": 7}
ALL_FILES = {
    "network.onnx",
    "network.pt2",
    "network.safetensors",
    "network.json",
    "loader.py",
    "manifest.json",
}

SMALL: list[tuple[str, Ops]] = [
    ("stem", (Conv2d(2, 4, 8, 8, kernel=3, activation="relu6"), MaxPool(4, 8, 8, kernel=3))),
    ("body.one", (Conv2d(4, 4, 4, 4, groups=2, bias=True, activation="silu"), Add(4, 4, 4))),
    ("pool", (MaxPool(4, 4, 4), GlobalAvgPool(4, 2, 2), Linear(4, 3, activation="sigmoid"))),
]
SMALL_SHAPE: Shape = (2, 8, 8)


@dataclass(frozen=True)
class Shift(OpSpec):
    """An operation of a user: adds 1, and while it is traced adds `traced`."""

    channels: int
    traced: float = 1.0

    @property
    def in_shape(self) -> Shape:
        return (self.channels, 8, 8)

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    @property
    def macs(self) -> int:
        return 0

    @property
    def params(self) -> int:
        return 0

    def module(self) -> nn.Module:
        return _Shift(self.traced)


class _Shift(nn.Module):
    def __init__(self, traced: float) -> None:
        super().__init__()
        self.traced = traced

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.traced if torch.compiler.is_exporting() else 1.0)


CUSTOM: list[tuple[str, Ops]] = [("shift", (Shift(2),)), ("head", (Linear(128, 3),))]
WRONG: list[tuple[str, Ops]] = [("shift", (Shift(2, traced=1.5),)), ("head", (Linear(128, 3),))]


def trained(blocks: list[tuple[str, Ops]], in_shape: Shape) -> nn.Sequential:
    """A network whose every layer matters: random batch norm, and statistics of real activations.

    Without them the signal of a random deep network fades, and any two networks agree.
    """
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = build_network(blocks)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
        with torch.no_grad():
            network(torch.randn(16, *in_shape))
    return network.eval()


def write(folder: Path, blocks: list[tuple[str, Ops]] = SMALL, **changes: Any) -> Manifest:
    in_shape = changes.pop("in_shape", SMALL_SHAPE)
    network = changes.pop("network", None) or trained(blocks, in_shape)
    arguments: dict[str, Any] = {
        "architecture": ARCHITECTURE,
        "blocks": blocks,
        "in_shape": in_shape,
        "preprocessing": {},
        "formats": ("safetensors",),
    }
    return export_network(network, folder=folder, **{**arguments, **changes})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Sequential, Manifest]:
    """One export of a network of the tiny space in every format."""
    folder = tmp_path_factory.mktemp("run") / "exported"
    network = trained(BLOCKS, IN_SHAPE)
    manifest = write(
        folder,
        BLOCKS,
        network=network,
        in_shape=IN_SHAPE,
        preprocessing=PREPROCESSING,
        formats=("onnx", "torch_export", "safetensors"),
        sample=torch.rand(2, *IN_SHAPE),
        extra={"costs": {"macs": 12}},
    )
    return folder, network, manifest


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is written -------------------------------------------------------------------------------------


def test_the_folder_holds_the_files_of_every_format_and_nothing_lies_beside_it(
    exported: tuple[Path, nn.Sequential, Manifest],
) -> None:
    folder, _, manifest = exported
    assert set(contents(folder)) == ALL_FILES
    assert set(manifest.files) == ALL_FILES - {"manifest.json"}
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_onnx_and_torch_export_agree_with_pytorch_at_batches_they_were_not_traced_with(
    exported: tuple[Path, nn.Sequential, Manifest], batch: int
) -> None:
    folder, network, _ = exported
    images = torch.randn(batch, *IN_SHAPE, generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        expected = network(images)
        archive = torch.export.load(folder / "network.pt2").module()(images)
    session = onnxruntime.InferenceSession(folder / "network.onnx", providers=["CPUExecutionProvider"])
    graph = session.run(["outputs"], {"images": images.numpy()})[0]
    # The outputs differ between images by far more than the tolerance: the comparison says something.
    assert batch == 1 or expected.std(dim=0).max() > 0.01
    torch.testing.assert_close(archive, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(graph, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_the_onnx_graph_is_as_compact_as_the_one_that_is_priced(
    exported: tuple[Path, nn.Sequential, Manifest],
) -> None:
    folder, _, manifest = exported
    model = onnx.load(folder / "network.onnx")
    ops = [op for _, block in BLOCKS for op in block]
    attention = sum(isinstance(op, SqueezeExcite) for op in ops)
    convolutions = [op for op in ops if isinstance(op, Conv2d)]
    # Batch norm is in the weights; each activation, mean and addition is one node.
    assert manifest.onnx_operators == {
        "Add": sum(isinstance(op, Add) for op in ops),
        "Conv": len(convolutions) + 2 * attention,
        "Gemm": 1,
        "GlobalAveragePool": attention + 1,
        "HardSigmoid": attention,
        "HardSwish": sum(op.activation == "hard_swish" for op in convolutions),
        "Mul": attention,
        "Relu": sum(op.activation == "relu" for op in convolutions) + attention,
        "Reshape": 1,
    }
    assert model.opset_import[0].version >= 18
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_batch_norm_is_folded_in_the_archive_and_kept_for_the_loader(
    exported: tuple[Path, nn.Sequential, Manifest],
) -> None:
    folder, _, _ = exported
    targets = {str(node.target) for node in torch.export.load(folder / "network.pt2").graph.nodes}
    assert any("conv2d" in target for target in targets)
    assert not any("batch_norm" in target for target in targets)
    assert any(isinstance(module, nn.BatchNorm2d) for module in load_exported(folder).modules())


def test_no_path_of_this_machine_is_in_an_exported_file(
    exported: tuple[Path, nn.Sequential, Manifest],
) -> None:
    for name, data in contents(exported[0]).items():
        assert b"site-packages" not in data, name
        assert str(Path(autocompress.ops.__file__).parent).encode() not in data, name


def test_the_manifest_says_what_a_stranger_must_know(
    exported: tuple[Path, nn.Sequential, Manifest],
) -> None:
    folder, _, manifest = exported
    payload = json.loads((folder / "manifest.json").read_text())
    assert (payload["schema"], payload["schema_version"]) == ("autocompress.export", 1)
    assert payload["versions"].keys() >= {"autocompress", "torch", "onnx"}
    assert SPACE.from_json(json.dumps(payload["architecture"])).key == payload["architecture_key"]
    assert payload["input"] == {
        "name": "images",
        "dtype": "float32",
        "shape": ["batch", 3, 32, 32],
        "layout": "NCHW",
    }
    assert payload["output"]["shape"] == ["batch", 7]
    assert payload["preprocessing"]["mean"] == [0.5, 0.4, 0.3]
    assert payload["extra"] == {"costs": {"macs": 12}}
    assert set(payload["parity"]) == {"onnx", "torch_export", "safetensors"}
    assert payload["parity"]["safetensors"]["max_abs_difference"] == 0
    assert payload["parity"]["onnx"]["images"] == 1 + 3 + 2
    assert Manifest.from_payload(payload) == manifest == verify_export(folder)


def test_exporting_prints_nothing_and_leaves_the_network_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    # PyTorch's own logger neither propagates nor writes to the stream that pytest captures.
    logging.getLogger("torch").addHandler(caplog.handler)
    network = trained(SMALL, SMALL_SHAPE).to(memory_format=torch.channels_last)
    before = {name: (tensor.clone(), tensor.stride()) for name, tensor in network.state_dict().items()}
    write(tmp_path / "x", network=network, formats=("onnx", "torch_export", "safetensors"))
    logging.getLogger("torch").removeHandler(caplog.handler)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.stride() == before[name][1]


def test_the_sample_is_compared_and_not_stored(tmp_path: Path) -> None:
    sample = torch.full((2, *SMALL_SHAPE), 0.123456)
    manifest = write(tmp_path / "x", sample=sample, formats=("torch_export",))
    assert manifest.parity["torch_export"].images == 6
    assert all(sample.numpy().tobytes()[:64] not in data for data in contents(tmp_path / "x").values())


# The loader ------------------------------------------------------------------------------------------

ALONE = """
import sys
sys.modules["autocompress"] = None  # any import of it fails
import runpy, torch
folder, images, outputs = sys.argv[1:]
network = runpy.run_path(folder + "/loader.py")["load"](folder)
with torch.no_grad():
    torch.save(network(torch.load(images)), outputs)
"""


def test_the_copied_loader_gives_equal_bits_where_autocompress_cannot_be_imported(
    exported: tuple[Path, nn.Sequential, Manifest], tmp_path: Path
) -> None:
    folder, network, _ = exported
    images = torch.randn(2, *IN_SHAPE)
    torch.save(images, tmp_path / "images.pt")
    arguments = [str(folder), str(tmp_path / "images.pt"), str(tmp_path / "outputs.pt")]
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "outputs.pt"), network(images))
    assert set(contents(folder)) == ALL_FILES


def test_the_loader_is_short_and_needs_torch_and_safetensors_only() -> None:
    lines = [line.strip() for line in inspect.getsource(loader).splitlines()]
    code = [line for line in lines if line and not line.startswith(("#", '"""'))]
    assert len(code) <= 55
    imports = {line.split()[1].split(".")[0] for line in code if line.startswith(("import ", "from "))}
    assert imports == {"collections", "json", "pathlib", "safetensors", "torch", "typing"}


def test_the_loader_knows_every_operation_and_activation_of_the_package() -> None:
    kinds = {
        name
        for name, kind in vars(autocompress.ops).items()
        if inspect.isclass(kind) and issubclass(kind, OpSpec) and not inspect.isabstract(kind)
    }
    assert kinds == set(formats.KINDS)
    classes = {**autocompress.ops.ACTIVATIONS}
    del classes["none"]
    assert classes == loader.ACTIVATIONS


def test_load_exported_gives_equal_bits_without_touching_the_random_state(
    exported: tuple[Path, nn.Sequential, Manifest],
) -> None:
    folder, network, _ = exported
    state = torch.get_rng_state()
    loaded = load_exported(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.training
    images = torch.randn(2, *IN_SHAPE)
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))


def test_every_operation_with_every_setting_survives_the_loader(tmp_path: Path) -> None:
    assert write(tmp_path / "x").parity["safetensors"].max_abs_difference == 0


def test_a_channels_last_network_is_exported_with_equal_bits(tmp_path: Path) -> None:
    network = trained(BLOCKS, IN_SHAPE).to(memory_format=torch.channels_last)
    manifest = write(tmp_path / "x", BLOCKS, network=network, in_shape=IN_SHAPE)
    assert manifest.parity["safetensors"].max_abs_difference == 0


def test_weights_that_layers_share_are_exported(tmp_path: Path) -> None:
    one, two = (f"{name}.0.conv.weight" for name in ("one", "two"))
    blocks: list[tuple[str, Ops]] = [(name, (Conv2d(2, 2, 8, 8),)) for name in ("one", "two")]
    network = trained([*blocks, ("head", (Linear(128, 3),))], SMALL_SHAPE)
    network.get_submodule("two.0.conv").weight = network.get_parameter(one)  # type: ignore[assignment]
    assert network.get_parameter(two) is network.get_parameter(one)
    manifest = write(tmp_path / "x", [*blocks, ("head", (Linear(128, 3),))], network=network)
    assert manifest.parity["safetensors"].max_abs_difference == 0


class Counted(Shift):
    """A user's operation that makes a constant of the batch size."""

    def module(self) -> nn.Module:
        return _Counted()


class _Counted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), 2, 8, 8) + 1


def test_a_network_that_makes_a_constant_of_the_batch_size_is_written_for_one_image(tmp_path: Path) -> None:
    blocks: list[tuple[str, Ops]] = [("shift", (Counted(2),)), ("head", (Linear(128, 3),))]
    manifest = write(tmp_path / "x", blocks, formats=("onnx", "torch_export"))
    assert manifest.input.shape == (1, 2, 8, 8)
    assert manifest.output.shape == (1, 3)
    assert {parity.images for parity in manifest.parity.values()} == {4}
    session = onnxruntime.InferenceSession(tmp_path / "x" / "network.onnx")
    assert session.get_inputs()[0].shape == [1, 2, 8, 8]


def test_an_operation_of_the_users_own_leaves_the_loader_out_and_says_why(tmp_path: Path) -> None:
    manifest = write(tmp_path / "x", CUSTOM, formats=("onnx", "torch_export", "safetensors"))
    assert set(contents(tmp_path / "x")) == {"network.onnx", "network.pt2", "manifest.json"}
    assert "block 'shift' runs Shift" in manifest.left_out["safetensors"]
    with pytest.raises(ExportError, match=r"has no network.safetensors: block 'shift' runs Shift"):
        load_exported(tmp_path / "x")


def test_an_export_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="nothing is left to export"):
        write(tmp_path / "x", CUSTOM)
    assert list(tmp_path.iterdir()) == []


# Parity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["onnx", "torch_export"])
def test_a_format_that_differs_is_an_error_with_its_name_and_numbers(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match=rf"'{name}' differs .* by 0\.\d+, more than the tolerance \d"):
        write(tmp_path / "x", WRONG, formats=(name,))
    assert list(tmp_path.iterdir()) == []


def test_blocks_that_are_not_those_of_the_network_are_found_out(tmp_path: Path) -> None:
    first = dataclasses.replace(SMALL[0][1][0], activation="silu")
    other = [("stem", (first, *SMALL[0][1][1:])), *SMALL[1:]]
    with pytest.raises(ExportError, match="'safetensors' differs from the PyTorch network"):
        write(tmp_path / "x", other, network=trained(SMALL, SMALL_SHAPE))
    with pytest.raises(ExportError, match=r"(?s)'safetensors' could not be loaded back: .*Missing key"):
        write(tmp_path / "x", SMALL, network=trained(CUSTOM, SMALL_SHAPE))


def test_tolerance_is_relative_to_the_largest_output_and_nan_never_passes() -> None:
    expected = [torch.tensor([[10.0, -200.0]])]
    found = check_parity("onnx", expected, [torch.tensor([[10.015625, -200.0]])])
    assert (found.max_abs_difference, found.scale) == (0.015625, 200.0)
    assert found.tolerance == pytest.approx(0.02)
    for value in (10.03125, float("nan")):
        with pytest.raises(ExportError, match="'onnx' differs"):
            check_parity("onnx", expected, [torch.tensor([[value, -200.0]])])
    with pytest.raises(ExportError, match="'safetensors' differs"):
        check_parity("safetensors", expected, [torch.tensor([[10.015625, -200.0]])])
    with pytest.raises(ExportError, match="outputs of shapes"):
        check_parity("onnx", expected, [torch.tensor([[10.0]])])


# Damage and faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["network.safetensors", "network.json", "loader.py"])
def test_one_changed_byte_is_found_and_the_file_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "x")
    path = tmp_path / "x" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for read in (verify_export, load_exported):
        with pytest.raises(ExportError, match=f"{name} is damaged"):
            read(tmp_path / "x")
    path.unlink()
    with pytest.raises(ExportError, match=f"{name} is missing"):
        verify_export(tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other"}, "must be a JSON object"),
        ({"schema_version": 2}, "schema_version 1, got 2"),
        ({"files": {"../secret": {"sha256": "0", "size_bytes": 1}}}, "no file of an export"),
        ({"files": {"network.onnx": {}}}, "manifest is damaged"),
        ({"parity": []}, "manifest is damaged"),
        ({"input": None}, "manifest is damaged"),
        ({"unknown": 1}, "manifest is damaged"),
        ({"architecture_key": "0" * 16}, "is not the key of its architecture"),
    ],
)
def test_a_manifest_that_is_wrong_is_an_error(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path / "x")
    path = tmp_path / "x" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ExportError, match=message):
        verify_export(tmp_path / "x")


def test_a_folder_without_a_readable_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="export manifest not found"):
        verify_export(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ExportError, match="cannot be read"):
        verify_export(tmp_path)


def test_an_export_that_fails_half_way_leaves_the_old_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x")
    before = contents(tmp_path / "x")

    def interrupted(folder: Path, *_: object) -> None:
        (folder / "network.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export.writers, "write_safetensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "x")
    with pytest.raises(ExportError, match="'onnx' differs"):
        write(tmp_path / "x", WRONG, formats=("onnx",))
    assert contents(tmp_path / "x") == before
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_rename_that_fails_puts_the_old_export_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x")
    before = contents(tmp_path / "x")
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if path.name.endswith(".exporting"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(ExportError, match=r"cannot write .*x: Input/output error"):
        write(tmp_path / "x")
    assert contents(tmp_path / "x") == before
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_what_a_killed_run_left_is_put_right_by_the_next_one(tmp_path: Path) -> None:
    write(tmp_path / "x", extra={"run": 1})
    # Killed between the two renames: the old export stands aside, the new one is not in place.
    (tmp_path / "x").rename(tmp_path / ".x.replaced")
    (tmp_path / ".x.exporting").mkdir()
    (tmp_path / ".x.exporting" / "network.onnx").write_bytes(b"half")
    with pytest.raises(ExportError, match="differs"):
        write(tmp_path / "x", WRONG, formats=("torch_export",))
    assert verify_export(tmp_path / "x").extra == {"run": 1}
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]
    write(tmp_path / "x", extra={"run": 2})
    assert verify_export(tmp_path / "x").extra == {"run": 2}
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_folder_with_other_files_is_refused_before_any_is_lost(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match=r"holds files that are no part of an export.*thesis\.tex"):
        write(tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may write anywhere; be nobody for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_read_only_place_is_an_error_at_once() -> None:
    # Not tmp_path: its parents are closed to other users, which would be the wrong reason.
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o555)
        network = trained(SMALL, SMALL_SHAPE)
        with (
            without_privileges(),
            pytest.raises(ExportError, match=r"cannot write .*exported: Permission denied"),
        ):
            write(Path(place) / "exported", network=network)
        assert list(Path(place).iterdir()) == []


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write"):
        write(tmp_path / "file" / "x")
    with pytest.raises(ExportError, match="cannot write"):
        write(tmp_path / "file")


@contextmanager
def files_at_most(size_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["onnx", "torch_export", "safetensors"])
def test_a_disk_without_room_is_an_error_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    network = trained(SMALL, SMALL_SHAPE)
    with files_at_most(300), pytest.raises(ExportError, match=f"'{name}' could not be written"):
        write(tmp_path / "x", network=network, formats=(name,))
    assert list(tmp_path.iterdir()) == []


# Arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formats": ("onxx",)}, "formats must be among onnx, torch_export, safetensors, got 'onxx'"),
        ({"formats": ()}, "formats must name at least one"),
        ({"blocks": [], "network": nn.Identity().eval()}, "nothing is left .* of no space"),
        ({"blocks": [("stem", ())], "network": nn.Identity().eval()}, "at least one operation"),
        (
            {"network": trained(SMALL, SMALL_SHAPE), "origin": {"model": "m:f"}},
            "origin is for a network of no",
        ),
        ({"network": trained(SMALL, SMALL_SHAPE), "in_shape": (3, 8, 8)}, r"in_shape must be \(2, 8, 8\)"),
        ({"network": build_network(SMALL)}, "must be in eval mode"),
        ({"preprocessing": {"mean": torch.zeros(3)}}, "preprocessing must hold finite numbers"),
        ({"extra": {"accuracy": float("nan")}}, "extra must hold finite numbers"),
        ({"sample": torch.zeros(1, 3, 8, 8)}, r"sample must be \(n, 2, 8, 8\), got \(1, 3, 8, 8\)"),
    ],
)
def test_a_wrong_argument_is_an_error_and_writes_nothing(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        write(tmp_path / "x", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_network_with_damaged_weights_is_not_exported(tmp_path: Path) -> None:
    network = trained(SMALL, SMALL_SHAPE)
    network.get_parameter("pool.2.linear.bias").data[0] = float("nan")
    with pytest.raises(ExportError, match="not finite"):
        write(tmp_path / "x", network=network)


def test_facts_found_later_are_added_to_the_manifest(tmp_path: Path) -> None:
    write(tmp_path / "x", extra={"macs": 12})
    amend_manifest(tmp_path / "x", {"measured_latency_ms": {"median": 0.3}})
    assert verify_export(tmp_path / "x").extra == {"macs": 12, "measured_latency_ms": {"median": 0.3}}
    assert (
        verify_export(tmp_path / "x").architecture_key == Architecture(SPACE.name, ARCHITECTURE.settings).key
    )
