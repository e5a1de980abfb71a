"""Budgets inside a loss: how an expected cost above, or below, its limit changes what is minimised.

Expectations only: the network that comes out is derived under the budget and priced anew
(`Relaxation.derive`). Each form takes the loss of the task and the ratios of expected costs to their limits.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, final, get_args

from autocompress.errors import RecipeError

Form = Literal["none", "product_log", "additive", "hinge", "lagrangian"]
FORMS: tuple[Form, ...] = get_args(Form)


class Penalty(Protocol):
    """A budget form; tensors of PyTorch in, a tensor out."""

    def __call__(self, loss: Any, ratios: Mapping[str, Any]) -> Any:
        """Return what is minimised.

        Args:
            loss: Of the task, a scalar.
            ratios: Metric to expected cost divided by its limit, scalars.
        """

    def update(self, ratios: Mapping[str, float]) -> None:
        """Learn from the ratios of a step; multipliers only."""

    def state_dict(self) -> dict[str, Any]:
        """Return what `update` changed."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""


class _Fixed:
    """A form that learns nothing."""

    def update(self, ratios: Mapping[str, float]) -> None:
        """Learn nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take nothing."""


@final
@dataclass
class NoPenalty(_Fixed):
    """The loss alone; the budget holds when the network is derived."""

    def __call__(self, loss: Any, ratios: Mapping[str, Any]) -> Any:
        """Return the loss."""
        return loss


@final
@dataclass
class ProductLog(_Fixed):
    """`scale * loss * prod (1 + ln ratio)^beta`: ProxylessNAS.

    Source: Cai et al., ProxylessNAS, ICLR 2019, and its repository (`mul#log`), which takes
    `(ln E / ln ref)^beta` of milliseconds, about 80 of them. That depends on the unit and has no value for
    latencies below 1; here costs count in units in which the limit is e, and less than 0.387 times the limit
    counts as that.

    Attributes:
        scale: Of the whole loss.
        beta: The exponent.
    """

    scale: float = 1.0
    beta: float = 0.3

    def __call__(self, loss: Any, ratios: Mapping[str, Any]) -> Any:
        """Return the loss, scaled."""
        for ratio in ratios.values():
            loss = loss * (1.0 + ratio.clamp(min=SMALLEST_RATIO).log()) ** self.beta
        return self.scale * loss


# Where 1 + ln(ratio) is 0.05: its power has a finite gradient there.
SMALLEST_RATIO = 0.387


@final
@dataclass
class Additive(_Fixed):
    """`loss + weight * sum (ratio - 1)`: every bit of cost counts, above the limit and below it.

    Source: Cai et al., ProxylessNAS, ICLR 2019, equation 4, with its repository's `add#linear`.

    Attributes:
        weight: What the whole budget is worth, in units of the loss.
    """

    weight: float = 0.1

    def __call__(self, loss: Any, ratios: Mapping[str, Any]) -> Any:
        """Return the loss with the costs added."""
        return loss + self.weight * sum(ratio - 1.0 for ratio in ratios.values())


@final
@dataclass
class Hinge(_Fixed):
    """`loss + weight * sum min(max(ratio - 1, 0), bound)`: only what is above the limit counts.

    Attributes:
        weight: What twice the budget costs, in units of the loss.
        bound: The greatest excess that counts; above it there is no gradient from the cost.
    """

    weight: float = 1.0
    bound: float = 1.0

    def __call__(self, loss: Any, ratios: Mapping[str, Any]) -> Any:
        """Return the loss with the excess added."""
        return loss + self.weight * sum((ratio - 1.0).clamp(0.0, self.bound) for ratio in ratios.values())


@final
@dataclass
class Lagrangian(_Fixed):
    """The augmented Lagrangian of `ratio <= 1`: its multipliers grow until the limits hold.

    `loss + sum (max(0, m + rho g)^2 - m^2) / (2 rho)` with `g = ratio - 1`; after each step
    `m = max(0, m + rate * rho * g)`. A multiplier that is stationary means that its limit just holds, or, at
    zero, that it does not bind.

    Source: Nocedal & Wright, Numerical Optimization, 2006, equations 17.64 and 17.65 (Hestenes, Powell,
    Rockafellar); `rate` is 1 there, where each step is a whole minimisation.

    Attributes:
        rho: Weight of the squared excess, in units of the loss.
        rate: How fast multipliers follow, a step.
        multipliers: Metric to multiplier.
    """

    rho: float = 10.0
    rate: float = 0.05
    multipliers: dict[str, float] = field(default_factory=dict)

    def __call__(self, loss: Any, ratios: Mapping[str, Any]) -> Any:
        """Return the augmented Lagrangian."""
        for metric, ratio in ratios.items():
            known = self.multipliers.get(metric, 0.0)
            pushed = (known + self.rho * (ratio - 1.0)).clamp(min=0.0)
            loss = loss + (pushed**2 - known**2) / (2 * self.rho)
        return loss

    def update(self, ratios: Mapping[str, float]) -> None:
        """Let the multipliers follow the excess."""
        for metric, ratio in ratios.items():
            known = self.multipliers.get(metric, 0.0)
            self.multipliers[metric] = max(0.0, known + self.rate * self.rho * (ratio - 1.0))

    def state_dict(self) -> dict[str, Any]:
        """Return the multipliers."""
        return {"multipliers": dict(self.multipliers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the multipliers."""
        self.multipliers = dict(state["multipliers"])


def make_penalty(form: str, **options: float) -> Penalty:
    """Make a form by its name; its attributes are options.

    Raises:
        RecipeError: There is no such form, it takes no such option, or an option is not a positive number.
    """
    kinds: dict[str, type[Any]] = {
        "none": NoPenalty,
        "product_log": ProductLog,
        "additive": Additive,
        "hinge": Hinge,
        "lagrangian": Lagrangian,
    }
    if form not in kinds:
        raise RecipeError(f"penalty must be one of {', '.join(FORMS)}, got {form!r}")
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise RecipeError(f"{form}.{name} must be a positive number, got {value!r}")
    parameters = inspect.signature(kinds[form]).parameters
    accepted = [name for name, p in parameters.items() if isinstance(p.default, float)]  # no multipliers
    for name in options:
        if name not in accepted:
            raise RecipeError(
                f"penalty_options of {form!r} are {', '.join(accepted) or 'none'}; got {name!r}"
            )
    made: Penalty = kinds[form](**options)
    return made
