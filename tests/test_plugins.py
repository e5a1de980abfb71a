import pytest

from autocompress.errors import PluginError
from autocompress.plugins import SPACES, STRATEGIES, available, load_space_factory, load_strategy
from search_spaces.mobilenet_v3 import mobilenet_v3
from strategies.random_search import RandomSearch


def test_the_plugins_of_this_distribution_are_found_without_importing_them() -> None:
    assert available(SPACES)["mobilenet_v3"] == "search_spaces.mobilenet_v3:mobilenet_v3"
    assert available(STRATEGIES)["elitist"] == "strategies.evolution:ElitistEvolution"
    assert list(available(STRATEGIES)) == sorted(available(STRATEGIES))


@pytest.mark.parametrize("name", list(available(STRATEGIES)))
def test_every_strategy_resolves(name: str) -> None:
    assert callable(load_strategy(name))


@pytest.mark.parametrize("name", list(available(SPACES)))
def test_every_space_resolves(name: str) -> None:
    assert callable(load_space_factory(name))


def test_a_name_and_a_module_with_attribute_give_the_same() -> None:
    assert load_strategy("random") is load_strategy("strategies.random_search:RandomSearch") is RandomSearch
    assert load_space_factory("mobilenet_v3") is mobilenet_v3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "evolutoin",
            "no strategy 'evolutoin'; did you mean 'evolution'?.*elitist.*random.*'module:attribute'",
        ),
        ("zzz", "no strategy 'zzz'; available are"),
        ("no.such.module:Search", "cannot be imported from module 'no.such.module': No module named"),
        ("strategies.evolution:Search", "'strategies.evolution' has no attribute 'Search'"),
        ("strategies.breeding:MAX_ATTEMPTS", "must be something to call, got int"),
        (":Search", "a strategy is a name or 'module:attribute', got ':Search'"),
        ("strategies.evolution:", "a strategy is a name or 'module:attribute'"),
        (".evolution:Search", "a strategy is a name or 'module:attribute'"),
        ("", "no strategy ''"),
    ],
)
def test_a_wrong_name_is_an_error_that_helps(name: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        load_strategy(name)


def test_the_error_says_which_kind_is_missing() -> None:
    with pytest.raises(PluginError, match="no search space 'mobilenetv3'; did you mean 'mobilenet_v3'"):
        load_space_factory("mobilenetv3")
