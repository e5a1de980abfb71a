"""Figure 2: best feasible network found under latency budgets on eight devices, against the true optimum.

python benchmarks/device_budgets.py [--quick] [--strategies random,evolution] [--add NAME=PLUGIN{JSON}]
"""

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
from record import environment
from tabular_runs import (
    BASELINE,
    RESULTS,
    Problem,
    Runs,
    against,
    contenders_of,
    data,
    made_by,
    markdown,
    parser,
    problems_of,
    run_all,
)

from autocompress.atomic import write_text

NAME = "device_budgets"
SEEDS = 10
QUANTILES = (0.10, 0.25, 0.50)
OBJECTIVE, EVALUATIONS = "c10_val_200ep", 300
MEDIAN_LIMIT = 0.05
SHARE_OF_RANDOM = 1 / 3
TEXT = f"""\
Searched on the 200-epoch validation column with {EVALUATIONS} evaluations under the 10, 25 and 50 %
quantiles of each device's latency over all networks. Regret: what the best feasible network found lacks
to the best feasible one of the column, in points; mean over the seeds, then median, mean and worst over
the settings. p: one-sided Mann-Whitney U test of these means against random's. (yes) and (NO): median <=
{MEDIAN_LIMIT}, mean at most a third of random search's."""


def main() -> None:
    """Run what is missing, print and write the table."""
    options: argparse.Namespace = parser((__doc__ or "").splitlines()[0], NAME, seeds=SEEDS).parse_args()
    path = options.output or (None if options.quick else RESULTS / f"{NAME}.json")
    problems = [
        Problem(f"{device}, {quantile:.0%}", OBJECTIVE, EVALUATIONS, device, quantile)
        for device in data()[1]
        for quantile in QUANTILES
    ]
    runs, about = run_all(
        path,
        contenders_of(options),
        problems_of(options, problems[::8] if options.quick else problems),
        min(3, options.seeds) if options.quick else options.seeds,
        workers=options.workers,
        again=options.again,
        describe=environment,
    )
    text = summary(runs, about)
    print(text)
    if path is not None:
        write_text(path.with_suffix(".md"), text)


def summary(runs: Runs, about: Mapping[str, Any]) -> str:
    """Write the table of strategies and the table of settings."""
    means = {name: _mean_regrets(found) for name, found in runs.items() if found}
    random = means.get(BASELINE, {})
    rows = []
    for name, by_problem in means.items():
        regrets = list(by_problem.values())
        every = [run for found in runs[name].values() for run in found.values()]
        worst = max(by_problem, key=lambda problem: by_problem[problem])
        share = np.mean(regrets) / np.mean(list(random.values())) if random else float("nan")
        worst_run = max(run.regret for run in every)
        rows.append(
            [
                name,
                f"{len(by_problem)} x {min(len(found) for found in runs[name].values())}",
                f"{np.median(regrets):.4f}{_reached(np.median(regrets) <= MEDIAN_LIMIT)}",
                f"{np.mean(regrets):.4f}",
                f"{share:.2f}{_reached(share <= SHARE_OF_RANDOM)}" if random and name != BASELINE else "",
                f"{by_problem[worst]:.4f} ({worst})",
                f"{worst_run:.4f}",
                _wins(by_problem, random) if name != BASELINE else "",
                str(min(run.evaluations for run in every)),
                str(sum(run.infeasible for run in every)),
                f"{np.mean([run.refused for run in every]):.1f}",
            ]
        )
    header = ["strategy", "settings x seeds", "median", "mean", "of random's", "worst setting", "worst run"]
    header += ["p", "fewest evaluations", "infeasible results", "refused proposals a run"]
    names = list(means)
    problems = list(dict.fromkeys(problem for by_problem in means.values() for problem in by_problem))
    settings = [
        [problem, *(f"{means[name][problem]:.4f}" if problem in means[name] else "" for name in names)]
        for problem in problems
    ]
    return "\n".join(
        [
            "# Latency budgets on eight devices, NAS-Bench-201",
            "",
            TEXT,
            "",
            markdown(header, rows),
            "",
            "Mean regret by setting:",
            "",
            markdown(["setting", *names], settings),
            "",
            made_by(about),
            "",
        ]
    )


def _mean_regrets(found: Mapping[str, Mapping[int, Any]]) -> dict[str, float]:
    return {p: float(np.mean([run.regret for run in by_seed.values()])) for p, by_seed in found.items()}


def _reached(reached: bool) -> str:
    return " (yes)" if reached else " (NO)"


def _wins(by_problem: Mapping[str, float], random: Mapping[str, float]) -> str:
    if not random:
        return ""
    return f"{against(list(by_problem.values()), list(random.values()), larger_is_better=False):.1e}"


if __name__ == "__main__":
    main()
