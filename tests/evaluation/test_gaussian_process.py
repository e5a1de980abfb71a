import pickle

import numpy as np
import pytest
from scipy.optimize import check_grad
from scipy.stats import kendalltau

from autocompress.cost import operation_cost
from autocompress.evaluation.gaussian_process import (
    EFFECTS,
    Effect,
    Encoding,
    GaussianProcess,
    log_costs,
    surprise,
)
from autocompress.space import Choice, Codes, SearchSpace
from autocompress.testing.toys import every_network, toy_space

SPACE = toy_space(4)
CODES = every_network(SPACE)
COSTS = [operation_cost(SPACE, metric) for metric in ("macs", "params")]
GENES = SearchSpace("genes", tuple(Choice(f"g{i}", ("a", "b", "c"), ordinal=False) for i in range(5)), (), {})
EVERY = every_network(GENES)


def some(codes: Codes, n: int, seed: int = 0) -> Codes:
    return codes[np.random.default_rng(seed).permutation(len(codes))[:n]]


def wavy(codes: Codes) -> np.ndarray:
    return np.sin(codes @ np.arange(1.0, codes.shape[1] + 1)) + 0.3 * codes.sum(axis=1)


def test_genes_agree_where_both_have_the_same_option_or_no_effect() -> None:
    rows = some(CODES, 40)
    encoded = Encoding(SPACE).rows(rows)
    active = SPACE.active(rows)
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            same = (one == other) & (active[i] == active[j])
            assert encoded.genes[i] @ encoded.genes[j] == same.sum()


def test_steps_are_distances_between_ordinal_options_and_one_where_one_has_no_effect() -> None:
    space = SearchSpace(
        "steps",
        (
            Choice("depth", (1, 2)),
            Choice("kernel", (1, 3, 5)),
            Choice("kind", ("a", "b", "c"), ordinal=False),
            Choice("only", (7,)),
            Choice("deep", (1, 2, 3), active_when=(("depth", (2,)),)),
        ),
        (),
        {},
    )
    rows = every_network(space)
    steps = Encoding(space).rows(rows).steps
    for one, x in zip(rows, steps, strict=True):
        for other, y in zip(rows, steps, strict=True):
            expected = abs(one[0] - other[0]) + abs(one[1] - other[1]) / 2 + (one[2] != other[2])
            if one[0] != other[0]:
                # 1, and the steps from the first option.
                expected += 1 + max(one[4], other[4]) / 2
            else:
                expected += abs(one[4] - other[4]) / 2
            assert np.square(x - y).sum() == pytest.approx(expected)


def test_the_posterior_is_that_of_the_textbook() -> None:
    """Kernels by their definitions, and the conditional of a joint normal by plain inversion."""
    train, judged = some(CODES, 60), some(CODES, 20, seed=1)
    values = 50 + 10 * wavy(train)
    process = GaussianProcess(SPACE, COSTS).fit(train, values)
    mean, scale = values.mean(), values.std()
    costs = log_costs(COSTS, train)
    both = np.vstack([train, judged])
    standard = np.clip((log_costs(COSTS, both) - costs.mean(axis=0)) / costs.std(axis=0), -4, 4)
    rows = Encoding(SPACE).rows(both)
    same = (rows.genes[:, None] * rows.genes).sum(axis=2) / len(SPACE.choices)
    steps = np.square(rows.steps[:, None] - rows.steps).sum(axis=2) / len(SPACE.choices)
    kernels: dict[Effect, np.ndarray] = {
        "genes": same,
        "pairs": same**2,
        "near": np.exp(-3 * steps),
        "costs": standard @ standard.T,
        "curve": np.exp(-np.square(standard[:, None] - standard).sum(axis=2) / 4),
    }
    prior = np.ones((80, 80))
    for effect, weight in zip(EFFECTS, process.weights, strict=True):
        known = kernels[effect][:60, :60]
        prior += weight * kernels[effect] / (np.diag(known).mean() - known.mean())
    inverse = np.linalg.inv(prior[:60, :60] + process.noise / scale**2 * np.eye(60))
    expected = mean + scale * prior[60:, :60] @ inverse @ ((values - mean) / scale)
    covariance = scale**2 * (prior[60:, 60:] - prior[60:, :60] @ inverse @ prior[:60, 60:])
    means, covariances = process.joint(judged)
    np.testing.assert_allclose(means, expected, rtol=1e-9)
    np.testing.assert_allclose(covariances, covariance, atol=1e-8 * scale**2)
    np.testing.assert_allclose(process.predict(judged), expected, rtol=1e-9)
    again, spreads = process.with_spread(judged)
    np.testing.assert_allclose(again, expected, rtol=1e-9)
    np.testing.assert_allclose(spreads, np.sqrt(np.diag(covariance)), rtol=1e-6)


def test_the_gradient_of_the_posterior_density_is_its_slope() -> None:
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(3, 12, 12))
    flat = (factors @ factors.transpose(0, 2, 1)).reshape(3, -1)
    targets = rng.normal(size=12)
    for _ in range(3):
        at = rng.normal(size=4)
        difference = check_grad(
            lambda x: surprise(x, flat, targets)[0], lambda x: surprise(x, flat, targets)[1], at
        )
        assert difference < 1e-4 * np.abs(surprise(at, flat, targets)[1]).max()


