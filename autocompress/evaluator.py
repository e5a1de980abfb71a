"""What an evaluator is: it turns architectures into metrics."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from autocompress.cost import Values
from autocompress.errors import AutocompressError, EvaluationError
from autocompress.space import Codes


class Evaluator(Protocol):
    """Scores architectures; deterministic in the codes, picklable, one row independent of the others.

    Attributes:
        paid: Whether an evaluation is worth keeping as a trial (a supernet slice, training, a measurement).
            Paid evaluators get one row a call; free ones (predictors, tables) all rows of a batch at once.
    """

    @property
    def paid(self) -> bool:
        """Whether an evaluation is worth keeping as a trial."""

    def __call__(self, codes: Codes) -> Mapping[str, Values]:
        """Return each metric as `(n,)` for `codes (n, choices)`.

        Raises:
            EvaluationError: The architecture could not be evaluated; the search goes on without it.
        """


@runtime_checkable
class ParallelEvaluator(Evaluator, Protocol):
    """A paid evaluator of several architectures at a time, in processes of its own.

    Attributes:
        workers: How many at a time.
    """

    @property
    def workers(self) -> int:
        """How many architectures are evaluated at a time."""

    def submit(self, row: Codes) -> None:
        """Have `row (1, choices)` evaluated."""

    def result(self) -> Mapping[str, float] | Exception:
        """Wait for the row that was submitted first of those whose result was not taken, and take it.

        Returns:
            Its metrics, or why there are none.
        """

    def cancel(self) -> None:
        """Forget all rows whose results were not taken."""


def check_evaluator(evaluator: object) -> None:
    """Refuse what does not say whether it is paid, such as a plain function.

    Raises:
        AutocompressError: Says how to say it.
    """
    if not hasattr(evaluator, "paid"):
        name = _name(evaluator)
        raise AutocompressError(
            f"evaluator {name} has no attribute `paid`: True if a score is worth keeping as a trial (it gets "
            "one network a call), False if it costs nothing (a predictor, a table: it gets many); a function "
            f"is given one by `{name}.paid = True`"
        )


def metrics_of(evaluator: Evaluator, codes: Codes) -> Mapping[str, Any]:
    """Return what an evaluator gives for `codes (n, choices)`: each metric with `n` values.

    Raises:
        AutocompressError: It gives something else. What it raises itself is not caught.
    """
    found = evaluator(codes)
    wanted = f"evaluator {_name(evaluator)} must return each metric by its name, as an array of shape (n,)"
    if not isinstance(found, Mapping):
        raise AutocompressError(f"{wanted}, got {type(found).__name__}")
    for name, values in found.items():
        if np.shape(values) != (len(codes),):
            raise AutocompressError(
                f"{wanted}: for n = {len(codes)} networks it returned {name!r} of shape {np.shape(values)}"
            )
    return found


def evaluated(evaluator: Evaluator, codes: Codes) -> Mapping[str, float] | Exception:
    """Return the metrics of one row, or why there are none.

    Returns:
        `EvaluationError` for what concerns this row only; others of autocompress say that the evaluator is
        broken.
    """
    try:
        return {name: float(values[0]) for name, values in metrics_of(evaluator, codes).items()}
    except AutocompressError as error:
        return error
    except Exception as error:  # noqa: BLE001  (a user's evaluator may raise anything)
        return EvaluationError(f"{type(error).__name__}: {error}")


def unless_broken(found: Mapping[str, float] | Exception) -> Mapping[str, float] | Exception:
    """Return what `evaluated` says of a row, or why the row has no metrics.

    Raises:
        AutocompressError: It says that the evaluator is broken.
    """
    if isinstance(found, AutocompressError) and not isinstance(found, EvaluationError):
        raise found
    return found


def _name(evaluator: object) -> str:
    return str(getattr(evaluator, "__name__", type(evaluator).__name__))
