import os
from pathlib import Path

import pytest
from mpi_mlx_cli import main as cli
from mpi_mlx_cli.projects import copy_whole, first_sentence

from mpi_mlx.recipe import load_recipe


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_init_refuses_what_exists(capsys, tmp_path):
    target = tmp_path / "mine"
    target.mkdir()
    code, _, err = run(capsys, "init", str(target))
    assert code == 2 and err == f"error: {target}: exists already; choose another name or remove it\n"
    assert list(target.iterdir()) == []


def test_a_copy_is_complete_and_leaves_nothing_else(tmp_path):
    source = tmp_path / "template"
    (source / "document" / "images").mkdir(parents=True)
    (source / "document" / "images" / "a.png").write_bytes(b"png")
    (source / "recipe.yaml").write_text("seed: 0\n")
    (source / "__pycache__").mkdir()
    (source / ".ruff_cache").mkdir()
    (source / ".ruff_cache" / "CACHEDIR.TAG").write_text("x")
    copy_whole(source, tmp_path / "sub" / "mine")
    found = sorted(p.relative_to(tmp_path / "sub") for p in (tmp_path / "sub").rglob("*") if p.is_file())
    assert found == [Path("mine/document/images/a.png"), Path("mine/recipe.yaml")]


def test_init_copies_the_template(capsys, tmp_path):
    from importlib.resources import files

    template = files("mpi_mlx_recipes") / "your_policy"
    if not template.is_dir():
        pytest.skip("the template is not written yet")
    code, out, err = run(capsys, "init", str(tmp_path / "mine"))
    assert (code, err) == (0, "") and "next: read" in out
    assert sorted(os.listdir(tmp_path)) == ["mine"]
    recipe = load_recipe(tmp_path / "mine" / "recipe.yaml")
    assert recipe.output == "runs/mine"  # two projects do not share a run
    assert recipe.data.train == str(tmp_path / "mine" / "train.jsonl")


def test_first_sentence_of_a_recipe():
    text = "# Teaches a tree to a\n# tiny model: 10 minutes.\n#\n# More.\nseed: 0\n"
    assert first_sentence(text) == "Teaches a tree to a tiny model"
    assert first_sentence("seed: 0\n# later\n") == ""


def test_recipes_are_listed(capsys):
    code, out, _ = run(capsys, "recipes")
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines() if " " in line.strip()}
    assert code == 0 and len(lines["quickstart"]) > 20
