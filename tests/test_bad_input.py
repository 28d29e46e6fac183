"""`mpi-mlx train` on what cannot work: one clear line, exit code 2, and nothing half-written."""

import json
import sys
from pathlib import Path

import pytest
from mpi_mlx_cli import main as cli
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent / "training"))

from small_runs import write_base, write_recipe  # noqa: E402

STAGE = dict(stage="sft", steps=1, batch_size=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def project(tmp_path, base):
    """A small project that trains; each test spoils one thing."""

    class Project:
        folder, model, output = tmp_path, tmp_path / "model", tmp_path / "run"
        train, picture = tmp_path / "train.jsonl", tmp_path / "picture.png"
        recipe = write_recipe(
            tmp_path / "recipe.yaml", tmp_path / "model", [STAGE], data={"train": "train.jsonl"},
            evaluation={},
        )  # fmt: skip

    Project.model.mkdir()
    for file in base.iterdir():
        (Project.model / file.name).write_bytes(file.read_bytes())
    Image.new("RGB", (56, 56), (200, 10, 10)).save(Project.picture)
    content = [{"type": "image", "image": "picture.png"}, {"type": "text", "text": "colour?"}]
    row = {"id": "a", "messages": [{"role": "user", "content": content}], "answer": "red"}
    Project.train.write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "b"}) + "\n")
    return Project


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} if folder.exists() else None


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *map(str, arguments)])
    said = capsys.readouterr()
    return ended.value.code, said.err


def refuse(project, capsys, *words, options=(), untouched=True):
    before = files(project.folder)
    code, err = run(capsys, project.recipe, "--output", project.output, *options)
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err
    assert not untouched or files(project.folder) == before
    assert not [p for p in project.folder.rglob(".*")]


def test_missing_image(project, capsys):
    project.picture.unlink()
    lines = project.train.read_text().splitlines()
    project.train.write_text(lines[0].replace('"a"', '"c"').replace("picture.png", "gone.png") + "\n")
    refuse(project, capsys, "train.jsonl:1", "gone.png")


def test_broken_image(project, capsys):
    project.picture.write_bytes(project.picture.read_bytes()[:40])
    project.train.write_text(project.train.read_text().splitlines()[0] + "\n")
    refuse(project, capsys, "picture.png")


def test_broken_json_line(project, capsys):
    project.train.write_text(project.train.read_text() + '{"id": "c", "messages": [\n')
    refuse(project, capsys, "train.jsonl:3")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_dataset(project, capsys, content):
    project.train.write_text(content)
    refuse(project, capsys, "train.jsonl")


def test_model_folder_without_weights(project, capsys):
    (project.model / "model.safetensors").unlink()
    refuse(project, capsys, str(project.model), "no weights")


def test_truncated_safetensors(project, capsys):
    weights = project.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refuse(project, capsys, "model.safetensors", "truncated")


def test_sequence_over_the_limit(project, capsys):
    """Found before the first step, though the only row of it may come last."""
    options = ["--set", "stages.0.max_tokens=20", "--set", "stages.0.steps=2"]
    refuse(project, capsys, "2 of 2 rows are over max_tokens=20", "train.jsonl:", options=options)
    lines = project.train.read_text().splitlines()
    project.train.write_text("\n".join([lines[0], lines[1].replace("colour?", "colour? " * 100)]))
    words = ["1 of 2 rows are over max_tokens=200", "train.jsonl:2 (example 'b')", "raise max_tokens"]
    refuse(project, capsys, *words, options=["--set", "stages.0.max_tokens=200", "--set", "stages.0.steps=2"])


def test_rows_that_cannot_be_trained_are_all_named_before_anything_is_written(project, capsys):
    lines = project.train.read_text().splitlines()
    odd = json.loads(lines[0]) | {"messages": [{"role": "user", "content": "<|image_pad|>"}]}
    project.train.write_text("\n".join([*lines, json.dumps(odd | {"id": "c"}), json.dumps(odd | {"id": "d"})]))
    code, err = run(capsys, project.recipe, "--output", project.output, "--set", "stages.0.steps=4")
    assert code == 2 and not project.output.exists()
    said = err.splitlines()
    assert len(said) == 3 and "2 errors" in said[0] and all(line.startswith("error: ") for line in said)
    for number, name, line in zip((3, 4), "cd", sorted(said[1:]), strict=True):
        assert f"train.jsonl:{number} (example '{name}'): " in line and "image placeholder" in line


def test_output_folders_that_are_taken(project, capsys):
    (project.output).mkdir()
    (project.output / "thesis.txt").write_text("mine")
    refuse(project, capsys, str(project.output), "is not empty and holds no run")
    (project.output / "thesis.txt").unlink()
    assert run(capsys, project.recipe, "--output", project.output) == (0, "")  # the project is sound
    refuse(project, capsys, "already holds this run", "--resume")
    refuse(project, capsys, "the run of another recipe", options=["--set", "seed=9", "--resume"])


def test_broken_checkpoint(project, capsys):
    from mpi_mlx.training import checkpoint

    folder = project.output / "stages" / "1-sft" / "checkpoints" / "step-000001"
    assert run(capsys, project.recipe, "--output", project.output) == (0, "")
    (project.output / "progress.json").write_text('{"stages": {}, "evaluated": []}')
    folder.mkdir(parents=True)
    for name in ("parameters.safetensors", "optimizer.safetensors"):
        (folder / name).write_bytes(b"")
    (folder / "state.json").write_text('{"step": 1, "source": {}}')
    assert checkpoint.checkpoints(folder.parent) == [(1, folder)]
    code, err = run(capsys, project.recipe, "--output", project.output, "--resume")
    assert code == 2 and err.count("\n") == 1 and f"{folder}/parameters.safetensors cannot be read" in err
