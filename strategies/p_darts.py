"""P-DARTS: the network grows while options are dropped, and identities are dropped in part.

Source: Chen et al., Progressive Differentiable Architecture Search, ICCV 2019, and its repository
(chenxin061/pdarts, `train_search.py`): three trainings in a row, of 5, 11 and 17 cells; after each, edges
lose their least probable options (of eight, five and then three are left) and the logits start anew. Each
training begins with the logits at rest. Dropout after identities falls during a training, and starts higher
in each.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, final

import torch

from autocompress.budget import Constraints
from autocompress.differentiable import Images, Mixed, Moment, Phase
from autocompress.elastic.mixture import Gate, Gates
from autocompress.errors import RecipeError
from autocompress.proposals import check_share
from autocompress.relaxation import INITIAL_SPREAD
from strategies.collapse import SKIP, skip_costs
from strategies.relaxed import RelaxedSearch

# Of 25 epochs the rate falls as exp(-0.2 epochs) once the logits move.
FALL: Final = 0.2 * 25


@final
class PDarts(RelaxedSearch):
    """DARTS of first order in phases."""

    computes_all = True

    def __init__(
        self,
        constraints: Constraints,
        *,
        grow: Mapping[str, Sequence[Any]] | None = None,
        keep: Sequence[float] = (5 / 8, 3 / 8),
        dropout: Sequence[float] = (0.0, 0.4, 0.7),
        learning_rate: float = 6e-4,
        warmup: float = 0.4,
        max_skips: int | None = 2,
        **options: Any,
    ) -> None:
        """Make the search; the defaults are those of the paper for CIFAR-10 (of 25 epochs, 10 are warm-up).

        Args:
            constraints: Space, costs and limits.
            grow: Setting of the space to its values in each phase but the last, which trains the supernet
                itself: `{"layers": (5, 11)}` in a supernet of 17 cells. Without, all phases have its size.
            keep: Share of its options that a choice or edge has left in each phase but the first; two are.
            dropout: Rate after identities at the start of each phase.
            learning_rate: Of the logits.
            warmup: Share of each phase in which the logits stand still.
            max_skips: Skip connections that a derived network has at most in each kind of cell; `None` sets
                no limit. Spaces without skip connections have none to limit.
            options: See `RelaxedSearch`.

        Raises:
            RecipeError: An option is out of its range, or the options are of different numbers of phases.
        """
        for name, given in {"keep": keep, "dropout": dropout, **(grow or {})}.items():
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise RecipeError(f"{name} must be a list, a number a phase, got {given!r}")
        rates = [check_share("dropout", rate) for rate in dropout]
        shares = [check_share("keep", share) for share in keep]
        grown = {name: list(values) for name, values in (grow or {}).items()}
        lengths = {len(rates), 1 + len(shares), *(1 + len(values) for values in grown.values())}
        if len(lengths) > 1 or not rates:
            raise RecipeError(
                "P-DARTS needs a rate of dropout a phase, and keep and grow for all phases but one, got "
                f"{rates}, {shares} and {grown}"
            )
        if sorted(shares, reverse=True) != shares:
            raise RecipeError(f"keep must not rise: options that were dropped do not come back; got {shares}")
        super().__init__(
            constraints,
            learning_rate=learning_rate,
            warmup=warmup,
            max_skips=max_skips if skip_costs(constraints.space) else None,
            **options,
        )
        if options.get("early_stopping", "none") != "none":
            raise RecipeError(
                "P-DARTS has no early stopping: each phase starts anew; leave early_stopping out"
            )
        self._dropout, self._keep = rates, shares
        sizes = [{name: values[at] for name, values in grown.items()} for at in range(len(shares))]
        self.phases = tuple(Phase(1 / len(rates), settings) for settings in [*sizes, {}])
        self._seed = options["seed"]

    def begin(self, phase: int) -> None:
        """Drop the least probable options, and start the logits anew."""
        super().begin(phase)
        if phase == 0:
            return
        generator = torch.Generator().manual_seed(self._seed + phase)
        for at, (vector, p) in enumerate(
            zip(self.relaxation.logits, self.relaxation.probabilities().values(), strict=True)
        ):
            left = min(len(p), max(2, round(self._keep[phase - 1] * len(p))))
            mask = torch.zeros(len(p), dtype=torch.bool)
            mask[p.detach().topk(left).indices] = True
            self.relaxation.kept[at] = mask & self.relaxation.kept[at]
            with torch.no_grad():
                vector.copy_(INITIAL_SPREAD * torch.randn(len(p), generator=generator, dtype=vector.dtype))
        self._optimizer.state.clear()

    def soft_gates(self) -> dict[str, Gate]:
        """Return gates that compute the options that are left, weighted by their probabilities."""
        gates = {}
        for (name, p), kept in zip(
            self.relaxation.probabilities().items(), self.relaxation.kept, strict=True
        ):
            codes = kept.nonzero().flatten()
            gates[name] = Gate(tuple(codes.tolist()), p[codes])
        return gates

    def weight_gates(self, moment: Moment) -> Gates:
        """Return the mixture, identities dropped in part."""
        return self._dropped(self.mixture(), moment)

    def gradients(self, network: Mixed, train: Images, held_out: Images, moment: Moment) -> None:
        """Differentiate the held-out loss by the logits."""
        gates = self._dropped(self.soft_gates(), moment)
        self.set_gradients(self.penalised(network.loss(held_out, gates)))

    def _dropped(self, gates: Gates, moment: Moment) -> Gates:
        rate = self._dropout[self._phase]
        over = moment.progress - self._warmup
        rate *= 1 - moment.progress if over < 0 else math.exp(-FALL * over)
        return {name: replace(gate, dropout={SKIP: rate}) for name, gate in gates.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what the relaxation has, and the options that are left."""
        return {**super().state_dict(), "kept": list(self.relaxation.kept), "phase": self._phase}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        super().load_state_dict(state)
        self.relaxation.kept, self._phase = list(state["kept"]), state["phase"]
