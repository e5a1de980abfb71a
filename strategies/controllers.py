"""Controllers of reinforcement learning: what scores the options of every choice, and how it is changed.

Gradients are written out: for a few rows of a few dozen small steps an autograd engine costs several times
the arithmetic, and numpy alone is the same on every number of threads. Tests compare them with PyTorch's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np
from numpy.typing import NDArray

from autocompress.cost import Values
from autocompress.space import Codes

NOT_TAKEN = -1
"""Stands for the option of a choice without effect."""

Act = Callable[[int, Values], NDArray[np.int64]]
"""Given the position of a choice and the scores of its options `(n, options)`: the option that each row takes
there, `(n,)`, `NOT_TAKEN` where the choice has no effect."""


class Controller(Protocol):
    """Scores every option of every choice, possibly depending on the options taken before."""

    parameters: list[Values]
    """What is learned; changed in place."""

    def scores(self, n: int, act: Act) -> Values:
        """Walk through the choices with `n` rows, `act` deciding for each what it takes.

        Returns:
            `(n, choices, width)`, the greatest number of options being the width; 0 where there is none.
        """

    def gradients(self, taken: Codes, slopes: Callable[[Values], Values]) -> list[Values]:
        """Return the gradient of a number, by parameter, for given rows.

        Args:
            taken: `(n, choices)`, `NOT_TAKEN` where a choice has no effect.
            slopes: Given the scores, the derivative of the number with respect to each, of the same shape.
        """


def follow(taken: Codes) -> Act:
    """Return what takes the given options, `(n, choices)`."""
    return lambda position, scores: taken[:, position]


@final
class Factorized:
    """Scores that depend on nothing: every choice is drawn on its own.

    Source: TuNAS (`independent_sample` in `tunas/controller.py`) and the REINFORCE published
    with NAS-Bench-201 (`exps/NATS-algos/reinforce.py` of AutoDL-Projects).
    """

    def __init__(self, counts: Sequence[int]) -> None:
        """Start uniform over the options of each choice."""
        self._counts = tuple(counts)
        self.parameters = [np.zeros((len(self._counts), max(self._counts)))]

    def scores(self, n: int, act: Act) -> Values:
        """Return the same scores for every row, see `Controller`."""
        table = self.parameters[0]
        for position, count in enumerate(self._counts):
            act(position, np.broadcast_to(table[position, :count], (n, count)))
        return np.broadcast_to(table, (n, *table.shape))

    def gradients(self, taken: Codes, slopes: Callable[[Values], Values]) -> list[Values]:
        """Return the sum of the slopes over rows, see `Controller`."""
        table = self.parameters[0]
        return [slopes(np.broadcast_to(table, (len(taken), *table.shape))).sum(axis=0)]


@dataclass(frozen=True, eq=False)
class _Walk:
    """What the backward pass needs of every step.

    Attributes:
        tokens: Row of the input table that was read, `(choices, n)`.
        gates: Input, forget, new content, output, `(choices, n, 4, units)`.
        cells: `(choices + 1, n, units)`, the initial zeros first; so are the hidden states.
        hiddens: `(choices + 1, n, units)`.
        scores: `(n, choices, width)`.
    """

    tokens: NDArray[np.int64]
    gates: Values
    cells: Values
    hiddens: Values
    scores: Values


# A sigmoid is (1 + tanh(x / 2)) / 2, which overflows nowhere: one tanh serves all four gates.
_SLOPES = np.array([[0.5], [0.5], [1.0], [0.5]])
_OFFSETS = np.array([[0.5], [0.5], [0.0], [0.5]])


@final
class LSTM:
    """An LSTM that reads the option taken last and scores the options of the next choice.

    Each choice has output weights of its own, each option an embedding; embedding, input weights and bias
    are linear in one another and stored as one table. A choice without effect reads like the start: nothing
    was taken. The scores are `constant * tanh(output / temperature)`, which bounds how sure it can become.

    Source: Zoph et al., NASNet, CVPR 2018 (one layer, 100 units, uniform in +-0.1); Pham et al., ENAS, ICML
    2018, and its repository (64 units, `tanh_constant`, `temperature`).
    """

    def __init__(
        self,
        counts: Sequence[int],
        rng: np.random.Generator,
        *,
        units: int,
        constant: float,
        temperature: float,
    ) -> None:
        """Draw the initial weights."""
        self._counts, self._width = tuple(counts), max(counts)
        self._units, self._constant, self._temperature = units, constant, temperature
        choices = len(self._counts)
        # Inputs (row 0: nothing was taken), recurrent weights, output weights and biases. Of choices with
        # fewer options than the widest the last columns are never used.
        shapes = [
            (1 + choices * self._width, 4 * units),
            (units, 4 * units),
            (choices, units, self._width),
            (choices, self._width),
        ]
        self.parameters = [rng.uniform(-0.1, 0.1, shape) for shape in shapes]

    def scores(self, n: int, act: Act) -> Values:
        """Walk through the choices, see `Controller`."""
        return self._forward(n, act).scores

    def gradients(self, taken: Codes, slopes: Callable[[Values], Values]) -> list[Values]:
        """Walk through the choices of given rows and back, see `Controller`."""
        walk = self._forward(len(taken), follow(taken))
        return self._backward(walk, slopes(walk.scores))

    def _forward(self, n: int, act: Act) -> _Walk:
        inputs, recurrent, outputs, biases = self.parameters
        choices, units = len(self._counts), self._units
        walk = _Walk(
            tokens=np.zeros((choices, n), dtype=np.int64),
            gates=np.empty((choices, n, 4, units)),
            cells=np.zeros((choices + 1, n, units)),
            hiddens=np.zeros((choices + 1, n, units)),
            scores=np.empty((n, choices, self._width)),
        )
        for position, count in enumerate(self._counts):
            before = inputs[walk.tokens[position]]
            before += walk.hiddens[position] @ recurrent
            gates = walk.gates[position]
            np.multiply(before.reshape(n, 4, units), _SLOPES, out=gates)
            np.tanh(gates, out=gates)
            gates *= _SLOPES
            gates += _OFFSETS
            cell = walk.cells[position + 1]
            np.multiply(gates[:, 1], walk.cells[position], out=cell)
            cell += gates[:, 0] * gates[:, 2]
            hidden = walk.hiddens[position + 1]
            np.multiply(gates[:, 3], np.tanh(cell), out=hidden)
            raw = hidden @ outputs[position]
            raw += biases[position]
            raw /= self._temperature
            scores = walk.scores[:, position]
            np.multiply(np.tanh(raw), self._constant, out=scores)
            option = act(position, scores[:, :count])
            if position + 1 < choices:
                token = option + (1 + position * self._width)
                walk.tokens[position + 1] = np.where(option == NOT_TAKEN, 0, token)
        return walk

    def _backward(self, walk: _Walk, slopes: Values) -> list[Values]:
        inputs, recurrent, outputs, _ = self.parameters
        choices, n, _, units = walk.gates.shape
        squashed = 1 - (walk.scores / self._constant) ** 2
        to_raw = (slopes * squashed * (self._constant / self._temperature)).transpose(1, 0, 2)
        from_outputs = to_raw @ outputs.transpose(0, 2, 1)
        enter, keep, new, show = (walk.gates[:, :, gate] for gate in range(4))
        shown = np.tanh(walk.cells[1:])
        to_shown = show * (1 - shown**2)
        # Of each gate before its squashing: the derivative of the cell, for the last one of the hidden state.
        local = np.empty_like(walk.gates)
        local[:, :, 0] = new * enter * (1 - enter)
        local[:, :, 1] = walk.cells[:-1] * keep * (1 - keep)
        local[:, :, 2] = enter * (1 - new**2)
        local[:, :, 3] = shown * show * (1 - show)
        to_hidden, to_cell = np.zeros((n, units)), np.zeros((n, units))
        for position in range(choices - 1, -1, -1):
            to_hidden += from_outputs[position]
            to_cell += to_hidden * to_shown[position]
            back = local[position]
            back[:, :3] *= to_cell[:, None]
            back[:, 3] *= to_hidden
            to_cell *= keep[position]
            to_hidden = back.reshape(n, 4 * units) @ recurrent.T
        to_gates = local.reshape(choices * n, 4 * units)
        to_inputs = np.zeros_like(inputs)
        np.add.at(to_inputs, walk.tokens.ravel(), to_gates)
        to_recurrent = walk.hiddens[:-1].reshape(choices * n, units).T @ to_gates
        to_outputs = walk.hiddens[1:].transpose(0, 2, 1) @ to_raw
        return [to_inputs, to_recurrent, to_outputs, to_raw.sum(axis=1)]
