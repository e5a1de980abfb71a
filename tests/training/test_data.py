import gzip
import hashlib
import io
import os
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from autocompress.errors import DataError
from autocompress.training.data import Augmentation, DataSet, Images, batches, load_data
from autocompress.training.readers import stratified_order


def images_of(part: Dataset[Any]) -> Images:
    assert isinstance(part, Images)
    return part


def row_hashes(part: Dataset[Any]) -> set[bytes]:
    return {row.tobytes() for row in images_of(part).images.numpy()}


# --- generated files ---


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@dataclass
class IdxFolder:
    folder: Path
    train: np.ndarray
    labels: np.ndarray

    def file(self, stem: str) -> Path:
        return self.folder / stem


@pytest.fixture
def idx_folder(tmp_path: Path) -> IdxFolder:
    rng = np.random.default_rng(3)
    train = rng.integers(0, 256, (60, 6, 5), np.uint8)
    labels = np.repeat(np.arange(10, dtype=np.uint8), 6)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(train))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (20, 6, 5), np.uint8)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[::3]))
    return IdxFolder(tmp_path, train, labels)


def cifar_bytes(count: int, seed: int) -> bytes:
    records = np.random.default_rng(seed).integers(0, 256, (count, 3073), np.uint8)
    records[:, 0] = np.arange(count) % 10
    return records.tobytes()


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    for number in range(1, 6):
        (inner / f"data_batch_{number}.bin").write_bytes(cifar_bytes(20, number))
    (inner / "test_batch.bin").write_bytes(cifar_bytes(10, 0))
    return tmp_path


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def grey(value: int, height: int = 4, width: int = 3) -> bytes:
    return png(np.full((height, width), value, np.uint8))


def put(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def put_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def two_classes(each: int = 10) -> dict[str, bytes]:
    return {
        f"{name}/{i}.png": grey(base + i) for base, name in ((0, "ant"), (100, "bee")) for i in range(each)
    }


UserData = Callable[..., str]


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> UserData:
    def make(returned: Any) -> str:
        module = types.ModuleType("someones_data")
        module.load = returned if callable(returned) else lambda: returned  # type: ignore[attr-defined]
        module.number = 3  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "someones_data", module)
        return "someones_data:load"

    return make


