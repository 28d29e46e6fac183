"""Rays against the solids of a CLEVR scene: spheres, and cubes and cylinders with rounded edges.

All solids are convex and stand on the plane z = 0, so none shadows or mirrors itself. Points and directions
are float32 (N, 3); directions have unit length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BEVEL = 0.09  # radius of rounded edges, as a share of the solid's radius
MARCH_STEPS = 12


@dataclass(frozen=True)
class Solid:
    """``radius`` is CLEVR's: of sphere and cylinder, and half the diagonal of a cube's footprint."""

    shape: str  # sphere, cube or cylinder
    x: float
    y: float
    radius: float
    angle: float  # about the vertical, radians
    color: tuple[float, float, float]  # linear RGB
    metal: bool

    @property
    def half(self) -> float:
        """Half the height."""
        return self.radius / np.sqrt(2) if self.shape == "cube" else self.radius

    @property
    def center(self) -> np.ndarray:
        return np.array([self.x, self.y, self.half], np.float32)

    @property
    def bound(self) -> float:
        """Radius of the sphere around ``center`` that holds the solid."""
        return self.half * {"sphere": 1.0, "cube": np.sqrt(3), "cylinder": np.sqrt(2)}[self.shape]


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("...i,...i->...", a, b)


def unit(a: np.ndarray) -> np.ndarray:
    return a / np.sqrt(dot(a, a))[..., None]


def first_hit(solid: Solid, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """float32 (N,): distance along each ray to the solid, infinite where it misses."""
    distance = np.full(len(direction), np.inf, np.float32)
    offset = origin - solid.center
    b = dot(offset, direction)
    square = b * b - dot(offset, offset) + np.float32(solid.bound**2)
    rays = np.flatnonzero((square > 0) & (b < 0))
    if solid.shape == "sphere":
        distance[rays] = -b[rays] - np.sqrt(square[rays])
        return distance
    o, d = _turned(solid, offset[rays] if len(offset) > 1 else offset), _turned(solid, direction[rays])
    enter, leave = _span(solid, o, d)
    inside = np.flatnonzero((enter < leave) & (leave > 0))
    rays, t = rays[inside], np.maximum(enter[inside], 0)
    o, d = (o[inside] if len(o) > 1 else o), d[inside]
    for _ in range(MARCH_STEPS):  # from the sharp solid's surface to the rounded one's
        gap = _gap(solid, o + t[:, None] * d)
        t = t + gap
    hit = gap < 0.004 * solid.radius
    distance[rays[hit]] = t[hit]
    return distance


def normals(solid: Solid, points: np.ndarray) -> np.ndarray:
    """float32 (N, 3): outward normals at points on the surface."""
    p = points - solid.center
    if solid.shape == "sphere":
        return unit(p)
    p = _turned(solid, p)
    core = solid.half - BEVEL * solid.radius
    if solid.shape == "cube":
        n = np.sign(p) * np.maximum(np.abs(p) - core, 1e-6)
    else:
        across = np.sqrt(p[:, 0] ** 2 + p[:, 1] ** 2)
        outward = np.maximum(across - (solid.radius - BEVEL * solid.radius), 0) / np.maximum(across, 1e-6)
        upward = np.sign(p[:, 2]) * np.maximum(np.abs(p[:, 2]) - core, 1e-6)
        n = np.stack([p[:, 0] * outward, p[:, 1] * outward, upward], -1)
    return unit(_turned(solid, n, back=True))


def faces(solid: Solid, points: np.ndarray) -> np.ndarray:
    """int (N,): which face of the solid points on its surface belong to; odd on its rounded edges."""
    if solid.shape == "sphere":
        return np.zeros(len(points), int)
    p = _turned(solid, points - solid.center)
    if solid.shape == "cylinder":
        p = np.stack([np.sqrt(p[:, 0] ** 2 + p[:, 1] ** 2), p[:, 2]], -1)
    away = np.abs(p) - np.array([solid.radius, solid.half] if solid.shape == "cylinder" else [solid.half] * 3)
    face = away.argmax(-1)
    edge = (away > -BEVEL * solid.radius).sum(-1) > 1
    return 4 * face + 2 * (np.take_along_axis(p, face[:, None], 1)[:, 0] > 0) + edge


def blocks(solid: Solid, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """bool (...): whether the solid (its edges sharp) lies on the rays."""
    o, d = _turned(solid, origin - solid.center), _turned(solid, direction)
    enter, leave = _span(solid, o, d)
    return (enter < leave) & (leave > 0)


def _turned(solid: Solid, v: np.ndarray, back: bool = False) -> np.ndarray:
    """Vectors in the solid's own axes (or back from them)."""
    if solid.shape == "cylinder":
        return v
    c, s = np.float32(np.cos(solid.angle)), np.float32(np.sin(solid.angle) * (-1 if back else 1))
    return np.stack([c * v[..., 0] + s * v[..., 1], c * v[..., 1] - s * v[..., 0], v[..., 2]], -1)


def _span(solid: Solid, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays enter and leave the sharp-edged cube or cylinder around the origin."""
    d = np.where(np.abs(d) < 1e-7, np.float32(1e-7), d)
    half = np.float32(solid.half)
    if solid.shape == "cube":
        middle, reach = -o / d, half / np.abs(d)
        enter, leave = middle - reach, middle + reach  # of the three slabs
        return (
            np.maximum(np.maximum(enter[..., 0], enter[..., 1]), enter[..., 2]),
            np.minimum(np.minimum(leave[..., 0], leave[..., 1]), leave[..., 2]),
        )
    low, high = (-half - o[..., 2]) / d[..., 2], (half - o[..., 2]) / d[..., 2]
    a = d[..., 0] ** 2 + d[..., 1] ** 2
    b = o[..., 0] * d[..., 0] + o[..., 1] * d[..., 1]
    square = b * b - a * (o[..., 0] ** 2 + o[..., 1] ** 2 - np.float32(solid.radius**2))
    root = np.sqrt(np.maximum(square, 0))
    enter = np.maximum(np.minimum(low, high), (-b - root) / a)
    leave = np.minimum(np.maximum(low, high), (-b + root) / a)
    return enter, np.where(square > 0, leave, np.float32(-1))


def _gap(solid: Solid, p: np.ndarray) -> np.ndarray:
    """Signed distance to the rounded cube or cylinder around the origin (Inigo Quilez's formulas)."""
    bevel = np.float32(BEVEL * solid.radius)
    if solid.shape == "cube":
        q = np.abs(p) - (np.float32(solid.half) - bevel)
    else:
        across = np.sqrt(p[:, 0] ** 2 + p[:, 1] ** 2) - (np.float32(solid.radius) - bevel)
        q = np.stack([across, np.abs(p[:, 2]) - (np.float32(solid.half) - bevel)], -1)
    outside = np.maximum(q, 0)
    return np.sqrt(dot(outside, outside)) + np.minimum(q.max(-1), 0) - bevel
