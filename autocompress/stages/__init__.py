"""The stages of a run, each a function that does nothing where its result is there already.

profile -> train -> search -> finetune -> passes -> export -> report; each calls those before it.
"""

from autocompress.stages.checking import (
    check,
    check_losses,
    check_passes,
    check_reward,
    check_trained,
    passes_of,
)
from autocompress.stages.compressing import compress, final_folder
from autocompress.stages.exporting import export
from autocompress.stages.finetuning import finetune
from autocompress.stages.limits import (
    check_change,
    check_untimed,
    constraints,
    latency_margin,
    proposer,
    resolve,
    try_out,
)
from autocompress.stages.networks import (
    calibration,
    extract_recalibrated,
    reference_score,
    resolution,
    untrained,
)
from autocompress.stages.pricing import (
    LATENCY,
    TABLE,
    costs,
    energy_price,
    price_of,
    profile,
    target,
    untimed_costs,
)
from autocompress.stages.searching import evaluator, search, spread, warm_start
from autocompress.stages.selecting import select, selected, selection
from autocompress.stages.training import (
    CHECKPOINT,
    THREADS,
    TRAINING,
    set_threads,
    train,
    train_together,
)

__all__ = [
    "CHECKPOINT",
    "LATENCY",
    "TABLE",
    "THREADS",
    "TRAINING",
    "calibration",
    "check",
    "check_change",
    "check_losses",
    "check_passes",
    "check_reward",
    "check_trained",
    "check_untimed",
    "compress",
    "constraints",
    "costs",
    "energy_price",
    "evaluator",
    "export",
    "extract_recalibrated",
    "final_folder",
    "finetune",
    "latency_margin",
    "passes_of",
    "price_of",
    "profile",
    "proposer",
    "reference_score",
    "resolution",
    "resolve",
    "search",
    "select",
    "selected",
    "selection",
    "set_threads",
    "spread",
    "target",
    "train",
    "train_together",
    "try_out",
    "untimed_costs",
    "untrained",
    "warm_start",
]