def float_set(n: int, classes: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(n)
    return TensorDataset(torch.randn(n, 2, 4, 4, generator=generator), torch.arange(n) % classes)


def byte_set(n: int, labels: Tensor) -> TensorDataset:
    generator = torch.Generator().manual_seed(n)
    return TensorDataset(torch.randint(0, 256, (n, 2, 4, 4), dtype=torch.uint8, generator=generator), labels)


# --- digits and the split ---


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load_data("digits")


def test_digits_are_1797_images_of_32_pixels_a_fifth_of_them_the_test_part(digits: DataSet) -> None:
    assert (digits.name, digits.classes, digits.in_shape, digits.flip) == ("digits", 10, (1, 32, 32), False)
    lengths = [len(images_of(part)) for part in (digits.train, digits.validation, digits.test)]
    assert lengths == [1294, 144, 359]  # 20 % of 1797 = 359.4; 10 % of the 1438 left


def test_digits_are_resized_bilinearly_as_pillow_does(digits: DataSet) -> None:
    from sklearn.datasets import load_digits

    originals = load_digits().images
    resized = {
        np.asarray(
            Image.fromarray((one * (255 / 16)).astype(np.float32)).resize((32, 32), Image.Resampling.BILINEAR)
        )
        .round()
        .astype(np.uint8)
        .tobytes()
        for one in originals
    }
    near = [hashed for hashed in row_hashes(digits.test) if hashed in resized]
    assert len(near) > 0.9 * len(row_hashes(digits.test))  # the rest differs where a half is rounded


def test_the_test_part_does_not_depend_on_seed_limit_or_validation(digits: DataSet) -> None:
    other = load_data("digits", seed=7, limit=200, validation=50)
    assert torch.equal(images_of(other.test).images, images_of(digits.test).images)
    assert torch.equal(images_of(other.test).labels, images_of(digits.test).labels)
    assert row_hashes(other.train) != row_hashes(digits.train)


def test_parts_have_no_image_in_common_and_the_limit_is_shared_by_train_and_validation() -> None:
    data = load_data("digits", limit=300, validation=60)
    train, held_out, test = map(row_hashes, (data.train, data.validation, data.test))
    assert (len(train), len(held_out)) == (240, 60)  # no digit is there twice
    assert not train & held_out
    assert not (train | held_out) & test
    full = load_data("digits")
    assert train | held_out <= row_hashes(full.train) | row_hashes(full.validation)


def test_validation_is_stratified_to_one_image_of_each_class() -> None:
    data = load_data("digits", limit=500, validation=0.2)
    held_out = np.bincount(images_of(data.validation).labels.numpy(), minlength=10)
    both = held_out + np.bincount(images_of(data.train).labels.numpy(), minlength=10)
    assert held_out.sum() == 100
    assert (abs(held_out - 0.2 * both) <= 1).all()


def test_a_smaller_limit_takes_images_of_the_larger() -> None:
    small, large = (load_data("digits", limit=limit) for limit in (100, 400))
    assert row_hashes(small.train) | row_hashes(small.validation) < row_hashes(large.train) | row_hashes(
        large.validation
    )


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    part=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_every_beginning_of_a_stratified_order_has_the_proportions_of_the_whole(
    counts: list[int], part: float, seed: int
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    order = stratified_order(labels, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(len(labels)))
    length = round(part * len(labels))
    found = np.bincount(labels[order[:length]], minlength=len(counts))
    # Each class holds n t within 1/2 at one common t, so any two classes agree on t within the sum of both.
    low, high = (found - 0.5) / counts, (found + 0.5) / counts
    assert low.max() <= high.min() + 1e-9


def test_mean_and_std_are_those_of_the_training_part_alone(idx_folder: IdxFolder) -> None:
    data = load_data("fashion_mnist", folder=idx_folder.folder)
    pixels = images_of(data.train).images.numpy().astype(np.float64) / 255
    assert data.mean == pytest.approx((pixels.mean(),), abs=1e-12)
    assert data.std == pytest.approx((pixels.std(),), abs=1e-12)
    idx_folder.file("t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((20, 6, 5), np.uint8)))
    blackened = load_data("fashion_mnist", folder=idx_folder.folder)
    assert (blackened.mean, blackened.std) == (data.mean, data.std)
    assert torch.equal(images_of(blackened.train).images, images_of(data.train).images)


def test_the_fingerprint_is_equal_for_equal_content_and_changes_with_one_pixel(idx_folder: IdxFolder) -> None:
    def fingerprint(seed: int = 0) -> str:
        return load_data("fashion_mnist", folder=idx_folder.folder, seed=seed).fingerprint

    first = fingerprint()
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert first == fingerprint()
    assert first != fingerprint(seed=1)
    idx_folder.train[7, 3, 2] ^= 1
    idx_folder.file("train-images-idx3-ubyte").write_bytes(idx(idx_folder.train))
    assert first != fingerprint()


@pytest.mark.parametrize("validation", [0.0, 1.0, -0.1, 1.5, 0, 1438, True, float("nan")])
def test_a_validation_part_out_of_range_is_refused(validation: float) -> None:
    with pytest.raises(DataError, match=r"validation must be a fraction .* or a count in 1\.\.1437"):
        load_data("digits", validation=validation)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(DataError, match=r"limit must be in 1\.\.1438, .* got 2000"):
        load_data("digits", limit=2000)
    with pytest.raises(DataError, match=r"4 images are left to train on, and none of class \d"):
        load_data("digits", limit=5)
    with pytest.raises(DataError, match=r"none of class \d; raise the limit or hold out less"):
        load_data("digits", validation=1437)
    with pytest.raises(DataError, match="seed must be 0 or more, got -1"):
        load_data("digits", seed=-1)
    with pytest.raises(DataError, match=r"one of digits, fashion_mnist, .* got 'imagenet'"):
        load_data("imagenet")
    with pytest.raises(DataError, match="take no folder"):
        load_data("digits", folder=Path("somewhere"))
    with pytest.raises(DataError, match="'cifar10' is read from files: give the folder"):
        load_data("cifar10")


# --- IDX ---


@pytest.mark.parametrize("place", ["", "raw", "FashionMNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_found_raw_and_packed_in_each_place(
    idx_folder: IdxFolder, tmp_path: Path, place: str, packed: bool
) -> None:
    target = tmp_path / "elsewhere"
    (target / place).mkdir(parents=True)
    for path in [path for path in idx_folder.folder.iterdir() if path.is_file()]:
        content = path.read_bytes()
        name = f"{path.name}.gz" if packed else path.name
        (target / place / name).write_bytes(gzip.compress(content) if packed else content)
    data = load_data("fashion_mnist", folder=target, validation=10)
    assert (data.in_shape, data.classes, data.flip) == ((1, 6, 5), 10, True)
    written = {
        row.tobytes(): int(label) for row, label in zip(idx_folder.train, idx_folder.labels, strict=True)
    }
    for part in (images_of(data.train), images_of(data.validation)):
        for image, label in zip(part.images, part.labels, strict=True):
            assert written.pop(image.numpy().tobytes()) == label
    assert not written
    assert images_of(data.test).labels.tolist() == idx_folder.labels[::3].tolist()


def test_a_missing_idx_file_is_named_with_its_places_and_source(idx_folder: IdxFolder) -> None:
    idx_folder.file("t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(
        DataError, match=r"t10k-labels-idx1-ubyte\.gz not found in .*FashionMNIST/raw; .*github"
    ):
        load_data("fashion_mnist", folder=idx_folder.folder)


@pytest.mark.parametrize(
    ("stem", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"\x89PNG1234", "magic number must be 2051, got 2303741511"),
        (
            "train-labels-idx1-ubyte",
            idx(np.zeros((2, 2, 2), np.uint8)),
            "magic number must be 2049, got 2051",
        ),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03\0\0", "truncated: it ends within its header of 16 bytes"),
        ("train-images-idx3-ubyte", b"", "truncated: it ends within its header"),
        ("train-images-idx3-ubyte", idx(np.zeros((60, 6, 5), np.uint8))[:-1], "truncated: .* 1800 bytes"),
        ("train-images-idx3-ubyte", idx(np.zeros((60, 6, 5), np.uint8)) + b"x", "too long: .* 1800 bytes"),
        ("train-images-idx3-ubyte", idx(np.zeros((59, 6, 5), np.uint8)), "59 images, but .* has 60 labels"),
        ("train-images-idx3-ubyte", idx(np.zeros((60, 5, 6), np.uint8)), "must have one size"),
        ("train-images-idx3-ubyte", idx(np.zeros((0, 6, 5), np.uint8)), "empty or damaged"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03" + b"\xff" * 20, "empty or damaged"),
        (
            "t10k-labels-idx1-ubyte",
            idx(np.array([0] * 4 + [10] * 16, np.uint8)),
            r"in 0\.\.9, got 10 at position 4",
        ),
    ],
)
def test_a_damaged_idx_file_is_named_with_what_is_wrong(
    idx_folder: IdxFolder, stem: str, content: bytes, message: str
) -> None:
    idx_folder.file(stem).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data("fashion_mnist", folder=idx_folder.folder)


@pytest.mark.parametrize("damage", ["cut", "no gzip", "flipped"])
def test_a_damaged_gzip_file_is_named(idx_folder: IdxFolder, damage: str) -> None:
    raw = idx_folder.file("train-images-idx3-ubyte")
    packed = bytearray(gzip.compress(raw.read_bytes()))
    raw.unlink()
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif damage == "no gzip":
        packed = bytearray(b"<html>404 not found</html>")
    else:
        packed[-6] ^= 0xFF  # the checksum
    (idx_folder.folder / "train-images-idx3-ubyte.gz").write_bytes(packed)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is damaged or cannot be read .* again"):
        load_data("fashion_mnist", folder=idx_folder.folder)


# --- CIFAR-10 ---


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_cifar_records_are_a_label_and_three_planes(cifar_folder: Path, below: str) -> None:
    data = load_data("cifar10", folder=cifar_folder / below, validation=0.1)
    assert (data.in_shape, data.classes, data.flip, len(data.mean)) == ((3, 32, 32), 10, True, 3)
    assert data.class_names[:2] == ("airplane", "automobile")
    assert (len(images_of(data.train)), len(images_of(data.validation))) == (90, 10)
    content = (cifar_folder / "cifar-10-batches-bin/test_batch.bin").read_bytes()
    green = images_of(data.test).images[4, 1]
    start = 4 * 3073 + 1 + 1024
    assert green.numpy().tobytes() == content[start : start + 1024]
    assert images_of(data.test).labels.tolist() == [content[3073 * i] for i in range(10)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_3.bin", cifar_bytes(20, 3)[:-5], "data_batch_3.bin is truncated: it has 61455 bytes"),
        ("data_batch_3.bin", b"", "data_batch_3.bin is truncated: it has 0 bytes"),
        ("data_batch_5.bin", cifar_bytes(19, 3), r"equally many images, got \[20, 20, 20, 20, 19\]"),
        ("test_batch.bin", b"\x0a" + bytes(3072), r"test_batch.bin must be in 0\.\.9, got 10"),
        ("data_batch_2.bin", None, "data_batch_2.bin not found; CIFAR-10 is"),
        ("test_batch.bin", None, "test_batch.bin not found; CIFAR-10 is"),
    ],
)
def test_a_damaged_cifar_file_is_named(
    cifar_folder: Path, name: str, content: bytes | None, message: str
) -> None:
    path = cifar_folder / "cifar-10-batches-bin" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data("cifar10", folder=cifar_folder)


def test_a_folder_without_cifar_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data_batch_1.bin not found in .*cifar-10-batches-bin; unpack .*kriz"
    ):
        load_data("cifar10", folder=tmp_path)


# --- class folders ---


def test_a_fifth_of_each_class_by_the_hash_of_its_names_is_the_test_part(tmp_path: Path) -> None:
    data = load_data("folder", folder=put(tmp_path, two_classes()), validation=2)
    assert (data.classes, data.class_names, data.in_shape) == (2, ("ant", "bee"), (1, 4, 3))
    ranked = sorted(range(10), key=lambda i: hashlib.sha256(f"{i}.png".encode()).hexdigest())
    chosen = sorted(f"{i}.png" for i in ranked[:2])
    values = [int(name.removesuffix(".png")) for name in chosen]
    assert images_of(data.test).images[:, 0, 0, 0].tolist() == values + [100 + value for value in values]
    assert images_of(data.test).labels.tolist() == [0, 0, 1, 1]
    reseeded = load_data("folder", folder=tmp_path, validation=2, seed=9)
    assert torch.equal(images_of(reseeded.test).images, images_of(data.test).images)


def test_a_zip_reads_as_its_folder_and_a_folder_around_it_is_skipped(tmp_path: Path) -> None:
    files = {f"pets/{name}": content for name, content in two_classes().items()}
    files |= {"pets/.hidden/x.png": b"", "__MACOSX/pets/._0.png": b"", "pets/readme.txt": b"two insects"}
    unpacked = load_data("folder", folder=put(tmp_path / "dir", files))
    packed = load_data("folder", folder=put_zip(tmp_path / "pets.zip", files))
    assert unpacked.fingerprint == packed.fingerprint
    assert packed.class_names == ("ant", "bee")


def test_zip_members_never_become_files(tmp_path: Path) -> None:
    files = two_classes() | {"../../evil.png": grey(1), "ant/../../evil2.png": grey(2)}
    archive = put_zip(tmp_path / "inner.zip", files)
    data = load_data("folder", folder=archive)
    assert sum(len(images_of(part)) for part in (data.train, data.validation, data.test)) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["inner.zip"]
    assert not list(tmp_path.parent.glob("evil*"))


def split_folders(*parts: str) -> dict[str, bytes]:
    return {
        f"{part}/{name}/{i}.png": grey(10 * index + 100 * label + i)
        for index, part in enumerate(parts)
        for label, name in enumerate(("ant", "bee"))
        for i in range(4)
    }


def test_train_and_test_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    data = load_data("folder", folder=put(tmp_path, split_folders("train", "test") | {"notes/x.txt": b""}))
    assert sorted(images_of(data.test).images[:, 0, 0, 0].tolist()) == [10, 11, 12, 13, 110, 111, 112, 113]
    assert (len(images_of(data.train)), len(images_of(data.validation))) == (7, 1)


def test_val_is_the_test_part_without_test_and_the_validation_part_with_it(tmp_path: Path) -> None:
    two = load_data("folder", folder=put(tmp_path / "two", split_folders("train", "val")))
    assert images_of(two.test).images[:, 0, 0, 0].min() == 10
    three = load_data("folder", folder=put(tmp_path / "three", split_folders("train", "val", "test")))
    assert sorted(images_of(three.validation).images[:, 0, 0, 0].tolist())[:4] == [10, 11, 12, 13]
    assert sorted(images_of(three.test).images[:, 0, 0, 0].tolist())[:4] == [20, 21, 22, 23]
    assert len(images_of(three.train)) == 8


def test_images_become_rgb_if_one_is_coloured(tmp_path: Path) -> None:
    files = two_classes() | {"bee/9.png": png(np.full((4, 3, 3), (200, 100, 50), np.uint8))}
    data = load_data("folder", folder=put(tmp_path, files))
    assert data.in_shape == (3, 4, 3)
    everything = torch.cat([images_of(part).images for part in (data.train, data.validation, data.test)])
    coloured = everything[everything[:, 0, 0, 0] == 200]
    assert coloured.shape == (1, 3, 4, 3)
    assert coloured[0, :, 2, 1].tolist() == [200, 100, 50]
    assert (everything[everything[:, 0, 0, 0] < 200].diff(dim=1) == 0).all()  # grey has three equal channels


def test_images_take_the_size_of_the_first_training_image(tmp_path: Path) -> None:
    files = split_folders("train", "test") | {"train/ant/0.png": grey(0, height=6, width=9)}
    data = load_data("folder", folder=put(tmp_path, files))
    assert data.in_shape == (1, 6, 9)
    assert (images_of(data.test).images == images_of(data.test).images[:, :, :1, :1]).all()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "the top of .* has no class folders with images"),
        ({"ant/0.png": grey(0), "ant/1.png": grey(1)}, r"at least 2 class folders, got 1: \['ant'\]"),
        (two_classes() | {"cow/readme.txt": b""}, "class folder cow of .* is empty"),
        (two_classes() | {"cow/0.png": grey(0)}, "class 'cow' of .* must have 2 images or more"),
        (two_classes() | {"0.png": grey(0)}, r"image 0\.png of .* must be in a class folder"),
        (two_classes() | {"bee/3.png": b"no image"}, r"image bee/3\.png of .* is broken"),
        (two_classes() | {"bee/3.png": grey(3, 90, 90)[:-30]}, r"image bee/3\.png of .* is broken"),
        (
            two_classes() | {"bee/3.png": png(np.zeros((4, 3), np.uint16))},
            r"bee/3\.png of .* 8 bits a channel",
        ),
        (split_folders("train"), "has train/, but neither test/ nor val/"),
        (split_folders("train", "test") | {"test/cow/1.png": grey(1)}, "class 'cow' .* none to train on"),
    ],
)
def test_class_folders_that_cannot_be_used_are_named(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_data("folder", folder=put(tmp_path, files))
    with pytest.raises(DataError, match=message):
        load_data("folder", folder=put_zip(tmp_path / "packed.zip", files))


def test_a_folder_or_zip_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere not found; expected a folder or a \.zip"):
        load_data("folder", folder=tmp_path / "nowhere")
    whole = put_zip(tmp_path / "whole.zip", two_classes()).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.zip must be a folder or a \.zip"):
        load_data("folder", folder=tmp_path / "cut.zip")


def test_a_set_too_large_for_memory_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autocompress.training.readers.MAX_MEMORY_BYTES", 239)
    with pytest.raises(DataError, match=r"20 images of .* at 3x4 pixels would take"):
        load_data("folder", folder=put(tmp_path, two_classes()))


def test_a_flipped_byte_in_an_image_is_a_data_error_or_an_image_never_another_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (9, 7, 3), np.uint8)
    for suffix in ("png", "jpeg", "gif", "webp", "tiff", "bmp"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, suffix)
        for _ in range(15):
            broken = bytearray(buffer.getvalue())
            broken[rng.integers(0, min(len(broken), 200))] ^= int(rng.integers(1, 256))
            files = {f"{name}/{i}.{suffix}": buffer.getvalue() for name in "ab" for i in range(3)}
            archive = put_zip(tmp_path / "set.zip", files | {f"b/2.{suffix}": bytes(broken)})
            message = ""
            try:
                load_data("folder", folder=archive, validation=1)
            except DataError as error:
                message = str(error)
            assert not message or f"b/2.{suffix}" in message


