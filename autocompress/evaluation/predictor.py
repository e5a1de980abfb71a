"""Accuracy predictors: a regression from genes to a metric, judged on architectures it never saw.

What they return is a prediction, and its name says so (`predicted_accuracy` by default): it never stands in
the column of a measured value.
"""

import itertools
from dataclasses import dataclass
from typing import Literal, Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.cost import Values
from autocompress.errors import DataError
from autocompress.space import Codes, SearchSpace

MIN_ROWS, MIN_HELD_OUT = 10, 4
"""Fewest distinct architectures in all, and to judge the predictor; so few give a very wide interval."""
RESAMPLES = 500
CONFIDENCE = 0.95
RIDGE_PENALTIES = np.logspace(-3, 4, 29)

Features = NDArray[np.float32]


@final
class RidgePredictor:
    """Linear regression on one-hot genes, its penalty chosen by leave-one-out errors.

    On published once-for-all sub-networks it orders as well as the 400x3 network does, from 200 samples.
    """

    def __init__(self) -> None:
        """Start untrained."""
        self.penalty = float("nan")
        self.leave_one_out_error = float("nan")
        self._weights: Values = np.zeros(0)
        self._constant = 0.0

    def fit(self, features: Features, values: Values) -> Self:
        """Fit, for every penalty of `RIDGE_PENALTIES` at once, and keep the one that predicts best.

        The leave-one-out error of row i is `residual_i / (1 - h_i)`, h the diagonal of the matrix that maps
        values to predictions; one singular value decomposition serves all penalties.

        `leave_one_out_error` is the mean square of the errors under the penalty that was kept.

        Source: Hastie, Tibshirani & Friedman, The Elements of Statistical Learning, 2nd ed., section 7.10.

        Args:
            features: `(n, features)`.
            values: `(n,)`.
        """
        matrix = features.astype(np.float64)
        center, mean = matrix.mean(axis=0), float(values.mean())
        left, singular, right = np.linalg.svd(matrix - center, full_matrices=False)
        projected = left.T @ (values - mean)
        # (penalties, components): how much of each component is kept.
        kept = singular**2 / (singular**2 + RIDGE_PENALTIES[:, None])
        residuals = (values - mean) - (kept * projected) @ left.T
        leverage = 1.0 / len(values) + kept @ (left**2).T
        errors = ((residuals / np.maximum(1.0 - leverage, 1e-12)) ** 2).mean(axis=1)
        best = int(errors.argmin())
        self.penalty, self.leave_one_out_error = float(RIDGE_PENALTIES[best]), float(errors[best])
        self._weights = right.T @ (singular / (singular**2 + self.penalty) * projected)
        self._constant = mean - float(center @ self._weights)
        return self

    def predict(self, features: Features) -> Values:
        """Return predictions `(n,)` for features `(n, features)`."""
        result: Values = features @ self._weights + self._constant
        return result


