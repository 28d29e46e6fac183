"""The images of a request: data URIs, and what the server's owner allowed beside them."""

from __future__ import annotations

import base64
import binascii
import io
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlparse

from PIL import Image

from mpi_mlx.documents.images import as_seen
from mpi_mlx.errors import ServingError
from mpi_mlx.serving.limits import Limits, Refused
from mpi_mlx.serving.remote import Unfetched

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class Pictures:
    """Loads the images of one request, which share its bounds.

    Args:
        hold: told the pixels of all images so far, before the last of them is decoded; may raise.

    Attributes:
        pixels: of all that were loaded.
    """

    def __init__(self, limits: Limits, hold: Callable[[int], None] = lambda pixels: None):
        self.limits, self._hold = limits, hold
        self.pixels = self._count = 0
        self._until: float | None = None  # for what is fetched

    def load(self, url: str, where: str) -> Image.Image:
        """The picture behind a URL, as it is seen. Raises Refused, naming ``where`` it stands in the request."""
        self._count += 1
        if self._count > self.limits.images:
            raise Refused(f"{where}: at most {self.limits.images} images", param=where)
        with self._open(url, where) as content:
            return self._decode(content, where)

    def _open(self, url: str, where: str) -> BinaryIO:
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            return io.BytesIO(_data(url, where))
        if scheme == "file" and self.limits.image_folder is not None:
            return _allowed_file(url, self.limits.image_folder, where)
        if scheme in ("http", "https") and self.limits.remote_images is not None:
            if self._until is None:
                self._until = time.monotonic() + self.limits.remote_images.seconds
            try:
                return io.BytesIO(self.limits.remote_images.fetch(url, self._until))
            except Unfetched as error:
                raise Refused(f"{where}: {error}", param=where) from None
        raise Refused(f"{where}: images come as data URIs{self._also()}", param=where)

    def _also(self) -> str:
        more = ["from the allowed folder"] * (self.limits.image_folder is not None)
        more += ["from the allowed hosts"] * (self.limits.remote_images is not None)
        return ", or " + " or ".join(more) if more else " only"

    def _decode(self, content: BinaryIO, where: str) -> Image.Image:
        try:
            with Image.open(content, formats=FORMATS) as opened:
                size, pixels = f"{opened.width} x {opened.height} pixels", opened.width * opened.height
                if pixels > self.limits.image_pixels:
                    raise Refused(f"{where}: {size}; at most {self.limits.image_pixels:,}", param=where)
                self.pixels += pixels
                if self.pixels > self.limits.request_pixels:
                    most = f"{self.limits.request_pixels:,}"
                    raise Refused(f"{where}: all images together have at most {most} pixels", param=where)
                self._hold(self.pixels)
                return as_seen(opened)
        except ServingError:
            raise
        except Exception:  # decoders fail in many ways
            raise Refused(f"{where}: not a picture ({', '.join(FORMATS)})", param=where) from None


def _data(url: str, where: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise Refused(f"{where}: a data URI is data:image/png;base64,...", param=where)
    try:
        return base64.b64decode("".join(data.split()), validate=True)  # lines of 76 letters, as MIME has them
    except (binascii.Error, ValueError):
        raise Refused(f"{where}: the data URI is not base64", param=where) from None


def _allowed_file(url: str, folder: Path, where: str) -> BinaryIO:
    """The file of a ``file://`` URL, opened, where it lies below ``folder``.

    Links are followed first. The path they lead to is then opened from the folder downwards, following none:
    a link that is put in place in between leads nowhere.
    """
    try:
        parts = urlparse(url)
        if parts.netloc not in ("", "localhost"):
            raise ValueError("another machine's file")
        root = folder.resolve(strict=True)
        steps = Path(unquote(parts.path)).resolve(strict=True).relative_to(root).parts
        return os.fdopen(_open_below(root, steps), "rb")
    except (OSError, ValueError, RuntimeError):
        raise Refused(f"{where}: no such picture in the allowed folder", param=where) from None


def _open_below(root: Path, steps: tuple[str, ...]) -> int:
    if os.open not in os.supports_dir_fd or not steps:  # the folder itself is no picture
        raise OSError("cannot be opened safely")
    quiet = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe must not wait for a writer
    place = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for step in steps:
        try:
            below = os.open(step, quiet, dir_fd=place)
        finally:
            os.close(place)
        place = below
    if not stat.S_ISREG(os.fstat(place).st_mode):
        os.close(place)
        raise OSError("not a file")
    return place
