"""What an evaluator is: it turns architectures into metrics."""

from collections.abc import Mapping
from typing import Protocol

from autocompress.cost import Values
from autocompress.space import Codes


class Evaluator(Protocol):
    """Scores architectures; deterministic in the codes, picklable, one row independent of the others.

    Attributes:
        paid: Whether an evaluation is worth keeping as a trial (a supernet slice, training, a measurement).
            Paid evaluators get one row a call; others (predictors, tables) get all rows of a batch at once.
    """

    @property
    def paid(self) -> bool:
        """Whether an evaluation is worth keeping as a trial."""

    def __call__(self, codes: Codes) -> Mapping[str, Values]:
        """Return each metric as `(n,)` for `codes (n, choices)`.

        Raises:
            EvaluationError: The architecture could not be evaluated; the search goes on without it.
        """
