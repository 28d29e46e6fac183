"""Images on their way into a model: identified by content, processed once."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from PIL import Image

from mpi_mlx.documents.images import BROKEN, as_seen, why_broken
from mpi_mlx.errors import DataError


@runtime_checkable
class Drawn(Protocol):
    """A picture made on demand: ``key`` says what it shows, ``open()`` draws it."""

    key: str

    def open(self) -> Image.Image: ...


ImageSource = str | os.PathLike | Image.Image | Drawn
Value = TypeVar("Value")


class ByteLRU(Generic[Value]):
    """A mapping that forgets the least recently used values beyond ``limit_bytes``.

    >>> lru = ByteLRU(10); lru.put("a", 1, 6); lru.put("b", 2, 6); lru.get("a") is None, lru.get("b")
    (True, 2)
    """

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._items: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        item = self._items.get(key)
        if item is None:
            return None
        self._items.move_to_end(key)
        return item[0]

    def put(self, key: Hashable, value: Value, size: int) -> None:
        if key in self._items:
            self.used_bytes -= self._items.pop(key)[1]
        self._items[key] = (value, size)
        self.used_bytes += size
        while self.used_bytes > self.limit_bytes and len(self._items) > 1:
            self.used_bytes -= self._items.popitem(last=False)[1][1]

    def clear(self) -> None:
        self._items.clear()
        self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._items)


@dataclass(frozen=True)
class Processed:
    """What an image processor made of one image.

    ``pixel_values`` float32, laid out as the vision tower takes it; ``grid`` is ``(t, h, w)`` in patches for
    towers that need it; ``num_tokens`` placeholders in the text; ``extra`` is for the family that made it.
    """

    pixel_values: np.ndarray
    grid: tuple[int, int, int] | None
    num_tokens: int
    extra: Any = None


@dataclass(frozen=True, eq=False)
class ImageInput:
    """One image as a model takes it. Pixels are made on demand, so keeping many of these is cheap."""

    key: str
    grid: tuple[int, int, int] | None
    num_tokens: int
    extra: Any = None
    _source: Any = field(default=None, repr=False)
    _store: Any = field(default=None, repr=False)

    @property
    def pixel_values(self) -> np.ndarray:
        """float32, as the vision tower takes it (Qwen: (patches, channels * time * height * width))."""
        return self._store.pixels(self)


def load_image(source: ImageSource) -> Image.Image:
    """An image source as RGB, as viewers show it (see ``as_seen``).

    Raises:
        DataError: it is missing or broken.
    """
    if isinstance(source, Drawn):
        source = source.open()
    if isinstance(source, Image.Image):
        return as_seen(source)
    try:
        with Image.open(source) as opened:
            return as_seen(opened)
    except FileNotFoundError:
        raise DataError(f"image {source} does not exist; check the path in the example") from None
    except BROKEN as error:
        raise DataError(f"image {source} cannot be read ({why_broken(error, source)}); replace the file") from None


class ImageStore:
    """Turns image sources into :class:`ImageInput`; equal content is processed once.

    Args:
        process: the family's processing of one RGB image.
        signature: what else decides the pixels (processor settings), part of every key.
        limit_bytes: bound on kept pixel arrays; evicted ones are made again from the source.
        limit_sources: bound on kept inputs and the in-memory images that they hold.
    """

    def __init__(
        self,
        process: Callable[[Image.Image], Processed],
        signature: str = "",
        limit_bytes: int = 256 << 20,
        limit_sources: int = 128 << 20,
    ):
        self._process = process
        self._signature = signature.encode()
        self._pixels: ByteLRU[np.ndarray] = ByteLRU(limit_bytes)
        self._inputs: ByteLRU[ImageInput] = ByteLRU(limit_sources)
        self._paths: dict[tuple, str] = {}

    def get(self, source: ImageSource) -> ImageInput:
        """The input for a path or PIL image. Raises DataError when it cannot be read or processed."""
        key = self._key(source)
        known = self._inputs.get(key)
        if known is not None:
            return known
        made = self._run(source)
        image = ImageInput(key, made.grid, made.num_tokens, made.extra, source, self)
        held = source.width * source.height * 3 if isinstance(source, Image.Image) else 0
        self._inputs.put(key, image, 1024 + held)
        self._pixels.put(key, made.pixel_values, made.pixel_values.nbytes)
        return image

    def pixels(self, image: ImageInput) -> np.ndarray:
        kept = self._pixels.get(image.key)
        if kept is None:
            kept = self._run(image._source).pixel_values
            self._pixels.put(image.key, kept, kept.nbytes)
        return kept

    def bound(self, limit: int) -> None:
        """Keeps ``limit`` bytes of pixel arrays at most, and as many of in-memory images."""
        self._pixels.limit_bytes = self._inputs.limit_bytes = limit

    def _run(self, source: ImageSource) -> Processed:
        picture = load_image(source)
        try:
            return self._process(picture)
        except ValueError as error:
            name = source if isinstance(source, (str, os.PathLike)) else "an in-memory image"
            raise DataError(f"image {name} ({picture.width}x{picture.height}): {error}") from None

    def _key(self, source: ImageSource) -> str:
        if isinstance(source, Drawn):
            return self._digest(b"drawn", source.key.encode())
        if isinstance(source, Image.Image):  # as it is seen: a palette's indices alone say little
            source = load_image(source)
            return self._digest(f"{source.mode}{source.size}".encode(), source.tobytes())
        try:
            stat = os.stat(source)
        except (OSError, ValueError):  # ValueError: a name that no file can have
            name = os.fspath(source)[:160]
            raise DataError(f"image {name} does not exist; check the path in the example") from None
        known = (os.fspath(source), stat.st_mtime_ns, stat.st_size)
        if known not in self._paths:
            try:
                self._paths[known] = self._digest(b"file", Path(source).read_bytes())
            except OSError as error:
                raise DataError(f"image {source} cannot be read ({error.strerror})") from None
        return self._paths[known]

    def _digest(self, *parts: bytes) -> str:
        digest = hashlib.sha256(self._signature)
        for part in parts:
            digest.update(part)
        return digest.hexdigest()[:32]
