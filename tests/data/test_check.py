import json

import numpy as np
import pytest
from PIL import Image

from mpi_mlx.data import Dataset, Example, write_examples
from mpi_mlx.data.check import check_dataset, read_source
from mpi_mlx.data.policy_tree import random_tree, tree_of
from mpi_mlx.data.scenes import scene_of
from mpi_mlx.data.sheet import (
    TRAINED,
    Card,
    Piece,
    StageView,
    _shortened,
    _wrapped,
    draw_sheet,
    pieces_of,
)
from mpi_mlx.documents import from_text
from mpi_mlx.errors import DataError


def example(name, text="Hi", **values):
    return Example(name, ({"role": "user", "content": text},), **values)


def pictured(name, color):
    content = [{"type": "image", "image": Image.new("RGB", (2, 2), color)}, {"type": "text", "text": "?"}]
    return Example(name, ({"role": "user", "content": content},), "trace", "yes")


def test_facts_are_counted():
    train = (example("a", "12345", reasoning="1234", answer="x"), example("b", "123", answer="y"))
    [facts] = check_dataset(Dataset(from_text("Rules."), train, rl=train)).splits
    assert (facts.name, facts.examples, facts.images, facts.with_reasoning) == ("train", 2, 0, 1)
    assert (facts.query_characters, facts.reasoning_characters, facts.majority) == (4.0, 2.0, 0.5)
    assert facts.answers == (("x", 1), ("y", 1))


def test_warnings():
    train = (pictured("a", "red"), pictured("b", "blue"))
    test = (pictured("c", "blue"), pictured("d", "green"))
    report = check_dataset(Dataset(None, train, rl=train, test=test))
    assert report.warnings == (
        "test: 1 of 2 examples are also in train (first 'c')",
        "no document: only sft without it, and rl without policy-aware rollouts, can run",
    )
    same = tuple(example(str(i), str(i), answer="x") for i in range(12))
    unlabelled = (example("r"), example("s", "Ho", answer="<think>a</think>b"))
    report = check_dataset(Dataset(from_text("Rules."), same, rl=unlabelled))
    assert report.warnings == (
        "train: no example has reasoning; set reasoning: false in the sft stage",
        "train: 100% of the answers are 'x'",
        "rl: 1 of 2 examples have no answer to check completions by",
        "rl: the answer of 's' holds a trace; move it to 'reasoning'",
    )


def test_scenes_overlap_by_what_they_show():
    shown = {"size": "small", "color": "red", "material": "metal", "shape": "cube", "x": 0.5, "y": 0.5}
    moved = {**shown, "x": 0.51}
    train = (example("a", "?", answer="x", meta={"scene": {"objects": [shown]}}),)
    test = (example("b", "!", answer="x", meta={"scene": {"objects": [moved]}}),)
    report = check_dataset(Dataset(from_text("Rules."), train, test=test))
    assert "test: 1 of 1 examples are also in train (first 'b')" in report.warnings


SHOWN = {"size": "small", "color": "red", "material": "metal", "shape": "cube", "x": 0.5, "y": 0.5}
OWN_SCENES = [
    "warehouse", 3, None, [], {}, {"objects": []}, {"objects": ["box"]}, {"objects": [SHOWN], "by": "me"},
    {"objects": [SHOWN | {"color": "pink"}]}, {"objects": [SHOWN | {"x": "left"}]}, {"objects": [SHOWN | {"x": 7}]},
    {"objects": [SHOWN | {"note": ""}]}, {"objects": [SHOWN | {"color": ["red"]}]},
]


