"""CLEVR-like scenes: objects with size, colour, material and shape on a jittered 3x3 layout.

Attribute names and values are those of CLEVR v1.0 (Johnson et al., 2017). A scene lists its objects in
reading order (row, then column), which is also the order of the reasoning trace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

SIZES = ("small", "large")
COLORS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
MATERIALS = ("metal", "rubber")
SHAPES = ("cube", "sphere", "cylinder")
# In the order in which English (and CLEVR) says them: "small red metal cube".
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": SIZES, "color": COLORS, "material": MATERIALS, "shape": SHAPES,
}
GRID = 3
CELL_NAMES = (
    "northwest", "north", "northeast",
    "west", "center", "east",
    "southwest", "south", "southeast",
)
JITTER = 0.035  # of the side: at most 3 of 84 pixels, so that an object stays in its cell
MARGIN = 0.15  # "left of" needs this much: between the largest jitter difference and the next column
MAX_CELLS = GRID * GRID


@dataclass(frozen=True)
class SceneObject:
    """One object. ``x`` grows to the right, ``y`` to the front (bottom); both lie in 0..1."""

    size: str
    color: str
    material: str
    shape: str
    x: float
    y: float

    @property
    def cell(self) -> int:
        """Index 0..8 of the 3x3 cell that holds the object, in reading order."""
        column = min(GRID - 1, int(self.x * GRID))
        row = min(GRID - 1, int(self.y * GRID))
        return row * GRID + column

    def describe(self) -> str:
        """``small red metal cube``."""
        return f"{self.size} {self.color} {self.material} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects in reading order."""

    objects: tuple[SceneObject, ...]

    @cached_property
    def key(self) -> str:
        """Hash of what the scene shows (cells and attributes, not the jitter): equal keys, same scene."""
        content = [(o.cell, o.size, o.color, o.material, o.shape) for o in self.objects]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def to_dict(self) -> dict:
        return {"objects": [asdict(o) for o in self.objects]}

    @classmethod
    def from_dict(cls, raw: dict) -> Scene:
        return cls(in_reading_order(SceneObject(**o) for o in raw["objects"]))

    def describe(self) -> str:
        """The scene in reading order: ``north small red metal cube, east ...``."""
        return ", ".join(f"{CELL_NAMES[o.cell]} {o.describe()}" for o in self.objects)


def scene_of(meta: dict) -> Scene | None:
    """The scene that the benchmark wrote into an example's ``meta``; None where ``scene`` is the user's own."""
    raw = meta.get("scene")
    objects = raw.get("objects") if isinstance(raw, dict) and len(raw) == 1 else None
    if not isinstance(objects, list) or not objects or not all(_is_object(o) for o in objects):
        return None
    return Scene.from_dict(raw)


def _is_object(raw) -> bool:
    if not isinstance(raw, dict) or set(raw) != {*ATTRIBUTES, "x", "y"}:
        return False
    placed = all(type(raw[axis]) in (int, float) and 0 <= raw[axis] <= 1 for axis in ("x", "y"))
    return placed and all(raw[name] in values for name, values in ATTRIBUTES.items())


def in_reading_order(objects: Iterable[SceneObject]) -> tuple[SceneObject, ...]:
    return tuple(sorted(objects, key=lambda o: (o.cell, o.y, o.x)))


@dataclass(frozen=True)
class SceneArrays:
    """N scenes as arrays, so that a condition is evaluated on all of them at once.

    ``attributes``: int8 (N, M, 4), an index into each of ATTRIBUTES' values, -1 where there is no object.
    ``xy``: float32 (N, M, 2).
    """

    attributes: np.ndarray
    xy: np.ndarray

    def __len__(self) -> int:
        return len(self.attributes)

    @property
    def present(self) -> np.ndarray:
        """bool (N, M)."""
        return self.attributes[:, :, 0] >= 0

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> SceneArrays:
        width = max((len(s.objects) for s in scenes), default=1) or 1
        attributes = np.full((len(scenes), width, 4), -1, np.int8)
        xy = np.zeros((len(scenes), width, 2), np.float32)
        for n, scene in enumerate(scenes):
            for m, o in enumerate(scene.objects):
                attributes[n, m] = [values.index(getattr(o, name)) for name, values in ATTRIBUTES.items()]
                xy[n, m] = o.x, o.y
        return cls(attributes, xy)

    def scene(self, index: int) -> Scene:
        objects = []
        for m in np.flatnonzero(self.present[index]):
            values = {
                name: ATTRIBUTES[name][self.attributes[index, m, a]] for a, name in enumerate(ATTRIBUTES)
            }
            x, y = (round(float(v), 4) for v in self.xy[index, m])
            objects.append(SceneObject(**values, x=x, y=y))
        return Scene(in_reading_order(objects))


def random_scenes(
    rng: np.random.Generator, count: int, *, min_objects: int = 2, max_objects: int = 5
) -> SceneArrays:
    """``count`` scenes of distinct cells and uniform attributes, as arrays of M = ``max_objects``."""
    if not 1 <= min_objects <= max_objects <= MAX_CELLS:
        raise ValueError(f"need 1 <= min_objects <= max_objects <= {MAX_CELLS}")
    cells = np.argsort(rng.random((count, MAX_CELLS)), axis=1)[:, :max_objects]
    number = rng.integers(min_objects, max_objects + 1, count)
    # Reading order: absent objects are moved behind the present ones before the cells are sorted.
    absent = np.arange(max_objects)[None, :] >= number[:, None]
    cells = np.sort(np.where(absent, MAX_CELLS, cells), axis=1)
    absent = cells == MAX_CELLS
    sizes = [len(v) for v in ATTRIBUTES.values()]
    attributes = np.stack([rng.integers(0, n, (count, max_objects)) for n in sizes], -1).astype(np.int8)
    attributes[absent] = -1
    jitter = rng.uniform(-JITTER, JITTER, (count, max_objects, 2))
    centre = np.stack([cells % GRID, np.minimum(cells, MAX_CELLS - 1) // GRID], -1)
    xy = ((centre + 0.5) / GRID + jitter).astype(np.float32)
    xy[absent] = 0
    return SceneArrays(attributes, xy)
