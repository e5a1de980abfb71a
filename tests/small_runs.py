"""The smallest whole run: 200 digits, 1,024 networks, two epochs; and a latency table that needs no clock."""

import copy
from pathlib import Path
from typing import Any

from autocompress.latency.correction import Correction
from autocompress.latency.measure import Measurement
from autocompress.latency.plan import distinct_blocks
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import Target, describe_device, load_target
from autocompress.ops import block_key
from autocompress.recipe import Recipe, parse_recipe
from autocompress.run import make_space
from autocompress.space import SearchSpace

RECIPE: dict[str, Any] = {
    "data": {"source": "digits", "limit": 200, "validation": 0.2},
    "space": {
        "name": "mobilenet_v3",
        "arguments": {
            "preset": "tiny",
            "depths": [2],
            "expands": [2, 6],
            "kernels": [3],
            "resolutions": [24],
            "in_channels": 1,
            "classes": 10,
        },
    },
    "profile": {"networks": 8, "min_rounds": 2, "max_rounds": 2},
    # Formats are fixed: `auto` takes the faster one, which differs from run to run.
    "train": {
        "epochs": 2,
        "batch_size": 80,
        "warmup_epochs": 0,
        "precision": "fp32",
        "memory_format": "contiguous",
        "random_networks": 1,
    },
    "search": {
        "budget": {"macs": "90%"},
        "evaluations": 6,
        "strategy": "evolution",
        "options": {"population": 4},
        "calibration_images": 80,
    },
    "finetune": {"epochs": 2, "batch_size": 80, "precision": "fp32", "memory_format": "contiguous"},
    "export": {"formats": ["safetensors"]},
    "random_networks": 2,
    "threads": 1,
}


def small_recipe(**changes: Any) -> Recipe:
    """The recipe with sections changed, for example `search={"seed": 1}`."""
    return parse_recipe(small_payload(**changes))


def small_payload(**changes: Any) -> dict[str, Any]:
    """The recipe as it stands in YAML, with sections changed."""
    payload = copy.deepcopy(RECIPE)
    for section, values in changes.items():
        if isinstance(values, dict):
            payload.setdefault(section, {}).update(values)
        else:
            payload[section] = values
    return payload


def no_data() -> Any:
    """The small recipe's space says its channels and classes, so no data is loaded for it."""
    raise AssertionError("data were loaded to make a space")


def small_space() -> SearchSpace:
    return make_space(small_recipe(), no_data)


def table_by_hand(space: SearchSpace, target: Target | None = None) -> LatencyTable:
    """A table in which every block takes 0.05 ms and a microsecond for every thousand MACs."""
    rows = {}
    for key, ops in distinct_blocks(space).items():
        milliseconds = 0.05 + sum(op.macs for op in ops) / 1e6
        rows[key] = Measurement(milliseconds, milliseconds, milliseconds, 0.0, milliseconds, 10)
    assert all(key == block_key(ops) for key, ops in distinct_blocks(space).items())
    provenance = {"device": describe_device()}
    return LatencyTable(target or load_target(), rows, Correction(), None, provenance)


def with_table(folder: Path) -> Path:
    """Make a run directory that has a latency table already; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    table_by_hand(small_space()).save(folder / "latency_table.json")
    return folder