# --- the user's own function ---


def test_float_inputs_of_a_function_are_neither_shifted_nor_mirrored(user: UserData) -> None:
    train = float_set(30)
    data = load_data(user((train, float_set(6))), validation=6)
    assert (data.classes, data.in_shape, data.mean, data.std) == (3, (2, 4, 4), (0.0, 0.0), (1.0, 1.0))
    held_out = torch.cat([y for _, y in batches(data.validation, 4, seed=None)])
    assert torch.bincount(held_out).tolist() == [2, 2, 2]
    known = {tuple(x.flatten().tolist()) for x in train.tensors[0]}
    seen = []
    for part in (data.train, data.validation):
        for x, _ in batches(part, 7, seed=3, augment=Augmentation(shift=2, flip=True)):
            seen += [tuple(row.flatten().tolist()) for row in x]
    assert len(seen) == 30
    assert set(seen) == known


def test_float_inputs_of_a_function_are_cut_out_where_that_is_asked_for(user: UserData) -> None:
    train = float_set(30)
    before = train.tensors[0].clone()
    data = load_data(user((train, float_set(6))), validation=6)

    def cut(epoch: int = 0) -> Tensor:
        augment = Augmentation(cutout=2)
        return torch.cat([x for x, _ in batches(data.train, 7, seed=3, epoch=epoch, augment=augment)])

    plain = torch.cat([x for x, _ in batches(data.train, 7, seed=3)])
    zero = cut() == 0
    assert torch.equal(torch.where(zero, 0, plain), cut())
    # At the corner a square of 2 around the very first pixel has one pixel in the image; whole ones have 4.
    assert set(zero[:, 0].flatten(1).sum(1).tolist()) <= {1, 2, 4}
    assert torch.equal(zero[:, 0], zero[:, 1])
    assert not torch.equal(zero, cut(epoch=1) == 0)
    assert torch.equal(train.tensors[0], before)


