"""Regressions from architectures to a metric: ridge, the once-for-all network, a Gaussian process."""

import itertools
from collections.abc import Sequence
from typing import Literal, Protocol, Self, final, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.cost import Cost, Values
from autocompress.evaluation.ensemble import ProcessEnsemble
from autocompress.evaluation.gaussian_process import GaussianProcess, log_costs
from autocompress.space import Codes, SearchSpace

RIDGE_PENALTIES = np.logspace(-3, 4, 29)
# The penalty of a ridge falls on small columns more: a cost says more than one gene.
COST_SCALE = 4.0

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


Kind = Literal["ridge", "mlp", "gaussian_process", "ensemble"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Model(Protocol):
    """A regression on architectures."""

    def fit(self, codes: Codes, values: Values) -> Self:
        """Learn from canonical `codes (n, choices)` and values `(n,)`."""

    def predict(self, codes: Codes) -> Values:
        """Return predictions `(n,)`."""


@final
class FeatureModel:
    """A regression on features of the rows: one-hot genes, and the logarithms of costs."""

    def __init__(
        self, space: SearchSpace, costs: Sequence[Cost], regression: RidgePredictor | MLPPredictor
    ) -> None:
        """Make the model, untrained."""
        self._space, self._costs, self._regression = space, tuple(costs), regression
        self._mean = self._scale = np.zeros(0)

    def fit(self, codes: Codes, values: Values) -> Self:
        """Learn from canonical `codes (n, choices)` and values `(n,)`."""
        costs = log_costs(self._costs, codes)
        deviation = costs.std(axis=0)
        self._mean, self._scale = costs.mean(axis=0), np.where(deviation > 0, deviation, 1.0)
        self._regression.fit(self._features(codes), values)
        return self

    def predict(self, codes: Codes) -> Values:
        """Return predictions `(n,)`."""
        return self._regression.predict(self._features(codes))

    def _features(self, codes: Codes) -> Features:
        genes = self._space.one_hot(codes)
        if not self._costs:
            return genes
        costs = (log_costs(self._costs, codes) - self._mean) / self._scale
        return np.hstack([genes, (COST_SCALE * costs).astype(np.float32)])


def make_model(
    kind: Kind, space: SearchSpace, costs: Sequence[Cost] = (), *, seed: int = 0, epochs: int = 200
) -> Model:
    """Make an untrained model.

    Args:
        kind: One of `KINDS`.
        space: The space.
        costs: Costs whose logarithms are features, such as MACs, parameters, latency.
        seed: Of the MLP.
        epochs: Of the MLP.
    """
    match kind:
        case "ridge":
            return FeatureModel(space, costs, RidgePredictor())
        case "mlp":
            return FeatureModel(space, costs, MLPPredictor(seed=seed, epochs=epochs))
        case "gaussian_process":
            return GaussianProcess(space, costs)
        case "ensemble":
            return ProcessEnsemble(space, costs)
