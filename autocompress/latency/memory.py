"""Peak memory of an exported network: measured in a process of its own, which does nothing else.

Linux hands the peak of `getrusage` from a parent down to its children, so that a child of a process that once
used 2 GB would report 2 GB. `/proc/self/status` counts the process alone; elsewhere `getrusage` has to do.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

from autocompress.errors import TableError
from autocompress.latency.strict import Node
from autocompress.latency.target import Target, read_target

STATUS: Final = Path("/proc/self/status")
RESET_PEAK: Final = Path("/proc/self/clear_refs")
RUNS: Final = 3
TIMEOUT_S: Final = 120


def peak_memory_bytes(path: Path, target: Target) -> int:
    """Return by how much loading an ONNX file and running it thrice raises the memory of a process, in bytes.

    Weights, activations and what the runtime keeps are counted; interpreter and libraries are not.

    Raises:
        TableError: The target is not of ONNX Runtime, or the file cannot be loaded or run.
    """
    if target.runtime != "onnxruntime" or target.number_format != "float32":
        raise TableError(
            f"peak memory is measured on onnxruntime with 32-bit floats; target {target.name!r} is of "
            f"{target.runtime} with {target.number_format}"
        )
    request = json.dumps({"path": str(path), "target": target.describe()})
    command = [sys.executable, "-c", f"from {__name__} import _child; _child()"]
    try:
        result = subprocess.run(
            command, input=request, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise TableError(f"running {path} to find its peak memory took over {TIMEOUT_S} s") from None
    try:
        return max(0, int(json.loads(result.stdout)["peak_bytes"]))
    except (ValueError, KeyError, TypeError):
        last = result.stderr.strip().splitlines()[-1:] or [f"exit code {result.returncode}"]
        raise TableError(f"peak memory of {path} cannot be measured: {last[0]}") from None


def _child() -> None:
    """Load and run what standard input names; write the rise of the peak to standard output."""
    # Loaded before the first look: libraries are not part of the network.
    import onnxruntime  # noqa: F401

    from autocompress.latency.runtime import prepare_onnx

    request = json.load(sys.stdin)
    target = read_target(Node(request["target"], "target"))
    if RESET_PEAK.exists():
        RESET_PEAK.write_text("5", encoding="ascii")
    before = _status_bytes("VmRSS")
    run = prepare_onnx(Path(request["path"]), target)
    for _ in range(RUNS):
        run()
    sys.stdout.write(json.dumps({"peak_bytes": _status_bytes("VmHWM") - before}))


def _status_bytes(name: str) -> int:
    if not STATUS.exists():
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Bytes on macOS, kibibytes elsewhere.
        return peak if sys.platform == "darwin" else peak * 1024
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        label, _, value = line.partition(":")
        if label == name:
            return int(value.split()[0]) * 1024
    raise TableError(f"{STATUS} has no line {name}")
