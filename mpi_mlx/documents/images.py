"""Images by reference: a path, a PIL image, or an object that draws itself when it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from PIL import Image, UnidentifiedImageError

from mpi_mlx.errors import DataError

_BROKEN = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@runtime_checkable
class LazyImage(Protocol):
    """A picture that is drawn on demand; equal ``key``, equal pixels."""

    key: str

    def open(self) -> Image.Image: ...


ImageRef = str | Path | Image.Image | LazyImage


def open_image(image: ImageRef) -> Image.Image:
    """The picture in RGB. Raises DataError for a file that is missing or broken."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, (str, Path)):
        return image.open().convert("RGB")
    problem = check_image(Path(image), decode=True)
    if problem:
        raise DataError(f"{problem}; restore the file or drop the example")
    with Image.open(image) as opened:
        return opened.convert("RGB")


def check_image(path: Path, *, decode: bool = False) -> str | None:
    """What is wrong with an image file, or None. ``decode`` reads every pixel, not only the structure."""
    if not path.exists():
        return f"image {str(path)!r} does not exist"
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
            else:
                image.verify()
    except _BROKEN as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or "broken"
        return f"image {str(path)!r} cannot be read ({reason})"
    return None


def pixels(image: ImageRef) -> bytes:
    """Size and RGB pixels as bytes: what a hash of the image should cover."""
    opened = open_image(image)
    return f"{opened.width} {opened.height} ".encode() + opened.tobytes()
