"""Data sets: a training, a held-out validation and a test part, and their mini-batches.

Images stay in memory as bytes; `batches` indexes, augments and normalises a whole batch at once. The
validation part is taken out of the training part; the test part influences nothing, not even the mean.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate

from autocompress.errors import DataError
from autocompress.recipe import DataSettings
from autocompress.training.readers import (
    Corpus,
    ImageArrays,
    call_user_function,
    read_cifar10,
    read_class_folders,
    read_digits,
    read_fashion_mnist,
    stratified_order,
)

SOURCES = ("digits", "fashion_mnist", "cifar10", "folder", "module:function")

# One independent stream of random numbers a use; the tag comes first because SeedSequence ignores zeros at
# the end: [seed, epoch] and [seed, epoch, 0] would be the same stream.
_LIMIT_STREAM, _VALIDATION_STREAM, _ORDER_STREAM, _AUGMENTATION_STREAM = range(4)

_READERS: dict[str, Callable[[Path], Corpus]] = {
    "fashion_mnist": read_fashion_mnist,
    "cifar10": read_cifar10,
    "folder": read_class_folders,
}


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory with what `batches` needs to make them the input of a network.

    Attributes:
        images: `(n, channels, height, width)`, uint8.
        labels: `(n,)`, int64, for classification; else any tensor with `n` rows.
        mean: Mean of each channel over the training part, of images in 0..1.
        std: Standard deviation of each channel, likewise; 1 where a channel is constant.
        flip: Whether a mirrored image keeps its label.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], flip: bool
    ) -> None:
        """Keep the tensors, not copies."""
        self.images, self.labels = images, labels
        self.mean, self.std, self.flip = mean, std, flip

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one image, normalised, `(channels, height, width)` float32, and its label."""
        return self.normalise(self.images[index][None])[0], self.labels[index]

    def normalise(self, images: Tensor) -> Tensor:
        """Map uint8 `(batch, channels, height, width)` to float32, `(image / 255 - mean) / std`."""
        std = torch.tensor(self.std, dtype=torch.float64)
        scale = (1 / (255 * std)).float().view(1, -1, 1, 1)
        shift = (torch.tensor(self.mean, dtype=torch.float64) / std).float().view(1, -1, 1, 1)
        return images.float().mul_(scale).sub_(shift)


@dataclass(frozen=True, eq=False)
class DataSet:
    """A training, a validation and a test part, with what training and export must know of them.

    Attributes:
        name: The source it was loaded from.
        train: Training part, `(x, y)` items, in an order whose every beginning is stratified.
        validation: Held out of the training part (or given by the user); drives every decision.
        test: Read once, at the end.
        classes: Number of classes; 0 if labels are no classes (regression and the like).
        in_shape: `(channels, height, width)` of an input.
        mean: Mean of each channel of the training part, of images in 0..1; 0 where inputs come normalised.
        std: Standard deviation of each channel, likewise; 1 where inputs come normalised.
        flip: Whether a mirrored image keeps its label.
        fingerprint: 16 hexadecimal digits of SHA-256, over the content of all parts in their order, or, for
            data sets of the user that are not in memory, over the arguments and the lengths.
        class_names: Names by label; empty if not known.
    """

    name: str
    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    classes: int
    in_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    fingerprint: str
    class_names: tuple[str, ...] = ()