@final
class MLPPredictor:
    """The once-for-all predictor: three hidden layers of 400 with ReLU, trained by Adam.

    Values are standardised for training, so that it works alike on percent and on fractions; the mean of
    the values is thus the output's bias, and the learning rate falls to zero along a cosine.

    Source: Cai et al., Once-for-All, ICLR 2020; learning rate and weight decay as its authors state them
    (mit-han-lab/once-for-all, issue 30).
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        width: int = 400,
        depth: int = 3,
        epochs: int = 200,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
    ) -> None:
        """Make the predictor, untrained."""
        self._seed, self._width, self._depth = seed, width, depth
        self._epochs, self._batch_size = epochs, batch_size
        self._learning_rate, self._weight_decay = learning_rate, weight_decay
        self._network = nn.Sequential()
        self._mean, self._scale = 0.0, 1.0

    def _build(self, inputs: int) -> nn.Sequential:
        sizes = [inputs, *[self._width] * self._depth]
        # The global generator is left as it was found.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            layers: list[nn.Module] = []
            for before, after in itertools.pairwise(sizes):
                layers += [nn.Linear(before, after), nn.ReLU()]
            layers.append(nn.Linear(sizes[-1], 1))
        return nn.Sequential(*layers)

    def fit(self, features: Features, values: Values) -> Self:
        """Train from scratch on features `(n, features)` and values `(n,)`; deterministic under the seed."""
        # Values that are all equal have no scale of their own.
        self._mean, self._scale = float(values.mean()), float(values.std()) or 1.0
        inputs = torch.from_numpy(features)
        targets = torch.from_numpy((values - self._mean) / self._scale).float()
        network = self._build(inputs.shape[1])
        optimizer = torch.optim.Adam(
            network.parameters(), lr=self._learning_rate, weight_decay=self._weight_decay
        )
        steps = self._epochs * -(-len(inputs) // self._batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        shuffler = torch.Generator().manual_seed(self._seed)
        for _ in range(self._epochs):
            order = torch.randperm(len(inputs), generator=shuffler)
            for rows in torch.split(order, self._batch_size):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(network(inputs[rows])[:, 0], targets[rows])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
        self._network = network.eval().requires_grad_(False)
        return self

    def predict(self, features: Features) -> Values:
        """Return predictions `(n,)` for features `(n, features)`."""
        with torch.inference_mode():
            output: Tensor = self._network(torch.from_numpy(features))
        return output.numpy()[:, 0].astype(np.float64) * self._scale + self._mean


Kind = Literal["ridge", "mlp"]


@final
@dataclass(eq=False)
class FittedPredictor:
    """A predictor trained on all architectures, with its quality on held-out ones; an `Evaluator`.

    Attributes:
        space: The space of the architectures.
        metric: The name of the prediction.
        kind: `ridge` or `mlp`.
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
    model: RidgePredictor | MLPPredictor
    rows: int
    held_out_rows: int
    kendall_tau: float
    kendall_tau_interval: tuple[float, float]
    mean_absolute_error: float
    paid: bool = False

    def __call__(self, codes: Codes) -> dict[str, Values]:
        """Return the predicted metric of every row, `(n,)`.

        The same rows in a batch of another size can differ in the last bits of a 32-bit float.
        """
        return {self.metric: self.model.predict(self.space.one_hot(codes))}

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
        kind: `"ridge"`, good from 50 rows on and trained in milliseconds, or `"mlp"`, for thousands.
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
    networks, network = np.unique(space.canonical(codes), axis=0, return_inverse=True)
    network = network.reshape(-1)
    away = max(MIN_HELD_OUT, round(held_out * len(networks)))
    if len(networks) < MIN_ROWS or len(networks) - away < 2:
        raise DataError(
            f"a predictor needs at least {MIN_ROWS} distinct architectures, 2 of them for training, got "
            f"{len(networks)} and held_out {held_out:g}: evaluate more sub-networks"
        )
    rng = np.random.default_rng(seed)
    judges = np.isin(network, rng.permutation(len(networks))[:away])
    features = space.one_hot(space.canonical(codes))

    def model() -> RidgePredictor | MLPPredictor:
        return RidgePredictor() if kind == "ridge" else MLPPredictor(seed=seed, epochs=epochs)

    predicted = model().fit(features[~judges], values[~judges]).predict(features[judges])
    tau, interval = kendall_tau(predicted, values[judges], rng)
    return FittedPredictor(
        space=space,
        metric=metric,
        kind=kind,
        model=model().fit(features, values),
        rows=len(values),
        held_out_rows=int(judges.sum()),
        kendall_tau=tau,
        kendall_tau_interval=interval,
        mean_absolute_error=float(np.abs(predicted - values[judges]).mean()),
    )


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
    if kind not in ("ridge", "mlp"):
        raise DataError(f"kind must be 'ridge' or 'mlp', got {kind!r}")
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
