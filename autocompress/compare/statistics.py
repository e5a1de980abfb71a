"""What cells say about strategies: curves with intervals, regrets, tests, and a verdict in plain words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from autocompress.compare.cells import Cell
from autocompress.cost import Values

RESAMPLES: Final = 2000
CONFIDENCE: Final = 0.95
SIGNIFICANT: Final = 0.05
MAX_PERMUTATIONS: Final = 20_000
BASELINE: Final = "random"


@dataclass(frozen=True)
class Standing:
    """How one strategy did.

    Attributes:
        label: Of the contestant.
        finals: Best score of each seed.
        mean: Of them.
        interval: Its 95 % bootstrap interval.
        spread: Their standard deviation; 0 for one seed.
        median: Of them.
        regret: Mean distance to the known optimum; `None` where it is not known.
        strategy_s: Mean seconds that the strategy took for one evaluation, its training included.
        failed: Searches that ended with an error.
        error: Of the first of them.
        training_s: Mean seconds of a search in which it was trained together with a supernet; 0 for one that
            is not.
    """

    label: str
    finals: tuple[float, ...]
    mean: float
    interval: tuple[float, float]
    spread: float
    median: float
    regret: float | None
    strategy_s: float
    failed: int
    error: str = ""
    training_s: float = 0.0


@dataclass(frozen=True)
class Pair:
    """Two strategies compared by the Mann-Whitney U test, two-sided.

    Attributes:
        first: One label.
        second: The other.
        difference: Median of the first minus median of the second.
        p: Probability of ranks at least as different if both were alike.
        corrected: The same after Holm's correction for the number of pairs.
    """

    first: str
    second: str
    difference: float
    p: float
    corrected: float


def standings(cells: Sequence[Cell], evaluations: int, optimum: float | None = None) -> list[Standing]:
    """Return how every strategy did, the best mean first; failed searches are counted, not averaged."""
    result = []
    for label, group in _by_label(cells).items():
        ended = [cell for cell in group if not cell.error and cell.best]
        error = next((cell.error for cell in group if cell.error), "")
        finals = np.array([cell.curve(evaluations)[-1] for cell in ended])
        if not len(finals):
            none = math.nan
            result.append(Standing(label, (), none, (none, none), 0.0, none, None, 0.0, len(group), error))
            continue
        count = sum(len(cell.scores) for cell in ended)
        result.append(
            Standing(
                label=label,
                finals=tuple(finals.tolist()),
                mean=float(finals.mean()),
                interval=interval_of_mean(finals),
                spread=float(finals.std(ddof=1)) if len(finals) > 1 else 0.0,
                median=float(np.median(finals)),
                regret=None if optimum is None else float((optimum - finals).mean()),
                strategy_s=sum(cell.strategy_s for cell in ended) / max(count, 1),
                failed=len(group) - len(ended),
                error=error,
                training_s=sum(cell.training_s for cell in ended) / len(ended),
            )
        )
    return sorted(result, key=lambda standing: -standing.mean if standing.finals else math.inf)


def interval_of_mean(values: Values) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean (percentiles, Efron & Tibshirani 1993, section 13.3)."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def curves(cells: Sequence[Cell], evaluations: int) -> dict[str, NDArray[np.float64]]:
    """Return, for every strategy, mean and interval of the best score so far, `(3, evaluations)`."""
    result = {}
    rng = np.random.default_rng(0)
    for label, group in _by_label(cells).items():
        runs = np.array([cell.curve(evaluations) for cell in group if not cell.error and cell.best])
        if not len(runs):
            continue
        draws = rng.integers(len(runs), size=(RESAMPLES // 4, len(runs)))
        means = runs[draws].mean(axis=1)
        ends = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
        result[label] = np.stack([runs.mean(axis=0), *ends])
    return result


def curves_over_seconds(cells: Sequence[Cell], points: int = 200) -> dict[str, NDArray[np.float64]]:
    """Return, for every strategy, seconds and the mean best score by then, `(2, points)`.

    Seconds are those of evaluations and of the strategy itself; its training comes before all evaluations,
    the rest is spread evenly. The axis begins when every seed has a score, and ends when the first seed has
    ended.
    """
    result = {}
    for label, group in _by_label(cells).items():
        ended = [cell for cell in group if not cell.error and cell.best]
        if not ended:
            continue
        elapsed = [
            cell.training_s
            + np.cumsum(cell.evaluation_s)
            + np.arange(1, len(cell.scores) + 1) * (cell.strategy_s - cell.training_s) / len(cell.scores)
            for cell in ended
        ]
        runs = [cell.curve(len(cell.scores)) for cell in ended]
        first = max(times[int(np.isfinite(run).argmax())] for times, run in zip(elapsed, runs, strict=True))
        last = max(first, min(times[-1] for times in elapsed))
        axis = np.linspace(first, last, points)
        at = [
            run[np.searchsorted(times, axis, side="right").clip(1) - 1]
            for times, run in zip(elapsed, runs, strict=True)
        ]
        result[label] = np.stack([axis, np.mean(at, axis=0)])
    return result


def pairs(found: Sequence[Standing]) -> list[Pair]:
    """Return all pairs of strategies with two final scores at least, p-values corrected together.

    Source: Mann & Whitney 1947; Holm 1979. Of few seeds all permutations are counted: the normal
    approximation, which scipy takes where there are ties, finds differences that three seeds cannot show.
    """
    able = [standing for standing in found if len(standing.finals) > 1]  # one has no rank among its own
    compared = []
    for first, second in combinations(able, 2):
        compared.append((first, second, _mann_whitney(first.finals, second.finals)))
    corrected = holm([p for *_, p in compared])
    return [
        Pair(a.label, b.label, a.median - b.median, p, after)
        for (a, b, p), after in zip(compared, corrected, strict=True)
    ]


def _mann_whitney(one: Sequence[float], other: Sequence[float]) -> float:
    from scipy.stats import PermutationMethod, mannwhitneyu

    if len({*one, *other}) == 1:
        return 1.0
    few = math.comb(len(one) + len(other), len(one)) <= MAX_PERMUTATIONS
    method = PermutationMethod(n_resamples=MAX_PERMUTATIONS) if few else "auto"
    return float(mannwhitneyu(one, other, method=method).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down procedure."""
    order = np.argsort(values, kind="stable")
    result = np.zeros(len(values))
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        result[index] = largest
    return [float(value) for value in result]


