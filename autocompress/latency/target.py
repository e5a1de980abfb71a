"""What latency is measured for: a runtime on this device, with its threads and batch size."""

import os
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

from autocompress.errors import PluginError, TableError

RuntimeName = Literal["onnxruntime", "pytorch"]


@dataclass(frozen=True)
class Target:
    """A runtime and how it is run; the device is always the machine that runs this program.

    Attributes:
        name: For people and recipes.
        runtime: `"onnxruntime"` (CPU, 32-bit floats) or `"pytorch"` (eager, CPU, channels_last).
        threads: Threads inside one operation, at least 1.
        batch: Images at once, at least 1.
    """

    name: str
    runtime: RuntimeName
    threads: int = 1
    batch: int = 1

    def __post_init__(self) -> None:
        """Check runtime, threads and batch."""
        if self.runtime not in get_args(RuntimeName):
            allowed = ", ".join(get_args(RuntimeName))
            raise PluginError(f"no runtime {self.runtime!r}; there are {allowed}")
        for field in ("threads", "batch"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TableError(f"target {self.name!r}: {field} must be an integer >= 1, got {value!r}")

    def describe(self) -> dict[str, Any]:
        """Return the attributes, for files."""
        return asdict(self)


DEFAULT_TARGET: Final = "onnxruntime-cpu"

TARGETS: Final[dict[str, Target]] = {
    DEFAULT_TARGET: Target(DEFAULT_TARGET, "onnxruntime"),
    "pytorch-cpu": Target("pytorch-cpu", "pytorch"),
}


def load_target(
    name: str = DEFAULT_TARGET, *, threads: int | None = None, batch: int | None = None
) -> Target:
    """Return a built-in target, its threads and batch replaced where given.

    Raises:
        PluginError: There is no target of that name.
        TableError: Threads or batch are not positive integers.
    """
    if name not in TARGETS:
        raise PluginError(f"no target {name!r}; there are {', '.join(TARGETS)}")
    target = TARGETS[name]
    return replace(
        target,
        threads=target.threads if threads is None else threads,
        batch=target.batch if batch is None else batch,
    )


def describe_device() -> dict[str, Any]:
    """Return what identifies this machine: CPU model, logical cores, architecture.

    Only what does not change between two runs on one machine; versions and load stand elsewhere.
    """
    return {"cpu": _cpu_model(), "cores": os.cpu_count() or 1, "architecture": platform.machine()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"