@pytest.mark.parametrize("scene", OWN_SCENES)
def test_a_scene_of_one_s_own_is_no_scene_of_the_benchmark(scene):
    """Two cases of one warehouse are two cases."""
    assert scene_of({"scene": scene}) is None
    train = (example("a", "?", answer="x", meta={"scene": scene}),)
    test = (example("b", "!", answer="x", meta={"scene": scene}),)
    assert check_dataset(Dataset(from_text("Rules."), train, test=test)).warnings == (
        "train: no example has reasoning; set reasoning: false in the sft stage",
    )
    assert scene_of({"scene": {"objects": [SHOWN]}}).objects[0].shape == "cube" and scene_of({}) is None


def test_a_tree_of_one_s_own_is_no_tree_of_the_benchmark():
    tree = random_tree(np.random.default_rng(0), 2, kinds=("exists", "count", "relation"))
    raw = json.loads(json.dumps(tree.to_dict()))
    assert tree_of({"tree": raw}) == tree and tree_of({}) is None
    others = ["oak", 3, None, [], {}, {"depth": 2}, raw | {"by": "me"}, raw | {"depth": 3}, raw | {"depth": "2"}]
    others += [raw | {"depth": 10**9}, raw | {"names": raw["names"][:2]}, raw | {"replies": [1, 2, 3, 4]}]
    others += [raw | {"conditions": [c] * 3} for c in ("x", {}, {"kind": "exists", "first": {"age": "old"}})]
    others += [raw | {"conditions": [{"kind": "exists", "first": {"color": "pink"}}] * 3}]
    for other in others:
        assert tree_of({"tree": other}) is None, other


def test_sources(tmp_path):
    write_examples(tmp_path / "train.jsonl", [pictured("a", "red")])
    assert read_source(tmp_path / "train.jsonl").dataset.train[0].id == "a"
    assert read_source(tmp_path).dataset.document is None
    (tmp_path / "document").mkdir()
    (tmp_path / "document" / "policy.md").write_text("Rules.")
    assert read_source(tmp_path).dataset.document.text == "Rules."
    with pytest.raises(DataError, match="no such dataset"):
        read_source(tmp_path / "gone.csv")


def test_pieces_are_cut_where_the_mask_changes():
    ids = np.array([1, 2, 9, 9, 9, 3, 4])
    weights = np.array([0, 1, 0, 0, 0, 1, 1], np.float32)
    pieces = pieces_of(ids, weights, ids == 9, lambda ids: " ".join(map(str, ids)))
    assert pieces == (
        Piece("1", 1, False),
        Piece("2", 1, True),
        Piece("[3 image tokens]", 3, False, True),
        Piece("3 4", 2, True),
    )
    view = StageView("sft", pieces)
    assert (view.tokens, view.trained) == (7, 3)


def test_lines_hold_all_text_and_long_ones_are_shortened():
    pieces = (Piece("one two\nthree", 3, False), Piece(" four five six", 3, True))
    lines = _wrapped(pieces, 10)
    assert ["".join(t for t, _ in line) for line in lines] == ["one two\u21b5", "three ", "four five", " six"]
    [unbroken] = {len(t) for line in _wrapped((Piece("x" * 90, 90, True),), 10) for t, _ in line}
    assert unbroken == 9
    many = _shortened(_wrapped((Piece("x\n" * 40, 80, True),), 10))
    assert len(many) == 15 and many[9][0][0] == "\u2026 26 more lines \u2026"


def test_the_sheet_shows_trained_tokens_in_the_stage_s_colour():
    def sheet_of(trained):
        pieces = (Piece("prompt ", 4, False), Piece("the answer", 3, trained))
        card = Card(pictured("a", "red"), (StageView("sft", pieces),))
        return np.asarray(draw_sheet([card], "Title", ["facts"]))

    def count(sheet, color):
        return int((sheet[200:] == color).all(-1).sum())  # below the legend

    assert count(sheet_of(True), TRAINED["sft"]) > 500
    assert count(sheet_of(False), TRAINED["sft"]) == 0
    assert count(sheet_of(True), TRAINED["cpt"]) == 0
    assert count(sheet_of(True), (255, 0, 0)) > 200 * 200  # the picture
