"""Every error autocompress raises on bad input, under one root that also is the fitting built-in."""


class AutocompressError(Exception):
    """Root of all errors raised on purpose; the command line prints them without a traceback."""


class SpaceError(AutocompressError, ValueError):
    """A search space, or an architecture for it, is not well-formed."""


class CostError(AutocompressError, ValueError):
    """A cost cannot be compiled or priced."""


class BudgetError(AutocompressError, ValueError):
    """A budget is not well-formed: an unknown metric, a wrong unit, a wrong number."""


class InfeasibleBudgetError(BudgetError):
    """No architecture of the space fits the budget.

    Attributes:
        nearest: The nearest feasible budget, metric to limit, in the metric's own unit.
    """

    def __init__(self, message: str, nearest: dict[str, float]) -> None:
        super().__init__(message)
        self.nearest = nearest

    def __reduce__(self) -> tuple[type["InfeasibleBudgetError"], tuple[str, dict[str, float]]]:
        """Pickle with the nearest budget: search workers send their errors home."""
        return type(self), (str(self), self.nearest)


class TableError(AutocompressError, ValueError):
    """A latency table is damaged, is of another target, or lacks rows."""


class ConversionError(AutocompressError, ValueError):
    """A model of the user cannot be looked into, or cannot be narrowed."""


class QuantizationError(AutocompressError, ValueError):
    """A model, a width or calibration data cannot be quantized as asked."""


class FactorizationError(AutocompressError, ValueError):
    """A layer or a model cannot be factorized as asked."""


class NegativeLatencyError(TableError):
    """By a latency table some network of a space would take less than no time."""


class MissingRowError(TableError, KeyError):
    """A latency table has no row for an operation or a block."""

    def __str__(self) -> str:
        # KeyError would print the message in quotes.
        return str(self.args[0])


class ToleranceError(AutocompressError, ValueError):
    """No network was found that loses as little as asked for, or there is nothing to compare it with."""


class DataError(AutocompressError, ValueError):
    """A data set is missing, damaged or of the wrong shape."""


class CheckpointError(AutocompressError, ValueError):
    """A checkpoint is damaged or belongs to another space, step or version."""


class DistillationError(AutocompressError, ValueError):
    """A student cannot be compared with its teacher, or not as asked."""


class TrainingError(AutocompressError, RuntimeError):
    """Training cannot go on: the loss is not finite, or collapses again after every roll-back."""


class EvaluationError(AutocompressError, RuntimeError):
    """One architecture could not be evaluated; the search tells it as failed and goes on."""


class StrategyError(AutocompressError, RuntimeError):
    """A search strategy raised, took too long, or proposed what is not in the space."""


class StorageError(AutocompressError, OSError):
    """A run directory, a journal or a history file cannot be read or written."""


class RecipeError(AutocompressError, ValueError):
    """A recipe or a command-line option is wrong; the message has the path of the key."""


class PolicyError(AutocompressError, ValueError):
    """A compression policy names passes or settings that there are not, or that cannot be done."""


class PluginError(AutocompressError, LookupError):
    """No search space or strategy has that name, or it cannot be imported."""


class ExportError(AutocompressError, RuntimeError):
    """An exported network differs from the PyTorch network, or could not be written."""
