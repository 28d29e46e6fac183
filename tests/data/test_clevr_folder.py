import json
import math
from types import SimpleNamespace

import pytest
from PIL import Image

from mpi_mlx.data.clevr_folder import arrays_of, read_clevr_folder
from mpi_mlx.data.clevr_photos import build_from_clevr
from mpi_mlx.data.clevr_policy import SPLITS
from mpi_mlx.data.conditions import Condition, Filter
from mpi_mlx.data.policy_tree import PolicyTree, check_trace, parse_description
from mpi_mlx.data.scenes import Scene, SceneArrays
from mpi_mlx.errors import DataError

# The camera looks along CLEVR's diagonal, as in the published files.
DIRECTIONS = {"right": [math.sqrt(0.5), math.sqrt(0.5), 0.0], "front": [math.sqrt(0.5), -math.sqrt(0.5), 0.0]}


def thing(color, x, y, **more):
    return {
        "size": "large",
        "color": color,
        "material": "metal",
        "shape": "cube",
        "3d_coords": [x, y, 0.7],
        "pixel_coords": [240, 160, 10.0],
        "rotation": 12.5,
        **more,
    }


def scene(index, *objects, **more):
    name = f"CLEVR_val_{index:06d}.png"
    return {
        "image_index": index,
        "image_filename": name,
        "objects": list(objects),
        "directions": DIRECTIONS,
        **more,
    }


@pytest.fixture
def clevr(tmp_path):
    """Makes a CLEVR_v1.0 folder of the given scenes."""

    def make(*scenes, split="val", images=True):
        (tmp_path / "scenes").mkdir(exist_ok=True)
        (tmp_path / "images" / split).mkdir(parents=True, exist_ok=True)
        for raw in scenes if images else ():
            Image.new("RGB", (48, 32)).save(tmp_path / "images" / split / raw["image_filename"])
        path = tmp_path / "scenes" / f"CLEVR_{split}_scenes.json"
        path.write_text(json.dumps({"info": {"split": split}, "scenes": list(scenes)}))
        return tmp_path

    return make


def test_objects_are_placed_along_the_camera(clevr):
    # On CLEVR's axes (3, 3) is farthest to the right, (3, -3) nearest to the front, (0, 0) the middle.
    folder = clevr(
        scene(0, thing("red", 0, 0), thing("blue", 3, 3), thing("green", 3, -3), thing("gray", -3, 3))
    )
    [picture] = read_clevr_folder(folder, "val")
    assert [o.color for o in picture.scene.objects] == ["gray", "red", "blue", "green"]
    gray, red, blue, green = picture.scene.objects
    assert (red.x, red.y) == (0.5, 0.5)
    assert blue.x == pytest.approx(0.5 + math.sqrt(18) / 8.6, abs=1e-3) and blue.y == 0.5
    assert green.y > 0.9 and gray.y < 0.1 and green.x == gray.x == 0.5
    assert picture.image == (folder / "images/val/CLEVR_val_000000.png").resolve()
    arrays = arrays_of([picture])
    assert arrays.attributes.shape == (1, 4, 4) and arrays.scene(0) == picture.scene


def test_two_objects_of_one_cell_have_a_trace(clevr):
    """Worked by hand: the middle third reaches 0.167 from the middle, 1.43 along the camera; all three are in it."""
    [picture] = read_clevr_folder(
        clevr(scene(0, thing("blue", 1, 0), thing("red", 0, 0), thing("red", 0, 1, shape="sphere"))), "val"
    )
    two_red = Condition("count", Filter((("color", "red"),)), number=2)
    tree = PolicyTree(1, (two_red,), ("Falcon",), ("maple", "cedar"))
    # (0, 1) lies behind the others and (1, 0) in front, so that is the reading order.
    trace = (
        "center large red metal sphere, center large red metal cube, center large blue metal cube. "
        "Falcon two red objects? Falcon yes maple."
    )
    assert tree.trace(picture.scene) == trace
    assert check_trace(trace, "maple", tree) == 1.0
    assert check_trace(trace.replace("yes maple", "no cedar"), "cedar", tree) == 0.0

    description = trace.partition(". ")[0]
    read = parse_description(description)
    assert read.describe() == description
    assert [(o.x, o.y) for o in read.objects] == [(0.5, 0.5)] * 3
    # How objects of one cell lie to each other is not said; where another cell's lie is.
    sphere, cube = Filter((("shape", "sphere"),)), Filter((("shape", "cube"),))
    for relation in ("left of", "right of", "in front of", "behind"):
        condition = Condition("relation", sphere, relation=relation, second=cube)
        assert not condition.holds(SceneArrays.of([read]))[0]
    beside = parse_description(description.replace("blue", "gray") + ", east small blue rubber sphere")
    right = Condition("relation", Filter((("color", "blue"),)), relation="right of", second=cube)
    assert right.holds(SceneArrays.of([beside]))[0]
    assert parse_description("east small red metal cube, west small red metal cube") is None  # not in reading order


