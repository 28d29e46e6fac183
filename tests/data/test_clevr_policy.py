from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mpi_mlx.data.clevr_policy import balanced_indices, build_clevr_policy
from mpi_mlx.data.conditions import Condition, Filter
from mpi_mlx.data.policy_tree import PolicyTree, check_trace, document_text, random_tree
from mpi_mlx.data.render_flat import render_flat
from mpi_mlx.data.scenes import Scene, SceneArrays, SceneObject, random_scenes
from mpi_mlx.errors import DataError


def thing(words, x, y):
    size, color, material, shape = words.split()
    return SceneObject(size, color, material, shape, x, y)


SCENE = Scene(
    (
        thing("small red metal cube", 0.17, 0.17),
        thing("large red rubber sphere", 0.5, 0.5),
        thing("small blue metal cylinder", 0.83, 0.52),
    )
)


def of(**pairs):
    return Filter(tuple(pairs.items()))


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        (Condition("exists", of(color="red", shape="cube")), True),
        (Condition("exists", of(color="blue", shape="cube")), False),
        (Condition("count", of(color="red"), number=2), True),
        (Condition("count", of(material="metal"), number=3), False),
        (Condition("relation", of(shape="cube"), relation="left of", second=of(shape="sphere")), True),
        (Condition("relation", of(shape="cube"), relation="right of", second=of(shape="sphere")), False),
        (Condition("relation", of(shape="cube"), relation="behind", second=of(color="blue")), True),
        (Condition("relation", of(color="blue"), relation="in front of", second=of(shape="cube")), True),
        # Side by side: 0.02 apart from front to back is neither.
        (Condition("relation", of(color="blue"), relation="in front of", second=of(shape="sphere")), False),
        (Condition("relation", of(shape="sphere"), relation="in front of", second=of(color="blue")), False),
    ],
)
def test_conditions_by_hand(condition, holds):
    assert condition.holds(SceneArrays.of([SCENE]))[0] == holds
    assert Condition.from_dict(condition.to_dict()) == condition


def test_scenes_as_arrays_and_back():
    scenes = random_scenes(np.random.default_rng(0), 50)
    for n in range(50):
        scene = scenes.scene(n)
        assert 2 <= len(scene.objects) <= 5
        cells = [o.cell for o in scene.objects]
        assert cells == sorted(set(cells))
        assert Scene.from_dict(scene.to_dict()) == scene
        assert SceneArrays.of([scene]).scene(0) == scene
    assert Scene(SCENE.objects[:2]).key != SCENE.key
    moved = thing("small red metal cube", 0.18, 0.16)
    assert Scene((moved, *SCENE.objects[1:])).key == SCENE.key


def tree_of_two_levels():
    conditions = (
        Condition("exists", of(shape="cube")),
        Condition("exists", of(color="blue")),
        Condition("exists", of(size="large")),
    )
    return PolicyTree(2, conditions, ("Falcon", "Otter", "Raven"), ("maple", "cedar", "birch", "willow"))


def test_the_walk_and_its_trace_by_hand():
    tree = tree_of_two_levels()
    assert tree.walk(SCENE) == ([(0, True), (1, True)], 0)
    assert tree.leaves(SceneArrays.of([SCENE, Scene(SCENE.objects[1:2])])).tolist() == [0, 2]
    trace = (
        "northwest small red metal cube, center large red rubber sphere, east small blue metal cylinder. "
        "Falcon cube? Falcon yes Otter blue object? Otter yes maple."
    )
    assert tree.trace(SCENE) == trace
    assert check_trace(trace, "maple", tree) == 1.0
    assert check_trace(trace, "cedar", tree) == 0.5  # both steps are right, the reply is not
    walked, other = "Falcon yes Otter blue object? Otter yes maple", "Falcon no Raven large object? Raven yes birch"
    wrong = trace.replace(walked, other)
    assert check_trace(wrong, "birch", tree) == 0.0
    half = trace.replace("Otter yes maple", "Otter no cedar")
    assert check_trace(half, "cedar", tree) == 0.25
    assert check_trace(trace + " maple.", "maple", tree) == 0.5
    assert check_trace("no scene here", "maple", tree) == 0.0
    assert check_trace(None, "maple", tree) == 0.0


