"""The template that `mpi-mlx init` copies: its files belong together."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from mpi_mlx.data.dataset import load_dataset_folder
from mpi_mlx.recipe import load_recipe

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "your_policy"


def _module(file: Path):
    spec = importlib.util.spec_from_file_location(f"template_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_script_draws_what_is_shipped(tmp_path):
    shutil.copy(FOLDER / "make_template.py", tmp_path)
    _module(tmp_path / "make_template.py").main()
    drawn = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.png"))
    assert drawn == sorted(p.relative_to(FOLDER) for p in FOLDER.rglob("*.png")) and len(drawn) == 36
    for name in drawn:
        # other versions of Pillow may round and pick the palette a little differently
        new, old = (Image.open(folder / name).convert("RGB") for folder in (tmp_path, FOLDER))
        differences = ImageChops.difference(new, old).convert("L").resize((1, 1), Image.Resampling.BOX)
        assert differences.getpixel((0, 0)) <= 3
    for name in ("train", "rl", "validation", "test"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (FOLDER / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("parcel", "walk", "answer"),
    [
        # dented, open, labelled, insured; read off policy/policy.md by hand
        ((True, True, True, False), "Section 2: label.", "inspect"),
        ((False, True, False, True), "Section 2: no label.", "refuse"),
        ((True, False, False, True), "Section 3: insured.", "refund"),
        ((True, False, True, False), "Section 3: not insured.", "inspect"),
        ((False, False, True, False), "Section 4: label.", "accept"),
        ((False, False, False, True), "Section 4: no label.", "ask for the order number"),
    ],
)
def test_decisions(parcel, walk, answer):
    script = _module(FOLDER / "make_template.py")
    assert script.decide(script.Parcel(*parcel)) == (walk, answer)


def test_examples():
    dataset = load_dataset_folder(FOLDER, thorough=True)
    assert [len(rows) for rows in dataset.splits.values()] == [12, 12, 4, 6]
    assert len(dataset.document.images) == 2
    replies = set(re.findall(r'"([^"]+)"', dataset.document.text))
    assert {e.answer for e in dataset.train} == replies == {e.answer for e in dataset.rl}
    assert all(e.reasoning is None for e in dataset.rl)
    named = [json.loads(line)["messages"][0]["content"][0]["image"]
             for split in dataset.splits for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]
    assert len(set(named)) == 34  # every example has a picture of its own
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file() and f.suffix != ".pyc") < 200_000


def test_readme_and_recipe_name_files_that_exist():
    readme = (FOLDER / "README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(names) == 9 and all((FOLDER / name).exists() for name in names)
    data = load_recipe(FOLDER).data
    assert all(Path(getattr(data, k)).exists() for k in ("document", "train", "rl", "validation", "test"))


def test_reward_counts_what_the_reasoning_names():
    reward = _module(FOLDER / "rewards.py").looked_at_everything
    texts = [
        "<think>box dented, tape open, label missing, insured.</think>\nrefuse",
        "<think>box dented, tape open.</think>\nlabel missing",  # named in the answer only
        "<think>box dented, box intact, tape open, label missing.</think>\nrefuse",  # both ways
        "refuse",
    ]
    assert reward(texts, [{}] * 4) == pytest.approx([1, 2 / 3, 2 / 3, 0])
