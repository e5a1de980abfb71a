"""What README and docs tell people to type works as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from autocompress import cli
from autocompress.budget import Constraints
from autocompress.distill.methods import METHODS
from autocompress.policy.passes import PASSES, check
from autocompress.policy.recipe import parse_policy_recipe
from autocompress.policy.run import space_of
from autocompress.recipe import parse_recipe
from autocompress.run import make_space
from autocompress.strategy import Strategy
from autocompress.testing.strategy import StrategyContract
from autocompress.testing.toys import toy_batch, toy_constraints
from autocompress.training.data import load_data

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("README.md", "python")
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(float(line.split()[1]) <= 300 for line in lines)


def test_the_recipes_of_the_readme_are_valid() -> None:
    recipes = [yaml.safe_load(text) for text in blocks("README.md", "yaml")]
    policies = [parse_policy_recipe(recipe, Path("policy.yaml")) for recipe in recipes if "model" in recipe]
    others = [parse_recipe(recipe) for recipe in recipes if "model" not in recipe]
    assert policies
    assert others


def test_the_strategy_of_the_docs_can_be_asked_and_told() -> None:
    (code,) = (block for block in blocks("docs/your-own.md", "python") if "class Mine" in block)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/your-own.md", "exec"), names)
    constraints = toy_constraints()
    strategy = names["Mine"](constraints, seed=1)
    rows = strategy.ask(5)
    assert constraints.feasible(rows).all()
    strategy.tell(toy_batch(constraints, rows))

    class Laws(StrategyContract):
        def make(self, constraints: Constraints, seed: int) -> Strategy:
            made: Strategy = names["Mine"](constraints, seed=seed)
            return made

    laws = Laws()
    laws.test_no_row_is_asked_twice(3)
    laws.test_on_a_tiny_space_it_ends()
    laws.test_what_was_asked_can_be_told_in_any_order()


def test_the_python_of_the_page_on_strategies_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    whole, table = blocks("docs/strategies.md", "python")[:2]
    names: dict[str, Any] = {}
    exec(compile(whole, "docs/strategies.md", "exec"), names)
    assert "accuracy" in capsys.readouterr().out
    assert (tmp_path / "trials.log").exists()
    assert names["problem"]().constraints is names["constraints"]
    assert "nas_bench_201_table(FOLDER" in table
    folder = ROOT.parent / "shared" / "data" / "nas_bench_201"
    if folder.exists():  # published data, which a checkout does not have
        exec(compile(table, "docs/strategies.md", "exec"), {"FOLDER": folder})


def test_the_python_of_the_page_on_gradients_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (python,) = blocks("docs/differentiable.md", "python")
    exec(compile(python, "docs/differentiable.md", "exec"), {})
    assert "4 = skip_connect(0) + sep_conv_3x3(1)" in capsys.readouterr().out
    first, large = (parse_recipe(yaml.safe_load(text)) for text in blocks("docs/differentiable.md", "yaml"))
    assert make_space(first, lambda: load_data("digits")).size == 15_625
    assert large.train.proxy == {"channels": 16, "layers": 8}


def test_the_page_on_distillation_has_every_loss_and_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (python,) = blocks("docs/distillation.md", "python")
    exec(compile(python, "docs/distillation.md", "exec"), {})
    assert "validation accuracy" in capsys.readouterr().out
    recipe, to_distill = blocks("docs/distillation.md", "yaml")
    assert parse_recipe(yaml.safe_load(to_distill)).search.reward == "distilled"
    assert [term.loss for term in parse_recipe(yaml.safe_load(recipe)).finetune.distill] == ["kd", "at"]
    page = (ROOT / "docs/distillation.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \| [^|]* \|$", page, re.MULTILINE))
    assert rows.keys() == METHODS.keys()
    for name, method in METHODS.items():
        assert rows[name].split(",")[0] == ("`alpha`" if method.weight is None else f"{method.weight:.5g}")


def test_the_recipe_of_the_page_on_policies_is_valid_and_names_every_pass() -> None:
    recipe, run = blocks("docs/policies.md", "yaml")
    parsed = parse_policy_recipe(yaml.safe_load(recipe), Path("policy.yaml"))
    check([entry for single in parse_recipe(yaml.safe_load(run)).passes for entry in single.items()])
    assert space_of(parsed).size > 100
    page = (ROOT / "docs/policies.md").read_text(encoding="utf-8")
    assert PASSES.keys() <= set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))


def test_the_recipes_of_the_page_on_ray_are_valid() -> None:
    for text in blocks("docs/ray.md", "yaml"):
        assert parse_recipe(yaml.safe_load(text)).search.workers > 1


def test_the_python_of_the_page_on_factorization_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (python,) = blocks("docs/factorize.md", "python")
    names: dict[str, Any] = {}
    exec(compile(python, "docs/factorize.md", "exec"), names)
    assert "MACs, then" in capsys.readouterr().out
    assert names["small"].macs_after <= 0.6 * names["small"].macs_before


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_exists_with_its_options(page: str) -> None:
    spans = re.findall(r"`([^`\n]+)`", (ROOT / page).read_text(encoding="utf-8"))
    text = "\n".join([*blocks(page, "sh"), *spans])
    command = r"(?:^|&& )autocompress (table [a-z]+|[a-z]+)([^#|&\n]*)"
    for name, options in re.findall(command, text, re.MULTILINE):
        shown = CliRunner().invoke(cli.app, [*name.split(), "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, f"there is no command {name} ({page})"
        for option in re.findall(r"--[a-z-]+", options):
            assert option in re.sub(r"\x1b\[[0-9;]*m", "", shown.output), f"{name} has no {option} ({page})"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
