import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.budget import Constraints
from autocompress.errors import RecipeError
from autocompress.proposals import Asked, check_count, check_share, fresh_sample, random_generator
from autocompress.space import Choice, SearchSpace
from autocompress.testing.toys import every_network, toy_constraints, toy_space


@given(st.lists(st.lists(st.integers(0, 23), max_size=30), max_size=5), st.integers(0, 40))
def test_fresh_rows_are_the_first_occurrences_in_order(parts: list[list[int]], at_most: int) -> None:
    networks = every_network(toy_space(2))
    asked = Asked(toy_space(2))
    seen: list[int] = []
    for part in parts:
        new = [index for index in dict.fromkeys(part) if index not in seen][:at_most]
        rows = asked.fresh(networks[np.array(part, dtype=np.int64)], at_most=at_most)
        np.testing.assert_array_equal(rows, networks[np.array(new, dtype=np.int64)])
        seen += new
        assert len(asked) == len(seen)


def test_codes_above_255_are_told_apart() -> None:
    space = SearchSpace("wide", (Choice("a", tuple(range(300))), Choice("b", tuple(range(300)))), ())
    codes = np.array([[0, 1], [256, 1], [0, 257], [0, 1]])
    assert len(Asked(space).fresh(codes)) == 3


def test_what_is_not_returned_is_not_remembered() -> None:
    networks = every_network(toy_space(2))
    asked = Asked(toy_space(2))
    np.testing.assert_array_equal(asked.fresh(networks, at_most=3), networks[:3])
    np.testing.assert_array_equal(asked.fresh(networks), networks[3:])


def test_a_sample_of_an_exhausted_space_ends() -> None:
    constraints = toy_constraints(blocks=2)
    networks = every_network(constraints.space)
    asked, rng = Asked(constraints.space), np.random.default_rng(0)
    rows = fresh_sample(constraints, 1000, rng, asked)
    assert len(rows) == int(constraints.feasible(networks).sum())
    assert len(fresh_sample(constraints, 1, rng, asked)) == 0


def test_a_space_with_one_network_has_one_sample() -> None:
    space = SearchSpace("one", (Choice("a", (1,)),), ())
    rows = fresh_sample(Constraints(space, {}, {}), 5, np.random.default_rng(0), Asked(space))
    assert rows.tolist() == [[0]]


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "0.5", True, None])
def test_a_share_is_a_number_from_0_to_1(value: object) -> None:
    with pytest.raises(RecipeError, match=r"rate must be in 0\.\.1, got"):
        check_share("rate", value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, 1.0, "3", True, None])
def test_a_count_is_an_integer_from_1(value: object) -> None:
    with pytest.raises(RecipeError, match="population must be an integer >= 1, got"):
        check_count("population", value)  # type: ignore[arg-type]


def test_a_count_can_have_a_limit() -> None:
    assert check_count("sample_size", 4, at_most=4) == 4
    with pytest.raises(RecipeError, match=r"sample_size must be in 1\.\.4, got 5"):
        check_count("sample_size", 5, at_most=4)


def test_equal_seeds_give_equal_generators_whatever_their_integer_type() -> None:
    assert random_generator(3).random() == random_generator(np.int64(3)).random()  # type: ignore[arg-type]
