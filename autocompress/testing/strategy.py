"""The laws of every search strategy, as tests to inherit.

```python
class TestMyStrategy(StrategyContract):
    def make(self, constraints: Constraints, seed: int) -> Strategy:
        return MyStrategy(constraints, seed=seed, population=8)
```

Choose options with which the strategy learns within some thirty evaluations (a small population). The
class must stand at the top of its file: one law makes the strategy again in another process.
"""

import hashlib
import inspect
import os
import pickle
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import pytest

from autocompress.budget import Constraints
from autocompress.space import Codes
from autocompress.strategy import Strategy
from autocompress.testing.toys import every_network, tiny_constraints, toy_batch, toy_constraints
from autocompress.trial import Outcome

STEPS, ASKED = 12, 7

_OTHER_PROCESS = """
import importlib.util, sys
path, name = sys.argv[1:]
specification = importlib.util.spec_from_file_location("strategy_under_test", path)
module = importlib.util.module_from_spec(specification)
sys.modules[specification.name] = module
specification.loader.exec_module(module)
from autocompress.testing.strategy import sequence_digest
print(sequence_digest(getattr(module, name)()))
"""


def drive(strategy: Strategy, constraints: Constraints, *, steps: int = STEPS, n: int = ASKED) -> list[Codes]:
    """Ask and tell `steps` times, every fifth step as failed; return what was asked."""
    asked = []
    for step in range(steps):
        codes = strategy.ask(n)
        asked.append(codes.copy())
        outcome = Outcome.FAILED if step % 5 == 4 else Outcome.MEASURED
        strategy.tell(toy_batch(constraints, codes, outcome))
    return asked


def sequence_digest(contract: "StrategyContract") -> str:
    """Return a digest of what the strategy of a contract asks under seed 1."""
    constraints = toy_constraints()
    rows = np.vstack(drive(contract.make(constraints, 1), constraints))
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()


