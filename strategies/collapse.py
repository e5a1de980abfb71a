"""Signs that a search by gradients collapses to identities, and when to stop it.

Sources: Zela et al., Understanding and Robustifying Differentiable Architecture Search, ICLR 2020
(RobustDARTS: the dominant eigenvalue of the Hessian of the held-out loss by the architecture parameters rises
before the derived network gets worse); Liang et al., DARTS+, 2019 (stop before there are too many skips).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, final, get_args

import numpy as np
import torch
from torch import Tensor

from autocompress.cost import AdditiveCost
from autocompress.errors import RecipeError
from autocompress.exact import separable
from autocompress.ops import CellSpec
from autocompress.space import SearchSpace

# What cells call the identity. Searches by gradients tend to end with nothing else: it trains fastest.
SKIP: Final = "skip_connect"

EarlyStopping = Literal["none", "eigenvalue", "skips"]

# Zela et al., section 4.3: averages over so many epochs are compared, so many epochs apart, by this ratio.
WINDOW: Final = 5
RATIO: Final = 0.75

# Of the length of all parameters together.
DIFFERENCE: Final = 0.01
ITERATIONS: Final = 10
TOLERANCE: Final = 0.02


def dominant_eigenvalue(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> float:
    """Return the eigenvalue of greatest magnitude of the Hessian of a loss, by power iteration.

    Products with the Hessian are central differences of gradients, as in the repository of RobustDARTS: not
    every activation can be differentiated twice.

    Args:
        loss: Computes the scalar at the present parameters.
        parameters: What the Hessian is by; moved, and put back.

    Returns:
        To about 2 %, or as far as ten products with the Hessian lead.
    """
    before = [parameter.detach().clone() for parameter in parameters]

    def gradient(direction: Sequence[Tensor], step: float) -> Sequence[Tensor]:
        _set(parameters, [b + step * d for b, d in zip(before, direction, strict=True)])
        return torch.autograd.grad(loss(), parameters, materialize_grads=True)

    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(b.shape, generator=generator, dtype=b.dtype) for b in before]
    value = 0.0
    try:
        for _ in range(ITERATIONS):
            norm = torch.sqrt(torch.stack([vector.square().sum() for vector in vectors]).sum())
            if not bool(norm > 0):
                break
            vectors = [vector / norm for vector in vectors]
            ahead, behind = gradient(vectors, DIFFERENCE), gradient(vectors, -DIFFERENCE)
            images = [(a - b) / (2 * DIFFERENCE) for a, b in zip(ahead, behind, strict=True)]
            last, value = value, float(sum((i * v).sum() for i, v in zip(images, vectors, strict=True)))
            vectors = images
            if abs(value - last) <= TOLERANCE * abs(value):
                break
    finally:
        _set(parameters, before)
    return value


def _set(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def skip_costs(space: SearchSpace) -> list[AdditiveCost]:
    """Return the number of skip connections of a network, one sum a kind of cell, as far as there are any.

    A kind of cell is what several cells of a network share: its edges.
    """
    kinds: dict[tuple[str, ...], None] = {}
    for block in space.blocks:
        ops = block.operations(*next(iter(space.covering_settings(block))))
        if len(ops) == 1 and isinstance(ops[0], CellSpec):
            kinds[block.edges or block.choices] = None
    found = []
    for edges in kinds:
        vectors = []
        for choice in space.choices:
            terms = choice.terms or tuple(((choice.name, option),) for option in choice.options)
            vectors.append([float(sum(e in edges and o == SKIP for e, o in pairs)) for pairs in terms])
        if np.any(np.concatenate(vectors)):
            # Limits go by name: no two kinds may have the same.
            found.append(separable(space, vectors, f"skips of {edges[0]} to {edges[-1]}"))
    return found


@final
class Watch:
    """What is seen at the end of every epoch, and whether the search is to stop there.

    Attributes:
        history: Of every epoch: its number, `skips` of the network that would be derived without a budget,
            `entropy`, and `eigenvalue` where it is computed.
        stopped: The epoch whose architecture parameters are kept, once the search has stopped.
    """

    def __init__(self, early_stopping: EarlyStopping, most_skips: int | None) -> None:
        """Watch nothing yet.

        Raises:
            RecipeError: The rule is unknown, or needs a number of skips that is not given.
        """
        if early_stopping not in get_args(EarlyStopping):
            raise RecipeError(
                f"early_stopping must be one of {', '.join(get_args(EarlyStopping))}, got {early_stopping!r}"
            )
        if early_stopping == "skips" and most_skips is None:
            raise RecipeError(
                "early_stopping 'skips' stops where there are more than max_skips: give max_skips"
            )
        self._rule, self._most = early_stopping, most_skips
        self.history: list[dict[str, Any]] = []
        self.stopped: int | None = None
        self._past: list[list[Tensor]] = []
        self._still = 0

    def add(self, seen: Mapping[str, Any], parameters: Sequence[Tensor], *, moving: bool = True) -> None:
        """Add what was seen of an epoch; on a stop, put the parameters back to what they were then.

        Args:
            seen: `skips`, `entropy`, `eigenvalue`; without the first in spaces without cells.
            parameters: Of the architecture.
            moving: Whether they have left their warm-up; eigenvalues from before say nothing about them.
        """
        self._still += not moving
        self.history.append({"epoch": len(self.history) + 1, **seen})
        self._past = [*self._past, [vector.detach().clone() for vector in parameters]][-WINDOW - 1 :]
        back = self._epochs_back()
        if back:
            self.stopped = len(self.history) - back
            _set(parameters, self._past[-1 - back])

    def _epochs_back(self) -> int:
        """Return how many epochs ago the search should have stopped; 0 to go on."""
        if self._rule == "skips" and len(self.history) > 1:
            before, now = (max(seen.get("skips", [0])) for seen in self.history[-2:])
            return int(before <= self._most < now)
        if self._rule == "eigenvalue" and len(self.history) >= self._still + 2 * WINDOW:
            values = [abs(seen["eigenvalue"]) for seen in self.history]
            then, now = np.mean(values[-2 * WINDOW : -WINDOW]), np.mean(values[-WINDOW:])
            return WINDOW if then < RATIO * now else 0
        return 0

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen, and the parameters of the last epochs."""
        return {
            "history": list(self.history),
            "stopped": self.stopped,
            "past": list(self._past),
            "still": self._still,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self.history, self.stopped = list(state["history"]), state["stopped"]
        self._past, self._still = list(state["past"]), state["still"]
