"""Figure 1: every strategy on NAS-Bench-201, CIFAR-10, over many seeds, against random search.

python benchmarks/nas_bench_201.py [--quick] [--strategies random,evolution] [--add NAME=PLUGIN{JSON}]
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from record import environment
from tabular_runs import (
    BASELINE,
    RESULTS,
    Problem,
    Run,
    Runs,
    against,
    contenders_of,
    made_by,
    markdown,
    parser,
    problems_of,
    run_all,
)

from autocompress.atomic import write_text

NAME = "nas_bench_201"
SEEDS = 200
SHORT = Problem("12 epochs, 100 evaluations", "c10_val_12ep", 100)
LONG = Problem("200 epochs, 500 evaluations", "c10_val_200ep", 500)
KNOWN_RANDOM = (93.70, 93.75)
"""Mean of random search, published and simulated on this table; one run has a spread of about 0.4."""
P_LIMIT = 0.01
FEWEST = "fewest evaluations"
SHORT_TEXT = f"""\
Searched on the 12-epoch validation column with {SHORT.evaluations} evaluations; reported is the 200-epoch
test accuracy of the network that was best on that column, in percent. p: one-sided Mann-Whitney U test
against random search, not corrected for the number of strategies."""
PUBLISHED = """\
Published (Dong & Yang, ICLR 2020): random 93.70 ± .36, REA 93.92 ± .30, REINFORCE 93.85 ± .37. The best
network of the table has 94.37. Simulated: what 12 epochs of every evaluated network would take at 10^12
multiply-accumulates a second, an assumption."""
LONG_TEXT = f"""\
Searched on the 200-epoch validation column with {LONG.evaluations} evaluations; regret is what the best
network found lacks to the best of the column (91.607), in points."""
SECONDS_TEXT = """\
Seconds are those of a whole search in one process, look-ups included, with other work on the machine."""


def main() -> None:
    """Run what is missing, print and write the tables."""
    options = parser((__doc__ or "").splitlines()[0], NAME, seeds=SEEDS).parse_args()
    path = options.output or (None if options.quick else RESULTS / f"{NAME}.json")
    runs, about = run_all(
        path,
        contenders_of(options),
        problems_of(options, (SHORT, LONG)),
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
    """Write both tables."""
    return "\n".join(
        [
            "# NAS-Bench-201, CIFAR-10",
            "",
            SHORT_TEXT,
            "",
            _short(runs),
            "",
            PUBLISHED,
            "",
            LONG_TEXT,
            "",
            _long(runs),
            "",
            SECONDS_TEXT,
            "",
            made_by(about),
            "",
        ]
    )


def _of(runs: Runs, problem: Problem) -> dict[str, list[Run]]:
    return {
        name: list(found[problem.name].values()) for name, found in runs.items() if found.get(problem.name)
    }


def _p(values: Sequence[float], baseline: Sequence[float], name: str, *, larger_is_better: bool) -> str:
    if name == BASELINE or not baseline:
        return ""
    p = against(values, baseline, larger_is_better=larger_is_better)
    return f"{p:.1e}{' (no better than random)' if p >= P_LIMIT else ''}"


def _short(runs: Runs) -> str:
    found = _of(runs, SHORT)
    baseline = [run.test for run in found.get(BASELINE, [])]
    rows = []
    for name, its in found.items():
        test = [run.test for run in its]
        mean = float(np.mean(test))
        known = ""
        if name == BASELINE:
            low, high = KNOWN_RANDOM
            margin = 3 * float(np.std(test)) / math.sqrt(len(test))
            known = f" ({'as' if low - margin <= mean <= high + margin else 'NOT as'} known)"
        rows.append(
            [
                name,
                str(len(its)),
                f"{mean:.2f} ± {np.std(test):.2f}{known}",
                f"{np.median(test):.2f}",
                f"{min(test):.2f}",
                f"{np.mean([run.regret for run in its]):.3f}",
                _p(test, baseline, name, larger_is_better=True),
                str(min(run.evaluations for run in its)),
                f"{np.mean([run.simulated_s for run in its]) / 3600:.2f}",
                f"{np.mean([run.seconds for run in its]):.2f}",
            ]
        )
    header = [
        "strategy",
        "seeds",
        "test, mean ± std",
        "median",
        "worst",
        "regret on 12 epochs",
        "p",
        FEWEST,
        "simulated h",
        "s",
    ]
    return markdown(header, rows)


def _long(runs: Runs) -> str:
    found = _of(runs, LONG)
    baseline = [run.regret for run in found.get(BASELINE, [])]
    rows = []
    for name, its in found.items():
        regret = [run.regret for run in its]
        rows.append(
            [
                name,
                str(len(its)),
                f"{np.mean(regret):.4f} ± {np.std(regret):.4f}",
                f"{np.median(regret):.4f}",
                f"{max(regret):.4f}",
                f"{np.mean([r < 1e-4 for r in regret]):.0%}",
                _p(regret, baseline, name, larger_is_better=False),
                str(min(run.evaluations for run in its)),
                f"{np.mean([run.seconds for run in its]):.2f}",
            ]
        )
    header = ["strategy", "seeds", "regret, mean ± std", "median", "worst", "optimum found", "p", FEWEST, "s"]
    return markdown(header, rows)


if __name__ == "__main__":
    main()
