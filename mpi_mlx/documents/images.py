"""Images by reference: a path, a PIL image, or an object that draws itself when it is needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mpi_mlx.errors import DataError

BROKEN = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
SHOWN = 160  # characters of a path that a message shows


@runtime_checkable
class LazyImage(Protocol):
    """A picture that is drawn on demand; equal ``key``, equal pixels."""

    key: str

    def open(self) -> Image.Image: ...


ImageRef = str | os.PathLike | Image.Image | LazyImage


def open_image(image: ImageRef) -> Image.Image:
    """The picture as :func:`as_seen`. Raises DataError for a file that is missing or broken."""
    if isinstance(image, Image.Image):
        return as_seen(image)
    if not isinstance(image, (str, os.PathLike)):
        return as_seen(image.open())
    path = Path(image)
    problem = _missing(path)
    if problem is None:
        try:
            with Image.open(path) as opened:
                return as_seen(opened)
        except BROKEN as error:
            problem = f"image {_shown(path)} cannot be read ({why_broken(error, path)})"
    raise DataError(f"{problem}; restore the file or drop the example")


def as_seen(image: Image.Image) -> Image.Image:
    """The picture in RGB as viewers show it: upright by its EXIF orientation, transparency on white.

    Of 16 bits a channel the upper 8 are kept. One in memory that is so already is returned itself.
    """
    image.load()
    if _turned(image):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode in _ALPHA or "transparency" in image.info:
        if image.mode == "La":  # Pillow converts it to nothing else
            image = image.convert("LA")
        shown = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
    in_memory = type(image) is Image.Image  # what a file is behind closes with it
    return image if image.mode == "RGB" and in_memory else image.convert("RGB")


def _turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # what is no EXIF block says nothing on the pixels, and fails in many ways
        return False


def _eight_bits(image: Image.Image) -> Image.Image:
    """``I`` and ``I;16`` as ``L``; Pillow itself would clip them at 255."""
    values = np.asarray(image).astype(np.int64)
    if image.mode != "I" or values.max(initial=0) > 255:  # "I" may hold 8 bits, too
        values >>= 8
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def check_image(path: Path, *, decode: bool = False) -> str | None:
    """What is wrong with an image file, or None. ``decode`` reads every pixel, not only the structure."""
    problem = _missing(path)
    if problem is not None:
        return problem
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
            else:
                image.verify()
    except BROKEN as error:
        return f"image {_shown(path)} cannot be read ({why_broken(error, path)})"
    return None


def _missing(path: Path) -> str | None:
    try:
        if path.exists():
            return None
    except (OSError, ValueError) as error:  # a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        return f"image {_shown(path)} is no path ({reason}); if it is base64, save it as a file and give its path"
    return f"image {_shown(path)} does not exist"


def why_broken(error: Exception, source: object = None) -> str:
    """What one of BROKEN, raised while a picture was read from `source`, says of it."""
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels: scale it down"
    if isinstance(error, UnidentifiedImageError):
        if str(source).lower().endswith((".heic", ".heif")):
            return "HEIC, as phones write it, is not read: save it as JPEG or PNG"
        return "not an image"
    return getattr(error, "strerror", None) or str(error) or "broken"


def _shown(path: Path) -> str:
    name = str(path)
    return repr(name) if len(name) <= SHOWN else f"{name[:SHOWN]!r}... ({len(name):,} characters)"


def pixels(image: ImageRef) -> bytes:
    """Size and RGB pixels as bytes: what a hash of the image should cover."""
    opened = open_image(image)
    return f"{opened.width} {opened.height} ".encode() + opened.tobytes()
