import json
import re
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


def refused(capsys, *arguments):
    """The lines of `mpi-mlx ...` on stderr, which must be errors that a user can mend."""
    from mpi_mlx_cli import main as cli

    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    said = capsys.readouterr()
    assert ended.value.code == 2 and "Traceback" not in said.err
    lines = said.err.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines)
    return [line.removeprefix("error: ") for line in lines], said.out


def rows_of(folder, count, change):
    """A train.jsonl of text rows, some of them changed."""
    rows = [{"id": str(n), "messages": [{"role": "user", "content": f"row {n}"}], "answer": "a"} for n in range(count)]
    for number, spoil in change.items():  # by line
        rows[number - 1] |= spoil
    path = folder / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def asks(*parts):
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
                         {"role": "user", "content": list(parts)}]}  # fmt: skip


def text(said):
    return {"type": "text", "text": said}


def test_check_reads_every_row(tmp_path, capsys):
    """Of 100 rows the 81st is bad: `train` refuses it, and so must `check`."""
    path = rows_of(tmp_path, 100, {81: asks(text("a"), text("b <|image_pad|> c"))})
    held = "the text holds the image placeholder '<|image_pad|>'; remove it"
    [line], out = refused(capsys, "data", "check", path)
    assert line == f"{path}:81: messages[2].content[1].text: {held}"
    assert "100" in out and not (tmp_path / "train.sheet.png").exists()
    change = {3: {"messages": [{"role": "user", "content": "<|image_pad|>"}]}, 90: {"answer": "<|image_pad|>"}}
    lines, _ = refused(capsys, "data", "check", rows_of(tmp_path, 100, change | {7: {"reasoning": "<|image_pad|>"}}))
    assert lines == [
        f"{path}: 3 errors",
        f"{path}:3: messages[0].content: {held}",
        f"{path}:7: reasoning: {held}",
        f"{path}:90: answer: {held}",
    ]
    assert "on 64 examples" not in call("check", rows_of(tmp_path, 100, {}), "--samples", 0)


def test_check_names_line_and_field_of_pictures_that_no_model_takes(tmp_path, capsys):
    Image.new("RGB", (2, 500)).save(tmp_path / "thin.png")
    Image.effect_noise((256, 256), 90).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-4000])

    def shows(*names):
        return asks(text("?"), *({"type": "image", "image": name} for name in names))

    path = rows_of(tmp_path, 70, {66: shows("whole.jpg", "thin.png"), 67: shows("cut.jpg"), 68: shows("whole.jpg")})
    lines, _ = refused(capsys, "data", "check", path)
    assert lines[0] == f"{path}: 2 errors" and len(lines) == 3
    assert lines[1].startswith(f"{path}:66: messages[2].content[2].image: image {tmp_path / 'thin.png'} (2x500): ")
    assert lines[2].startswith(f"{path}:67: messages[2].content[1].image: image {tmp_path / 'cut.jpg'} cannot be read")


def test_check_decodes_each_picture_once(tmp_path, monkeypatch):
    from mpi_mlx.models import images

    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    shown = asks({"type": "image", "image": "a.png"}, {"type": "image", "image": "a.png"})
    path = rows_of(tmp_path, 9, {1: shown, 5: shown, 9: shown})
    decoded, load = [], images.load_image
    monkeypatch.setattr(images, "load_image", lambda source: decoded.append(source) or load(source))
    call("check", path, "--samples", 0)
    assert decoded == [str(tmp_path / "a.png")]


def test_check_says_which_files_of_a_document_were_read(tmp_path, capsys):
    rows_of(tmp_path, 2, {})
    folder = tmp_path / "policy"
    folder.mkdir()
    for name in ("README.md", "01-returns.md", "02-refunds.md"):
        (folder / name).write_text(f"# {name}\n\nSee ![fig1].\n")
    Image.new("RGB", (28, 28)).save(folder / "box.png")
    said = call("check", tmp_path, "--samples", 0)
    assert "\n  read: 01-returns.md, 02-refunds.md, README.md\n  not read or shown: box.png\n" in said
    assert f"warning: {folder / '01-returns.md'}:3: '![fig1].' is read as text; " in said
    (folder / "policy.md").write_text("a\n\nb <|image_pad|>\n")
    [line], out = refused(capsys, "data", "check", tmp_path)
    assert line.startswith(f"{folder / 'policy.md'}:3: the text holds the image placeholder")
    assert "\n  read: policy.md\n  not read or shown: 01-returns.md, 02-refunds.md, README.md, box.png\n" in out


def test_generated_rows_are_sampled(monkeypatch):
    from mpi_mlx.data.examples import Example
    from mpi_mlx.data.measure import measured_rows

    drawn = [Example(str(n), ({"role": "user", "content": "?"},)) for n in range(640)]
    assert [e.id for e in measured_rows(drawn)] == [str(n) for n in range(0, 640, 10)]
    read = [replace(e, source="a.jsonl:1") for e in drawn]
    assert measured_rows(read) == read


def test_check_compares_the_document_with_the_models_context(tmp_path, capsys, monkeypatch):
    from mpi_mlx.models import context

    rows_of(tmp_path, 2, {})
    (tmp_path / "policy.md").write_text("Refund the red cube. " * 40)
    monkeypatch.setattr(context, "context_length", lambda model: 100)
    [line], out = refused(capsys, "data", "check", tmp_path)
    assert re.fullmatch(r"document: \d{3} tokens, and embedded:tiny takes 100 .*; shorten it, or choose .*", line)
