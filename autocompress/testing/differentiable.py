"""The laws of every differentiable strategy, as tests to inherit.

```python
class TestMyStrategy(DifferentiableContract):
    warmup = 0.2

    def make(self, constraints: Constraints, seed: int, candidates: int) -> Differentiable:
        return MyStrategy(constraints, seed=seed, candidates=candidates, warmup=0.2)
```

Override `space` where the strategy needs one of a certain kind, such as cells. Choose small settings: every
law trains for a few steps.
"""

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.budget import Budget, Constraints
from autocompress.cost import operation_cost
from autocompress.differentiable import Differentiable, Images, Moment
from autocompress.elastic.mixture import Gates, run_mixture
from autocompress.errors import InfeasibleBudgetError, TrainingError
from autocompress.space import SearchSpace
from autocompress.testing.toys import toy_classifier_space
from autocompress.training.loop import seeded

STEPS, PER_EPOCH = 4, 2
"""Of a phase, and of an epoch."""


class MixedSupernet:
    """A supernet with a loss, in the middle of a training by SGD: weights and momenta have moved.

    Attributes:
        supernet: The weights.
        arch: Says the options of choices without gates.
        channels: Cells mix one in so many channels.
        group: Settings of the optimizer.
        velocities: Momentum of each weight, by its id.
    """

    def __init__(self, space: SearchSpace, *, channels: int = 1, dtype: torch.dtype = torch.float32) -> None:
        """Make the weights, a function of their sizes."""
        self.supernet = space.supernet().to(dtype)
        with torch.no_grad():
            for weight in self.supernet.parameters():
                generator = torch.Generator().manual_seed(weight.numel())
                weight.add_(torch.randn(weight.shape, dtype=dtype, generator=generator), alpha=0.3)
        (self.arch,) = space.decode(space.largest())
        self.channels = channels
        self.group = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": False}
        generator = torch.Generator().manual_seed(0)
        self.velocities = {
            id(weight): 0.1 * torch.randn(weight.shape, dtype=dtype, generator=generator)
            for weight in self.supernet.parameters()
        }

    def of_outputs(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(outputs, targets)

    def loss(self, batch: Images, gates: Gates) -> Tensor:
        """Return the loss of a mixture."""
        images, targets = batch
        outputs = run_mixture(self.supernet, images, self.arch, gates, affine=False, channels=self.channels)
        return self.of_outputs(outputs, targets)

    @property
    def weights(self) -> list[tuple[nn.Parameter, Mapping[str, Any]]]:
        """The weights with the settings of their optimizer."""
        return [(weight, self.group) for weight in self.supernet.parameters()]

    def velocity(self, weight: nn.Parameter) -> Tensor | None:
        """Return the momentum of a weight."""
        return self.velocities[id(weight)]


class DifferentiableContract(ABC):
    """Derive, name it `Test...`, and implement `make`.

    Attributes:
        warmup: Share of each phase in which `make`'s strategy leaves its architecture parameters alone.
        budget: What derived networks are to keep, in MACs and parameters.
    """

    warmup = 0.0
    budget = "macs=70%,params=80%"

    @abstractmethod
    def make(self, constraints: Constraints, seed: int, candidates: int) -> Differentiable:
        """Return a new strategy that derives at most so many networks."""

    def space(self) -> SearchSpace:
        """Return the space, of images that every of its networks runs in milliseconds."""
        return toy_classifier_space()

    # What the laws are tried on -----------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        """Sums over several threads may be added in another order at each run."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    def constraints(self) -> Constraints:
        """Return the budget on the space."""
        space = self.space()
        costs = [operation_cost(space, metric) for metric in ("macs", "params")]
        return Budget.parse(self.budget).resolve(space, costs)

    def network(self, strategy: Differentiable) -> MixedSupernet:
        """Return the supernet that a strategy is trained with."""
        return MixedSupernet(self.space(), channels=strategy.channels)

    def batch(self, seed: int) -> Images:
        """Return random images of two classes."""
        space = self.space()
        (_, first), *_ = space.operations(space.largest())
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(4, *first[0].in_shape, generator=generator), torch.tensor([0, 1, 1, 0])

    def step(self, strategy: Differentiable, network: MixedSupernet, step: int) -> None:
        """Make a step of the architecture, as the loop of training does."""
        moment = Moment(step, STEPS, torch.Generator().manual_seed(step), PER_EPOCH)
        with seeded(0, step):
            strategy.architecture_step(network, self.batch(2 * step), self.batch(2 * step + 1), moment)

    def trained(self, *, candidates: int = 1) -> Differentiable:
        """Return a strategy after all phases."""
        strategy = self.make(self.constraints(), 1, candidates)
        network = self.network(strategy)
        for phase in range(len(strategy.phases)):
            strategy.begin(phase)
            for step in range(STEPS):
                self.step(strategy, network, step)
        return strategy

    # The laws -----------------------------------------------------------------------------------------

    def test_it_satisfies_the_protocol_and_starts_from_a_network_of_the_space(self) -> None:
        """Law: `training.bilevel` can train it."""
        strategy = self.make(self.constraints(), 1, 1)
        assert isinstance(strategy, Differentiable)
        assert strategy.channels >= 1
        space = self.space()
        assert strategy.start.shape == (1, len(space.choices))
        space.validate(strategy.start)
        np.testing.assert_array_equal(strategy.start, space.canonical(strategy.start))

    def test_phases_share_all_epochs_and_the_last_trains_the_supernet_itself(self) -> None:
        """Law: shares are positive and add up to 1; the last phase has no settings."""
        phases = self.make(self.constraints(), 1, 1).phases
        assert all(phase.share > 0 for phase in phases)
        assert sum(phase.share for phase in phases) == pytest.approx(1.0)
        assert not phases[-1].settings

    def test_a_budget_that_nothing_fits_is_refused_when_it_is_made(self) -> None:
        """Law: nobody trains for a budget that cannot be kept."""
        constraints = self.constraints()
        least = constraints.costs["params"].minimum
        with pytest.raises(InfeasibleBudgetError, match="the reachable minimum"):
            self.make(Constraints(constraints.space, constraints.costs, {"params": 0.99 * least}), 1, 1)

    def test_the_seed_and_nothing_else_decides_how_it_starts(self) -> None:
        """Law: deterministic in its arguments, and the seed has an effect."""
        first, second, other = (self.make(self.constraints(), seed, 1).mixture() for seed in (1, 1, 2))
        assert _equal(first, second)
        assert not _equal(first, other)

    def test_a_step_leaves_weights_their_gradients_and_their_optimizer_as_they_were(self) -> None:
        """Law: only the loop moves the weights."""
        strategy = self.make(self.constraints(), 1, 1)
        network = self.network(strategy)
        weights = list(network.supernet.parameters())
        for weight in weights[::2]:
            weight.grad = torch.full_like(weight, 0.5)
        group = dict(network.group)
        before = [
            (
                w.detach().clone(),
                w.grad if w.grad is None else w.grad.clone(),
                network.velocities[id(w)].clone(),
            )
            for w in weights
        ]
        for step in range(STEPS):
            self.step(strategy, network, step)
        for weight, (value, gradient, velocity) in zip(weights, before, strict=True):
            assert weight.requires_grad
            assert torch.equal(weight, value)
            assert (weight.grad is None) == (gradient is None)
            assert weight.grad is None or gradient is None or torch.equal(weight.grad, gradient)
            assert torch.equal(network.velocities[id(weight)], velocity)
        assert network.group == group

    def test_the_architecture_moves_but_not_while_it_warms_up(self) -> None:
        """Law: in every phase."""
        strategy = self.make(self.constraints(), 1, 1)
        network = self.network(strategy)
        for phase in range(len(strategy.phases)):
            strategy.begin(phase)
            for step in range(STEPS):
                before = strategy.mixture()
                self.step(strategy, network, step)
                assert _equal(before, strategy.mixture()) == (step / STEPS < self.warmup)

    def test_a_step_is_a_function_of_state_batch_and_moment(self) -> None:
        """Law: a strategy that takes a state goes on as the one that gave it, of which it shares nothing."""
        one, other = (self.make(self.constraints(), seed, 1) for seed in (1, 2))
        network = self.network(one)
        for step in range(STEPS - 2):
            self.step(one, network, step)
        other.load_state_dict(one.state_dict())
        untouched = _stored(one)
        self.step(other, network, STEPS - 2)
        assert _bytes(untouched) == _bytes(_stored(one))
        self.step(one, network, STEPS - 2)
        assert _bytes(_stored(other)) == _bytes(_stored(one))
        moments = [Moment(STEPS - 1, STEPS, torch.Generator().manual_seed(5), PER_EPOCH) for _ in range(2)]
        assert _equal(one.weight_gates(moments[0]), other.weight_gates(moments[1]))

    def test_stored_in_any_phase_it_goes_on_identically(self) -> None:
        """Law: the state is tensors and plain values, and all that training changes."""
        one = self.make(self.constraints(), 1, 2)
        network = self.network(one)
        phases = len(one.phases)
        for phase in range(phases):
            one.begin(phase)
            for step in range(STEPS - 1):
                self.step(one, network, step)
            twin = self.make(self.constraints(), 1, 2)
            twin.load_state_dict(_stored(one))
            assert twin.notes == one.notes
            for strategy in (one, twin):
                self.step(strategy, network, STEPS - 1)
                if phase + 1 < phases:
                    strategy.begin(phase + 1)
            assert _bytes(_stored(twin)) == _bytes(_stored(one))
            assert twin.notes == one.notes
            assert _equal(twin.mixture(), one.mixture())
        np.testing.assert_array_equal(twin.ask(2), one.ask(2))

    def test_what_is_asked_fits_and_is_asked_once(self) -> None:
        """Law: canonical, within every limit, none twice, at most as many as `candidates`; then the end."""
        constraints = self.constraints()
        strategy = self.trained(candidates=4)
        asked = [strategy.ask(1), strategy.ask(2), strategy.ask(100)]
        assert [len(codes) for codes in asked] == [1, 2, 1]
        assert len(strategy.ask(1)) == 0
        rows = np.vstack(asked)
        constraints.space.validate(rows)
        np.testing.assert_array_equal(rows, constraints.space.canonical(rows))
        assert constraints.feasible(rows).all()
        assert len(np.unique(rows, axis=0)) == len(rows)

    @pytest.mark.parametrize("where", ["held-out images", "weights"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_an_error_and_not_an_architecture(self, where: str, value: float) -> None:
        """Law: a `TrainingError` that says what is not finite; nothing of it is left in the strategy."""
        strategy = self.make(self.constraints(), 1, 1)
        network = self.network(strategy)
        train, (images, targets) = self.batch(0), self.batch(1)
        if where == "weights":
            with torch.no_grad():
                next(network.supernet.parameters()).fill_(value)
        else:
            images = torch.full_like(images, value)
        before = strategy.mixture()
        for step in range(STEPS):
            moment = Moment(step, STEPS, torch.Generator().manual_seed(step), PER_EPOCH)
            if step / STEPS < self.warmup:
                with suppress(TrainingError):  # what nobody looks at may pass
                    strategy.architecture_step(network, train, (images, targets), moment)
            else:
                with pytest.raises(TrainingError, match=r"nan|inf|finite"):
                    strategy.architecture_step(network, train, (images, targets), moment)
            json.dumps(strategy.notes, allow_nan=False)
        assert _equal(before, strategy.mixture())

    def test_notes_can_be_written_as_json_and_say_what_is_probable(self) -> None:
        """Law: entropy, probabilities, expected costs, a line an epoch, and whether the search stopped."""
        strategy = self.trained()
        written = json.loads(json.dumps(strategy.notes, allow_nan=False))["relaxation"]
        assert 0 <= written["entropy"] <= 1 + 1e-9
        assert written["probabilities"]
        for name, options in written["probabilities"].items():
            assert set(options) == {str(option) for option in self.space().variables[name].options}
            assert sum(options.values()) == pytest.approx(1.0)
            assert min(options.values()) >= 0
        assert written["expected_costs"].keys() == self.constraints().limits.keys()
        assert min(written["expected_costs"].values()) > 0
        epochs = len(strategy.phases) * STEPS // PER_EPOCH
        assert [seen["epoch"] for seen in written["epochs"]] == list(range(1, epochs + 1))
        assert written["stopped"] is None or 1 <= written["stopped"] <= epochs

    def test_notes_stay_what_they_were(self) -> None:
        """Law: they are a record, not a view."""
        strategy = self.make(self.constraints(), 1, 1)
        network = self.network(strategy)
        notes = strategy.notes
        written = json.dumps(notes)
        for step in range(STEPS):
            self.step(strategy, network, step)
        assert json.dumps(notes) == written
        assert json.dumps(strategy.notes) != written

    def test_gates_for_the_weights_and_the_mixture_have_no_gradients(self) -> None:
        """Law: a step of the weights leaves the architecture alone; gates are copies."""
        strategy = self.make(self.constraints(), 1, 1)
        network = self.network(strategy)
        for phase in range(len(strategy.phases)):
            strategy.begin(phase)
            moment = Moment(STEPS - 1, STEPS, torch.Generator().manual_seed(0), PER_EPOCH)
            before = strategy.mixture()
            for gates in (strategy.weight_gates(moment), strategy.mixture()):
                for gate in gates.values():
                    assert not gate.weights.requires_grad
                    assert gate.scale is None or not gate.scale.requires_grad
                loss = network.loss(self.batch(0), gates)
                assert bool(torch.isfinite(loss))
                loss.backward()  # type: ignore[no-untyped-call]
                for gate in gates.values():
                    gate.weights.zero_()
            assert _equal(before, strategy.mixture())
            for name, gate in before.items():
                assert float(gate.weights.sum()) == pytest.approx(1.0), name


def _stored(strategy: Differentiable) -> dict[str, Any]:
    """Return the state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(strategy.state_dict(), file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def _bytes(state: Any) -> Any:
    """Return a state with its tensors as what can be compared."""
    if isinstance(state, Tensor):
        return state.dtype, tuple(state.shape), state.numpy().tobytes()
    if isinstance(state, Mapping):
        return {key: _bytes(value) for key, value in state.items()}
    return [_bytes(value) for value in state] if isinstance(state, list | tuple) else state


def _equal(one: Gates, other: Gates) -> bool:
    """Return whether gates are equal, bit for bit."""

    def plain(gates: Gates) -> Any:
        return {name: _bytes([g.codes, g.weights, g.scale, g.dropout]) for name, g in gates.items()}

    return bool(plain(one) == plain(other))
