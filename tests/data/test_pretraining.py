import re

import numpy as np
import pytest

from mpi_mlx.data.pretraining import cell_labels, draw_step, questions
from mpi_mlx.data.scenes import ATTRIBUTES, CELL_NAMES, Scene, SceneArrays, SceneObject

SHARES = dict(document=0.4, walk=0.2, recall=0.1, repeat=0.1, check=0.1, describe=0.05, ask=0.05)


def drawn(step=3, seed=0, rows=40, shares=SHARES, **options):
    return draw_step(seed, step, rows=rows, shares=shares, depths={1: 1.0, 2: 1.0}, **options)


@pytest.fixture(scope="module")
def batch():
    return drawn()


def of_kind(batch, kind):
    return [t for t in batch.tasks if t.kind == kind]


def test_a_step_is_a_function_of_seed_and_step(batch):
    assert drawn() == batch
    assert drawn(step=4) != batch and drawn(seed=1) != batch


def test_shares(batch):
    counts = {kind: len(of_kind(batch, kind)) for kind in SHARES}
    assert counts == dict(document=16, walk=8, recall=4, repeat=4, check=4, describe=2, ask=2)
    # 10 rows in thirds: 3 each, and the one left over goes to the largest share
    few = drawn(rows=10, shares=dict(document=1.2, walk=1.0, ask=1.0))
    assert [len(of_kind(few, k)) for k in ("document", "walk", "ask")] == [4, 3, 3]
    with pytest.raises(ValueError, match="unknown tasks"):
        drawn(shares={"dance": 1.0})


def test_rows_share_documents(batch):
    about = [t.document for t in batch.tasks if t.document is not None]
    assert len(about) == 28 and np.bincount(about).tolist() == [4] * 7 and len(set(batch.documents)) == 7
    assert len(drawn(scenes_per_document=2).documents) == 14


def test_answers_follow_their_documents(batch):
    """Each condition asked on the way stands in the document, and so does the reply; yes is the truth."""
    for task in of_kind(batch, "document"):
        document = batch.documents[task.document]
        trace, reply = task.answer.removeprefix("<think>").split("</think>\n")
        described, _, walk = trace.partition(". ")
        assert described == task.scene.describe() and reply in document
        steps = re.findall(r"(\w+) ([a-z ]+)\? \1 (yes|no) ", walk)
        assert steps and all(name in document for name, *_ in steps) and walk.endswith(f" {reply}.")
    for task in of_kind(batch, "walk"):
        assert task.scene is None
        # each yes or no is drawn, so what is trained leaves it out
        between = [task.answer[stop:start] for (_, stop), (start, _) in zip(task.graded, task.graded[1:], strict=False)]
        assert between == [f" {said}" for said in re.findall(r"\? \w+ (yes|no)\b", task.answer)] != []
        assert task.answer.split("\n")[-1] in batch.documents[task.document]


def test_copying(batch):
    for task in of_kind(batch, "repeat"):
        assert task.user == task.answer and 8 <= len(task.answer.split()) - 1 <= 24


def test_only_the_verdicts_of_checks_are_trained(batch):
    kinds = set()
    for task in of_kind(batch, "check"):
        texts = [task.answer[a:b] for a, b in task.graded]
        if texts[0].startswith("<think>"):
            assert texts.pop(0) == f"<think>{task.scene.describe()}."
        assert len(texts) == 14 and set(texts) <= {" yes", " no"}
        kinds |= set(texts)
    assert kinds == {" yes", " no"}


def scene():
    return Scene((
        SceneObject(size="small", color="red", material="metal", shape="cube", x=0.1, y=0.1),
        SceneObject(size="large", color="blue", material="rubber", shape="sphere", x=0.9, y=0.9),
    ))  # fmt: skip


def test_questions_are_answered_truly():
    found = questions(np.random.default_rng(0), scene(), 60)
    for condition, truth in found:
        wanted = dict(condition.first.pairs)
        assert truth == any(all(getattr(o, n) == v for n, v in wanted.items()) for o in scene().objects)
        assert truth == condition.holds(SceneArrays.of([scene()]))[0]
    yes = sum(t for _, t in found)
    assert 10 < yes < 50


def test_cell_labels_by_hand():
    labels = cell_labels([scene()])
    assert labels.shape == (1, 9, 5) and labels[0, :, 0].sum() == 2
    first, second = scene().objects
    for o in (first, second):
        expected = [1, *(values.index(getattr(o, name)) for name, values in ATTRIBUTES.items())]
        assert labels[0, o.cell].tolist() == expected
    empty = [c for c in range(len(CELL_NAMES)) if c not in (first.cell, second.cell)]
    assert (labels[0, empty] == [0, -1, -1, -1, -1]).all()
