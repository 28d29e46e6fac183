"""What one request may ask for, and how it is told that it may not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpi_mlx.errors import ServingError
from mpi_mlx.serving.remote import RemoteImages


class Refused(ServingError):
    """A request that is answered with a 4xx."""

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclass(frozen=True)
class Limits:
    """Bounds on one request, and on all that are being prepared.

    Attributes:
        body_bytes, body_seconds: of a request's body, and how long it may take to come.
        images, image_pixels, request_pixels: how many images, pixels of one, pixels of all in a request.
        messages, tokens: of a conversation, and of an answer.
        held_bytes: bodies and decoded images of all requests that wait, together.
        image_folder: where file:// images may lie; None: nowhere.
        remote_images: whose https:// and http:// images may be fetched; None: nobody's.
    """

    body_bytes: int = 32 << 20
    body_seconds: float = 60.0
    images: int = 16
    image_pixels: int = 16 << 20
    request_pixels: int = 32 << 20
    messages: int = 1024
    tokens: int = 8192
    held_bytes: int = 1 << 30
    image_folder: Path | None = None
    remote_images: RemoteImages | None = None
