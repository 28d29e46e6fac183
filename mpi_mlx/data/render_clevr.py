"""Scenes as CLEVR shows them: shaded solids, metal and rubber, on a grey ground under three soft lights.

A small ray tracer in numpy: one ray a pixel, more where a pixel holds an edge. Colours, sizes and the
three-light set-up follow CLEVR's Blender generator (Johnson et al., 2017); the camera stands higher than
there, so that the 3x3 layout's rows stay visible behind one another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import product

import numpy as np
from PIL import Image

from mpi_mlx.data.raytrace import Light, Tracer
from mpi_mlx.data.scenes import GRID, JITTER, Scene
from mpi_mlx.data.solids import Solid, unit

COLORS = {  # CLEVR's, sRGB
    "gray": (87, 87, 87), "red": (173, 35, 35), "blue": (42, 75, 215), "green": (29, 105, 20),
    "brown": (129, 74, 25), "purple": (129, 38, 192), "cyan": (41, 208, 208), "yellow": (255, 238, 51),
}
RADIUS = {"small": 0.35, "large": 0.7}
SPAN_X, SPAN_Y = 7.2, 8.4  # ground units that the layout's 0..1 covers; no two solids touch
DISTANCE = 15.0  # of the camera from the layout's middle
FILL = 0.97  # of the picture that the layout's corners may reach
EDGE_RAYS = 4  # squared: rays for a pixel that holds an edge


def render_clevr(scene: Scene, size: int | Sequence[int] = (480, 320), seed: int = 0) -> Image.Image:
    """The scene as an RGB picture of ``size`` (width, height), or ``size`` x ``size``.

    Turns of the cubes and small shifts of camera and lights are drawn from the scene and ``seed``; the same
    scene, size and seed give the same pixels.
    """
    tracer, camera = _set_up(scene, size, seed)
    width, height = camera.width, camera.height
    columns, rows = camera.grid()
    pixels, what = tracer.trace(camera.position, camera.rays(columns, rows))
    pixels = _developed(pixels)
    edges = np.flatnonzero(_edges(what.reshape(height, width)))
    if len(edges):
        step = (np.arange(EDGE_RAYS) + 0.5) / EDGE_RAYS - 0.5
        dx, dy = (g.ravel() for g in np.meshgrid(step, step))
        x, y = (columns[edges, None] + dx).ravel(), (rows[edges, None] + dy).ravel()
        finer, _ = tracer.trace(camera.position, camera.rays(x, y))
        pixels[edges] = _developed(finer).reshape(len(edges), EDGE_RAYS**2, 3).mean(1)
    return Image.fromarray((pixels.reshape(height, width, 3) * 255 + 0.5).astype(np.uint8))


def visible_objects(scene: Scene, size: int | Sequence[int] = (480, 320), seed: int = 0) -> np.ndarray:
    """int (H, W): index of the object that each pixel of :func:`render_clevr`'s picture shows, or -1."""
    tracer, camera = _set_up(scene, size, seed)
    what, _ = tracer.nearest(camera.position[None], camera.rays(*camera.grid()))
    return np.maximum(what, -1).reshape(camera.height, camera.width)


def _set_up(scene: Scene, size: int | Sequence[int], seed: int) -> tuple[Tracer, _Camera]:
    width, height = (size, size) if isinstance(size, int) else size
    rng = _rng(scene, seed)
    camera, lights = _Camera(width, height, rng), _lights(rng)
    solids = [
        Solid(
            o.shape, (o.x - 0.5) * SPAN_X, (0.5 - o.y) * SPAN_Y, RADIUS[o.size], rng.uniform(0, np.pi / 2),
            tuple(_linear(np.array(COLORS[o.color]) / 255)), o.material == "metal",
        )
        for o in scene.objects
    ]
    return Tracer(solids, lights), camera


def _rng(scene: Scene, seed: int) -> np.random.Generator:
    content = json.dumps([scene.to_dict(), seed], sort_keys=True)
    return np.random.default_rng(int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big"))


def _linear(srgb: np.ndarray) -> np.ndarray:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _developed(light: np.ndarray) -> np.ndarray:
    """Linear light to sRGB 0..1, highlights rolled off instead of cut."""
    knee = 0.8
    over = np.maximum(light - knee, 0)
    light = np.minimum(light, knee) + (1 - knee) * (1 - np.exp(-over / (1 - knee)))
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def _lights(rng: np.random.Generator) -> list[Light]:
    """Key from the right, fill from the left, back from behind, each moved a little."""
    plan = [
        ((6.5, -3.5, 8.5), 1.2, 0.72, (1.0, 0.98, 0.94)),
        ((-6.5, -5.5, 6.5), 1.8, 0.27, (0.94, 0.97, 1.0)),
        ((-2.0, 7.5, 7.0), 1.6, 0.26, (1.0, 1.0, 1.0)),
    ]
    lights = []
    for position, radius, power, color in plan:
        moved = np.array(position) + rng.uniform(-0.5, 0.5, 3)
        lights.append(Light(moved.astype(np.float32), radius, power, np.array(color, np.float32)))
    return lights


class _Camera:
    """Looks down on the layout from the front; zoomed so that all nine cells fit any format."""

    def __init__(self, width: int, height: int, rng: np.random.Generator):
        self.width, self.height = width, height
        elevation = np.radians(34 + 24 * np.clip(1.5 - width / height, 0, 0.5) + rng.uniform(-1, 1))
        turn = np.radians(rng.uniform(-2, 2))
        flat, rise = np.cos(elevation), np.sin(elevation)
        away = np.array([flat * np.sin(turn), -flat * np.cos(turn), rise])
        self.position = (DISTANCE * away).astype(np.float32)
        self.forward = -away
        self.right = unit(np.cross(self.forward, [0.0, 0.0, 1.0]))
        self.up = np.cross(self.right, self.forward)
        # The corners of the space that solids can take, on the screen at focal length 1.
        tall = 2 * RADIUS["large"]
        x, y = (s * (0.5 - 0.5 / GRID + JITTER) + RADIUS["large"] for s in (SPAN_X, SPAN_Y))
        corners = np.array(list(product((-x, x), (-y, y), (0, tall)))) - self.position
        depth = corners @ self.forward
        across, along = corners @ self.right / depth, corners @ self.up / depth
        self.middle = (along.max() + along.min()) / 2
        extent = max(np.abs(across).max() / width, (along.max() - along.min()) / 2 / height)
        self.pixel = 2 * extent / FILL

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """float (H*W,) each: columns and rows of the pixels' middles."""
        columns, rows = np.meshgrid(np.arange(self.width) + 0.5, np.arange(self.height) + 0.5)
        return columns.ravel(), rows.ravel()

    def rays(self, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """float32 (N, 3): directions through points of the picture, in pixels from its top left."""
        across = (columns - self.width / 2) * self.pixel
        along = (self.height / 2 - rows) * self.pixel + self.middle
        d = self.forward + across[:, None] * self.right + along[:, None] * self.up
        return unit(d).astype(np.float32)


def _edges(what: np.ndarray) -> np.ndarray:
    """bool (H, W): pixels beside one that shows something else."""
    edge = np.zeros(what.shape, bool)
    for axis in (0, 1):
        differs = np.diff(what, axis=axis) != 0
        pad = [(0, 0), (0, 0)]
        pad[axis] = (1, 0)
        edge |= np.pad(differs, pad)
        pad[axis] = (0, 1)
        edge |= np.pad(differs, pad)
    return edge.ravel()
