"""Figure 4: how well predictors order published once-for-all sub-networks, from few training samples.

python benchmarks/ofa_predictor.py [--quick] [--output FILE] [--table CSV]

Split by distinct architecture: what is judged was never trained on. The kind of "chosen" is chosen anew in
every split, by cross-validation within its training rows alone.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from record import SHARED, Figure, parser, report, use_one_core
from scipy.stats import kendalltau

from autocompress.cost import Cost, Values, operation_cost
from autocompress.evaluation.ofa_table import read_ofa_table
from autocompress.evaluation.predictor import cross_validate
from autocompress.evaluation.regression import KINDS, Kind, Model, make_model
from autocompress.space import Codes, SearchSpace
from search_spaces.mobilenet_v3 import mobilenet_v3

TABLE = SHARED / "ofa/ofa_mbv3_w10_imagenet_subnets.csv"
TARGETS = {50: 0.88, 200: 0.92, 500: 0.94}
COSTS = ("macs", "params")
CHOSEN = "chosen by cross-validation"
QUICK_KINDS: tuple[Kind, ...] = ("ridge", "gaussian_process", "ensemble")
"""What is chosen from: a fit of the MLP takes ten to a thousand times as long."""

Predict = Callable[[Codes, Values, Codes], Values]
"""Rows and values to train on, and rows to predict."""


def of_model(make: Callable[[], Model], codes: Codes, values: Values, judged: Codes) -> Values:
    """Train a model and predict."""
    return make().fit(codes, values).predict(judged)


def of_macs(macs: Cost, codes: Codes, values: Values, judged: Codes) -> Values:
    """Predict the MACs: more is better."""
    return macs.of(judged)


def chosen(
    makes: dict[str, Callable[[], Model]], picked: list[str], codes: Codes, values: Values, judged: Codes
) -> Values:
    """Train the model that cross-validates best on the training rows."""
    taus = {kind: cross_validate(make, codes, values, seed=0) for kind, make in makes.items()}
    best = max(taus, key=taus.__getitem__)
    picked.append(best)
    return of_model(makes[best], codes, values, judged)


def contenders(space: SearchSpace, costs: list[Cost], picked: list[str]) -> dict[str, Predict]:
    """Return what is compared, by name."""
    result: dict[str, Predict] = {"MACs alone": partial(of_macs, costs[0])}
    for name, features in {"genes": [], "genes, MACs, parameters": costs}.items():
        for kind in KINDS:
            result[f"{kind} on {name}"] = partial(of_model, partial(make_model, kind, space, features))
    makes = {kind: partial(make_model, kind, space, costs) for kind in QUICK_KINDS}
    result[CHOSEN] = partial(chosen, makes, picked)
    return result


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0] if __doc__ else "", repeats=10)
    arguments.add_argument("--table", type=Path, default=TABLE, help="the published sub-networks")
    options = arguments.parse_args()
    use_one_core()
    space = mobilenet_v3()
    table = read_ofa_table(options.table, space).distinct()
    splits = 2 if options.quick else options.repeats
    figures, settings, picked = [], {}, []
    compared = contenders(space, [operation_cost(space, metric) for metric in COSTS], picked)
    for samples, target in TARGETS.items():
        for name, predict in compared.items():
            taus, seconds = [], []
            for seed in range(splits):
                order = np.random.default_rng(seed).permutation(len(table.codes))
                train, judged = order[:samples], order[samples:]
                start = time.process_time()
                predicted = predict(table.codes[train], table.top1_percent[train], table.codes[judged])
                seconds.append(time.process_time() - start)
                taus.append(float(kendalltau(predicted, table.top1_percent[judged]).statistic))
            mean = float(np.mean(taus))
            promised = name == CHOSEN
            figures.append(
                Figure(
                    f"{samples} samples: {name}",
                    mean,
                    "Kendall tau",
                    min(taus),
                    max(taus),
                    f">= {target}" if promised else "",
                    mean >= target if promised else None,
                )
            )
            spread = (
                f"standard deviation {np.std(taus, ddof=1):.4f}, {np.median(seconds):.3g} s of processor time"
            )
            settings[figures[-1].name] = f"{mean:.4f}, {spread}"
        settings[f"{samples} samples: kinds chosen"] = {
            kind: picked.count(kind) for kind in sorted(set(picked))
        }
        picked.clear()
    settings |= {
        "table": f"{len(table.codes)} distinct sub-networks of {options.table.name}, all others are judged",
        "value": f"mean over {splits} splits; the range is that of the splits",
        "tau of MACs over all": float(kendalltau(table.macs, table.top1_percent).statistic),
    }
    report("ofa_predictor", figures, settings=settings, options=options)


if __name__ == "__main__":
    main()
