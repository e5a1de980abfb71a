"""Methods by name, and what is said of options that are wrong."""

from typing import Any

import pytest

from autocompress.errors import RecipeError
from autocompress.sparse.methods import METHODS, method_of, options_of


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        RecipeError, match=r"no method 'sliming'; did you mean 'slimming'\? There are slimming"
    ):
        method_of("sliming")


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_has_defaults_and_says_where_it_comes_from(name: str) -> None:
    options_of(name, {})
    assert "Source: " in (METHODS[name].start.__doc__ or "")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("slimming", {"lambda": 1}, "options.lambda: method 'slimming' takes strength, not 'lambda'"),
        ("slimming", {"strength": 0}, "options.strength: Input should be greater than 0, got 0"),
        ("slimming", {"strength": True}, "options.strength: must not be true or false, got True"),
        ("slimming", {"strength": float("nan")}, "options.strength: .*finite number, got nan"),
        ("magnitude", {"sparsity": 1.0}, "options.sparsity: Input should be less than 1, got 1.0"),
        ("magnitude", {"scope": "all"}, "options.scope: Input should be 'layer' or 'global', got 'all'"),
        ("soft", {"rate": "much"}, "options.rate: .*, got 'much'"),
        ("play-and-prune", {"tolerance": -1}, "options.tolerance: .*greater than or equal to 0, got -1"),
        ("play-and-prune", {"tolerance": 100}, "options.tolerance: Input should be less than 100, got 100"),
        ("structure", {"momentum": 1}, "options.momentum: Input should be less than 1, got 1"),
    ],
)
def test_a_wrong_option_is_refused_by_its_key(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        options_of(method, options)


def test_numbers_may_be_written_as_yaml_reads_them() -> None:
    assert options_of("slimming", {"strength": "1e-3"}).model_dump() == {"strength": 0.001}
