"""Readers of image files: digits, IDX, CIFAR-10 and class folders become arrays of bytes.

Everything read here is checked and nothing is trusted: no pickle, no extraction to paths, and an error that
names the file, what is wrong with it and what was expected.
"""

import gzip
import hashlib
import importlib
import io
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autocompress.errors import DataError

if TYPE_CHECKING:
    from torch.utils.data import Dataset

TEST_SHARE = 0.2
"""Part of a set without a test part of its own (digits, plain class folders) that becomes the test part."""

# A folder of photographs is refused before it is decoded, rather than killed by the system in the middle.
MAX_MEMORY_BYTES = 8 * 2**30
MAX_FILE_BYTES = 256 * 2**20

_FASHION_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_CIFAR_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_CIFAR_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_CIFAR_TEST = "test_batch.bin"
_CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32
_IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
)
_GREY_MODES, _DEEP_MODES = frozenset(("1", "L", "LA")), ("I", "F")
# What Pillow and zipfile raise on damaged bytes; a fuzzed file must not end in a traceback.
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    KeyError,
    IndexError,
    TypeError,
    RuntimeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """Images and their classes.

    Attributes:
        images: `(n, channels, height, width)`.
        labels: `(n,)`, from 0.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Corpus:
    """An image set as its files have it.

    Attributes:
        train: Training part; the validation part is still in it, unless there is one of its own.
        test: Test part.
        validation: Validation part, where the files have one.
        class_names: Names by label.
        flip: Whether a mirrored image keeps its label.
    """

    train: ImageArrays
    test: ImageArrays
    validation: ImageArrays | None
    class_names: tuple[str, ...]
    flip: bool


def stratified_order(labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Shuffle so that every beginning has the classes in the proportions of the whole.

    The image of rank `r` of `n` in its class stands at `(r + 1/2) / n`, so that up to a position `t` in 0..1
    a class has `n t`, rounded. Ranks are random; so is the order of images at the same position.

    Args:
        labels: `(n,)`.
        rng: Source of randomness.

    Returns:
        A permutation `(n,)`.
    """
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        position[members] = (rng.permutation(len(members)) + 0.5) / len(members)
    return np.lexsort((rng.random(len(labels)), position)).astype(np.int64)


def read_digits() -> Corpus:
    """Read the 1,797 digits that come with scikit-learn, resized bilinearly from 8x8 to 32x32.

    The fifth that is the test part is the same for every seed.
    """
    import torch
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    grey = torch.from_numpy(pixels.reshape(-1, 1, 8, 8).astype(np.float32)) * (255 / 16)
    grey = torch.nn.functional.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False)
    images, labels = grey.round().to(torch.uint8).numpy(), classes.astype(np.int64)
    order = stratified_order(labels, np.random.default_rng(0))
    test, train = np.split(order, [round(TEST_SHARE * len(order))])
    return Corpus(
        ImageArrays(images[train], labels[train]),
        ImageArrays(images[test], labels[test]),
        None,
        tuple("0123456789"),
        flip=False,
    )


def read_fashion_mnist(folder: Path) -> Corpus:
    """Read Fashion-MNIST, or any set in the same four IDX files with ten classes, raw or as `.gz`.

    Source of the format: http://yann.lecun.com/exdb/mnist (IDX).

    Raises:
        DataError: A file is missing, damaged, truncated, or does not fit the others.
    """
    train, test = _idx_part(folder, "train"), _idx_part(folder, "t10k")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"training and test images in {folder} must have one size, got "
            f"{train.images.shape[2:]} and {test.images.shape[2:]}"
        )
    return Corpus(train, test, None, _FASHION_NAMES, flip=True)


def _idx_part(folder: Path, part: str) -> ImageArrays:
    image_file = _idx_file(folder, f"{part}-images-idx3-ubyte")
    label_file = _idx_file(folder, f"{part}-labels-idx1-ubyte")
    images, labels = _read_idx(image_file, dimensions=3), _read_idx(label_file, dimensions=1)
    if len(images) != len(labels):
        raise DataError(
            f"{image_file} has {len(images)} images, but {label_file} has {len(labels)} labels; "
            "they must be of one download"
        )
    _check_ten_classes(labels, label_file)
    return ImageArrays(images[:, None], labels.astype(np.int64))


