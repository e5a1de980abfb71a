"""What the differentiable strategies share: logits, their optimizer, the budget in the loss, derivation.

Architecture parameters are moved by Adam on held-out images; while they warm up they stand still. The
expected cost of every limited sum is part of the loss, in one of the forms of `autocompress.penalty`. What is
asked in the end is derived under the budget, which it keeps exactly; further networks are the next most
probable ones.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.budget import Constraints
from autocompress.cost import AdditiveCost
from autocompress.differentiable import Images, Mixed, Moment, Phase
from autocompress.elastic.mixture import Gate, Gates
from autocompress.errors import BudgetError, RecipeError, TrainingError
from autocompress.penalty import make_penalty
from autocompress.proposals import check_count, check_share, random_generator
from autocompress.relaxation import Relaxation
from autocompress.space import Codes, Option
from autocompress.trial import Batch
from strategies.collapse import SKIP, EarlyStopping, Watch, dominant_eigenvalue, skip_costs


class RelaxedSearch(ABC):
    """A relaxation that is trained, then asked for the most probable networks that fit.

    Attributes:
        relaxation: The architecture parameters.
        skips: The number of skip connections of a network, one sum a kind of cell.
    """

    channels = 1
    phases: Sequence[Phase] = (Phase(),)
    # Whether the options of a choice are states of a Markov chain.
    chained = False
    # Whether every option is computed in training, so that the eigenvalue takes no memory that is not there.
    computes_all = False

    def __init__(
        self,
        constraints: Constraints,
        *,
        seed: int,
        objective: str = "accuracy",
        learning_rate: float = 3e-4,
        betas: Sequence[float] = (0.5, 0.999),
        weight_decay: float = 1e-3,
        warmup: float = 0.0,
        penalty: str = "lagrangian",
        penalty_options: Mapping[str, float] | None = None,
        fixed: Mapping[str, Option] | None = None,
        candidates: int = 1,
        at_least: float = 0.95,
        max_skips: int | None = None,
        early_stopping: EarlyStopping = "none",
        eigenvalue: bool | None = None,
    ) -> None:
        """Make the search, untrained.

        Args:
            constraints: Space, costs and limits.
            seed: Of the logits and of what is sampled in training.
            objective: Not used: what is minimised is the loss of the task.
            learning_rate: Of the logits (Adam).
            betas: Of Adam.
            weight_decay: Of the logits.
            warmup: Share of the training, 0..1, in which the logits stand still.
            penalty: How limits enter the loss, a name of `autocompress.penalty.FORMS`.
            penalty_options: Of the form.
            fixed: Choices that are not relaxed, with their options; see `Relaxation`.
            candidates: Networks that are derived: the most probable one that fits, the next one, and so on.
            at_least: Share of a limit, 0..1, that a derived network is to use, if any that fits does; 0 takes
                the most probable one, however far below the budget it is.
            max_skips: Skip connections that a derived network has at most, in each kind of cell; `None` sets
                no limit.
            early_stopping: `eigenvalue` keeps the architecture parameters of five epochs before the dominant
                eigenvalue has risen (RobustDARTS), `skips` those of the last epoch with at most `max_skips`
                (DARTS+). The weights train on to the end.
            eigenvalue: Whether the dominant eigenvalue of the Hessian is computed at the end of every epoch,
                in about as much time as twenty steps, with every option in memory; by default where every
                option is in memory anyway.

        Raises:
            RecipeError: An option is out of its range.
            SpaceError: The space has nothing to relax.
            InfeasibleBudgetError: Nothing fits.
            BudgetError: Nothing fits with the fixed options and the limit on skip connections.
        """
        random_generator(seed)
        for name, value in {"learning_rate": learning_rate, "weight_decay": weight_decay}.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise RecipeError(f"{name} must be a number >= 0, got {value!r}")
        pair = betas if isinstance(betas, Sequence) else ()
        if len(pair) != 2 or not all(isinstance(b, int | float) and 0 <= b < 1 for b in pair):
            raise RecipeError(f"betas must be two numbers in 0..1, 1 left out, got {betas!r}")
        constraints.check_feasible()
        self._constraints = constraints
        self._candidates = check_count("candidates", candidates)
        self._at_least = check_share("at_least", at_least)
        self.skips = skip_costs(constraints.space)
        self._capped = _caps(self.skips, max_skips)
        self._watch = Watch(early_stopping, max_skips)
        if eigenvalue is not None and not isinstance(eigenvalue, bool):
            raise RecipeError(f"eigenvalue must be true or false, or left out, got {eigenvalue!r}")
        if eigenvalue is False and early_stopping == "eigenvalue":
            raise RecipeError("early_stopping 'eigenvalue' needs the eigenvalue, which is switched off")
        self._eigenvalue = early_stopping == "eigenvalue" or (
            self.computes_all if eigenvalue is None else eigenvalue
        )
        self._warmup = check_share("warmup", warmup)
        for name, mapping in {"fixed": fixed, "penalty_options": penalty_options}.items():
            if mapping is not None and not isinstance(mapping, Mapping):
                raise RecipeError(f"{name} must be a mapping from names to values, got {mapping!r}")
        self.relaxation = Relaxation(constraints.space, seed=seed, fixed=fixed, chained=self.chained)
        try:
            self.relaxation.derive(constraints, capped=self._capped)
        except BudgetError as error:
            asked = f"fixed options {dict(fixed)}, " if fixed else ""
            asked += f"at most {max_skips} skip connections in each kind of cell, " if self._capped else ""
            raise BudgetError(
                f"nothing fits the budget with {asked}though networks without that do: loosen one of them"
            ) from error
        self._penalty = make_penalty(penalty, **(penalty_options or {}))
        self._optimizer = torch.optim.Adam(
            self.relaxation.parameters(),
            lr=learning_rate,
            betas=(betas[0], betas[1]),
            weight_decay=weight_decay,
        )
        self._priced = {
            metric: (cost, constraints.limits[metric])
            for metric, cost in constraints.costs.items()
            if metric in constraints.limits and isinstance(cost, AdditiveCost)
        }
        self._phase = 0
        self._asked: list[Mapping[str, Option]] = []
        self._exhausted = False

    @property
    def start(self) -> Codes:
        """The codes `(1, choices)` that say the options of choices without gates."""
        return self.relaxation.largest()

    def begin(self, phase: int) -> None:
        """Begin a phase."""
        self._phase = phase

    def mixture(self) -> Gates:
        """Return gates that compute every option, weighted by its probability; without gradients."""
        with torch.no_grad():
            return self.soft_gates()

    # Training ----------------------------------------------------------------------------------------

    @abstractmethod
    def weight_gates(self, moment: Moment) -> Gates:
        """Return the gates under which the weights make a step."""

    @abstractmethod
    def gradients(self, network: Mixed, train: Images, held_out: Images, moment: Moment) -> None:
        """Set the gradients of the logits."""

    def architecture_step(self, network: Mixed, train: Images, held_out: Images, moment: Moment) -> None:
        """Move the logits, unless they warm up or the search has stopped; look at them after every epoch."""
        if self._watch.stopped is not None:
            return
        moving = moment.progress >= self._warmup
        if moving:
            self._optimizer.zero_grad(set_to_none=True)
            self.gradients(network, train, held_out, moment)
            self.move()
            with torch.no_grad():
                self._penalty.update({metric: float(ratio) for metric, ratio in self.ratios().items()})
        if moment.ends_epoch:
            self._watch.add(self._seen(network, held_out), self._parameters, moving=moving)

    @property
    def _parameters(self) -> list[nn.Parameter]:
        """All architecture parameters."""
        return [vector for group in self._optimizer.param_groups for vector in group["params"]]

    def _seen(self, network: Mixed, held_out: Images) -> dict[str, Any]:
        """Return the signs of a collapse: skips a kind of cell, entropy, the dominant eigenvalue.

        Raises:
            TrainingError: The eigenvalue is not finite.
        """
        seen: dict[str, Any] = {"entropy": self.relaxation.entropy()}
        if self.skips:
            probable = self.relaxation.most_probable(self.weights())
            seen["skips"] = [int(cost.of(probable)[0]) for cost in self.skips]
        if self._eigenvalue:
            seen["eigenvalue"] = dominant_eigenvalue(
                lambda: network.loss(held_out, self.soft_gates()), self._parameters
            )
            if not math.isfinite(seen["eigenvalue"]):
                raise TrainingError(
                    f"the Hessian by the architecture parameters has the eigenvalue {seen['eigenvalue']}: "
                    "lower the learning rate of the weights, or look at the images and labels"
                )
        return seen

    def move(self) -> None:
        """Make a step of the optimizer.

        Raises:
            TrainingError: A gradient or logit is not finite.
        """
        for name, vector in zip(self.relaxation.relaxed, self.relaxation.logits, strict=True):
            if vector.grad is not None and not bool(torch.isfinite(vector.grad).all()):
                raise TrainingError(
                    f"the gradient of the architecture parameters of {name!r} is {vector.grad.tolist()}: "
                    "lower the learning rate of the weights, or look at the images and labels"
                )
        self._optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        """Return what derivation and expected costs go by, variable to `(options,)`: probabilities."""
        return self.relaxation.probabilities()

    def derived_from(self) -> dict[str, Tensor]:
        """Return what networks are derived from, variable to `(options,)`: their product is maximised."""
        return self.weights()

    def ratios(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the expected cost of every limited sum, divided by its limit."""
        given = self.weights() if weights is None else weights
        return {
            metric: self.relaxation.expected(cost, given) / limit
            for metric, (cost, limit) in self._priced.items()
        }

    def penalised(self, loss: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the loss with the budget in it."""
        total: Tensor = self._penalty(loss, self.ratios(weights) if self._priced else {})
        return total

    def set_gradients(self, loss: Tensor) -> None:
        """Set the gradients of the architecture parameters of a loss, and of nothing else."""
        parameters = self._parameters
        # What was drawn may compute nothing (the operation none), and then teaches nothing.
        found = torch.autograd.grad(loss, parameters, materialize_grads=True)
        for vector, gradient in zip(parameters, found, strict=True):
            vector.grad = gradient

    def soft_gates(self) -> dict[str, Gate]:
        """Return gates that compute every option, weighted by its probability."""
        return {name: Gate.all(vector) for name, vector in self.relaxation.probabilities().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return logits, moments of Adam, multipliers."""
        return {
            "logits": self.relaxation.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "penalty": self._penalty.state_dict(),
            "watch": self._watch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self.relaxation.load_state_dict(state["logits"])
        # PyTorch would move its moments in place, which are then those of whoever gave the state.
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self._penalty.load_state_dict(state["penalty"])
        self._watch.load_state_dict(state["watch"])

    # Asking ------------------------------------------------------------------------------------------

    def ask(self, n: int) -> Codes:
        """Derive up to `n` networks, the most probable first; each fits, and none is derived twice."""
        space = self._constraints.space
        rows = [space.smallest()[:0]]
        while len(rows) <= n and len(self._asked) < self._candidates and not self._exhausted:
            try:
                found = self.relaxation.derive(
                    self._constraints,
                    weights=self.derived_from(),
                    at_least=self._at_least,
                    capped=self._capped,
                    forbidden=self._asked,
                )
            except BudgetError:  # nothing is left, within the budget or at all
                self._exhausted = True
                break
            (arch,) = space.decode(found.codes)
            self._asked.append(dict(arch.settings))
            rows.append(found.codes)
        return np.vstack(rows)

    def tell(self, batch: Batch) -> None:
        """Learn nothing: the supernet has taught all there is."""
        del batch

    @property
    def notes(self) -> Mapping[str, Any]:
        """Probabilities of the options, their entropy, and the expected costs with their limits."""
        with torch.no_grad():
            weights = self.weights()
            expected = {
                metric: float(self.relaxation.expected(cost, weights))
                for metric, (cost, _) in self._priced.items()
            }
        return {
            "relaxation": {
                "entropy": self.relaxation.entropy(),
                "skips": self.relaxation.mean_probability(SKIP),
                "probabilities": self.relaxation.summary(),
                "expected_costs": expected,
                "epochs": [dict(seen) for seen in self._watch.history],
                "stopped": self._watch.stopped,
            }
        }


def _caps(skips: Sequence[AdditiveCost], most: int | None) -> tuple[tuple[AdditiveCost, float], ...]:
    """Return the sums that a derived network must keep under, with their limits."""
    if most is None:
        return ()
    if isinstance(most, bool) or not isinstance(most, int) or most < 0:
        raise RecipeError(f"max_skips must be an integer >= 0, or left out, got {most!r}")
    if not skips:
        raise RecipeError(f"max_skips counts options {SKIP!r} of cells, of which the space has none")
    # Halfway to the next count: budgets divide by their limits, which must not be 0.
    return tuple((cost, most + 0.5) for cost in skips)
