"""Light in a CLEVR scene: soft shadows, mirrors and the ground, for rays given as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpi_mlx.data.solids import Solid, blocks, dot, faces, first_hit, normals, unit

GROUND = np.array([0.36, 0.357, 0.352], np.float32)
SKY = np.array([0.27, 0.275, 0.28], np.float32)
AMBIENT = 0.24
SHADOW_RAYS = 32


@dataclass(frozen=True)
class Light:
    """A disc of ``radius`` at ``position``; ``power`` is the irradiance it gives at the layout's middle."""

    position: np.ndarray
    radius: float
    power: float
    color: np.ndarray

    def samples(self) -> np.ndarray:
        """float32 (SHADOW_RAYS, 3): points spread evenly over the disc (a sunflower's pattern)."""
        n = np.arange(SHADOW_RAYS) + 0.5
        r, a = np.sqrt(n / SHADOW_RAYS) * self.radius, n * np.pi * (3 - np.sqrt(5))
        axis = unit(self.position)
        side = unit(np.cross(axis, [0.0, 0.0, 1.0]))
        up = np.cross(side, axis)
        disc = np.cos(a)[:, None] * side + np.sin(a)[:, None] * up
        return (self.position + r[:, None] * disc).astype(np.float32)


class Tracer:
    """Colours of rays through one scene."""

    def __init__(self, solids: list[Solid], lights: list[Light]):
        self.solids, self.lights = solids, lights

    def trace(self, origin: np.ndarray, direction: np.ndarray, own: int = -2, depth: int = 0):
        """(linear RGB (N, 3), int (N,) that changes where a picture may have an edge).

        ``origin`` (3,) or (N, 3); the solid ``own`` is left out; ``depth`` counts mirrors on the way.
        """
        origin = np.atleast_2d(origin)
        what, nearest = self.nearest(origin, direction, own)
        color = self._sky(direction, depth)
        label = what.copy()
        for index in range(-1, len(self.solids)):
            rays = np.flatnonzero(what == index)
            if not len(rays):
                continue
            at = (origin[rays] if len(origin) > 1 else origin) + nearest[rays, None] * direction[rays]
            if index == -1:
                color[rays] = self._ground(at, color[rays])
            else:
                color[rays], label[rays] = self._solid(index, at, direction[rays], depth, label[rays])
        return color, label

    def nearest(self, origin: np.ndarray, direction: np.ndarray, own: int = -2):
        """(int (N,): a solid's index, -1 for the ground, -2 for the sky; float32 (N,): how far it is)."""
        n = len(direction)
        nearest = np.full(n, np.inf, np.float32)
        what = np.full(n, -2)
        down = direction[:, 2] < -1e-4
        nearest[down] = (-np.broadcast_to(origin, (n, 3))[:, 2][down] / direction[:, 2][down])
        what[down] = -1
        for index, solid in enumerate(self.solids):
            if index != own:
                t = first_hit(solid, origin, direction)
                closer = t < nearest
                nearest[closer], what[closer] = t[closer], index
        return what, nearest

    def _sky(self, direction: np.ndarray, depth: int) -> np.ndarray:
        """The surroundings; what mirrors see of them holds the lights as bright discs."""
        rise = np.clip(direction[:, 2:], 0, 1)
        color = SKY * (1 - 0.75 * rise)
        if depth:
            for light in self.lights:
                facing = direction @ unit(light.position)
                glow = np.clip((facing - 0.965) / 0.02, 0, 1)[:, None]
                color = color + glow * glow * light.color * (1.2 + 4 * light.power)
        return color.astype(np.float32)

    def _ground(self, at: np.ndarray, sky: np.ndarray) -> np.ndarray:
        up = np.broadcast_to(np.array([0, 0, 1], np.float32), at.shape)
        light, _ = self._light(at, up, None, -1)
        color = GROUND * (light + AMBIENT * self._openness(at, up, -1)[:, None])
        far = np.clip((dot(at[:, :2], at[:, :2]) - 30) / 500, 0, 1)[:, None]
        return color + (sky - color) * far

    def _solid(self, index: int, at: np.ndarray, direction: np.ndarray, depth: int, label: np.ndarray):
        solid = self.solids[index]
        n = normals(solid, at)
        label = label + 100 * faces(solid, at)
        facing = -dot(n, direction)
        mirror = direction + 2 * facing[:, None] * n
        base = np.array(solid.color, np.float32)
        diffuse, shine = self._light(at, n, mirror, index, power=220 if solid.metal else 18)
        diffuse = diffuse + AMBIENT * self._openness(at, n, index)[:, None]
        if not solid.metal:
            return base * diffuse * 1.05 + 0.07 * shine, label
        edge = (1 - np.clip(facing, 0, 1)[:, None]) ** 5
        tint = 0.05 + 0.95 * base / np.sqrt(base.max())  # dark metals still mirror enough to show their hue
        tint = tint + (1 - tint) * 0.6 * edge
        if depth:
            seen = self._sky(mirror, 1) * (mirror[:, 2:] > 0) + GROUND * 0.8 * (mirror[:, 2:] <= 0)
        else:
            seen, other = self.trace(at, mirror, index, depth + 1)
            label = label + 10_000 * (other % 10_000 + 3)
        return base * diffuse * 0.25 + tint * seen * 1.3 + 0.8 * shine, label

    def _light(self, at, n, mirror, own: int, power: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Light that falls on points (N, 3), and highlights towards the eye (N, 3)."""
        total, shine = np.zeros_like(at), np.zeros_like(at)
        for light in self.lights:
            to = light.position - at
            distance = np.sqrt(dot(to, to))
            to = to / distance[:, None]
            slope = dot(n, to)
            lit = np.flatnonzero(slope > 0)
            if not len(lit):
                continue
            seen = self._seen(light, at[lit], to[lit], distance[lit], own)
            strength = light.power * dot(light.position, light.position) / distance[lit] ** 2 * seen
            total[lit] += (slope[lit] * strength)[:, None] * light.color
            if mirror is not None:
                spot = np.clip(dot(mirror[lit], to[lit]), 0, 1) ** power
                shine[lit] += (spot * strength)[:, None] * light.color
        return 1.5 * total, shine

    def _seen(self, light: Light, at, to, distance, own: int) -> np.ndarray:
        """float32 (N,): the share of the light that the points see."""
        seen = np.ones(len(at), np.float32)
        samples = light.samples()
        forward = dot(at, to)
        for index, solid in enumerate(self.solids):
            if index == own:
                continue
            along = to @ solid.center - forward
            square = self._square(at, solid) - along * along  # distance of the solid's middle from the ray
            rays = np.flatnonzero((along > 0) & (square < (solid.bound + 0.5 * light.radius) ** 2))
            beside = np.sqrt(np.maximum(square[rays], 0))
            blur = light.radius * along[rays] / distance[rays]
            if solid.shape == "sphere":
                inside = np.clip((solid.radius - beside) / np.maximum(blur, 1e-3), -1, 1)
                seen[rays] *= 0.5 - 0.25 * inside * (3 - inside**2)
                continue
            seen[rays[beside + blur < 0.95 * solid.half]] = 0
            points = rays[(beside < solid.bound + blur) & (seen[rays] > 0)]
            toward = samples[None] - at[points, None]
            seen[points] *= 1 - blocks(solid, at[points, None], toward).mean(1, dtype=np.float32)
        return seen

    def _openness(self, at: np.ndarray, n: np.ndarray, own: int) -> np.ndarray:
        """float32 (N,): the share of the surroundings that the points see (solids taken as spheres)."""
        free = np.ones(len(at), np.float32)
        height = dot(n, at)
        for index, solid in enumerate(self.solids):
            if index != own:
                square = self._square(at, solid)
                cosine = np.clip((n @ solid.center - height) / np.sqrt(square), 0, 1)
                free *= 1 - np.clip(cosine * np.float32(solid.half**2) / square, 0, 1) * 0.85
        return free * (0.75 + 0.25 * n[:, 2]) if own >= 0 else free

    @staticmethod
    def _square(at: np.ndarray, solid: Solid) -> np.ndarray:
        """float32 (N,): squared distances of points from a solid's middle."""
        offset = solid.center - at
        return dot(offset, offset)