def load_data(
    source: str,
    *,
    folder: Path | None = None,
    validation: float | int = 0.1,
    limit: int | None = None,
    seed: int = 0,
) -> DataSet:
    """Load a data set.

    Sources:
        `digits`: bundled with scikit-learn, 1x32x32; needs no files.
        `fashion_mnist`: official IDX files, raw or `.gz`, in `folder`, its `raw/` or `FashionMNIST/raw/`.
        `cifar10`: official binary layout, in `folder` or its `cifar-10-batches-bin/`.
        `folder`: a folder or a zip file of class folders (`read_class_folders` says how).
        `module:function`: the user's function. It is called without arguments, or with `folder` if that is
        given, and returns `(train, test)` or `(train, validation, test)`: data sets with a length, of items
        `(x, y)`. Float `x`, `(channels, height, width)`, is taken as it is: normalised, never shifted or
        mirrored.
        uint8 `x` is an image: all are read into memory and normalised. The number of classes is the attribute
        `classes` of `train` (a number, or the names), else the largest integer label of `train` plus 1, else
        0 (regression, segmentation). Without three parts and `classes`, all of `train` is read once for the
        labels.

    Args:
        source: One of the above.
        folder: Where the files are.
        validation: Part of the training images held out, a fraction in 0..1 or a count; stratified if labels
            are integers. Has no effect if the data have a validation part of their own.
        limit: Use only this many training images, stratified if labels are integers; the validation part is
            taken out of them. A larger limit with the same seed has the images of the smaller, and more.
        seed: Decides which images are held out and which are in the limit; never the test part.

    Raises:
        DataError: Files missing or damaged, labels out of range, less than two classes, an argument out of
            range, or a function that cannot be imported or returns something else.
    """
    if seed < 0:
        raise DataError(f"seed must be 0 or more, got {seed}")
    if source not in SOURCES and ":" in source:
        return _user_data(source, folder, validation, limit, seed)
    if source == "digits":
        if folder is not None:
            raise DataError(f"digits come with scikit-learn and take no folder, got {folder}")
        corpus = read_digits()
    elif source in _READERS:
        if folder is None:
            raise DataError(f"data set {source!r} is read from files: give the folder they are in")
        corpus = _READERS[source](Path(folder))
    else:
        raise DataError(f"data must be one of {', '.join(SOURCES)}, got {source!r}")
    held_out = corpus.validation
    kept, out = _split(
        corpus.train.labels, len(corpus.train.labels), validation if held_out is None else None, limit, seed
    )
    train = _tensors(corpus.train, kept)
    parts = train, _tensors(held_out or corpus.train, None if held_out else out), _tensors(corpus.test)
    return _in_memory(source, parts, len(corpus.class_names), corpus.flip, corpus.class_names)


