"""Targets: a device with its runtime, threads, batch and number format, and what bit widths it can run.

A target is a small JSON file. Those of `autocompress/latency/targets/` ship with the program; any other is
named by its path. A target without a runtime cannot be measured here: it states what a device can run, for
bit-width search and for tables that come from elsewhere.
"""

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, get_args

from autocompress.errors import PluginError, TableError
from autocompress.latency.reading import parse_json, read_text, reading
from autocompress.latency.strict import Node

SCHEMA: Final = "autocompress.target"
VERSION: Final = 1
DEFAULT_TARGET: Final = "onnxruntime-cpu"
OPTIONAL: Final = ("schemes", "float_formats", "channel_alignment", "description")

Device = Literal["cpu", "cuda", "other"]
NumberFormat = Literal["float32", "float16", "bfloat16", "int8"]
Levels = Literal["uniform", "logarithmic", "dynamic_fixed_point"]
Zero = Literal["symmetric", "asymmetric"]
Granularity = Literal["per_layer", "per_channel"]


@dataclass(frozen=True)
class Scheme:
    """One way in which a device quantizes.

    Attributes:
        bits: Legal widths of weights and activations, ascending.
        levels: Evenly spaced, powers of two, or evenly spaced at a power-of-two scale.
        weights: Whether the levels of weights are symmetric around zero.
        activations: The same for activations.
        granularity: Whether weights have one scale a layer or one a channel; the choices there are.
    """

    bits: tuple[int, ...]
    levels: Levels = "uniform"
    weights: Zero = "symmetric"
    activations: Zero = "symmetric"
    granularity: tuple[Granularity, ...] = ("per_layer",)


@dataclass(frozen=True)
class Target:
    """A device, what runs on it and how.

    Attributes:
        name: For people and recipes.
        runtime: A name of `autocompress.latency.runtime.RUNTIMES` or `module:attribute`; empty for a target
            that only states capabilities.
        threads: Threads inside one operation, at least 1.
        batch: Images at once, at least 1.
        device: What the runtime runs on; a CPU or GPU is always that of the machine of this program.
        number_format: In what weights and activations are computed.
        schemes: How the device can quantize; none for floating point only.
        float_formats: Which floating-point formats it runs.
        channel_alignment: Channel counts are best multiples of it, as documented; `table steps` measures it.
        description: For people; where the capabilities are from.
    """

    name: str
    runtime: str
    threads: int = 1
    batch: int = 1
    device: Device = "cpu"
    number_format: NumberFormat = "float32"
    schemes: tuple[Scheme, ...] = ()
    float_formats: tuple[NumberFormat, ...] = ("float32",)
    channel_alignment: int = 1
    description: str = ""

    def __post_init__(self) -> None:
        """Check threads, batch and alignment."""
        for field in ("threads", "batch", "channel_alignment"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TableError(f"target {self.name!r}: {field} must be an integer >= 1, got {value!r}")

    @property
    def bit_widths(self) -> tuple[int, ...]:
        """Every width below 16 and integer 16 that some scheme has, ascending."""
        return tuple(sorted({bits for scheme in self.schemes for bits in scheme.bits}))

    def describe(self) -> dict[str, Any]:
        """Return the attributes as they stand in a file."""
        listed = asdict(self, dict_factory=lambda pairs: {name: _json(value) for name, value in pairs})
        return {"schema": SCHEMA, "version": VERSION, **listed}

    def conditions(self) -> dict[str, Any]:
        """Return what two measurements must have in common to be compared, the device itself apart."""
        return {
            name: getattr(self, name) for name in ("runtime", "threads", "batch", "device", "number_format")
        }


def _json(value: Any) -> Any:
    return [_json(part) for part in value] if isinstance(value, tuple | list) else value


def read_target(node: Node) -> Target:
    """Read a target from JSON; `OPTIONAL` keys have defaults, unknown ones are refused.

    Raises:
        TableError: Something is wrong; names the key.
    """
    node.object()
    node.member("schema").equal(SCHEMA)
    node.member("version").equal(VERSION)
    names = [field.name for field in fields(Target)]
    members = node.object(("schema", "version", *names), optional=OPTIONAL)
    values: dict[str, Any] = {}
    for name, member in members.items():
        if name in ("schema", "version"):
            continue
        if name == "schemes":
            values[name] = tuple(_read_scheme(entry) for entry in member.list())
        elif name in ("threads", "batch", "channel_alignment"):
            values[name] = member.integer(1)
        elif name == "device":
            values[name] = member.equal(*get_args(Device))
        elif name == "number_format":
            values[name] = member.equal(*get_args(NumberFormat))
        elif name == "float_formats":
            values[name] = tuple(entry.equal(*get_args(NumberFormat)) for entry in member.list())
        else:
            values[name] = member.text()
    return Target(**values)


def _read_scheme(node: Node) -> Scheme:
    names = [field.name for field in fields(Scheme)]
    members = node.object(names, optional=names[1:])
    bits = tuple(entry.integer(1) for entry in members["bits"].list())
    if not bits or list(bits) != sorted(set(bits)) or bits[-1] > 16:
        raise members["bits"].wrong("a list of widths in 1..16, ascending, without repetition")
    kinds: dict[str, tuple[str, ...]] = {
        "levels": get_args(Levels),
        "weights": get_args(Zero),
        "activations": get_args(Zero),
    }
    values: dict[str, Any] = {
        name: members[name].equal(*allowed) for name, allowed in kinds.items() if name in members
    }
    if "granularity" in members:
        chosen = tuple(entry.equal(*get_args(Granularity)) for entry in members["granularity"].list())
        values["granularity"] = chosen
    return Scheme(bits, **values)


def load_target_file(path: Path) -> Target:
    """Read a target file.

    Raises:
        TableError: It is absent, damaged, of another schema or version, or a value in it is wrong.
    """
    with reading("target", path, described="docs/latency.md"):
        return read_target(parse_json(read_text(path)))


@cache
def targets() -> Mapping[str, Target]:
    """Return the targets that ship with autocompress, by name; those that can be measured come first."""
    folder = resources.files("autocompress.latency") / "targets"
    with resources.as_file(folder) as path:
        found = [load_target_file(file) for file in sorted(path.glob("*.json"))]
    found.sort(key=lambda target: (not target.runtime, target.device, target.name))
    return {target.name: target for target in found}


def load_target(
    name: str = DEFAULT_TARGET, *, threads: int | None = None, batch: int | None = None
) -> Target:
    """Return a target by its name or the path of its file, threads and batch replaced where given.

    Raises:
        PluginError: There is no target of that name.
        TableError: The file is wrong, or threads or batch are not positive integers.
    """
    if name.endswith(".json"):
        target = load_target_file(Path(name))
    elif name in targets():
        target = targets()[name]
    else:
        raise PluginError(f"no target {name!r}; there are {', '.join(targets())}, and any PATH.json")
    return replace(
        target,
        threads=target.threads if threads is None else threads,
        batch=target.batch if batch is None else batch,
    )


def describe_device(device: Device = "cpu") -> dict[str, Any]:
    """Return what identifies this machine: CPU model, logical cores, architecture; for CUDA also the GPU.

    Only what does not change between two runs on one machine; versions and load stand elsewhere.
    """
    described = {"cpu": _cpu_model(), "cores": os.cpu_count() or 1, "architecture": platform.machine()}
    if device == "cuda":
        import torch

        described["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return described


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