class StrategyContract(ABC):
    """Derive, name it `Test...`, and implement `make`."""

    @abstractmethod
    def make(self, constraints: Constraints, seed: int) -> Strategy:
        """Return a new strategy that maximises `accuracy`."""

    def test_the_same_seed_asks_the_same_sequence(self) -> None:
        """Law: deterministic in its arguments and the order of calls."""
        constraints = toy_constraints()
        first = drive(self.make(constraints, 1), constraints)
        second = drive(self.make(toy_constraints(), 1), constraints)
        for one, other in zip(first, second, strict=True):
            np.testing.assert_array_equal(one, other)

    def test_another_process_with_other_hashes_asks_the_same_sequence(self) -> None:
        """Law: nothing depends on the order of sets, on addresses or on what ran before."""
        hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
        run = subprocess.run(
            [sys.executable, "-c", _OTHER_PROCESS, inspect.getfile(type(self)), type(self).__qualname__],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=Path.cwd(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.split()[-1] == sequence_digest(self)

    def test_another_seed_asks_another_sequence(self) -> None:
        """Law: the seed has an effect."""
        constraints = toy_constraints()
        first = np.vstack(drive(self.make(constraints, 1), constraints))
        second = np.vstack(drive(self.make(constraints, 2), constraints))
        assert first.shape != second.shape or (first != second).any()

    @pytest.mark.parametrize("n", [1, ASKED, 1000])
    def test_every_asked_row_is_canonical_and_feasible_and_there_are_at_most_n(self, n: int) -> None:
        """Law: no evaluation is lost on what is not in the space or not in the budget."""
        constraints = toy_constraints()
        for codes in drive(self.make(constraints, 3), constraints, n=n, steps=min(STEPS, 3000 // n)):
            assert len(codes) <= n
            assert codes.dtype == np.int64
            constraints.space.validate(codes)
            np.testing.assert_array_equal(codes, constraints.space.canonical(codes))
            assert constraints.feasible(codes).all()

    @pytest.mark.parametrize("n", [1, ASKED])
    def test_no_row_is_asked_twice(self, n: int) -> None:
        """Law: no evaluation is paid twice."""
        constraints = toy_constraints()
        rows = np.vstack(drive(self.make(constraints, 4), constraints, steps=200 // n, n=n))
        assert len(rows) >= 20
        assert len(np.unique(rows, axis=0)) == len(rows)

    @pytest.mark.parametrize("outcome", [Outcome.INFEASIBLE, Outcome.FAILED])
    def test_it_goes_on_when_nothing_could_be_measured(self, outcome: Outcome) -> None:
        """Law: it survives tells without one measured row, and then learns from what follows."""
        constraints = toy_constraints()
        strategy = self.make(constraints, 5)
        for _ in range(10):
            codes = strategy.ask(ASKED)
            assert len(codes), "nothing was asked although most of the space is left"
            strategy.tell(toy_batch(constraints, codes, outcome))
        assert len(np.vstack(drive(strategy, constraints)))

    def test_rows_it_did_not_ask_for_can_be_told_before_its_first_ask(self) -> None:
        """Law: a search can start from given networks, see `WarmStart`."""
        constraints = toy_constraints()
        strategy = self.make(constraints, 9)
        for start in range(0, 20, 5):
            rows = np.unique(constraints.sample(50, np.random.default_rng(start)), axis=0)[:5]
            strategy.tell(toy_batch(constraints, rows))
        assert len(np.vstack(drive(strategy, constraints))) > ASKED

    def test_what_was_asked_can_be_told_in_any_order(self) -> None:
        """Law: workers finish when they finish; no row is lost or asked again for it."""
        constraints = toy_constraints()
        strategy = self.make(constraints, 10)
        rng = np.random.default_rng(0)
        asked: list[Codes] = []
        for _ in range(6):
            pieces = [codes for codes in (strategy.ask(ASKED), strategy.ask(ASKED)) if len(codes)]
            assert pieces, "nothing was asked although everything was told and most of the space is left"
            asked += pieces
            rows = np.vstack(pieces)
            for row in rng.permutation(len(rows)):
                strategy.tell(toy_batch(constraints, rows[row : row + 1]))
        rows = np.vstack(asked)
        assert constraints.feasible(rows).all()
        assert len(np.unique(rows, axis=0)) == len(rows)

    def test_it_survives_being_told_rows_again(self) -> None:
        """Law: a row that was told before, by `WarmStart` or by itself, does no harm."""
        constraints = toy_constraints()
        strategy = self.make(constraints, 11)
        for _ in range(6):
            codes = strategy.ask(ASKED)
            assert len(codes)
            strategy.tell(toy_batch(constraints, codes))
            strategy.tell(toy_batch(constraints, codes[:2]))
        assert len(np.vstack(drive(strategy, constraints)))

    @pytest.mark.parametrize("options", [(1,), (2,), (5,), (1, 1), (1, 3, 1)])
    def test_it_ends_on_spaces_of_one_choice_or_one_option(self, options: tuple[int, ...]) -> None:
        """Law: nothing is asked twice, everything at most once, and then comes the end."""
        constraints = tiny_constraints(options)
        size = int(np.prod(options))
        strategy = self.make(constraints, 12)
        asked: list[Codes] = []
        for _ in range(20 * size):
            codes = strategy.ask(ASKED)
            if not len(codes):
                break
            asked.append(codes)
            strategy.tell(toy_batch(constraints, codes))
        else:
            pytest.fail(f"no end on a space of {size} networks")
        rows = np.vstack(asked)
        assert len(np.unique(rows, axis=0)) == len(rows) == size

    def test_pickled_in_mid_search_it_goes_on_identically(self) -> None:
        """Law: a search can be stored between any two calls, also between ask and tell."""
        constraints = toy_constraints()
        strategy = self.make(constraints, 6)
        drive(strategy, constraints, steps=5)
        codes = strategy.ask(ASKED)
        twin = pickle.loads(pickle.dumps(strategy))
        for one in (strategy, twin):
            one.tell(toy_batch(constraints, codes))
        for one, other in zip(drive(strategy, constraints), drive(twin, constraints), strict=True):
            np.testing.assert_array_equal(one, other)

    def test_on_a_tiny_space_it_ends(self) -> None:
        """Law: once all was told, an empty ask says that the strategy is finished; it always comes."""
        constraints = toy_constraints(blocks=2)
        networks = every_network(constraints.space)
        feasible = int(constraints.feasible(networks).sum())
        strategy = self.make(constraints, 7)
        asked = 0
        for _ in range(4 * feasible):
            codes = strategy.ask(ASKED)
            if not len(codes):
                break
            asked += len(codes)
            strategy.tell(toy_batch(constraints, codes))
        else:
            pytest.fail(f"{asked} rows asked of a space with {feasible} feasible networks, and still no end")
        assert 0 < asked <= feasible

    def test_the_global_generator_of_numpy_is_neither_used_nor_changed(self) -> None:
        """Law: randomness comes from the seed only."""
        constraints = toy_constraints()
        expected = np.vstack(drive(self.make(constraints, 8), constraints))
        state = np.random.get_state(legacy=False)  # noqa: NPY002 the law is about the global generator
        try:
            np.random.seed(12345)  # noqa: NPY002
            before = np.random.get_state(legacy=False)["state"]["key"].copy()  # noqa: NPY002
            rows = np.vstack(drive(self.make(constraints, 8), constraints))
            after = np.random.get_state(legacy=False)["state"]["key"]  # noqa: NPY002
        finally:
            np.random.set_state(state)  # noqa: NPY002
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_array_equal(before, after)