@pytest.mark.parametrize("depth", range(1, 7))
def test_documents_of_every_depth(depth):
    rng = np.random.default_rng(depth)
    tree = random_tree(rng, depth, kinds=("exists", "count", "relation"))
    assert PolicyTree.from_dict(tree.to_dict()) == tree
    assert len(set(tree.replies)) == 2**depth and len(set(tree.names)) == 2**depth - 1
    scenes = random_scenes(rng, 2000)
    leaves = tree.leaves(scenes)
    assert [tree.walk(scenes.scene(n))[1] for n in range(20)] == leaves[:20].tolist()
    for wording in ("natural", "compact"):
        text = document_text(tree, rng, wording=wording)
        assert all(text.count(reply) == 1 for reply in tree.replies)
        assert all(name in text for name in tree.names)


def spec(**values):
    plain = dict(
        depth=3,
        conditions=("exists",),
        seed=3,
        document_seed=None,
        wording="natural",
        modality="text",
        rl=40,
        style="flat",
        image_size=None,
        max_objects=5,
        train=16,
        validation=8,
        test=80,
    )
    return SimpleNamespace(**{**plain, **values})


def test_examples_follow_their_document():
    dataset = build_clevr_policy(spec())
    for example in (*dataset.train, *dataset.test):
        tree = PolicyTree.from_dict(example.meta["tree"])
        assert check_trace(example.reasoning, example.answer, tree) == 1.0
        assert example.answer in dataset.document.text
        assert example.images[0].scene == Scene.from_dict(example.meta["scene"])
    answers = [e.answer for e in dataset.test]
    assert {answers.count(a) for a in set(answers)} == {10}  # 80 examples, 8 replies
    assert all(e.reasoning is None and e.answer for e in dataset.rl)


def test_the_document_has_its_own_seed():
    one, two = build_clevr_policy(spec()), build_clevr_policy(spec(seed=9, document_seed=3))
    assert one.document == two.document and one.train != two.train
    without_rl = build_clevr_policy(spec(rl=None))
    assert without_rl.rl == without_rl.train


def test_replies_are_balanced_until_they_run_out():
    leaves, used = np.array([0] * 8 + [1] * 2), np.zeros(10, bool)
    first = balanced_indices(leaves, 4, 2, np.random.default_rng(0), used)
    assert sorted(leaves[first]) == [0, 0, 1, 1] and used.sum() == 4
    second = balanced_indices(leaves, 6, 2, np.random.default_rng(0), used)
    assert sorted({*first, *second}) == list(range(10))
    with pytest.raises(DataError, match="only 0 distinct scenes are left for 1"):
        balanced_indices(leaves, 1, 2, np.random.default_rng(0), used)


def test_illustrated_documents_show_what_they_do_not_say():
    document = build_clevr_policy(spec(modality="multimodal", train=2, rl=0, test=0, validation=0)).document
    assert len(document.images) == 7
    assert document.text.count("as in this picture: ") == 7


def test_flat_pictures_tell_attributes_apart():
    def picture(words):
        return np.asarray(render_flat(Scene((thing(words, 0.5, 0.5),)))).astype(int)

    plain = picture("large red rubber cube")
    for other in (
        "small red rubber cube",
        "large blue rubber cube",
        "large red metal cube",
        "large red rubber sphere",
    ):
        assert (np.abs(picture(other) - plain).max(-1) > 30).sum() > 30, other
    assert isinstance(render_flat(SCENE, 112), Image.Image) and render_flat(SCENE, 112).size == (112, 112)