def seeds_needed(comparisons: int) -> int:
    """Return from how many seeds on the test can show any difference, if all ranks agree."""
    count = 1
    while comparisons * 2 / math.comb(2 * count, count) > SIGNIFICANT:
        count += 1
    return count


def verdicts(found: Sequence[Standing], compared: Sequence[Pair], baseline: str = BASELINE) -> list[str]:
    """Say in plain words which strategies are better than the baseline, which are not, and which failed."""
    result = [
        f"{standing.label}: {standing.failed} of {standing.failed + len(standing.finals)} searches failed, "
        f"the first with: {standing.error}"
        for standing in found
        if standing.failed
    ]
    known = {standing.label: standing for standing in found if standing.finals}
    if baseline not in known:
        failed = any(standing.label == baseline for standing in found)
        lack = (
            f"every search of {baseline!r} failed:"
            if failed
            else f"without {baseline!r} among the strategies"
        )
        return [*result, f"{lack} nobody can say whether any is worth it"]
    against = {pair.first if pair.second == baseline else pair.second: pair for pair in compared
               if baseline in (pair.first, pair.second)}  # fmt: skip
    result += [
        _verdict(standing, known[baseline], against.get(label))
        for label, standing in known.items()
        if label != baseline
    ]
    most = max(len(standing.finals) for standing in known.values())
    tests = math.comb(len(known), 2)
    if tests and most < seeds_needed(tests):
        result.append(
            f"with {counted(most, 'seed')} and {counted(tests, 'pair')} the test cannot show any difference; "
            f"it can from {seeds_needed(tests)} seeds on"
        )
    return result


def _verdict(one: Standing, baseline: Standing, pair: Pair | None) -> str:
    """Say how a strategy did against the baseline; without a pair no test was possible."""
    gain = f"median {one.median - baseline.median:+z.4g}"
    if pair is None:
        return f"{one.label}: no test against random search is possible with a single score ({gain})"
    facts = f"{gain}, p = {pair.corrected:.3g} after correction"
    if pair.corrected > SIGNIFICANT:
        return f"{one.label}: no better than random search can be shown ({facts})"
    if _wins(one, baseline):
        return f"{one.label}: better than random search ({facts})"
    return f"{one.label}: WORSE than random search ({facts})"


def early_ends(cells: Sequence[Cell], evaluations: int) -> list[str]:
    """Say which strategies had nothing new to propose before all evaluations were made, and when."""
    said = []
    for label, group in _by_label(cells).items():
        made = sorted(len(cell.scores) for cell in group if cell.best and len(cell.scores) < evaluations)
        if made:
            span = f"{made[0]}" if made[0] == made[-1] else f"{made[0]} to {made[-1]}"
            said.append(
                f"{label}: {len(made)} of {len(group)} searches ended after {span} of {evaluations} "
                "evaluations, with nothing new to propose"
            )
    return said


def trainings(found: Sequence[Standing], prepared: str) -> list[str]:
    """Say which strategies were trained together with a supernet, in how many seconds, and who else paid.

    Args:
        found: How every strategy did.
        prepared: See `Problem`.
    """
    said = [
        f"{standing.label}: trained together with a supernet of its own, {standing.training_s:.1f} s a "
        "search, which are in its own seconds; what it derived is scored as every other network is"
        for standing in found
        if standing.training_s
    ]
    return [*said, prepared] if said and prepared else said


def counted(count: int, noun: str) -> str:
    """Return a number of things in words: `1 seed`, `2 seeds`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _wins(one: Standing, other: Standing) -> bool:
    """Whether a final score of one is more often above one of the other than below."""
    return float(np.sign(np.subtract.outer(one.finals, other.finals)).sum()) > 0


def _by_label(cells: Sequence[Cell]) -> Mapping[str, list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.label, []).append(cell)
    return groups