def test_leave_one_out_is_a_fit_without_the_row() -> None:
    rows = some(CODES, 25)
    values = wavy(rows)
    process = GaussianProcess(SPACE, effects=("genes", "near")).fit(rows, values)
    encoded = Encoding(SPACE).rows(rows)
    choices = len(SPACE.choices)
    same = encoded.genes @ encoded.genes.T / choices
    near = np.exp(-3 / choices * np.square(encoded.steps[:, None] - encoded.steps).sum(axis=2))
    prior = np.ones((25, 25))
    for kernel, weight in zip((same, near), process.weights, strict=True):
        prior += weight * kernel / (np.diag(kernel).mean() - kernel.mean())
    noise = process.noise / values.var()
    targets = (values - values.mean()) / values.std()
    for row, predicted in enumerate(process.leave_one_out()):
        others = np.delete(np.arange(25), row)
        matrix = prior[np.ix_(others, others)] + noise * np.eye(24)
        expected = prior[row, others] @ np.linalg.solve(matrix, targets[others])
        assert predicted == pytest.approx(expected * values.std() + values.mean(), rel=1e-8)


def test_it_finds_out_what_values_are_made_of() -> None:
    additive = EVERY @ np.array([3.0, 2.0, 1.0, 0.5, 0.2])
    pairwise = 1.0 * (EVERY[:, 0] == 1) * (EVERY[:, 1] == 2) - (EVERY[:, 2] == 0) * (EVERY[:, 3] == 0)
    rng = np.random.default_rng(3)
    rows = rng.permutation(len(EVERY))[:80]
    others = np.setdiff1d(np.arange(len(EVERY)), rows)
    fits = {
        name: GaussianProcess(GENES).fit(EVERY[rows], values[rows])
        for name, values in {
            "additive": additive,
            "pairwise": pairwise,
            "noise": rng.normal(size=243),
        }.items()
    }
    share = {name: fit.weights[0] / fit.weights.sum() for name, fit in fits.items()}
    assert share["additive"] > 0.8
    assert share["pairwise"] < 0.5
    error = fits["additive"].predict(EVERY[others]) - additive[others]
    assert np.abs(error).max() < 0.05
    error = fits["pairwise"].predict(EVERY[others]) - pairwise[others]
    assert np.sqrt((error**2).mean()) < 0.35 * pairwise.std()
    # Of noise nothing is predicted: the weights fall until the noise explains the values.
    assert fits["noise"].noise > 2 * fits["pairwise"].noise / pairwise.var()
    assert fits["noise"].predict(EVERY[others]).std() < 0.7


def test_costs_as_features_order_what_follows_costs() -> None:
    values = np.log(COSTS[0].of(CODES)) + 0.01 * wavy(CODES)
    rows = some(CODES, 12)
    with_costs = GaussianProcess(SPACE, COSTS).fit(rows, np.log(COSTS[0].of(rows)) + 0.01 * wavy(rows))
    without = GaussianProcess(SPACE).fit(rows, np.log(COSTS[0].of(rows)) + 0.01 * wavy(rows))
    tau = kendalltau(with_costs.predict(CODES), values).statistic
    assert tau > 0.9
    assert tau > kendalltau(without.predict(CODES), values).statistic + 0.1


def test_the_spread_says_how_far_off_predictions_are() -> None:
    """Values drawn from the prior itself: errors over spread have variance 1 on average."""
    rng = np.random.default_rng(5)
    encoded = Encoding(GENES).rows(EVERY).genes / np.sqrt(5)
    ratios = []
    for seed in range(20):
        values = encoded @ rng.normal(size=encoded.shape[1]) * 2 + rng.normal(size=len(EVERY)) * 0.3
        rows = np.random.default_rng(seed).permutation(len(EVERY))[:40]
        process = GaussianProcess(GENES).fit(EVERY[rows], values[rows])
        others = np.setdiff1d(np.arange(len(EVERY)), rows)
        means, spreads = process.with_spread(EVERY[others])
        ratios.append(np.mean((values[others] - means) ** 2 / (spreads**2 + process.noise)))
        known = process.with_spread(EVERY[rows])[1]
        assert known.mean() < spreads.mean()
    # The mean of 20 ratios of about 0.25 standard deviation each.
    assert 0.7 < np.mean(ratios) < 1.4


@pytest.mark.parametrize("costs", [[], COSTS])
def test_it_can_be_pickled_and_chunks_make_no_difference(
    costs: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = some(CODES, 30)
    process = pickle.loads(pickle.dumps(GaussianProcess(SPACE, costs).fit(rows, wavy(rows))))
    expected = GaussianProcess(SPACE, costs).fit(rows, wavy(rows)).with_spread(CODES)
    np.testing.assert_array_equal(process.with_spread(CODES), expected)
    monkeypatch.setattr("autocompress.evaluation.gaussian_process.CHUNK_ROWS", 7)
    np.testing.assert_allclose(process.with_spread(CODES), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(process.predict(CODES), expected[0], rtol=1e-9)


def test_rows_that_are_all_alike_and_values_that_are_all_equal_are_no_fault() -> None:
    one = np.repeat(CODES[:1], 4, axis=0)
    process = GaussianProcess(SPACE, COSTS).fit(one, np.array([1.0, 2.0, 3.0, 2.0]))
    means, spreads = process.with_spread(CODES)
    assert np.isfinite(means).all()
    assert np.isfinite(spreads).all()
    assert means[0] == pytest.approx(2.0, abs=1e-6)
    equal = GaussianProcess(SPACE, COSTS).fit(CODES[:5], np.full(5, 0.7))
    np.testing.assert_allclose(equal.predict(CODES), 0.7)
