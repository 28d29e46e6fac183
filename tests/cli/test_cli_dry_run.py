"""`mpi-mlx train --dry-run`: the recipe, the parameters, the steps and the memory; nothing is written."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from mpi_mlx_cli import main as cli

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from small_runs import STAGES, write_base, write_recipe  # noqa: E402

from mpi_mlx.models import load_model  # noqa: E402
from mpi_mlx.recipe import load_recipe, parse_recipe  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *map(str, arguments), "--dry-run"])
    return ended.value.code, *capsys.readouterr()


def test_what_it_shows(base, tmp_path, capsys):
    stages = [STAGES["cpt"], {k: v for k, v in STAGES["sft"].items() if k != "steps"} | {"epochs": 3}, STAGES["rl"]]
    file = write_recipe(tmp_path / "r.yaml", base, stages)
    code, out, err = run(capsys, file, "--output", tmp_path / "run", "--set", "stages.0.steps=7")
    assert (code, err) == (0, "") and [p.name for p in tmp_path.iterdir()] == ["r.yaml"]
    text, _, rest = out.partition("\n\n")
    resolved = yaml.safe_load(text)
    recipe = load_recipe(file, ["stages.0.steps=7"], output=tmp_path / "run")
    assert parse_recipe(text, tmp_path).to_yaml() == recipe.to_yaml()
    assert resolved["stages"][0]["steps"] == 7 and resolved["stages"][2]["clip_low"] == 0.2  # defaults filled in

    model = load_model(base)
    layers = [m for _, m in model.net.language_model.named_modules() if type(m).__name__ == "Linear"]
    trained = sum(2 * sum(layer.weight.shape) for layer in layers if layer.weight.shape[0] != model.vocab_size)
    said = re.search(r"(\S+) parameters, (\S+) trained", rest).groups()
    assert said[1] == f"{trained / 1000:.0f}K"
    cells = [line.split() for line in rest.splitlines()]
    table = {name: found for name, *found in (c for c in cells if c) if name in STAGES}
    # 7 as set; 3 epochs of 5 rows, 4 a step: 15 / 4 = 4; 4 as written
    assert [table[name][0] for name in ("cpt", "sft", "rl")] == ["7", "4", "4"]
    assert [table[name][1] for name in ("cpt", "sft", "rl")] == ["2", "2", "6"]  # 2 prompts x (2 + 1)
    assert int(table["cpt"][2]) > int(table["sft"][2]) - 1 > 50  # both know the document
    assert all(table[name][-3:-1] != [] and table[name][-1] in ("MB", "GB") for name in table)
    assert f"output would be {tmp_path / 'run'}" in rest.replace("\n", "")


@pytest.mark.parametrize(
    "options, words",
    [
        (["stages.0.max_tokens=20"], "rows are over max_tokens=20"),
        (["lora=null", "model.quantize=4"], "cannot be trained without lora"),
        (["lora.targets=[nonesuch]"], "nonesuch"),
    ],
)
def test_it_refuses_what_training_refuses(base, tmp_path, capsys, options, words):
    file = write_recipe(tmp_path / "r.yaml", base, ["cpt"])
    code, _, err = run(capsys, file, *(x for option in options for x in ("--set", option)))
    assert code == 2 and err.startswith("error: ") and words in err and "Traceback" not in err


def test_a_document_longer_than_the_context(base, tmp_path, capsys):
    """Refused in the stage that reads it; where no stage does, in the evaluation that would come after hours."""
    short = tmp_path / "short"
    shutil.copytree(base, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 250}))
    file = write_recipe(tmp_path / "r.yaml", short, ["cpt"])
    code, _, err = run(capsys, file)
    assert code == 2 and re.search(r"stage cpt: .* tokens .* takes 250 .*shorten the document", " ".join(err.split()))
    plain = {**STAGES["sft"], "document_fraction": 0.0}
    file = write_recipe(tmp_path / "r.yaml", short, [plain])
    assert run(capsys, file)[0] == 0
    code, _, err = run(capsys, file, "--set", "evaluation.max_completion_tokens=150")
    said = " ".join(err.split())
    assert code == 2 and "evaluation with the document in context: example 'test-" in said and "takes 250" in said
    for change in ("with_document=false", "after=[]"):
        words = ("--set", "evaluation.max_completion_tokens=150", "--set", f"evaluation.{change}")
        assert run(capsys, file, *words)[0] == 0
