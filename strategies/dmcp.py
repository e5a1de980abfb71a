"""DMCP: each width a Markov chain, trained with a sandwich of slices, then derived under the budget.

A choice of a width is a chain over its options: from each the next larger one is taken with probability
`sigmoid(alpha)`. In the architecture step the whole network is run, every channel times the probability that
it is kept, and the expected cost is part of the loss. In the weight step slices are trained: the largest
network on the labels, which teaches the smallest one and two drawn ones.

Source: Guo et al., "DMCP: Differentiable Markov Channel Pruning for Neural Networks", CVPR 2020; schedules of
its repository. Departures:

- Architecture parameters see held-out images, not those of the weights.
- Any cost that adds up can be expected, latency of a table as well as MACs, and with the right gradient for
  depthwise convolutions (the repository's is twice that).
- Chains start where the expected cost is the budget. Published is 0.5 throughout, where the expectation is
  near the smallest network, and what late options learn is scaled by all earlier probabilities.
- Annealing goes by the share of the training, not by steps, and so not by the size of batches.
- The derived network is the one nearest to the expected widths that fits, by integer programming. Drawing
  until one fits, as published, may never end.
"""

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from autocompress.differentiable import Images, Mixed, Moment
from autocompress.elastic.mixture import Gate, Gates
from autocompress.proposals import check_count, check_share
from autocompress.space import Codes
from strategies.relaxed import RelaxedSearch

# Logits of chains at the start are looked for within these, so often.
STEEPEST, BISECTIONS = 12.0, 60
# Without a budget: the next option is taken with a probability of 0.98.
UNLIMITED = 4.0


@final
class Dmcp(RelaxedSearch):
    """Widths by Markov chains."""

    chained = True

    def __init__(
        self,
        *args: Any,
        learning_rate: float = 0.05,
        weight_decay: float = 0.0,
        warmup: float = 0.5,
        drawn: int = 2,
        random_share: float = 0.3,
        **options: Any,
    ) -> None:
        """Make the search.

        Args:
            args: See `RelaxedSearch`.
            learning_rate: Of the architecture parameters, by Adam (published: SGD at 0.5, which the gradients
                of late options need: they are scaled by all earlier probabilities; Adam scales them anyway).
            weight_decay: As published, none.
            warmup: The first stage, in which widths of the slices are uniform: half of the training.
            drawn: Slices that are drawn in each step.
            random_share: Of the slices of the second stage that are still uniform at its end; at its start
                all are. Published are 0.37 to 0.78, depending on the number of GPUs.
            options: See `RelaxedSearch`.

        Raises:
            RecipeError: An option is out of its range.
            SpaceError: The space has nothing to relax.
            InfeasibleBudgetError: Nothing fits.
        """
        super().__init__(
            *args, learning_rate=learning_rate, weight_decay=weight_decay, warmup=warmup, **options
        )
        self._drawn = check_count("drawn", drawn)
        self._random_share = check_share("random_share", random_share)
        self._start()

    def _start(self) -> None:
        """Set all chains alike, so that the expected cost that is nearest to its limit meets it."""
        if not self._priced:
            self._set(UNLIMITED)
            return
        low, high = -STEEPEST, STEEPEST
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            self._set(middle)
            with torch.no_grad():
                above = max(float(ratio) for ratio in self.ratios().values()) > 1.0
            low, high = (low, middle) if above else (middle, high)
        self._set(low)

    def _set(self, logit: float) -> None:
        with torch.no_grad():
            for vector in self.relaxation.logits:
                vector.fill_(logit)

    def weight_gates(self, moment: Moment) -> Gates:
        """Return the largest network."""
        return self._slice(self.relaxation.largest())

    def taught_gates(self, moment: Moment) -> Sequence[Gates]:
        """Return the smallest network and drawn ones: uniform ones, later more and more of the chains."""
        space = self.relaxation.space
        generator = np.random.default_rng(int(torch.randint(2**62, (1,), generator=moment.generator)))
        stage = max(0.0, moment.progress - self._warmup) / max(1.0 - self._warmup, 1e-12)
        uniform = 1.0 - stage * (1.0 - self._random_share)
        rows = [space.smallest()]
        for _ in range(self._drawn):
            if generator.random() < uniform:
                rows.append(space.sample(1, generator))
            else:
                rows.append(self._walk(generator))
        return [self._slice(row) for row in rows]

    def gradients(self, network: Mixed, train: Images, held_out: Images, moment: Moment) -> None:
        """Differentiate the held-out loss of the gated network by the parameters of the chains."""
        self.set_gradients(self.penalised(network.loss(held_out, self.soft_gates())))

    def derived_from(self) -> dict[str, Tensor]:
        """Return weights that fall with the squared distance from the expected width, in parts of the widest.

        The most probable state of a chain is often its first or last one, whatever it expects.
        """
        found = {}
        for name, p in self.relaxation.probabilities().items():
            options = self.relaxation.space.variables[name].options
            widths = torch.tensor([float(option) for option in options], dtype=torch.float64)
            distance = (widths - p @ widths) / widths[-1]
            found[name] = torch.exp(-(distance**2))
        return found

    def _slice(self, codes: Codes) -> dict[str, Gate]:
        """Return gates that compute one network."""
        space = self.relaxation.space
        one = torch.ones(1, dtype=torch.float64)
        return {name: Gate((int(codes[0, space.positions[name]]),), one) for name in self.relaxation.relaxed}

    def _walk(self, generator: np.random.Generator) -> Codes:
        """Draw a network from the chains."""
        codes = self.relaxation.largest()
        space = self.relaxation.space
        with torch.no_grad():
            for name, vector in self.relaxation.probabilities().items():
                p = vector.numpy()
                codes[0, space.positions[name]] = int(generator.choice(len(p), p=p / p.sum()))
        return space.canonical(codes)
