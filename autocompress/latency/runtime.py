"""Runtimes: each turns blocks or an ONNX file into a function that runs once; one file each in `runtimes/`.

Inputs are made beforehand, so that one call is one inference and nothing else. Clocks are read elsewhere.
"""

import importlib
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from autocompress.errors import PluginError, TableError
from autocompress.latency.target import Device, NumberFormat, Target, targets
from autocompress.machine import cores
from autocompress.ops import Conv2d, Ops

Run = Callable[[], object]
"""Runs a network or a block once; what it returns is not looked at."""

Blocks = Sequence[tuple[str, Ops]]

RUNTIMES: Final = {
    "onnxruntime": "autocompress.latency.runtimes.onnxruntime_cpu:RUNTIME",
    "openvino": "autocompress.latency.runtimes.openvino_cpu:RUNTIME",
    "pytorch": "autocompress.latency.runtimes.pytorch_eager:RUNTIME",
}
"""Name of a runtime to where it is; a target may also name any other `module:attribute`."""


def _unpinned(target: Target) -> AbstractContextManager[None]:
    """Return a context that changes nothing: sessions have threads of their own."""
    return nullcontext()


@dataclass(frozen=True)
class Runtime:
    """What runs networks.

    Attributes:
        package: What has to be importable.
        install: How to get it.
        packages: Distributions whose versions belong to a measurement.
        runs: Which number formats it runs on which devices.
        prepare: Builds the network of blocks, with random weights, for a target.
        prepare_onnx: Loads an ONNX model of 32-bit floats, serialized or a file, for a target; free
            dimensions of its inputs become the target's batch. `None` if the runtime does not read ONNX.
        pinned: Holds what belongs to the whole process, such as its number of threads, while it is entered.
    """

    package: str
    install: str
    packages: tuple[str, ...]
    runs: dict[Device, tuple[NumberFormat, ...]]
    prepare: Callable[[Blocks, Target], Run]
    prepare_onnx: Callable[[bytes | Path, Target], Run] | None = None
    pinned: Callable[[Target], AbstractContextManager[None]] = _unpinned


def load_runtime(target: Target) -> Runtime:
    """Return the runtime of a target.

    Raises:
        PluginError: There is no such runtime, the package is not installed, or the target has none.
        TableError: The runtime does not run the target's number format on its device.
    """
    if not target.runtime:
        raise PluginError(
            f"target {target.name!r} only states capabilities and cannot be measured here: import a table "
            "with `autocompress table import`, or measure the device with `autocompress profile --bundle`"
        )
    place = RUNTIMES.get(target.runtime, target.runtime)
    path, _, attribute = place.partition(":")
    if not attribute:
        known = ", ".join(RUNTIMES)
        raise PluginError(f"no runtime {target.runtime!r}; there are {known}, and any 'module:attribute'")
    try:
        runtime = operator.attrgetter(attribute)(importlib.import_module(path))
    except (ImportError, AttributeError) as error:
        raise PluginError(f"runtime {target.runtime!r} cannot be loaded from {place}: {error}") from error
    if not isinstance(runtime, Runtime):
        raise PluginError(f"{place} must be a Runtime, got {type(runtime).__name__}")
    try:
        importlib.import_module(runtime.package)
    except ImportError as error:
        raise PluginError(
            f"target {target.name!r} needs {runtime.package}, which cannot be imported ({error}): "
            f"{runtime.install}"
        ) from None
    formats = runtime.runs.get(target.device, ())
    if target.number_format not in formats:
        able = "; ".join(f"{device}: {', '.join(names)}" for device, names in runtime.runs.items())
        raise TableError(
            f"target {target.name!r}: {target.runtime} does not run {target.number_format} on "
            f"{target.device}; it runs {able}"
        )
    return runtime


def targets_here() -> list[str]:
    """Return the names of the targets that ship with autocompress and can be measured on this machine."""
    probe: Blocks = [("probe", (Conv2d(1, 1, 1, 1),))]
    found = []
    for name, target in targets().items():
        try:
            prepare(probe, target)
        except (PluginError, TableError):
            continue
        found.append(name)
    return found


def prepare(blocks: Blocks, target: Target) -> Run:
    """Build the network of these blocks, with random weights, on the target's runtime.

    Raises:
        PluginError: As `load_runtime`.
        TableError: As `load_runtime`.
    """
    return load_runtime(target).prepare(blocks, target)


def reads_onnx(target: Target) -> bool:
    """Whether an ONNX file can be run on the target."""
    return load_runtime(target).prepare_onnx is not None


def prepare_onnx(model: bytes | Path, target: Target) -> Run:
    """Load an ONNX model of 32-bit floats on the target's runtime; for an 8-bit target it is quantized.

    Args:
        model: Serialized, or a file. Free dimensions of its inputs become the target's batch.
        target: Where it runs. Quantization is calibrated on random inputs: good for timing only.

    Raises:
        PluginError: As `load_runtime`.
        TableError: The runtime does not read ONNX, or cannot load the model.
    """
    load = load_runtime(target).prepare_onnx
    if load is None:
        raise TableError(f"an ONNX model does not run on {target.runtime}, the runtime of {target.name!r}")
    return load(model, target)


@contextmanager
def pinned(target: Target) -> Iterator[None]:
    """Hold what belongs to the whole process, its number of threads above all, as the target wants it.

    Raises:
        PluginError: As `load_runtime`.
        TableError: As `load_runtime`; or the target has more threads than this process may use cores.
    """
    if target.threads > cores():
        raise TableError(
            f"target {target.name!r} has {target.threads} threads, and this process may use {cores()} cores: "
            "what would be measured is threads that wait for each other; ask for fewer (--threads, or "
            "target.threads of the recipe), or measure the device itself with `autocompress profile --bundle`"
        )
    with load_runtime(target).pinned(target):
        yield


def random_input(rng: np.random.Generator, shape: list[int], *, integers: bool) -> NDArray[Any]:
    """Return random numbers for a model to run on: normal ones, or unsigned 8-bit integers."""
    if integers:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return rng.standard_normal(shape, dtype=np.float32)


def background(target: Target) -> list[Run]:
    """Build a dozen small blocks that run between the timed runs of a few networks."""
    blocks: list[Ops] = []
    for size, channels in ((32, 8), (16, 16), (8, 32), (4, 64)):
        for kernel in (3, 5, 7):
            middle = 4 * channels
            blocks.append(
                (
                    Conv2d(channels, middle, size, size, activation="hard_swish"),
                    Conv2d(middle, middle, size, size, kernel=kernel, groups=middle, activation="relu"),
                    Conv2d(middle, channels, size, size),
                )
            )
    return [prepare([("background", ops)], target) for ops in blocks]


def versions(target: Target) -> dict[str, str]:
    """Return the versions of what runs and times networks on a target."""
    found = {}
    for name in ("numpy", *load_runtime(target).packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
