"""What stages made with former settings is kept, and found again when they come back.

A run directory shows what the present recipe makes. Every stage has a digest of all its settings, and of
those of the stages that it stands on (`run.digests`); `stages.json` says which digests the files belong to.
Where a recipe has other ones, files of those stages are moved to `kept/STAGE-DIGEST/`, and what was made with
the new ones before is moved back. Moving goes on where it was stopped.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autocompress.atomic import read_json, write_json
from autocompress.errors import StorageError

FILES = {
    "profile": ("latency_samples.jsonl", "latency_check.json", "latency_table.json"),
    "train": ("threads.json", "supernet.pt", "training.json"),
    "search": ("trials.log", "selected.json", "report.md", "result.json"),
}
"""What belongs to the stages whose settings may change; networks and their reports have digests as names."""
STAGES, KEPT = "stages.json", "kept"
DIGITS = 8


def digest(content: Any) -> str:
    """Return some hexadecimal digits of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:DIGITS]


def settled(folder: Path, wanted: Mapping[str, str]) -> bool:
    """Whether the files of a run are those of these digests, all of them."""
    return _state(folder, wanted) == {"here": dict(wanted)}


def settle(folder: Path, wanted: Mapping[str, str]) -> dict[str, Path]:
    """Put aside what was made with other settings, take back what was made with these; to be called locked.

    Returns:
        Each stage that had files of other settings, and where they are now.
    """
    state = _state(folder, wanted)
    if "next" in state:
        # Another process was killed in the middle of this.
        _move(folder, state)
        state = {"here": state["next"]}
    aside = {}
    if state["here"] != wanted:
        for stage, names in FILES.items():
            if state["here"][stage] != wanted[stage] and any((folder / name).exists() for name in names):
                aside[stage] = _place(folder, stage, state["here"][stage])
        _move(folder, {**state, "next": dict(wanted), "emptied": False})
    if not (folder / STAGES).exists() or not settled(folder, wanted):
        write_json(folder / STAGES, {"here": dict(wanted)})
    return aside


def _move(folder: Path, state: Mapping[str, Any]) -> None:
    """Do what is left of a change: first everything out, and then everything in."""
    changed = [stage for stage in FILES if state["here"][stage] != state["next"][stage]]
    if not state["emptied"]:
        write_json(folder / STAGES, state)
        for stage in changed:
            place = _place(folder, stage, state["here"][stage])
            for name in FILES[stage]:
                if (folder / name).exists():
                    place.mkdir(parents=True, exist_ok=True)
                    (folder / name).replace(place / name)
        write_json(folder / STAGES, {**state, "emptied": True})
    for stage in changed:
        place = _place(folder, stage, state["next"][stage])
        for name in FILES[stage]:
            if (place / name).exists():
                (place / name).replace(folder / name)
        if place.exists():
            place.rmdir()


def _place(folder: Path, stage: str, its_digest: str) -> Path:
    return folder / KEPT / f"{stage}-{its_digest}"


def _state(folder: Path, wanted: Mapping[str, str]) -> dict[str, Any]:
    """Read to which settings the files belong; where nothing is said, to these."""
    path = folder / STAGES
    if not path.exists():
        return {"here": dict(wanted)}
    state: dict[str, Any] = read_json(path, StorageError, "list of stages")
    if not isinstance(state, dict) or not isinstance(state.get("here"), dict) or {*state["here"]} != {*FILES}:
        raise StorageError(f"{path} is damaged; remove it if the recipe was not changed since")
    return state
