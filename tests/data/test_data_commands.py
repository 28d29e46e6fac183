import json
from dataclasses import replace

import numpy as np
import pytest
from mpi_mlx_cli.data import app
from PIL import Image
from typer.testing import CliRunner

from mpi_mlx.data import load_dataset
from mpi_mlx.data.recipe_text import recipe_text
from mpi_mlx.data.sheet import TRAINED
from mpi_mlx.errors import DataError
from mpi_mlx.recipe import load_recipe

SMALL = "--depth 2 --train 4 --rl 6 --validation 2 --test 4 --seed 5".split()


def call(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "out"
    call("clevr-policy", out, *SMALL)
    return out


def test_writing_twice_gives_the_same_bytes(written, tmp_path):
    assert "train 4, rl 6, validation 2, test 4" in call("clevr-policy", tmp_path / "out", *SMALL)
    first = {p.relative_to(written): p.read_bytes() for p in written.rglob("*") if p.is_file()}
    second = {
        p.relative_to(tmp_path / "out"): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    first.pop(next((p for p in first if p.name == "sheet.png"), None), None)
    assert first == second
    assert len([p for p in first if p.suffix == ".png"]) == 16


def test_the_recipe_beside_the_files_loads(written, tmp_path):
    recipe = load_recipe(written)
    assert [stage.stage for stage in recipe.stages] == ["cpt", "sft", "rl"]
    assert recipe.data.train == str(written / "train.jsonl") and recipe.model.base == "embedded:tiny"
    dataset = load_dataset(recipe.data, recipe.folder)
    for base in ("embedded:tiny", "owner/name"):
        (tmp_path / "recipe.yaml").write_text(recipe_text("x", dataset, base, "made by hand"))
        assert load_recipe(tmp_path).model.base == base
    (tmp_path / "recipe.yaml").write_text(recipe_text("x", replace(dataset, train=()), "owner/name", "-"))
    assert [stage.stage for stage in load_recipe(tmp_path).stages] == ["rl"]


def test_check_counts_and_draws(written, tmp_path):
    said = call("check", written, "--samples", 2, "--sheet", tmp_path / "sheet.png")
    assert "tokens in a prompt" in said and "warning" not in said
    rows = {line.split()[0]: line.split()[1:4] for line in said.splitlines() if line.strip()}
    assert rows["train"] == ["4", "4", "4"] and rows["rl"] == ["6", "6", "0"]
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))[200:]
    for stage, color in TRAINED.items():
        assert (sheet == color).all(-1).sum() > 1000, stage
    assert call("check", written / "recipe.yaml", "--samples", 0) in said.replace("sheet", "\nsheet")


def test_check_names_every_bad_line(written, tmp_path):
    lines = (written / "train.jsonl").read_text().splitlines()
    broken = json.loads(lines[1])
    broken["messages"][0]["content"][0]["image"] = "gone.png"
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"messages": 3}), json.dumps(broken), "{"]))
    with pytest.raises(DataError) as caught:
        call("check", tmp_path / "a.jsonl")
    said = str(caught.value)
    for part in (
        "3 errors",
        "a.jsonl:1: messages: ",
        "a.jsonl:2: messages[0].content[0].image: ",
        "a.jsonl:3: not JSON",
    ):
        assert part in said
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_refusals(written, tmp_path):
    with pytest.raises(DataError, match="exists already"):
        call("clevr-policy", written)
    with pytest.raises(DataError, match=r"--depth: .*found 9; --style: .*found 'photo'"):
        call("clevr-policy", tmp_path / "new", "--depth", 9, "--style", "photo")
    with pytest.raises(DataError, match="--split dev: expected train, rl, validation or test"):
        call("check", written, "--split", "dev")
    with pytest.raises(DataError, match="no scenes/CLEVR_train_scenes.json"):
        call("clevr-policy", tmp_path / "new", "--clevr", tmp_path)
    assert list(tmp_path.iterdir()) == []
