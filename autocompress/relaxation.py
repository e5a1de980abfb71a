"""A space made continuous: a probability for each option, expected costs, and the way back to one network.

A differentiable strategy moves the logits; the supernet mixes what the options of a choice compute
(`elastic.mixture`); expected costs are exact, since the choices are independent. What comes out is derived by
integer programming: the most probable network that keeps the budget. Taking the most probable option of each
choice can land anywhere.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.budget import Constraints
from autocompress.cost import AdditiveCost, Cost
from autocompress.elastic.marginal import width_choices
from autocompress.errors import BudgetError, SpaceError, TrainingError
from autocompress.exact import Optimum, separable, solve
from autocompress.ops import Ops
from autocompress.proposals import every_feasible
from autocompress.space import Choice, Codes, Option, SearchSpace

# A space of so many networks is looked at whole.
ENUMERATED = 50_000
# Probabilities below are taken for this one: logarithms stay finite.
LEAST = 1e-300
# Logits start near zero: all options are nearly equally probable.
INITIAL_SPREAD = 1e-3


@final
class Relaxation(nn.Module):
    """Logits, one vector a variable: a choice, or an edge of which options of choices are made.

    Choices are drawn on their own. The probability of an option is that of its variable, or, made of edges,
    proportional to the product of theirs: the most probable option of a node then has the two edges that
    DARTS keeps.

    Attributes:
        space: The space.
        relaxed: Names of the variables with logits, in the order of the space.
        fixed: Name to option of the choices that are not relaxed.
        logits: `(options,)` a variable, in the order of `relaxed`, in 64-bit floats.
        kept: `(options,)` a variable: which options are left; those that were dropped have probability 0.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        fixed: Mapping[str, Option] | None = None,
        chained: bool = False,
    ) -> None:
        """Draw the logits.

        Args:
            space: The space.
            seed: Of the logits.
            fixed: Choices that are not relaxed, with their options. Choices that change more of the shapes
                of whole blocks than channels (resolution) cannot be mixed: they are always fixed, by default
                at their largest option. So are choices of one option.
            chained: Whether options of a choice follow one another in a Markov chain (DMCP): logit k is of
                the probability of going on from option k to the next; the last one has no meaning. Otherwise
                probabilities are the softmax of the logits.

        Raises:
            SpaceError: A fixed choice or option is not of the space, or nothing is left to relax.
        """
        super().__init__()
        self.space = space
        self.chained = chained
        given = dict(fixed or {})
        for name, option in given.items():
            if name not in space.positions:
                raise SpaceError(
                    f"space {space.name!r} has no choice {name!r} to fix; it has {list(space.positions)}"
                )
            space.choices[space.positions[name]].code(option)
        rigid = shape_changing(space)
        self.fixed: dict[str, Option] = {}
        for choice in space.choices:
            if choice.name in given or choice.name in rigid or len(choice.options) == 1:
                self.fixed[choice.name] = given.get(choice.name, choice.options[-1])
        free = [choice for choice in space.choices if choice.name not in self.fixed]
        mixed = {edge for choice in free for terms in choice.terms for edge, _ in terms}
        mixed |= {choice.name for choice in free if not choice.terms}
        self.relaxed = tuple(name for name in space.variables if name in mixed)
        if not self.relaxed:
            raise SpaceError(
                f"every choice of space {space.name!r} is fixed or changes more of the shapes of blocks than "
                f"channels ({', '.join(rigid)}): there is nothing to relax; search it by another strategy"
            )
        generator = torch.Generator().manual_seed(seed)
        counts = [len(space.variables[name].options) for name in self.relaxed]
        self.logits = nn.ParameterList(
            nn.Parameter(INITIAL_SPREAD * torch.randn(count, generator=generator, dtype=torch.float64))
            for count in counts
        )
        self.kept = [torch.ones(count, dtype=torch.bool) for count in counts]
        self._places = {choice.name: self._places_of(choice) for choice in free if choice.terms}

    def probabilities(self) -> dict[str, Tensor]:
        """Return the probabilities of the options that are left, name of a variable to `(options,)`."""
        if self.chained:
            return {name: _chain(vector) for name, vector in zip(self.relaxed, self.logits, strict=True)}
        return {
            name: vector.masked_fill(~kept, -torch.inf).softmax(0)
            for name, vector, kept in zip(self.relaxed, self.logits, self.kept, strict=True)
        }

    def of_choice(self, choice: Choice, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the probabilities of the options of a choice that is not fixed, `(options,)`.

        Args:
            choice: Of the space.
            weights: Of the options of each variable, `(options,)`, 0 or more; not all of a choice 0.
        """
        if choice.terms:
            flat = torch.cat([*(weights[name] for name in self.relaxed), torch.ones(1, dtype=torch.float64)])
            products = flat[self._places[choice.name]].prod(1)
        else:
            products = weights[choice.name]
        return products / products.sum()

    def _places_of(self, choice: Choice) -> Tensor:
        """Return where the terms of each option stand among all variables, `(options, most terms)`."""
        counts = [len(self.space.variables[name].options) for name in self.relaxed]
        first = dict(zip(self.relaxed, np.cumsum([0, *counts]).tolist(), strict=False))
        most = max(len(terms) for terms in choice.terms)
        places = torch.full((len(choice.options), most), sum(counts))  # there stands a 1
        for row, terms in enumerate(choice.terms):
            for column, (edge, option) in enumerate(terms):
                places[row, column] = first[edge] + self.space.variables[edge].code(option)
        return places

    def largest(self) -> Codes:
        """Return the largest network with the fixed options, `(1, choices)`: what a mixture starts from."""
        codes = self.space.largest().copy()
        for name, option in self.fixed.items():
            position = self.space.positions[name]
            codes[0, position] = self.space.choices[position].code(option)
        return self.space.canonical(codes)

    def expected(self, cost: Cost, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the expected cost of a network whose choices are drawn on their own, exactly.

        Args:
            cost: A cost that adds up, of the space.
            weights: Of the variables, `(options,)`, see `of_choice`; by default their probabilities.

        Raises:
            CostError: The cost is a maximum, which has no such expectation.
        """
        given = self.probabilities() if weights is None else weights
        vectors = []
        for choice in self.space.choices:
            if choice.name not in self.fixed:
                vectors.append(self.of_choice(choice, given))
            else:
                vector = torch.zeros(len(choice.options), dtype=torch.float64)
                vector[choice.code(self.fixed[choice.name])] = 1.0
                vectors.append(vector)
        found: Tensor = cost.expected(vectors)
        return found

    def derive(
        self,
        constraints: Constraints,
        *,
        weights: Mapping[str, Tensor] | None = None,
        at_least: float = 0.0,
        capped: Sequence[tuple[AdditiveCost, float]] = (),
        forbidden: Sequence[Mapping[str, Option]] = (),
    ) -> Optimum:
        """Return the most probable network that keeps every limit, and the proof of it.

        Cells whose output does not depend on the input are never returned (`CellSpec.connected`). Options
        that were dropped are taken only where no network without them fits.

        Args:
            constraints: Of this space.
            weights: Of the variables, as in `expected`.
            at_least: Share of some limited sum that the network is to use. Where no network that fits does,
                it may use less.
            capped: Other sums that are to stay at or under a number, and need not be used.
            forbidden: Networks or parts of them that are not to be returned, see `exact.solve`.

        Raises:
            BudgetError: No network with the fixed options fits.
            TrainingError: A logit is not finite.
        """
        for name, logits in zip(self.relaxed, self.logits, strict=True):
            if not bool(torch.isfinite(logits).all()):
                raise TrainingError(
                    f"the architecture parameters of {name!r} are {logits.tolist()}: lower the learning rate "
                    "of the architecture, or look at the losses"
                )
        vectors, dropped = [], []
        with torch.no_grad():
            given = self.probabilities() if weights is None else weights
            for choice in self.space.choices:
                if choice.name in self.fixed:
                    vectors.append(np.zeros(len(choice.options)))
                    dropped.append(np.zeros(len(choice.options)))
                else:
                    p = self.of_choice(choice, given)
                    vectors.append(p.clamp(min=LEAST).log().numpy())
                    dropped.append((p == 0).numpy().astype(np.float64))
        others = [
            {choice.name: option}
            for choice in self.space.choices
            if choice.name in self.fixed
            for option in choice.options
            if option != self.fixed[choice.name]
        ]
        value = separable(self.space, vectors, "log_probability")
        excluded = [*others, *forbidden]
        if np.any(np.concatenate(dropped)):
            none_of_them = (separable(self.space, dropped, "dropped options"), 0.5)
            with suppress(BudgetError):
                return self._solved(constraints, value, at_least, [*capped, none_of_them], excluded)
        return self._solved(constraints, value, at_least, capped, excluded)

    def _solved(
        self,
        constraints: Constraints,
        value: AdditiveCost,
        at_least: float,
        capped: Sequence[tuple[AdditiveCost, float]],
        forbidden: Sequence[Mapping[str, Option]],
    ) -> Optimum:
        """Return the network of greatest value, by enumeration or integer programming."""
        everything = every_feasible(constraints, at_most=ENUMERATED)
        if everything is not None:
            kept = [cost.of(everything) <= most for cost, most in capped]
            fitting = everything[np.all(kept, axis=0)] if kept else everything
            return self._best_of(fitting, value, constraints, at_least=at_least, forbidden=forbidden)
        found = []
        for filled in _filled(constraints, at_least) if at_least > 0 else ():
            with suppress(BudgetError):
                found.append(self._connected(value, _with_caps(filled, capped), forbidden))
        if found:
            return max(found, key=lambda optimum: optimum.value)
        return self._connected(value, _with_caps(constraints, capped), forbidden)

    def _connected(
        self, value: AdditiveCost, constraints: Constraints, forbidden: Sequence[Mapping[str, Option]]
    ) -> Optimum:
        """Solve the program until the output of the network depends on its input."""
        refused = list(forbidden)
        while True:
            found = solve(value, constraints, sense="maximize", forbidden=refused)
            if self.space.connected(found.codes):
                return found
            (arch,) = self.space.decode(found.codes)
            refused.append(dict(arch.settings))

    def most_probable(self, weights: Mapping[str, Tensor]) -> Codes:
        """Return the network of the most probable options, `(1, choices)`, whatever it costs."""
        codes = self.largest()
        with torch.no_grad():
            for position, choice in enumerate(self.space.choices):
                if choice.name not in self.fixed:
                    codes[0, position] = int(self.of_choice(choice, weights).argmax())
        return self.space.canonical(codes)

    def _best_of(
        self,
        codes: Codes,
        value: AdditiveCost,
        constraints: Constraints,
        *,
        at_least: float,
        forbidden: Sequence[Mapping[str, Option]],
    ) -> Optimum:
        """Return the best of all networks that fit; `solve` for tables over many choices takes minutes."""
        start = time.perf_counter()
        allowed = np.ones(len(codes), dtype=np.bool_)
        for assignment in forbidden:
            allowed &= ~self._has(codes, assignment)
        uses = [
            constraints.costs[metric].of(codes) >= at_least * limit
            for metric, limit in constraints.limits.items()
            if isinstance(constraints.costs[metric], AdditiveCost)
        ]
        values = value.of(codes)
        order = np.argsort(-values, kind="stable")
        filling = np.any(uses, axis=0) if uses and at_least > 0 else np.ones(len(codes), dtype=np.bool_)
        for wanted in (allowed & filling, allowed):
            for index in order[wanted[order]]:
                if self.space.connected(codes[[index]]):
                    top = float(values[index])
                    seconds = time.perf_counter() - start
                    return Optimum(codes[[index]], top, top, 0.0, True, "enumeration", seconds)
        raise BudgetError("no network that fits is left by the fixed options and what is forbidden")

    def _has(self, codes: Codes, assignment: Mapping[str, Option]) -> NDArray[np.bool_]:
        """Return which rows have all these options; a choice without effect has none."""
        active = self.space.active(codes)
        holds = np.ones(len(codes), dtype=np.bool_)
        for name, option in assignment.items():
            position = self.space.positions[name]
            code = self.space.choices[position].code(option)
            holds &= active[:, position] & (codes[:, position] == code)
        return holds

    def entropy(self) -> float:
        """Return the mean entropy of the variables, as a share of that of options left evenly probable."""
        shares = []
        for vector, kept in zip(self.probabilities().values(), self.kept, strict=True):
            p = vector.detach().clamp(min=LEAST)
            if (left := int(kept.sum())) > 1:
                shares.append(float(-(p * p.log()).sum() / np.log(left)))
        return float(np.mean(shares)) if shares else 0.0

    def mean_probability(self, option: Option) -> float | None:
        """Return the mean probability of an option over the variables that have it, `None` for none."""
        found = []
        for name, vector in self.probabilities().items():
            options = self.space.variables[name].options
            if option in options:
                found.append(float(vector.detach()[options.index(option)]))
        return float(np.mean(found)) if found else None

    def summary(self) -> dict[str, Any]:
        """Return the probabilities by variable and option, as plain values."""
        return {
            name: {
                str(option): float(p)
                for option, p in zip(self.space.variables[name].options, vector.tolist(), strict=True)
            }
            for name, vector in self.probabilities().items()
        }


def _with_caps(constraints: Constraints, capped: Sequence[tuple[AdditiveCost, float]]) -> Constraints:
    """Return the constraints with further sums limited."""
    return replace(
        constraints,
        costs={**constraints.costs, **{cost.metric: cost for cost, _ in capped}},
        limits={**constraints.limits, **{cost.metric: most for cost, most in capped}},
    )


def _filled(constraints: Constraints, share: float) -> Iterator[Constraints]:
    """Yield the constraints once a limited sum, with that sum at least at a share of its limit."""
    for metric, limit in constraints.limits.items():
        cost = constraints.costs[metric]
        if isinstance(cost, AdditiveCost):
            # What is at least so much is, turned round, at most so much; and costs are positive.
            top = 2 * max(cost.maximum, limit)
            turned, name = cost.scaled(-1.0, top), f"unused_{metric}"
            yield replace(
                constraints,
                costs={**constraints.costs, name: replace(turned, metric=name)},
                limits={**constraints.limits, name: top - share * limit},
            )


def _chain(logits: Tensor) -> Tensor:
    """Return the probabilities of ending at each state of a chain that goes on with `sigmoid(logit)`.

    Source: Guo et al., DMCP, CVPR 2020, equations 2 and 3: there of keeping a group of channels, here of the
    options.
    """
    on = logits[:-1].sigmoid()
    reached = torch.cat([torch.ones_like(logits[:1]), on.cumprod(0)])
    return reached * torch.cat([1 - on, torch.ones_like(logits[:1])])


def shape_changing(space: SearchSpace) -> tuple[str, ...]:
    """Return the choices that change the input or output shape of a block, or leave out one that has both.

    A block that is left out is the identity, which needs an input and output of one shape. Choices of widths
    alone are not among them: their channels are gated (`elastic.marginal`).
    """
    widths = width_choices(space)
    changing: set[str] = set()
    for block in space.blocks:
        if set(block.choices) <= changing:
            continue
        by_setting: dict[tuple[Option, ...], Any] = {
            setting: _shapes(block.operations(*setting)) for setting in space.covering_settings(block)
        }
        for position, name in enumerate(block.choices):
            if name in widths:
                continue
            rest: dict[tuple[Option, ...], set[Any]] = {}
            for setting, shapes in by_setting.items():
                seen = rest.setdefault((*setting[:position], *setting[position + 1 :]), set())
                if shapes is not None:
                    seen.add(shapes)
                elif any(own is not None and own[0] != own[1] for own in by_setting.values()):
                    seen.add(None)
            if any(len(seen) > 1 for seen in rest.values()):
                changing.add(name)
    return tuple(choice.name for choice in space.choices if choice.name in changing)


def _shapes(ops: Ops) -> tuple[Any, Any] | None:
    return (ops[0].in_shape, ops[-1].out_shape) if ops else None
