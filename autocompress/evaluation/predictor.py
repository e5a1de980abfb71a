"""Accuracy predictors: a regression from genes to a metric, judged on architectures it never saw.

What they return is a prediction, and its name says so (`predicted_accuracy` by default): it never stands in
the column of a measured value.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from autocompress.cost import Cost, Values
from autocompress.errors import DataError
from autocompress.evaluation.regression import KINDS, Kind, Model, make_model
from autocompress.space import Codes, SearchSpace

MIN_ROWS, MIN_HELD_OUT = 10, 4
"""Fewest distinct architectures in all, and to judge the predictor; so few give a very wide interval."""
RESAMPLES = 500
CONFIDENCE = 0.95
FOLDS = 5


@final
@dataclass(eq=False)
class FittedPredictor:
    """A predictor trained on all architectures, with its quality on held-out ones; an `Evaluator`.

    Attributes:
        space: The space of the architectures.
        metric: The name of the prediction.
        kind: One of `KINDS`.
        model: Trained on all rows.
        rows: Rows it was trained on.
        held_out_rows: Rows that judged it, when it was trained on the others only.
        kendall_tau: Rank correlation (tau-b) of prediction and value on the held-out rows: 1 is the same
            order, 0 is no relation.
        kendall_tau_interval: Its 95 % bootstrap interval.
        mean_absolute_error: On the held-out rows, in the unit of the values.
        paid: False: a prediction is no trial.
    """

    space: SearchSpace
    metric: str
    kind: Kind
    model: Model
    rows: int
    held_out_rows: int
    kendall_tau: float
    kendall_tau_interval: tuple[float, float]
    mean_absolute_error: float
    paid: bool = False

    def __call__(self, codes: Codes) -> dict[str, Values]:
        """Return the predicted metric of every row, `(n,)`.

        The same rows in a batch of another size can differ in the last bits of a float.
        """
        return {self.metric: self.model.predict(codes)}

    def __str__(self) -> str:
        low, high = self.kendall_tau_interval
        return (
            f"{self.kind} predictor of {self.metric}: Kendall tau {self.kendall_tau:.3f} "
            f"({CONFIDENCE:.0%} interval {low:.3f} to {high:.3f}), mean absolute error "
            f"{self.mean_absolute_error:.4g}, on {self.held_out_rows} held-out of {self.rows} sub-networks"
        )


def fit(
    space: SearchSpace,
    codes: Codes,
    values: Values,
    *,
    kind: Kind = "ridge",
    costs: Sequence[Cost] = (),
    held_out: float = 0.2,
    seed: int = 0,
    metric: str = "predicted_accuracy",
    epochs: int = 200,
) -> FittedPredictor:
    """Judge a predictor on held-out architectures, then train it on all.

    Args:
        space: The space.
        codes: Evaluated architectures `(n, choices)`. All rows of one network are held out together.
        values: What was measured `(n,)`, any unit.
        kind: `"gaussian_process"`, the best up to some thousand rows; `"ridge"`, good from 50 rows on and
            trained in milliseconds; `"mlp"`, for thousands.
        costs: Costs whose logarithms are features beside the genes; MACs make every kind better.
        held_out: Share of the distinct architectures that judge the predictor, above 0 and below 1.
        seed: Chooses the held-out architectures, the initial weights and the order of training.
        metric: Name of the prediction.
        epochs: Passes over the data; of the MLP only.

    Raises:
        DataError: Too few rows, shapes that do not fit, values that are not finite or all equal.
        SpaceError: Rows are not of the space.
    """
    space.validate(codes)
    values = np.asarray(values, dtype=np.float64)
    _check(codes, values, kind=kind, held_out=held_out)
    if len(values) and np.ptp(values) == 0:
        raise DataError(f"the {len(values)} values are all {values[0]:g}: nothing can be learned of them")
    codes = space.canonical(codes)
    networks, network = np.unique(codes, axis=0, return_inverse=True)
    network = network.reshape(-1)
    away = max(MIN_HELD_OUT, round(held_out * len(networks)))
    if len(networks) < MIN_ROWS or len(networks) - away < 2:
        raise DataError(
            f"a predictor needs at least {MIN_ROWS} distinct architectures, 2 of them for training, got "
            f"{len(networks)} and held_out {held_out:g}: evaluate more sub-networks"
        )
    rng = np.random.default_rng(seed)
    judges = np.isin(network, rng.permutation(len(networks))[:away])

    def model() -> Model:
        return make_model(kind, space, costs, seed=seed, epochs=epochs)

    predicted = model().fit(codes[~judges], values[~judges]).predict(codes[judges])
    tau, interval = kendall_tau(predicted, values[judges], rng)
    return FittedPredictor(
        space=space,
        metric=metric,
        kind=kind,
        model=model().fit(codes, values),
        rows=len(values),
        held_out_rows=int(judges.sum()),
        kendall_tau=tau,
        kendall_tau_interval=interval,
        mean_absolute_error=float(np.abs(predicted - values[judges]).mean()),
    )


def cross_validate(
    model: Callable[[], Model], codes: Codes, values: Values, *, seed: int, folds: int = FOLDS
) -> float:
    """Return Kendall's tau of predictions, each by a model that was trained on the other folds.

    It serves to choose between models by rows for training alone.

    Args:
        model: Makes an untrained model.
        codes: Canonical, distinct, `(n, choices)`.
        values: `(n,)`.
        seed: Deals the rows to the folds.
        folds: At most n.
    """
    from scipy.stats import kendalltau

    fold = np.random.default_rng(seed).permutation(len(values)) % folds
    predicted = np.empty(len(values))
    for away in range(folds):
        judges = fold == away
        predicted[judges] = model().fit(codes[~judges], values[~judges]).predict(codes[judges])
    return float(kendalltau(predicted, values).statistic)


def kendall_tau(first: Values, second: Values, rng: np.random.Generator) -> tuple[float, tuple[float, float]]:
    """Return Kendall's rank correlation (tau-b) of two `(n,)` and its 95 % bootstrap interval.

    Where all values of one side are equal there is no order to agree with: 0.

    Args:
        first: One ranking.
        second: The other.
        rng: Draws the resamples.
    """
    from scipy.stats import kendalltau

    def tau(rows: NDArray[np.intp]) -> float:
        value = float(kendalltau(first[rows], second[rows]).statistic)
        return value if np.isfinite(value) else 0.0

    count = len(first)
    resampled = [tau(rng.integers(count, size=count)) for _ in range(RESAMPLES)]
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return tau(np.arange(count)), (float(low), float(high))


def _check(codes: Codes, values: Values, *, kind: str, held_out: float) -> None:
    if kind not in KINDS:
        raise DataError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if not 0 < held_out < 1:
        raise DataError(f"held_out must be above 0 and below 1, got {held_out!r}")
    if values.shape != (len(codes),):
        raise DataError(f"values must have shape ({len(codes)},), one a row of codes, got {values.shape}")
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise DataError(
            f"values must be finite; {len(wrong)} of {len(values)} are not, the first is row {wrong[0]} with "
            f"{values[wrong[0]]}: leave failed evaluations out"
        )