def _split(
    labels: NDArray[np.int64] | None, n: int, validation: float | None, limit: int | None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose which training items to train on, and which to hold out.

    Args:
        labels: `(n,)`, or `None` if labels are no classes.
        n: Number of training items.
        validation: Fraction or count; `None` to hold out nothing.
        limit: Number of training items to use.
        seed: Decides.

    Returns:
        Positions to train on, positions held out, both in stratified order.
    """
    classes = np.zeros(n, np.int64) if labels is None else labels
    if limit is not None and not 1 <= limit <= n:
        raise DataError(f"limit must be in 1..{n}, the number of training images, got {limit}")
    positions = stratified_order(classes, np.random.default_rng([_LIMIT_STREAM, seed]))[:limit]
    count = 0 if validation is None else _held_out_count(validation, len(positions))
    order = positions[stratified_order(classes[positions], np.random.default_rng([_VALIDATION_STREAM, seed]))]
    out, kept = np.split(order, [count])
    missing = sorted(set(classes.tolist()) - set(classes[kept].tolist()))
    if missing:
        raise DataError(
            f"with limit={limit} and validation={validation}, {len(kept)} images are left to train on, and "
            f"none of class {missing[0]}; raise the limit or hold out less"
        )
    return kept, out


def _held_out_count(validation: float, n: int) -> int:
    if isinstance(validation, float) and 0 < validation < 1:
        # At least one, so that a small set with the default fraction still has something to decide by.
        return max(1, round(validation * n))
    if isinstance(validation, int) and not isinstance(validation, bool) and 1 <= validation < n:
        return validation
    raise DataError(
        f"validation must be a fraction over 0 and under 1, or a count in 1..{n - 1}, got {validation!r}"
    )


_Part = tuple[Tensor, Tensor]


def _tensors(arrays: ImageArrays, positions: NDArray[np.int64] | None = None) -> _Part:
    # Indexing copies, which also makes arrays writable that lie in the bytes of a file.
    chosen = np.arange(len(arrays.labels)) if positions is None else positions
    return torch.from_numpy(arrays.images[chosen]), torch.from_numpy(arrays.labels[chosen])


def _in_memory(
    name: str, parts: tuple[_Part, _Part, _Part], classes: int, flip: bool, class_names: tuple[str, ...]
) -> DataSet:
    mean, std = _statistics(parts[0][0])
    digest = hashlib.sha256()
    for part in parts:
        for tensor in part:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
    train, validation, test = (Images(images, labels, mean, std, flip) for images, labels in parts)
    channels, height, width = parts[0][0].shape[1:]
    return DataSet(
        name,
        train,
        validation,
        test,
        classes,
        (channels, height, width),
        mean,
        std,
        flip,
        digest.hexdigest()[:16],
        class_names,
    )


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, of `images` in 0..1; exact, by histograms."""
    means, stds = [], []
    values = np.arange(256) / 255
    for channel in images.transpose(0, 1):
        share = np.bincount(channel.numpy().ravel(), minlength=256) / channel.numel()
        means.append(float(share @ values))
        stds.append(math.sqrt(float(share @ (values - means[-1]) ** 2)) or 1.0)
    return tuple(means), tuple(stds)


def _user_data(source: str, folder: Path | None, validation: float, limit: int | None, seed: int) -> DataSet:
    parts = call_user_function(source, folder)
    shapes, is_image = zip(*(_check_item(source, part) for part in parts), strict=True)
    if len(set(shapes)) > 1 or len(set(is_image)) > 1:
        raise DataError(f"all parts that {source} returns must have x of one shape and type, got {shapes}")
    train, test = parts[0], parts[-1]
    classes, class_names = _stated_classes(source, train)
    labels = None
    if classes != 0 and not (len(parts) == 3 and classes is not None and limit is None):
        labels = _integer_labels(train)
    if classes is None:
        classes = 0 if labels is None else int(labels.max()) + 1
    if classes == 1:
        raise DataError(f"{source} must have at least 2 classes, got 1")
    if labels is not None:
        for checked in (labels, *(_integer_labels(part) for part in parts[1:])):
            _check_labels(source, checked, classes)
    size = len(cast(Sized, train))
    kept, out = _split(labels, size, None if len(parts) == 3 else validation, limit, seed)
    chosen = (
        Subset(train, kept.tolist()),
        parts[1] if len(parts) == 3 else Subset(train, out.tolist()),
        test,
    )
    if is_image[0]:
        stacked = tuple(_stack(source, part, shapes[0]) for part in chosen)
        return _in_memory(source, cast(tuple[_Part, _Part, _Part], stacked), classes, False, class_names)
    lengths = [len(cast(Sized, part)) for part in chosen]
    arguments = repr((source, str(folder), validation, limit, seed, lengths, shapes[0], classes))
    channels = shapes[0][0]
    return DataSet(
        source,
        *chosen,
        classes=classes,
        in_shape=shapes[0],
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        flip=False,
        fingerprint=hashlib.sha256(arguments.encode()).hexdigest()[:16],
        class_names=class_names,
    )


def _check_item(source: str, part: Dataset[Any]) -> tuple[tuple[int, int, int], bool]:
    """Return the shape of the first `x`, and whether it is an image of bytes."""
    item = part[0]
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise DataError(f"items of the data sets of {source} must be (x, y), got {type(item).__name__}")
    x = item[0]
    if not isinstance(x, Tensor) or x.ndim != 3 or not (x.is_floating_point() or x.dtype == torch.uint8):
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise DataError(f"x of {source} must be a float or uint8 tensor (channels, height, width), got {got}")
    channels, height, width = x.shape
    return (channels, height, width), x.dtype == torch.uint8


def _stated_classes(source: str, train: Dataset[Any]) -> tuple[int | None, tuple[str, ...]]:
    stated = getattr(train, "classes", None)
    if stated is None:
        return None, ()
    if isinstance(stated, tuple | list):
        return len(stated), tuple(str(name) for name in stated)
    if isinstance(stated, int) and stated >= 0:
        return stated, ()
    raise DataError(f"attribute classes of {source} must be a number or the names, got {stated!r}")


def _integer_labels(part: Dataset[Any]) -> NDArray[np.int64] | None:
    """Return all labels, or `None` if they are not single integers."""
    labels = []
    for position in range(len(cast(Sized, part))):
        label = part[position][1]
        value = label.item() if isinstance(label, Tensor | np.ndarray) and label.ndim == 0 else label
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            return None
        labels.append(int(value))
    return np.array(labels, np.int64)


def _check_labels(source: str, labels: NDArray[np.int64] | None, classes: int) -> None:
    if labels is None:
        raise DataError(f"labels of {source} must be integers in all parts, as they are in the training part")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise DataError(f"labels of {source} must be in 0..{classes - 1}, got {wrong[0]}")


def _stack(source: str, part: Dataset[Any], shape: tuple[int, int, int]) -> _Part:
    images, labels = [], []
    for position in range(len(cast(Sized, part))):
        image, label = part[position]
        if image.dtype != torch.uint8 or tuple(image.shape) != shape:
            raise DataError(
                f"images of {source} must all be uint8 {shape}, got {image.dtype} {tuple(image.shape)} "
                f"at position {position}"
            )
        images.append(image)
        try:
            labels.append(torch.as_tensor(label))
        except (TypeError, ValueError, RuntimeError):
            raise DataError(
                f"labels of {source} must be numbers or tensors, got {label!r} at position {position}"
            ) from None
    stacked = torch.stack(labels)
    # Cross-entropy takes int64 only, and users' labels come as bytes or int32 too.
    whole = stacked.ndim == 1 and not (stacked.is_floating_point() or stacked.dtype == torch.bool)
    return torch.stack(images), stacked.long() if whole else stacked


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images that keep their labels.

    Source: He et al., CVPR 2016, section 4.2 (shift by 4 pixels and flip, for CIFAR-10); DeVries & Taylor,
    "Improved Regularization of CNNs with Cutout", 2017.

    Attributes:
        shift: Move by up to this many pixels, each way, uniformly.
        padding: What comes in from outside: black, or the image mirrored at its border pixel.
        flip: Mirror left to right with probability 1/2; `None` does as the data set says.
        cutout: Side in pixels of a square that is set to the mean colour; its centre is anywhere in the
            image, so that part of it may lie outside. 0 for none.
    """

    shift: int = 0
    padding: Literal["zero", "reflect"] = "zero"
    flip: bool | None = None
    cutout: int = 0

    def __post_init__(self) -> None:
        """Refuse negative sizes and unknown padding."""
        if self.shift < 0 or self.cutout < 0:
            raise DataError(f"shift and cutout must be 0 or more, got {self.shift} and {self.cutout}")
        if self.padding not in ("zero", "reflect"):
            raise DataError(f"padding must be 'zero' or 'reflect', got {self.padding!r}")


def load_data_of(settings: DataSettings) -> DataSet:
    """Load the data set that a recipe of any kind names.

    Raises:
        DataError: It is absent, damaged, or too small for what the recipe asks.
    """
    held_out = settings.validation
    return load_data(
        settings.source,
        folder=settings.folder,
        validation=held_out if held_out < 1 else int(held_out),
        limit=settings.limit,
        seed=settings.seed,
    )


@lru_cache(maxsize=2)
def order_of(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order in which `batches` goes through so many items, `(count,)`."""
    return np.random.default_rng([_ORDER_STREAM, seed, epoch]).permutation(count)


def batches(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    seed: int | None,
    epoch: int = 0,
    augment: Augmentation | None = None,
    drop_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through a data set once, in mini-batches of normalised inputs and labels.

    Order and augmentation depend on the arguments only, so that a resumed run repeats an epoch exactly.

    Args:
        dataset: A part of a `DataSet`.
        batch_size: Items a batch; the last may have fewer.
        seed: `None` keeps the order of the data, for evaluation; else the order is a random permutation.
        epoch: Another epoch has another permutation and other augmentation.
        augment: How to augment images. Float inputs of the user's data sets are cut out and nothing else:
            they come normalised, so that 0 is their mean too. Nothing is done where labels are not single
            integers, which a change of the image could make wrong.
        drop_last: Leave out a last batch with fewer items.

    Returns:
        Batches `(x, y)`: `x` of `(batch, channels, height, width)`.

    Raises:
        DataError: An argument is out of range, or `augment` is given without a seed.
    """
    n = len(cast(Sized, dataset))
    if batch_size < 1:
        raise DataError(f"batch_size must be 1 or more, got {batch_size}")
    if drop_last and n < batch_size:
        raise DataError(
            f"with drop_last, batch_size must be in 1..{n}, the number of items, got {batch_size}"
        )
    if seed is None and augment is not None:
        raise DataError("augment is random and needs a seed, got seed=None")
    if epoch < 0 or (seed is not None and seed < 0):
        raise DataError(f"seed and epoch must be 0 or more, got {seed} and {epoch}")
    if isinstance(dataset, Images) and augment is not None:
        sides = dataset.images.shape[2:]
        if augment.shift >= min(sides):
            raise DataError(f"shift must be under {min(sides)}, the side of the images, got {augment.shift}")
    order = np.arange(n) if seed is None else order_of(n, seed=seed, epoch=epoch)
    stop = n - n % batch_size if drop_last else n

    def generate() -> Iterator[tuple[Tensor, Tensor]]:
        for number, start in enumerate(range(0, stop, batch_size)):
            positions = torch.from_numpy(order[start : min(start + batch_size, stop)])
            if not isinstance(dataset, Images):
                x, y = default_collate([dataset[position] for position in positions.tolist()])
                if augment is not None and augment.cutout and _are_classes(y):
                    rng = np.random.default_rng([_AUGMENTATION_STREAM, cast(int, seed), epoch, number])
                    _cut_out(x, torch.from_numpy(rng.random((2, len(x), 1))), augment.cutout)
                yield x, y
            elif augment is None or dataset.labels.dtype != torch.int64 or dataset.labels.ndim != 1:
                yield dataset.normalise(dataset.images[positions]), dataset.labels[positions]
            else:
                rng = np.random.default_rng([_AUGMENTATION_STREAM, cast(int, seed), epoch, number])
                yield _augmented(dataset, positions, augment, rng), dataset.labels[positions]

    return generate()


def _augmented(dataset: Images, positions: Tensor, augment: Augmentation, rng: np.random.Generator) -> Tensor:
    n = len(positions)
    channels, height, width = dataset.images.shape[1:]
    flip = dataset.flip if augment.flip is None else augment.flip
    # All numbers are drawn whether used or not: switching one augmentation on leaves the others as they were.
    moves = torch.from_numpy(rng.integers(-augment.shift, augment.shift + 1, (2, n, 1)))
    mirrored = torch.from_numpy(rng.random((n, 1)) < 0.5) & flip
    centres = torch.from_numpy(rng.random((2, n, 1)))
    rows = torch.arange(height) + moves[0]
    columns = torch.arange(width) + moves[1]
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows, rows_inside = _into_image(rows, height)
    columns, columns_inside = _into_image(columns, width)
    images = dataset.images[
        positions[:, None, None, None],
        torch.arange(channels)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
    if augment.shift and augment.padding == "zero":
        images *= rows_inside[:, None, :, None] & columns_inside[:, None, None, :]
    x = dataset.normalise(images)
    if augment.cutout:
        _cut_out(x, centres, augment.cutout)
    return x


def _are_classes(labels: Any) -> bool:
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    return isinstance(labels, Tensor) and labels.ndim == 1 and labels.dtype in integers


def _cut_out(x: Tensor, centres: Tensor, size: int) -> None:
    """Set a square of normalised images to the mean colour, in place; `centres` in 0..1, `(2, batch, 1)`."""
    height, width = x.shape[2:]
    rows, columns = _near(centres[0], height, size), _near(centres[1], width, size)
    x.masked_fill_(rows[:, None, :, None] & columns[:, None, None, :], 0.0)


def _into_image(positions: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Reflect positions outside `0..side-1` at the border pixels; also say which were inside."""
    inside = (positions >= 0) & (positions < side)
    reflected = positions.abs()
    return torch.where(reflected >= side, 2 * (side - 1) - reflected, reflected), inside


def _near(centre: Tensor, side: int, size: int) -> Tensor:
    """Say which of `0..side-1` lie in `size` pixels around `centre`, a fraction of the side."""
    start = (centre * side).long() - size // 2
    pixels = torch.arange(side)
    return (pixels >= start) & (pixels < start + size)
