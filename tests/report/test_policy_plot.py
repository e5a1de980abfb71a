"""The plot of a policy."""

from pathlib import Path

import pytest

from autocompress.errors import QuantizationError
from autocompress.report.policy_plot import PlottedLayer, policy_plot


def test_a_plot_names_layers_bits_and_the_cost(tmp_path: Path) -> None:
    layers = [PlottedLayer("stem", 8, 8, 1.0, 1.0), PlottedLayer("block.conv", 32, 32, 0.5, 0.7)]
    path = tmp_path / "policy.svg"
    policy_plot(path, layers, metric="latency_ms", title="made up")
    text = path.read_text()
    assert text.startswith("<?xml")
    for word in ("stem", "block.conv", "floats", "latency_ms", "made up"):
        assert f"<!-- {word} -->" in text, word
    again = tmp_path / "again.svg"
    policy_plot(again, layers, metric="latency_ms", title="made up")
    assert len(again.read_text()) == len(text)


def test_a_policy_without_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="at least one layer"):
        policy_plot(tmp_path / "policy.svg", [], metric="bops", title="")
    assert not list(tmp_path.iterdir())
