"""Outlined, textured shapes that a tiny vision tower can tell apart at 84 to 112 pixels.

One object fills one cell of the 3x3 layout. Shapes: a square for a cube, a disc for a sphere, a narrow
upright drum for a cylinder. Rubber is plain; metal carries bright diagonal bands.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from mpi_mlx.data.scenes import Scene, SceneObject

BACKGROUND = (244, 244, 240)
OUTLINE = (20, 20, 24)
FILL = {
    "gray": (128, 128, 128), "red": (214, 40, 40), "blue": (40, 80, 220), "green": (30, 150, 50),
    "brown": (130, 80, 30), "purple": (140, 50, 190), "cyan": (40, 200, 210), "yellow": (245, 215, 40),
}
SUPERSAMPLE = 4
CELL_PIXELS = 28  # at a picture of 84 pixels
HALF_WIDTH = {"small": 6.0, "large": 11.0}


@lru_cache(maxsize=512)
def _sprite(size: str, color: str, material: str, shape: str, side: int) -> np.ndarray:
    """uint8 (side, side, 4): one object centred in a transparent square of ``side`` pixels."""
    big = side * SUPERSAMPLE
    unit = big / CELL_PIXELS
    half = HALF_WIDTH[size] * unit
    centre = big / 2
    box = [centre - half, centre - half, centre + half, centre + half]
    mask = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(mask)
    if shape == "cube":
        draw.rectangle(box, fill=255)
    elif shape == "sphere":
        draw.ellipse(box, fill=255)
    else:
        narrow = 0.62 * half
        draw.rounded_rectangle(
            [centre - narrow, centre - half, centre + narrow, centre + half], radius=0.55 * narrow, fill=255
        )
    inside = np.asarray(mask) > 0
    pixels = np.zeros((big, big, 4), np.float32)
    pixels[inside] = (*FILL[color], 255)
    if material == "metal":
        rows, columns = np.mgrid[:big, :big]
        bands = ((rows + columns) / unit) % 5.0 < 2.0
        bright = 0.35 * np.array(FILL[color], np.float32) + 0.65 * 255
        pixels[inside & bands, :3] = bright
    edge = inside & ~_eroded(inside, max(1, round(1.3 * unit)))
    pixels[edge, :3] = OUTLINE
    # Premultiplied averaging keeps the outline's colour where it meets the transparent background.
    alpha = pixels[..., 3:] / 255
    blocks = np.concatenate([pixels[..., :3] * alpha, alpha * 255], -1)
    blocks = blocks.reshape(side, SUPERSAMPLE, side, SUPERSAMPLE, 4).mean((1, 3))
    return blocks


def _eroded(inside: np.ndarray, width: int) -> np.ndarray:
    out = inside.copy()
    for _ in range(width):
        padded = np.pad(out, 1)
        out = out & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return out


def _paste(canvas: np.ndarray, o: SceneObject) -> None:
    pixels = canvas.shape[0]
    side = round(CELL_PIXELS * pixels / 84)
    sprite = _sprite(o.size, o.color, o.material, o.shape, side)
    left = int(np.clip(round(o.x * pixels - side / 2), 0, pixels - side))
    top = int(np.clip(round(o.y * pixels - side / 2), 0, pixels - side))
    patch = canvas[top : top + side, left : left + side]
    patch *= 1 - sprite[..., 3:] / 255
    patch += sprite[..., :3]


def render_flat_array(scene: Scene, size: int = 84) -> np.ndarray:
    """uint8 (size, size, 3)."""
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = BACKGROUND
    for o in scene.objects:
        _paste(canvas, o)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def render_flat(scene: Scene, size: int = 84) -> Image.Image:
    """The scene as an RGB picture of ``size`` x ``size`` pixels."""
    return Image.fromarray(render_flat_array(scene, size))


