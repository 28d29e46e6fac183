import colorsys

import numpy as np
import pytest

from mpi_mlx.data.render_clevr import COLORS, render_clevr, visible_objects
from mpi_mlx.data.scenes import Scene, SceneObject, random_scenes
from mpi_mlx.data.solids import Solid, blocks, first_hit, normals


def one(**values) -> Scene:
    plain = {"size": "large", "material": "rubber", "color": "red", "shape": "sphere", "x": 0.5, "y": 0.5}
    return Scene((SceneObject(**{**plain, **values}),))


def pixels_of(scene, size=(120, 80), seed=0, index=0):
    return np.asarray(render_clevr(scene, size, seed))[visible_objects(scene, size, seed) == index]


def test_sizes_and_determinism():
    scene = one()
    assert render_clevr(scene).size == (480, 320)
    assert render_clevr(scene, 64).size == (64, 64)
    first = render_clevr(scene, 64, seed=1).tobytes()
    assert render_clevr(scene, 64, seed=1).tobytes() == first
    assert render_clevr(scene, 64, seed=2).tobytes() != first


@pytest.mark.parametrize("material", ["rubber", "metal"])
def test_an_object_shows_the_hue_of_its_colour(material):
    for name, rgb in COLORS.items():
        hue, saturation, _ = colorsys.rgb_to_hsv(*pixels_of(one(color=name, material=material)).mean(0) / 255)
        if name == "gray":
            assert saturation < 0.1
        else:
            assert saturation > 0.4
            assert abs(hue - colorsys.rgb_to_hsv(*np.array(rgb) / 255)[0]) < 0.05, name


def test_metal_looks_unlike_rubber():
    bright = {m: np.sort(pixels_of(one(material=m)).min(-1))[-3] for m in ("metal", "rubber")}
    assert bright["metal"] > bright["rubber"] + 60  # white highlights on a red ball
    for shape in ("sphere", "cylinder", "cube"):
        metal, rubber = (pixels_of(one(shape=shape, material=m)).mean(0) for m in ("metal", "rubber"))
        assert np.abs(metal - rubber).max() > 20, shape


def test_size_place_and_shape_show():
    def box(**values):
        rows, columns = np.nonzero(visible_objects(one(**values)) == 0)
        return columns.min(), columns.max(), rows.min(), rows.max(), len(rows)

    small, large = box(size="small"), box(size="large")
    assert 3 < large[4] / small[4] < 5  # twice the radius, four times the area
    assert box(x=0.2)[1] < box(x=0.8)[0]
    assert box(y=0.2)[3] < box(y=0.8)[2]
    left, right, top, bottom, area = large
    assert abs(area / ((right - left + 1) * (bottom - top + 1)) - np.pi / 4) < 0.03  # a disc in its box
    left, right, top, bottom, area = box(shape="cylinder")
    assert area / ((right - left + 1) * (bottom - top + 1)) > 0.88


@pytest.mark.parametrize("size", [(96, 64), 80])
def test_every_object_of_any_layout_is_in_the_picture(size):
    scenes = random_scenes(np.random.default_rng(0), 40, min_objects=9, max_objects=9)
    worst = []
    for n in range(len(scenes)):
        shown = visible_objects(scenes.scene(n), size)
        assert (np.concatenate([shown[0], shown[-1], shown[:, 0], shown[:, -1]]) == -1).all()
        areas = np.bincount(shown[shown >= 0], minlength=9)
        assert (areas > 0).all()
        worst.append(areas.min())
    assert np.median(worst) >= 12  # of about 25 pixels that a small object far away covers


def test_shadows_fall_on_the_ground():
    empty = np.asarray(render_clevr(Scene(()), (120, 80))).astype(int).sum(-1)
    one_ball = np.asarray(render_clevr(one(), (120, 80))).astype(int).sum(-1)
    around = one_ball[visible_objects(one(), (120, 80)) == -1]
    assert np.sort(around)[20] < 0.85 * empty.min()


@pytest.mark.parametrize("shape", ["sphere", "cube", "cylinder"])
def test_rays_meet_solids_where_they_must(shape):
    solid = Solid(shape, 1.0, 2.0, 0.7, 0.0, (1, 1, 1), False)
    down = np.array([[0, 0, -1]], np.float32)
    above = np.array([[1, 2, 5]], np.float32)
    [t] = first_hit(solid, above, down)
    assert t == pytest.approx(5 - 2 * solid.half, abs=5e-3)
    assert normals(solid, above + t * down) == pytest.approx(np.array([[0, 0, 1]]), abs=1e-2)
    assert np.isinf(first_hit(solid, above + [[0.8, 0, 0]], down)[0])
    east = np.array([[-1, 0, 0]], np.float32)
    [t] = first_hit(solid, np.array([[5, 2, 0.4]], np.float32), east)
    reach = {"sphere": np.sqrt(0.7**2 - 0.3**2), "cube": 0.7 / np.sqrt(2), "cylinder": 0.7}[shape]
    assert t == pytest.approx(4 - reach, abs=5e-3)
    if shape != "sphere":
        assert blocks(solid, np.array([[5, 2, 0.4]], np.float32), east).all()
        assert not blocks(solid, np.array([[5, 3, 0.4]], np.float32), east).any()
        assert not blocks(solid, np.array([[-5, 2, 0.4]], np.float32), east).any()  # behind the ray
