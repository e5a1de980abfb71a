import numpy as np
import pytest

from autocompress.testing.toys import every_network, toy_constraints, toy_score, toy_space


@pytest.mark.parametrize("blocks", [1, 2, 4, 6])
def test_the_toy_space_has_as_many_networks_as_its_formula_says(blocks: int) -> None:
    space = toy_space(blocks)
    expected = 2 * sum(3**depth for depth in range(1, blocks + 1))
    assert space.size == expected == len(every_network(space)) == len(np.unique(every_network(space), axis=0))


def test_its_costs_are_those_of_its_convolutions() -> None:
    constraints = toy_constraints("macs=100%", blocks=2)
    space = constraints.space
    codes = space.encode(
        [
            space.architecture({"resolution": 12, "depth": 2, "block1.kernel": 3, "block2.kernel": 5}),
            space.architecture({"resolution": 8, "depth": 1, "block1.kernel": 1}),
        ]
    )
    # 4 channels to 4: 16 weights a kernel position.
    assert constraints.costs["macs"].of(codes).tolist() == [144 * 16 * (9 + 25), 64 * 16 * 1]
    assert constraints.limits["macs"] == pytest.approx(144 * 16 * (25 + 25))


def test_the_score_grows_with_every_gene() -> None:
    space = toy_space(3)
    networks = every_network(space)
    scores = toy_score(space, networks)
    assert scores.min() == 0
    assert scores.max() == 1
    np.testing.assert_allclose(scores**2, networks.sum(axis=1) / 9)
