"""`autocompress compare` from the command line, on a toy problem whose optimum is known."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from autocompress.cli import app
from autocompress.errors import StorageError, StrategyError
from autocompress.testing.toys import every_network, toy_constraints
from autocompress.trial import Batch
from strategies.random_search import RandomSearch

TOY = ("--problem", "autocompress.testing.toys:toy_problem", "--set", "blocks=4")


def call(*arguments: object, succeeds: bool = True) -> Result:
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    assert (result.exit_code == 0) == succeeds, result.output + str(result.exception)
    return result


def test_strategies_are_compared_and_what_is_finished_is_kept(tmp_path: Path) -> None:
    strategies = "random,evolution:population=6:sample_size=3"
    more = ("--evaluations", 15, "--jobs", 1, "--output", tmp_path)
    first = call(*TOY, "--strategies", strategies, "--seeds", 2, *more).stdout
    assert first.startswith("toy of 4 blocks, macs=50%: 4 searches, 1 at a time\n")
    assert "toy of 4 blocks, macs=50%: best accuracy of 2 seeds, 15 evaluations each" in first
    assert "evolution:population=6:sample_size=3: no better than random search can be shown" in first
    assert "with 2 seeds and 1 pair the test cannot show any difference; it can from 4 seeds on" in first
    kept = {path: path.read_bytes() for path in tmp_path.glob("cells/*/*.json")}
    assert len(kept) == 4
    call(*TOY, "--strategies", f"{strategies},elitist", "--seeds", 3, *more)
    assert all(path.read_bytes() == content for path, content in kept.items())
    content = json.loads((tmp_path / "results.json").read_text())
    assert {standing["label"] for standing in content["standings"]} == {*strategies.split(","), "elitist"}
    for standing in content["standings"]:
        assert len(standing["finals"]) == 3
        assert standing["regret"] == pytest.approx(content["optimum"] - standing["mean"])
        assert max(standing["finals"]) <= content["optimum"]
    assert len(content["pairs"]) == 3
    report = (tmp_path / "report.md").read_text()
    assert "| random |" in report
    assert "Known optimum within the limits" in report
    for name in ("evaluations.svg", "seconds.svg"):
        assert "</svg>" in (tmp_path / name).read_text()


def test_one_seed_is_reported_without_a_test(tmp_path: Path) -> None:
    said = call(
        *TOY,
        "--strategies",
        "tpe,random",
        "--seeds",
        1,
        "--evaluations",
        4,
        "--jobs",
        1,
        "--output",
        tmp_path,
    ).stdout
    assert "best accuracy of 1 seed, 4 evaluations each" in said
    assert "tpe: no test against random search is possible with a single score" in said
    assert "with 1 seed and 1 pair the test cannot show any difference; it can from 4 seeds on" in said
    assert json.loads((tmp_path / "results.json").read_text())["pairs"] == []
    assert "No test is possible: it needs two seeds" in (tmp_path / "report.md").read_text()


class Broken(RandomSearch):  # type: ignore[misc]
    """A strategy with a fault that shows at the first network."""

    def tell(self, batch: Batch) -> None:
        raise KeyError("reward")


def test_failed_searches_are_shown_with_their_reason_and_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{__name__}:Broken"
    given = (*TOY, "--strategies", f"random,{name}", "--seeds", 2, "--evaluations", 4, "--jobs", 1)
    said = call(*given, "--output", tmp_path).stdout
    reason = "StrategyError: strategy Broken failed to tell: KeyError: 'reward'"
    assert f"{name}: 2 of 2 searches failed, the first with: {reason}" in said
    assert f"- {name}, seed 1: {reason}" in (tmp_path / "report.md").read_text()
    monkeypatch.delattr(Broken, "tell")
    assert f"{name}: no better than random search can be shown" in call(*given, "--output", tmp_path).stdout


def test_if_every_search_fails_the_report_is_written_and_the_command_fails(tmp_path: Path) -> None:
    name = f"{__name__}:Broken"
    result = call(
        *TOY, "--strategies", f"{name},{name}:at_least=0.5", "--seeds", 1, "--evaluations", 4, "--jobs", 1,
        "--output", tmp_path, succeeds=False,
    )  # fmt: skip
    assert isinstance(result.exception, StrategyError)
    assert "all 2 searches failed, the first with: StrategyError: strategy Broken" in str(result.exception)
    assert "| failed |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "seconds.svg").exists()


def test_searches_that_end_before_all_evaluations_are_shown(tmp_path: Path) -> None:
    constraints = toy_constraints(blocks=2)
    fitting = int(constraints.feasible(every_network(constraints.space)).sum())
    strategies = ("--strategies", "random,elitist", "--seeds", 2, "--jobs", 1)
    said = call(*TOY[:3], "blocks=2", *strategies, "--evaluations", 40, "--output", tmp_path).stdout
    assert "best accuracy of 2 seeds, up to 40 evaluations each" in said
    line = f"random: 2 of 2 searches ended after {fitting} of 40 evaluations, with nothing new to propose"
    assert line in said
    assert line in (tmp_path / "report.md").read_text()


def test_the_help_says_how_to_name_a_strategy_of_ones_own() -> None:
    said = call("--help").stdout
    assert "module:attribute" in said
    assert "my_module:MySearch:rate=0.1" in said


def test_a_folder_of_another_comparison_is_refused(tmp_path: Path) -> None:
    given = (*TOY, "--strategies", "random,elitist", "--seeds", 1, "--jobs", 1, "--output", tmp_path)
    call(*given, "--evaluations", 5)
    said = str(call(*given, "--evaluations", 6, succeeds=False).exception)
    assert "holds a comparison with other settings (evaluations)" in said
    said = str(call(*given, "--evaluations", 5, "--set", "budget=macs=60%", succeeds=False).exception)
    assert "problem, limits" in said


@pytest.mark.parametrize("content", ["null", "[]", "{", '{"evaluations": 5}'])
def test_damaged_settings_are_called_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "comparison.json").write_text(content)
    given = (*TOY, "--strategies", "random,elitist", "--seeds", 1, "--evaluations", 5, "--output", tmp_path)
    error = call(*given, succeeds=False).exception
    assert isinstance(error, StorageError)
    assert "comparison.json" in str(error)
    assert "is damaged" in str(error) or "cannot be read" in str(error)


def test_searches_of_another_length_are_not_mixed_in_where_the_settings_are_gone(tmp_path: Path) -> None:
    given = (*TOY, "--strategies", "random,elitist", "--seeds", 1, "--jobs", 1, "--output", tmp_path)
    call(*given, "--evaluations", 5)
    (tmp_path / "comparison.json").unlink()
    said = str(call(*given, "--evaluations", 6, succeeds=False).exception)
    assert "0.json is a search of 5 evaluations, not 6; use another --output" in said
    call(*given, "--evaluations", 5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "either --run, a trained run, or --problem"),
        ((*TOY, "--run", "nowhere"), "either --run, a trained run, or --problem"),
        ((*TOY, "--seeds", 0), "--seeds must be 1 or more, got 0"),
        ((*TOY, "--evaluations", 0), "--evaluations must be 1 or more, got 0"),
        ((*TOY, "--jobs", 0), "--jobs must be 1 or more, got 0"),
        ((*TOY, "--budget", "macs=50%"), "--budget belongs to --run"),
        ((*TOY, "--strategies", "random"), "two different strategies at least, got 'random'"),
        ((*TOY, "--strategies", "random,random"), "two different strategies at least"),
        ((*TOY, "--strategies", "random,nosuch"), "there is no strategy 'nosuch'"),
        ((*TOY, "--strategies", "random,elitist:population"), "name:option=value"),
        ((*TOY, "--strategies", "random,elitist:population=0"), "population must be an integer >= 1, got 0"),
        (
            (*TOY, "--strategies", "random,darts"),
            "and problem 'toy of 4 blocks, macs=50%' has no train_together to do it; leave the strategy out",
        ),
        (("--run", "nowhere", "--strategies", "random,elitist"), "nowhere holds no run"),
        (
            ("--run", "nowhere", "--set", "a=1", "--strategies", "random,elitist"),
            "--set changes arguments of",
        ),
    ],
)
def test_bad_options_are_refused(
    arguments: tuple[object, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in str(call(*arguments, succeeds=False).exception)
    assert not list(tmp_path.iterdir())
