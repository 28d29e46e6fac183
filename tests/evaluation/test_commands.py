"""`mpi-mlx eval` and `mpi-mlx ablation` from the outside, on a run of random weights."""

import json

import pytest
import yaml
from mpi_mlx_cli.ablation import numbers
from mpi_mlx_cli.main import app
from typer import BadParameter
from typer.testing import CliRunner

from mpi_mlx.errors import CheckpointError, RecipeError
from mpi_mlx.evaluation import both
from mpi_mlx.recipe import load_recipe
from mpi_mlx.training.run import train

RECIPE = {
    "model": {"base": "embedded:tiny", "init": "random"},
    "lora": {"rank": 2, "alpha": 4},
    "data": {"benchmark": "clevr_policy", "depth": 1, "train": 2, "rl": 4, "test": 3},
    "stages": [{"stage": "sft", "steps": 1, "batch_size": 2, "learning_rate": 1e-3}],
    "evaluation": {"max_completion_tokens": 4, "forgetting": False, "after": ["sft"]},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="module")
def run(recipe):
    output = recipe.parent / "run"
    for _ in train(load_recipe(str(recipe), [], output=str(output))):
        pass
    return output


def invoke(*words):
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


def test_eval_repeats_the_runs_own_figures_and_takes_other_examples(run):
    result = invoke("eval", run)
    assert result.exit_code == 0 and "base" in result.stdout and "sft" in result.stdout
    own = json.loads((run / "evaluation" / "results.json").read_text())["rows"]
    again = json.loads((run / "repeat" / "evaluation" / "results.json").read_text())["rows"]
    assert [(r["model"], r["document_in_context"]) for r in again] == [
        ("base", False), ("base", True), ("sft", False), ("sft", True)
    ]
    measured = ("prefill_seconds", "seconds", "decode_tokens_per_second")
    for before, after in zip(own, again[2:], strict=True):
        assert {k: v for k, v in before.items() if k not in measured} == {
            k: v for k, v in after.items() if k not in measured
        }
    assert (run / "repeat" / "report.md").is_file()
    changes = ("--set", "evaluation.samples=2", "--set", "data.seed=9")
    other = invoke("eval", run, *changes, "--output", run / "other")
    assert other.exit_code == 0
    rows = json.loads((run / "other" / "evaluation" / "results.json").read_text())["rows"]
    assert {r["n"] for r in rows} == {2}


def test_a_repeat_holds_nothing_of_the_one_before(run):
    assert invoke("eval", run).exit_code == 0
    changes = ("--set", "evaluation.samples=2", "--set", "evaluation.with_document=false")
    assert invoke("eval", run, *changes).exit_code == 0
    repeat = run / "repeat"
    rows = json.loads((repeat / "evaluation" / "results.json").read_text())["rows"]
    assert [(r["model"], r["document_in_context"], r["n"]) for r in rows] == [("base", False, 2), ("sft", False, 2)]
    lines = (repeat / "evaluation" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["model"] for line in lines] == ["base"] * 2 + ["sft"] * 2
    assert "in context |" not in (repeat / "report.md").read_text()


def test_a_repeat_does_not_replace_a_runs_own_results(run):
    own = (run / "evaluation" / "results.json").read_text()
    with pytest.raises(CheckpointError, match="holds a run, whose own results would be lost; choose another --output"):
        invoke("eval", run, "--output", run)
    assert (run / "evaluation" / "results.json").read_text() == own


def test_eval_of_other_scenes_keeps_the_document_that_was_learned(run, monkeypatch):
    seen = []

    def look(run, model, dataset, **options):
        seen.append(dataset)
        return []

    monkeypatch.setattr(both, "evaluate_both", look)
    monkeypatch.setattr(both, "write_report", lambda *_, **__: run)
    for changes in ((), ("data.seed=9",), ("data.seed=9", "data.document_seed=9")):
        both.repeat_evaluation(run, changes)
    own, scenes, document = seen[::2]
    assert scenes.document.sha256 == own.document.sha256 != document.document.sha256
    assert scenes.test[0].meta["tree"] == own.test[0].meta["tree"]
    assert [e.meta["scene"] for e in scenes.test] != [e.meta["scene"] for e in own.test]


def test_eval_of_what_is_no_run(tmp_path, run):
    with pytest.raises(CheckpointError, match="not a run"):
        invoke("eval", tmp_path)
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    with pytest.raises(CheckpointError, match="no adapter or model yet"):
        invoke("eval", tmp_path)


def test_ablation_runs_and_its_report_is_shown(recipe):
    study = recipe.parent / "study"
    words = ("ablation", recipe, "--documents", "3", "--variants", "base,sft", "--output", study)
    result = invoke(*words)
    assert result.exit_code == 0
    assert "1/2 recipe/document-3/base" in result.stdout and "| CoT-SFT |" in result.stdout
    again = invoke(*words, "--report-only")
    assert again.exit_code == 0 and "2 runs over one document" in again.stdout


def test_ablation_says_what_is_wrong_before_it_trains(recipe):
    assert "cpt_sft+dapo_policyrollout" in invoke("ablation", "--list").stdout
    with pytest.raises(RecipeError, match="no variant 'sfft'; did you mean 'sft'"):
        invoke("ablation", recipe, "--variants", "sfft")
    assert invoke("ablation", recipe, "--part", "3/2").exit_code == 2
    assert invoke("ablation", recipe, "--depths", "two").exit_code == 2
    with pytest.raises(RecipeError, match="needs stage rl; the recipe has sft"):
        invoke("ablation", recipe, "--output", recipe.parent / "none")
    assert not (recipe.parent / "none").exists()


def test_numbers():
    assert numbers("1001-1003, 7,7", "x") == [1001, 1002, 1003, 7]
    for wrong in ("", "a", "5-3", "1,,2"):
        with pytest.raises(BadParameter):
            numbers(wrong, "x")