def test_pixels_stand_in_for_missing_directions(clevr):
    raw = scene(0, thing("red", 0, 0, pixel_coords=[120, 240, 9.0]))
    del raw["directions"]
    [picture] = read_clevr_folder(clevr(raw), "val")
    assert (picture.scene.objects[0].x, picture.scene.objects[0].y) == (0.25, 0.75)


def test_equal_scenes_and_the_limit(clevr):
    folder = clevr(*(scene(i, thing(c, 0, 0)) for i, c in enumerate(("red", "red", "blue", "green"))))
    assert [p.image.stem[-1] for p in read_clevr_folder(folder, "val")] == ["0", "2", "3"]
    assert len(read_clevr_folder(folder, "val", limit=2)) == 2


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            scene(0, thing("pink", 0, 0)),
            r"scenes\[0\]\.objects\[0\]\.color: expected one of gray, .* found 'pink'",
        ),
        (scene(0, thing("red", "a", 0)), r"scenes\[0\]\.objects\[0\]: needs 3d_coords"),
        (
            scene(0, thing("red", 0, 0), objects=None),
            r"scenes\[0\]: expected an object with a list 'objects'",
        ),
        ([], r"scenes\[0\]: expected an object"),
        (scene(0, 3), r"objects\[0\]\.size: expected one of small, large, found None"),
    ],
)
def test_odd_scenes(clevr, raw, message):
    folder = clevr(raw, images=isinstance(raw, dict))
    with pytest.raises(DataError, match=message):
        read_clevr_folder(folder, "val")


def test_missing_files(clevr, tmp_path):
    with pytest.raises(
        DataError, match="no scenes/CLEVR_train_scenes.json in it; give the folder CLEVR_v1.0"
    ):
        read_clevr_folder(tmp_path)
    folder = clevr(scene(0, thing("red", 0, 0)), scene(1, thing("red", 0, 0)), images=False)
    with pytest.raises(
        DataError, match=r"2 errors\n.*000000\.png' does not exist; unpack images/val as well"
    ):
        read_clevr_folder(folder, "val")
    (folder / "scenes" / "CLEVR_val_scenes.json").write_text('{"scenes": [')
    with pytest.raises(DataError, match="not JSON"):
        read_clevr_folder(folder, "val")
    (folder / "scenes" / "CLEVR_val_scenes.json").write_text("{}")
    with pytest.raises(DataError, match="no list 'scenes'"):
        read_clevr_folder(folder, "val")


def spec(**values):
    plain = dict(
        depth=1,
        conditions=("exists",),
        seed=3,
        document_seed=None,
        wording="natural",
        modality="text",
        rl=None,
        style="clevr",
        image_size=64,
        train=6,
        validation=2,
        test=4,
    )
    return SimpleNamespace(**{**plain, **values})


def many(split, count, offset):
    colors = ("red", "blue", "green", "gray", "cyan", "yellow", "purple", "brown")
    rows = []
    for i in range(offset, offset + count):
        things = [thing(colors[i % 8], 0, 0), thing(colors[i // 8 % 8], 3, 3), thing(colors[i // 64], -3, -3)]
        rows.append(scene(i, *things) | {"image_filename": f"CLEVR_{split}_{i:06d}.png"})
    return rows


def test_a_rulebook_over_real_pictures(clevr):
    folder = clevr(*many("train", 40, 0), split="train")
    clevr(*many("val", 40, 30), split="val")
    dataset = build_from_clevr(folder, spec())
    assert [len(s) for s in dataset.splits.values()] == [6, 6, 2, 4]
    assert all("/images/train/" in e.images[0] for e in dataset.train)
    assert all("/images/val/" in e.images[0] for e in dataset.test)
    keys = {name: {Scene.from_dict(e.meta["scene"]).key for e in dataset.splits[name]} for name in SPLITS}
    assert not keys["train"] & keys["test"] and not keys["validation"] & keys["test"]
    example = dataset.train[0]
    tree = PolicyTree.from_dict(example.meta["tree"])
    assert example.answer == tree.replies[tree.walk(Scene.from_dict(example.meta["scene"]))[1]]
    assert example.answer in dataset.document.text
    assert {e.answer for e in dataset.train} == set(tree.replies)
    assert build_from_clevr(folder, spec()) == dataset


def test_one_split_serves_all_and_limits_are_told(clevr):
    folder = clevr(*many("train", 40, 0), split="train")
    dataset = build_from_clevr(folder, spec(rl=5))
    images = [e.images[0] for name in SPLITS for e in dataset.splits[name]]
    assert len(images) == len(set(images)) == 17 and dataset.rl[0].reasoning is None
    with pytest.raises(DataError, match="only .* distinct scenes are left for 60"):
        build_from_clevr(folder, spec(train=60))
    with pytest.raises(DataError, match="relation cannot be asked of CLEVR's pictures; use exists, count"):
        build_from_clevr(folder, spec(conditions=("exists", "relation")))
