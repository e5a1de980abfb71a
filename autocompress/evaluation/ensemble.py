"""Gaussian processes that see architectures differently, as one predictor; where they disagree, it is unsure.

Costs order the networks of most spaces well, and mislead where shape counts for more than size. A search that
trusts one view stays where that view is wrong; a member without costs disagrees there.
"""

from collections.abc import Sequence
from typing import Self, final

import numpy as np

from autocompress.cost import Cost, Values
from autocompress.evaluation.gaussian_process import GaussianProcess, Matrix
from autocompress.space import Codes, SearchSpace


@final
class ProcessEnsemble:
    """The even mixture of a process on genes and costs and one on genes alone, by its first two moments.

    Where a space has no costs there is one member. The spread is that of the members and between them, as in
    Lakshminarayanan et al., Simple and Scalable Predictive Uncertainty Estimation, NeurIPS 2017, section 2.4.
    """

    def __init__(self, space: SearchSpace, costs: Sequence[Cost] = ()) -> None:
        """Make the ensemble, untrained."""
        self.members = [GaussianProcess(space, given) for given in ([costs, []] if costs else [[]])]

    def fit(self, codes: Codes, values: Values) -> Self:
        """Fit every member to canonical `codes (n, choices)` and values `(n,)`."""
        for member in self.members:
            member.fit(codes, values)
        return self

    @property
    def noise(self) -> float:
        """Variance of values around what the members explain, their mean."""
        return float(np.mean([member.noise for member in self.members]))

    def predict(self, codes: Codes) -> Values:
        """Return the expected value of every row, `(n,)`."""
        return _mean([member.predict(codes) for member in self.members])

    def with_spread(self, codes: Codes) -> tuple[Values, Values]:
        """Return expectations and standard deviations of the values without their noise, `(n,)` both."""
        parts = [member.with_spread(codes) for member in self.members]
        means = _mean([part for part, _ in parts])
        variances = _mean([spread**2 + (part - means) ** 2 for part, spread in parts])
        return means, np.sqrt(variances)

    def joint(self, codes: Codes) -> tuple[Values, Matrix]:
        """Return expectations `(n,)` and covariances `(n, n)` of the values without their noise."""
        parts = [member.joint(codes) for member in self.members]
        means = _mean([part for part, _ in parts])
        return means, _mean([matrix + np.outer(part - means, part - means) for part, matrix in parts])

    def leave_one_out(self) -> Values:
        """Return what is predicted for each row of the fit from the others under the same weights, `(n,)`."""
        return _mean([member.leave_one_out() for member in self.members])


def _mean(parts: Sequence[Matrix]) -> Matrix:
    mean: Matrix = np.mean(parts, axis=0)
    return mean