def test_byte_inputs_of_a_function_are_images(user: UserData) -> None:
    train = byte_set(20, torch.arange(20) % 4)
    data = load_data(user((train, byte_set(4, torch.arange(4)))), validation=4)
    assert images_of(data.train).images.dtype == torch.uint8
    assert data.mean == pytest.approx((images_of(data.train).images / 255).mean((0, 2, 3)).tolist(), rel=1e-5)
    assert len(images_of(data.train)) == 16


def test_three_parts_of_a_function_are_used_as_given(user: UserData) -> None:
    data = load_data(user((float_set(9), float_set(3), float_set(6))), validation=0.5)
    assert [
        sum(1 for _ in batches(part, 1, seed=None)) for part in (data.train, data.validation, data.test)
    ] == [
        9,
        3,
        6,
    ]


def test_classes_are_the_attribute_of_the_training_part_where_there_is_one(user: UserData) -> None:
    for stated, count, names in ((5, 5, ()), (["a", "b", "c", "d"], 4, ("a", "b", "c", "d"))):
        train = float_set(30)
        train.classes = stated  # type: ignore[attr-defined]
        data = load_data(user((train, float_set(6))))
        assert (data.classes, data.class_names) == (count, names)


@pytest.mark.parametrize("shape", [(12,), (12, 1)])
def test_labels_that_are_no_integers_have_no_classes_and_no_augmentation(
    user: UserData, shape: tuple[int, ...]
) -> None:
    targets = torch.linspace(0, 1, 12).view(shape)
    floats = lambda n: TensorDataset(torch.randn(n, 1, 4, 4), targets[:n])  # noqa: E731
    for make in (floats, lambda n: byte_set(n, targets[:n])):
        data = load_data(user((make(12), make(4))), validation=3)
        assert data.classes == 0
        plain, _ = next(batches(data.train, 5, seed=0))
        x, y = next(batches(data.train, 5, seed=0, augment=Augmentation(shift=1, flip=True, cutout=2)))
        assert torch.equal(x, plain)
        assert (x.dtype, y.shape, y.dtype) == (torch.float32, (5, *shape[1:]), torch.float32)
        assert set(y.flatten().tolist()) <= set(targets.flatten().tolist())