def _idx_file(folder: Path, stem: str) -> Path:
    for place in (folder, folder / "raw", folder / "FashionMNIST" / "raw"):
        for name in (stem, f"{stem}.gz"):
            if (place / name).is_file():
                return place / name
    raise DataError(
        f"{stem} or {stem}.gz not found in {folder}, {folder / 'raw'} or {folder / 'FashionMNIST/raw'}; the "
        "four files of Fashion-MNIST are at https://github.com/zalandoresearch/fashion-mnist"
    )


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file of bytes: 2 zero bytes, type 8, dimensions, sizes as big-endian 32 bits, data."""
    expected = 0x0800 + dimensions
    try:
        with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            header = file.read(4 + 4 * dimensions)
            magic = int.from_bytes(header[:4], "big")
            if len(header) >= 4 and magic != expected:
                raise DataError(f"{path} is no IDX file: magic number must be {expected}, got {magic}")
            if len(header) < 4 + 4 * dimensions:
                raise DataError(
                    f"{path} is truncated: it ends within its header of {4 + 4 * dimensions} bytes"
                )
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size = int(np.prod(shape, dtype=object))
            if not 0 < size <= MAX_MEMORY_BYTES:
                raise DataError(f"{path} is empty or damaged: its header says {shape} bytes")
            # One byte more than there should be, to see whether the file goes on.
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or cannot be read ({error}); get the file again") from error
    if len(content) != size:
        problem = "is truncated" if len(content) < size else "is too long"
        raise DataError(f"{path} {problem}: its header says {shape}, that is {size} bytes of data")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _check_ten_classes(labels: NDArray[np.uint8], path: Path) -> None:
    if labels.max() > 9:
        first = int(np.argmax(labels > 9))
        raise DataError(f"labels in {path} must be in 0..9, got {labels[first]} at position {first}")


def read_cifar10(folder: Path) -> Corpus:
    """Read CIFAR-10 in its official binary layout: records of a label and red, green, blue planes.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".

    Raises:
        DataError: A file is missing, truncated, or has labels over 9.
    """
    places = (folder, folder / "cifar-10-batches-bin")
    # The place with most of the files is the one meant, so that a missing file is named there.
    present = [sum((place / name).is_file() for name in (*_CIFAR_TRAIN, _CIFAR_TEST)) for place in places]
    place = places[int(np.argmax(present))]
    if not max(present):
        raise DataError(
            f"{_CIFAR_TRAIN[0]} not found in {places[0]} or {places[1]}; unpack cifar-10-binary.tar.gz of "
            "https://www.cs.toronto.edu/~kriz/cifar.html there"
        )
    parts = [_read_cifar_file(place / name) for name in _CIFAR_TRAIN]
    counts = [len(part.labels) for part in parts]
    if len(set(counts)) > 1:
        raise DataError(
            f"the five training files in {place} must have equally many images, got {counts}; "
            "one of them is truncated"
        )
    train = ImageArrays(
        np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts])
    )
    return Corpus(train, _read_cifar_file(place / _CIFAR_TEST), None, _CIFAR_NAMES, flip=True)


def _read_cifar_file(path: Path) -> ImageArrays:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} not found; CIFAR-10 is data_batch_1..5.bin and test_batch.bin") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if not content or len(content) % _CIFAR_RECORD_BYTES:
        raise DataError(
            f"{path} is truncated: it has {len(content)} bytes, and must have a multiple of "
            f"{_CIFAR_RECORD_BYTES} (a label and 3x32x32 pixels an image)"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _CIFAR_RECORD_BYTES)
    _check_ten_classes(records[:, 0], path)
    return ImageArrays(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64))


@dataclass(frozen=True, eq=False)
class _Tree:
    """A folder or a zip file, read only: paths of files and of folders in it, and how to read a file."""

    origin: Path
    files: tuple[PurePosixPath, ...]
    folders: tuple[PurePosixPath, ...]
    read: Callable[[PurePosixPath], bytes]


def read_class_folders(source: Path) -> Corpus:
    """Read a folder, or a zip file, of images in one folder a class.

    Either class folders in `train/` and `test/` (or `val/`; with all three, `val/` is the validation part),
    or class folders directly: then of every class the fifth with the smallest SHA-256 of the path within it,
    at least one image, is the test part, whatever the seed. A single folder around it all is skipped.
    Classes are numbered in the order of their names. Folders within a class folder belong to it; hidden
    files and files that are no images by their suffix are left out.

    Images become grey (one channel) if all are, else RGB without transparency, and take the size of the first
    training image (first class, first path; bilinear, the aspect ratio may change).

    Raises:
        DataError: Nothing there, less than two classes, an empty class folder, or a broken image.
    """
    tree = _open_tree(source)
    tops = {path.parts[0] for path in (*tree.files, *tree.folders)}
    if "train" in tops:
        parts = {name: _classes_of(tree, name) for name in ("train", "val", "test") if name in tops}
        test = parts.pop("test", None) or parts.pop("val", None)
        if test is None:
            raise DataError(f"{source} has train/, but neither test/ nor val/ beside it")
        train, validation = parts["train"], parts.get("val")
    else:
        train, test = _split_by_hash(_classes_of(tree, ""), source)
        validation = None
    names = tuple(sorted(train))
    if len(names) < 2:
        raise DataError(f"{source} must have at least 2 class folders, got {len(names)}: {list(names)}")
    for extra in sorted({*test, *(validation or {})} - set(names)):
        raise DataError(f"class {extra!r} of {source} has test or validation images, but none to train on")
    chosen = [part for part in (train, test, validation) if part is not None]
    grey, size = _headers(tree, [path for part in chosen for name in names for path in part.get(name, ())])
    arrays = [_decode_part(tree, part, names, grey, size) for part in chosen]
    # What the images show is not known: a mirrored letter or arrow is another one.
    return Corpus(arrays[0], arrays[1], arrays[2] if validation else None, names, flip=False)


def _open_tree(source: Path) -> _Tree:
    if source.is_dir():
        found = sorted(source.rglob("*"))
        files = [PurePosixPath(path.relative_to(source).as_posix()) for path in found if path.is_file()]
        folders = [PurePosixPath(path.relative_to(source).as_posix()) for path in found if path.is_dir()]
        return _tree(source, files, folders, lambda path: (source / path).read_bytes())
    if not source.is_file():
        raise DataError(f"{source} not found; expected a folder or a .zip file of class folders")
    try:
        archive = zipfile.ZipFile(source)
        members = {PurePosixPath(entry.filename): entry for entry in archive.infolist()}
    except _DAMAGE as error:
        raise DataError(f"{source} must be a folder or a .zip file of class folders: {error}") from error

    def read(path: PurePosixPath) -> bytes:
        if members[path].file_size > MAX_FILE_BYTES:
            raise ValueError(f"{members[path].file_size} bytes are more than {MAX_FILE_BYTES}")
        return archive.read(members[path])

    files = [path for path, entry in members.items() if not entry.is_dir()]
    empty = [path for path, entry in members.items() if entry.is_dir()]
    return _tree(source, files, {*empty, *(parent for path in files for parent in path.parents)}, read)


def _tree(
    source: Path,
    files: Iterable[PurePosixPath],
    folders: Iterable[PurePosixPath],
    read: Callable[[PurePosixPath], bytes],
) -> _Tree:
    def visible(path: PurePosixPath) -> bool:
        return bool(path.parts) and not any(part.startswith((".", "__MACOSX")) for part in path.parts)

    images = [path for path in files if visible(path) and path.suffix.lower() in _IMAGE_SUFFIXES]
    places = [path for path in folders if visible(path)]
    around = PurePosixPath()
    while True:
        tops = {path.parts[0] for path in (*images, *places)}
        below = [path for path in places if len(path.parts) > 1]
        if len(tops) != 1 or not below or tops == {"train"}:
            break
        top = tops.pop()
        around /= top
        images, places = [path.relative_to(top) for path in images], [path.relative_to(top) for path in below]
    return _Tree(source, tuple(sorted(images)), tuple(sorted(places)), lambda path: read(around / path))


def _classes_of(tree: _Tree, part: str) -> dict[str, list[PurePosixPath]]:
    """Return the images of each class folder in `part` (`""` is the top), in the order of their paths."""
    prefix = (part,) if part else ()
    depth = len(prefix)
    classes: dict[str, list[PurePosixPath]] = {
        path.parts[depth]: []
        for path in tree.folders
        if path.parts[:depth] == prefix and len(path.parts) == depth + 1
    }
    for path in tree.files:
        if path.parts[:depth] != prefix:
            continue
        if len(path.parts) == depth + 1:
            raise DataError(f"image {path} of {tree.origin} must be in a class folder")
        classes[path.parts[depth]].append(path)
    for name, paths in classes.items():
        if not paths:
            raise DataError(
                f"class folder {'/'.join((*prefix, name))} of {tree.origin} is empty; it must have images "
                f"({', '.join(sorted(_IMAGE_SUFFIXES))}), or must not be there"
            )
    if not classes:
        raise DataError(f"{part or 'the top'} of {tree.origin} has no class folders with images")
    return classes


def _split_by_hash(
    classes: dict[str, list[PurePosixPath]], source: Path
) -> tuple[dict[str, list[PurePosixPath]], dict[str, list[PurePosixPath]]]:
    train, test = {}, {}
    for name, paths in classes.items():
        if len(paths) < 2:
            raise DataError(
                f"class {name!r} of {source} must have 2 images or more, to train and to test; got 1"
            )
        ranked = sorted(
            paths, key=lambda path: hashlib.sha256("/".join(path.parts[1:]).encode("utf-8")).digest()
        )
        count = max(1, round(TEST_SHARE * len(paths)))
        train[name], test[name] = sorted(ranked[count:]), sorted(ranked[:count])
    return train, test


def _open_image(
    tree: _Tree, path: PurePosixPath, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns of a picture too large, or of damaged metadata; only the first is an error.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return convert(Image.open(io.BytesIO(tree.read(path))))
    except _DAMAGE as error:
        raise DataError(f"image {path} of {tree.origin} is broken or cannot be read: {error}") from error


def _headers(tree: _Tree, paths: list[PurePosixPath]) -> tuple[bool, tuple[int, int]]:
    """Return whether all images are grey, and `(width, height)` of the first, from the headers alone."""
    grey, size = True, (0, 0)
    for path in paths:
        image = _open_image(tree, path, lambda image: image)
        if image.mode.startswith(_DEEP_MODES):
            raise DataError(
                f"image {path} of {tree.origin} must have 8 bits a channel, got mode {image.mode!r}"
            )
        grey = grey and image.mode in _GREY_MODES
        size = image.size if size == (0, 0) else size
    memory_bytes = len(paths) * size[0] * size[1] * (1 if grey else 3)
    if memory_bytes > MAX_MEMORY_BYTES:
        raise DataError(
            f"the {len(paths)} images of {tree.origin} at {size[0]}x{size[1]} pixels would take "
            f"{memory_bytes / 2**30:.1f} GiB of memory, the limit is {MAX_MEMORY_BYTES / 2**30:g} GiB; "
            "make them smaller first, or give a function of your own that reads them one by one"
        )
    return grey, size


def _decode_part(
    tree: _Tree,
    part: dict[str, list[PurePosixPath]],
    names: tuple[str, ...],
    grey: bool,
    size: tuple[int, int],
) -> ImageArrays:
    def convert(image: Image.Image) -> Image.Image:
        image = image.convert("L" if grey else "RGB")
        return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)

    pairs = [(path, label) for label, name in enumerate(names) for path in part.get(name, ())]
    images = np.empty((len(pairs), 1 if grey else 3, size[1], size[0]), np.uint8)
    for row, (path, _) in zip(images, pairs, strict=True):
        pixels = np.asarray(_open_image(tree, path, convert))
        row[:] = pixels[None] if grey else pixels.transpose(2, 0, 1)
    return ImageArrays(images, np.array([label for _, label in pairs], np.int64))


def call_user_function(source: str, folder: Path | None) -> "tuple[Dataset[Any], ...]":
    """Import and call `module:function`; an error inside the function keeps its own traceback.

    Args:
        source: Module and function.
        folder: Given to the function, unless `None`.

    Returns:
        `(train, test)` or `(train, validation, test)`, each with a length and not empty.

    Raises:
        DataError: It cannot be imported, is no function, or returns something else.
    """
    module_name, _, attribute = source.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{source}: cannot import {module_name!r} ({error}); its folder must be on PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise DataError(f"{source}: module {module_name!r} has no {attribute!r}") from error
    if not callable(function):
        raise DataError(f"{source} must be a function, got {type(function).__name__}")
    try:
        parts = function() if folder is None else function(folder)
    except Exception as error:
        given = "without arguments" if folder is None else f"with folder {folder}"
        raise DataError(f"{source}, called {given}, failed: {type(error).__name__}: {error}") from error
    if not isinstance(parts, tuple | list) or len(parts) not in (2, 3):
        raise DataError(f"{source} must return (train, test) or (train, validation, test), got {parts!r:.80}")
    for part in parts:
        if not (hasattr(part, "__getitem__") and hasattr(part, "__len__")):
            raise DataError(f"{source} must return data sets with a length, got {type(part).__name__}")
        if not len(part):
            raise DataError(f"{source} returns an empty data set")
    return tuple(parts)
