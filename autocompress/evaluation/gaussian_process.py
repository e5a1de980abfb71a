"""A Gaussian process over the rows of any search space: predictions with a spread, from few evaluations.

The value of a network is a sum of effects, each with a kernel of its own; how much each matters is learned:

- `genes`: every gene adds its part, whatever the others are;
- `pairs`: every pair of genes adds its part;
- `near`: networks are alike that differ in few genes, and in those by few steps of an ordinal choice;
- `costs`: linear in the logarithms of the costs (MACs, parameters, latency: whatever the space is priced by);
- `curve`: a smooth function of them.

Source: Rasmussen & Williams, Gaussian Processes for Machine Learning, MIT Press 2006: algorithm 2.1, section
5.4.1 (marginal likelihood and its gradient), section 5.4.2 (leave-one-out). A sum of kernels with learned
weights is a Bayesian form of the additive and pairwise encodings of architectures.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Self, final, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular
from scipy.optimize import minimize

from autocompress.cost import Cost, Values
from autocompress.space import Codes, SearchSpace

Effect = Literal["genes", "pairs", "near", "costs", "curve"]
EFFECTS: tuple[Effect, ...] = get_args(Effect)

Matrix = NDArray[np.float64]

# Prior of the logarithm of each weight: all effects together explain half of the (unit) variance, and noise a
# tenth, within about a factor of e. It keeps fits to a handful of rows sober.
EXPLAINED, NOISE, PRIOR_SPREAD = 0.5, 0.1, 1.0
LOG_WEIGHTS, LOG_NOISE = (-12.0, 5.0), (-9.0, 2.0)
MAX_ITERATIONS = 30
# Networks that differ in all genes are alike to exp(-3).
NEAR_RATE = 3.0
# Standardised logarithms of costs that differ by 2 are alike to exp(-1).
CURVE_WIDTH = 2.0
MAX_DEVIATIONS = 4.0
TINY = 1e-12
CHUNK_ROWS = 4096


class Rows(NamedTuple):
    """Architectures as the kernels see them.

    Attributes:
        genes: One column an option, and one for no effect, of every choice, 0 or 1: `(n, columns)`.
        steps: Columns whose squared distances add up to the steps between two rows, 1 a choice at most.
        costs: Logarithms of the costs, `(n, costs)`.
    """

    genes: Matrix
    steps: Matrix
    costs: Matrix


@final
class Encoding:
    """Turns codes into what kernels work on."""

    def __init__(self, space: SearchSpace, costs: Sequence[Cost] = ()) -> None:
        """Make the encoding of a space, with the costs that are features too."""
        self._space, self._costs = space, tuple(costs)
        self.choices = max(1, int((space.counts > 1).sum()))

    def rows(self, codes: Codes) -> Rows:
        """Return the features of canonical `codes (n, choices)`."""
        active = self._space.active(codes)
        genes, steps = [], []
        for position, choice in enumerate(self._space.choices):
            count = len(choice.options)
            if count == 1:
                continue
            # No effect is an option of its own, below the first.
            option = np.where(active[:, position], codes[:, position] + 1, 0)
            one_hot = (option[:, None] == np.arange(count + 1)).astype(np.float64)
            genes.append(one_hot)
            if choice.ordinal:
                # Unary: the squared distance of two options is their difference.
                unary = (option[:, None] > np.arange(1, count)).astype(np.float64)
                steps += [unary / np.sqrt(count - 1), one_hot[:, :1]]
            else:
                steps.append(one_hot / np.sqrt(2))
        none = np.zeros((len(codes), 0))
        return Rows(np.hstack([none, *genes]), np.hstack([none, *steps]), log_costs(self._costs, codes))


def log_costs(costs: Sequence[Cost], codes: Codes) -> Matrix:
    """Return the logarithms of the costs of every row, `(n, costs)`; a cost of 0 counts as nearly none."""
    columns = [np.log(np.maximum(cost.of(codes), TINY)) for cost in costs]
    return np.stack(columns, axis=1) if columns else np.zeros((len(codes), 0))


@final
class GaussianProcess:
    """Regression with a spread. Deterministic; a fit takes some 10 ms for 100 rows and 0.5 s for 500."""

    def __init__(
        self, space: SearchSpace, costs: Sequence[Cost] = (), *, effects: Sequence[Effect] = EFFECTS
    ) -> None:
        """Make the process, untrained.

        Args:
            space: The space of the rows.
            costs: Costs that are features too.
            effects: What values are a sum of.
        """
        self._encoding = Encoding(space, costs)
        self._effects = tuple(e for e in effects if costs or e not in ("costs", "curve"))
        self.weights: Values = np.zeros(len(self._effects))
        """Share of each effect, of the variance of the values, after `fit`; in the order of `effects`."""
        self.noise = 0.0
        """Variance of values around what the effects explain, in their unit squared, after `fit`."""

    def fit(self, codes: Codes, values: Values) -> Self:
        """Learn weights and noise by their posterior mode, then condition on the values.

        Args:
            codes: Canonical, `(n, choices)`; repetitions are allowed.
            values: `(n,)`, finite.
        """
        rows = self._encoding.rows(codes)
        self._cost_mean, self._cost_scale = rows.costs.mean(axis=0), rows.costs.std(axis=0)
        self._rows = self._standardised(rows)
        # Values that are all equal have no scale of their own.
        self._mean, self._scale = float(values.mean()), float(values.std()) or 1.0
        targets = (values - self._mean) / self._scale
        kernels = np.stack(list(self._kernels(self._rows, self._rows)))
        spread = np.trace(kernels, axis1=1, axis2=2) / len(values) - kernels.mean(axis=(1, 2))
        # What does not vary among the rows explains nothing.
        self._unit = np.where(spread > 1e-9, 1.0 / np.maximum(spread, 1e-9), 0.0)
        kernels *= self._unit[:, None, None]
        self.weights, noise = _weights(kernels, targets)
        covariance = np.tensordot(self.weights, kernels, 1) + 1.0
        covariance[np.diag_indices(len(values))] += noise
        self.noise = noise * self._scale**2
        self._factor = np.linalg.cholesky(covariance)
        self._dual = cho_solve((self._factor, True), targets)
        self._targets = targets
        return self

    def predict(self, codes: Codes) -> Values:
        """Return the expected value of every row, `(n,)`."""
        result = np.empty(len(codes))
        for start in range(0, len(codes), CHUNK_ROWS):
            chunk = self._standardised(self._encoding.rows(codes[start : start + CHUNK_ROWS]))
            result[start : start + CHUNK_ROWS] = self._cross(chunk, self._rows) @ self._dual
        return result * self._scale + self._mean

    def with_spread(self, codes: Codes) -> tuple[Values, Values]:
        """Return expectations and standard deviations of the values without their noise, `(n,)` both."""
        means, variances = np.empty(len(codes)), np.empty(len(codes))
        for start in range(0, len(codes), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            rows = self._standardised(self._encoding.rows(codes[part]))
            cross = self._cross(rows, self._rows)
            whitened = solve_triangular(self._factor, cross.T, lower=True)
            means[part] = cross @ self._dual
            variances[part] = self._own(rows) - np.square(whitened).sum(axis=0)
        return means * self._scale + self._mean, np.sqrt(np.maximum(variances, 0.0)) * self._scale

    def joint(self, codes: Codes) -> tuple[Values, Matrix]:
        """Return expectations `(n,)` and covariances `(n, n)` of the values without their noise."""
        rows = self._standardised(self._encoding.rows(codes))
        cross = self._cross(rows, self._rows)
        whitened = solve_triangular(self._factor, cross.T, lower=True)
        covariance = self._cross(rows, rows) - whitened.T @ whitened
        return cross @ self._dual * self._scale + self._mean, covariance * self._scale**2

    def leave_one_out(self) -> Values:
        """Return what is predicted for each row of the fit from the others under the same weights, `(n,)`."""
        inverse = cho_solve((self._factor, True), np.eye(len(self._targets)))
        left_out: Values = self._targets - self._dual / np.diag(inverse)
        return left_out * self._scale + self._mean

    def _standardised(self, rows: Rows) -> Rows:
        scale = np.where(self._cost_scale > 0, self._cost_scale, 1.0)
        costs = np.clip((rows.costs - self._cost_mean) / scale, -MAX_DEVIATIONS, MAX_DEVIATIONS)
        return rows._replace(costs=costs)

    def _cross(self, one: Rows, other: Rows) -> Matrix:
        """Return the weighted kernels of two sets of rows, with the constant one of the unknown mean."""
        result = np.ones((len(one.genes), len(other.genes)))
        for weight, kernel in zip(self.weights * self._unit, self._kernels(one, other), strict=True):
            kernel *= weight
            result += kernel
        return result

    def _own(self, rows: Rows) -> Values:
        """Return the weighted kernels of every row with itself, `(n,)`."""
        result = np.ones(len(rows.genes))
        for effect, weight in zip(self._effects, self.weights * self._unit, strict=True):
            result += weight * (np.square(rows.costs).sum(axis=1) if effect == "costs" else 1.0)
        return result

    def _kernels(self, one: Rows, other: Rows) -> Iterator[Matrix]:
        """Yield the kernel of every effect, `(n, m)`; the caller may write into it."""
        choices = self._encoding.choices
        agreement = one.genes @ other.genes.T / choices
        for effect in self._effects:
            match effect:
                case "genes":
                    yield agreement.copy()
                case "pairs":
                    yield np.square(agreement)
                case "near":
                    yield _alike(one.steps, other.steps, NEAR_RATE / choices)
                case "costs":
                    yield one.costs @ other.costs.T
                case "curve":
                    yield _alike(one.costs, other.costs, CURVE_WIDTH**-2)


def _alike(one: Matrix, other: Matrix, rate: float) -> Matrix:
    """Return `exp(-rate * squared distance)` of the rows of two matrices."""
    # In place: most of the time of a prediction goes into these matrices.
    result = one @ other.T
    result *= 2 * rate
    result -= rate * np.square(one).sum(axis=1)[:, None]
    result -= rate * np.square(other).sum(axis=1)
    np.minimum(result, 0.0, out=result)
    alike: Matrix = np.exp(result, out=result)
    return alike


def _weights(kernels: Matrix, targets: Values) -> tuple[Values, float]:
    """Return weights `(effects,)` and noise of greatest posterior density, for unit kernels and targets."""
    count = len(kernels)
    found = minimize(
        surprise,
        np.log([EXPLAINED / count] * count + [NOISE]),
        args=(kernels.reshape(count, -1), targets),
        jac=True,
        method="L-BFGS-B",
        bounds=[LOG_WEIGHTS] * count + [LOG_NOISE],
        options={"maxiter": MAX_ITERATIONS},
    )
    best = np.exp(found.x)
    return best[:count], float(best[count])


def surprise(logarithms: Values, flat: Matrix, targets: Values) -> tuple[float, Values]:
    """Return the negative log posterior density of weights, less a constant, and its gradient.

    Args:
        logarithms: Of the weights and of the noise, `(effects + 1,)`.
        flat: Kernels, `(effects, n * n)`.
        targets: `(n,)`, of mean 0 and variance 1.
    """
    count, rows = len(flat), len(targets)
    diagonal = np.diag_indices(rows)
    weights = np.exp(logarithms)
    covariance = (weights[:count] @ flat).reshape(rows, rows) + 1.0
    covariance[diagonal] += weights[count]
    factor = np.linalg.cholesky(covariance)
    inverse = cho_solve((factor, True), np.eye(rows))
    dual = inverse @ targets
    away = (logarithms - np.log([EXPLAINED / count] * count + [NOISE])) / PRIOR_SPREAD
    value = 0.5 * targets @ dual + np.log(factor[diagonal]).sum() + 0.5 * away @ away
    outer = np.outer(dual, dual) - inverse
    slopes = np.append(flat @ outer.ravel(), np.trace(outer))
    return float(value), -0.5 * weights * slopes + away / PRIOR_SPREAD