def test_masks_of_segmentation_stay_with_their_images_unaugmented(user: UserData) -> None:
    masks = torch.arange(12)[:, None, None].expand(12, 4, 4)
    train = byte_set(12, masks)
    train.classes = 12  # type: ignore[attr-defined]
    data = load_data(user((train, byte_set(4, masks[:4]))), validation=3)
    x, y = next(batches(data.train, 9, seed=0, augment=Augmentation(shift=1, flip=True, cutout=2)))
    assert (data.classes, y.shape) == (12, (9, 4, 4))
    assert torch.equal(x, images_of(data.train).normalise(train.tensors[0][y[:, 0, 0]]))


def test_a_function_is_given_the_folder(user: UserData, tmp_path: Path) -> None:
    asked: list[Path] = []

    def load(folder: Path) -> tuple[TensorDataset, TensorDataset]:
        asked.append(folder)
        return float_set(12), float_set(6)

    load_data(user(load), folder=tmp_path)
    assert asked == [tmp_path]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (float_set(3), r"must return \(train, test\) or \(train, validation, test\)"),
        ((float_set(3),), r"must return \(train, test\)"),
        ((float_set(9), 3), "data sets with a length, got int"),
        ((float_set(9), []), "returns an empty data set"),
        (([1, 2], [1, 2]), r"must be \(x, y\), got int"),
        (([("x", 1)], [("x", 1)]), r"float or uint8 tensor \(channels, height, width\), got str"),
        ((TensorDataset(torch.randn(4, 8), torch.arange(4)),) * 2, r"got torch\.float32 \(8,\)"),
        ((float_set(9), byte_set(3, torch.arange(3))), "x of one shape and type"),
        ((float_set(9), float_set(9, 4)), r"labels of .* must be in 0\.\.2, got 3"),
        ((byte_set(9, torch.arange(9) - 1),) * 2, r"labels of .* must be in 0\.\.7, got -1"),
        ((float_set(9, 1), float_set(9, 1)), "at least 2 classes, got 1"),
        (
            (float_set(9), TensorDataset(torch.randn(2, 2, 4, 4), torch.randn(2))),
            "must be integers in all parts",
        ),
        (
            (
                [(torch.zeros(1, 2, 2, dtype=torch.uint8), 0), (torch.zeros(1, 2, 3, dtype=torch.uint8), 1)]
                * 3,
            )
            * 2,
            r"must all be uint8 \(1, 2, 2\), got torch\.uint8 \(1, 2, 3\)",
        ),
    ],
)
def test_a_function_that_returns_something_else_is_refused(
    user: UserData, returned: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_data(user(returned))


def test_a_function_that_cannot_be_imported_is_named(user: UserData) -> None:
    source = user((float_set(9), float_set(3)))
    with pytest.raises(DataError, match=r"cannot import 'no_such_module' .* PYTHONPATH"):
        load_data("no_such_module:load")
    with pytest.raises(DataError, match="module 'someones_data' has no 'lode'"):
        load_data(source.replace("load", "lode"))
    with pytest.raises(DataError, match="must be a function, got int"):
        load_data(source.replace("load", "number"))


def fails() -> Any:
    raise KeyError("images")


def words() -> Any:
    part = [(torch.zeros(1, 4, 4, dtype=torch.uint8), "cat") for _ in range(8)]
    return part, part


@pytest.mark.parametrize(
    ("function", "folder", "message"),
    [
        ("fails", None, r"fails, called without arguments, failed: KeyError: 'images'"),
        ("fails", Path("/x"), r"called with folder /x, failed: TypeError: .* 0 positional arguments"),
        ("words", None, "labels of .*words must be numbers or tensors, got 'cat' at position"),
    ],
)
def test_a_function_of_the_user_that_fails_is_named(
    function: str, folder: Path | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("users_data")
    vars(module).update(fails=fails, words=words)
    monkeypatch.setitem(sys.modules, "users_data", module)
    with pytest.raises(DataError, match=message):
        load_data(f"users_data:{function}", folder=folder, validation=0.5)


# --- real data ---


@pytest.mark.slow
def test_real_data_have_the_published_mean_and_standard_deviation(tmp_path: Path) -> None:
    shared = Path(os.environ.get("AUTOCOMPRESS_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (shared / "FashionMNIST").is_dir():
        pytest.skip(f"no FashionMNIST in {shared}; set AUTOCOMPRESS_DATA to the folder of the real data sets")
    fashion = load_data("fashion_mnist", folder=shared / "FashionMNIST", validation=10)
    # The constants that torchvision users pass to Normalize, for both data sets, of all training images.
    assert fashion.mean == pytest.approx((0.2860,), abs=1e-4)
    assert fashion.std == pytest.approx((0.3530,), abs=1e-4)
    assert (len(images_of(fashion.train)), len(images_of(fashion.test))) == (59_990, 10_000)
    assert torch.bincount(images_of(fashion.test).labels).tolist() == [1000] * 10
    subprocess.run([sys.executable, str(shared / "unpack_cifar10.py"), str(tmp_path)], check=True)
    cifar = load_data("cifar10", folder=tmp_path, validation=0.1)
    assert cifar.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=1e-3)
    assert cifar.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=1e-3)
    assert torch.bincount(images_of(cifar.validation).labels).tolist() == [500] * 10
