import pickle

import numpy as np
import pytest

from autocompress.cost import operation_cost
from autocompress.evaluation.ensemble import ProcessEnsemble
from autocompress.evaluation.gaussian_process import GaussianProcess
from autocompress.testing.toys import every_network, toy_space

SPACE = toy_space(4)
CODES = every_network(SPACE)
COSTS = [operation_cost(SPACE, "macs")]
ROWS = CODES[np.random.default_rng(0).permutation(len(CODES))[:30]]
VALUES = np.sin(ROWS @ np.arange(1.0, ROWS.shape[1] + 1)) + np.log(COSTS[0].of(ROWS))
JUDGED = CODES[100:120]


def test_its_moments_are_those_of_draws_from_either_member() -> None:
    ensemble = ProcessEnsemble(SPACE, COSTS).fit(ROWS, VALUES)
    rng = np.random.default_rng(1)
    draws = np.vstack(
        [
            rng.multivariate_normal(
                *GaussianProcess(SPACE, costs).fit(ROWS, VALUES).joint(JUDGED), size=40_000
            )
            for costs in (COSTS, [])
        ]
    )
    means, covariances = ensemble.joint(JUDGED)
    np.testing.assert_allclose(means, draws.mean(axis=0), atol=0.02)
    np.testing.assert_allclose(covariances, np.cov(draws.T), atol=0.03)
    again, spreads = ensemble.with_spread(JUDGED)
    np.testing.assert_allclose(again, means, rtol=1e-9)
    np.testing.assert_allclose(spreads, np.sqrt(np.diag(covariances)), rtol=1e-6)
    np.testing.assert_allclose(ensemble.predict(JUDGED), means, rtol=1e-9)


def test_what_is_left_out_and_noise_are_means_of_the_members() -> None:
    ensemble = ProcessEnsemble(SPACE, COSTS).fit(ROWS, VALUES)
    one, other = (GaussianProcess(SPACE, costs).fit(ROWS, VALUES) for costs in (COSTS, []))
    np.testing.assert_allclose(ensemble.leave_one_out(), (one.leave_one_out() + other.leave_one_out()) / 2)
    assert ensemble.noise == pytest.approx((one.noise + other.noise) / 2)


def test_without_costs_it_is_one_process_and_it_can_be_pickled() -> None:
    ensemble = pickle.loads(pickle.dumps(ProcessEnsemble(SPACE).fit(ROWS, VALUES)))
    assert len(ensemble.members) == 1
    np.testing.assert_array_equal(
        ensemble.with_spread(JUDGED), GaussianProcess(SPACE).fit(ROWS, VALUES).with_spread(JUDGED)
    )
