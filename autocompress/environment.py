"""A space under a budget as an environment of gymnasium, for reinforcement learning libraries of one's own.

```python
environment = RatioEnvironment(constraints, lambda codes: accuracy(codes))
model = stable_baselines3.TD3("MlpPolicy", environment)
```

The same process as that of the strategy `amc` (`autocompress.ratios`), which needs no gymnasium: every
episode ends with a network within the budget.
"""

from collections.abc import Callable
from typing import Any, SupportsFloat, final

import numpy as np
from numpy.typing import NDArray

from autocompress.budget import Constraints
from autocompress.errors import EvaluationError, SpaceError
from autocompress.ratios import RatioProcess
from autocompress.space import Codes

try:
    import gymnasium
except ImportError as error:
    raise ImportError(f"the environment needs gymnasium: pip install 'autocompress[rl]' ({error})") from error

Observation = NDArray[np.float32]
Action = NDArray[np.float32]


@final
class RatioEnvironment(gymnasium.Env[Observation, Action]):
    """One network an episode, one ratio a choice; the reward comes with the last one.

    The information of `step` has the ratio that was possible (`ratio`), and at the end of an episode the row
    (`codes`, `(1, choices)`) and its costs (`costs`). The last observation of an episode is the one before.
    """

    def __init__(self, constraints: Constraints, reward: Callable[[Codes], SupportsFloat]) -> None:
        """Make it.

        Args:
            constraints: Space, costs and limits.
            reward: Of one feasible row `(1, choices)`; larger is better.

        Raises:
            SpaceError: Nothing is to be decided, or options are not positive numbers in ascending order.
            InfeasibleBudgetError: Nothing fits.
        """
        self._process, self._reward = RatioProcess(constraints), reward
        self._walk = self._process.start()
        self._finished = self._walk.done
        if self._finished:
            raise SpaceError(
                f"space {constraints.space.name!r} has one network only: there is nothing to decide"
            )
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (self._process.features,), np.float32)
        self.action_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; nothing in it is random."""
        super().reset(seed=seed, options=options)
        self._walk, self._finished = self._process.start(), False
        return self._walk.state, {}

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Decide the next choice, see `gymnasium.Env.step`.

        Raises:
            EvaluationError: The episode is over, or the reward is not a finite number.
        """
        if self._finished:
            raise EvaluationError("the episode is over: call reset() before the next step()")
        information: dict[str, Any] = {"ratio": self._walk.act(float(action[0]))}
        self._finished = self._walk.done
        if not self._finished:
            return self._walk.state, 0.0, False, False, information
        row = self._walk.row
        information["codes"] = row
        prices = self._process.constraints.price(row)
        information["costs"] = {metric: float(values[0]) for metric, values in prices.items()}
        reward = float(self._reward(row))
        if not np.isfinite(reward):
            raise EvaluationError(f"the reward of a row must be a finite number, got {reward}")
        return self._walk.state, reward, True, False, information
