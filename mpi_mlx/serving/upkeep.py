"""What keeps a server from growing that runs for long."""

from __future__ import annotations

import ctypes
import sys
import time

import mlx.core as mx

EVERY = 1.0  # seconds of work between two releases, which take some milliseconds
TEXTS = 2 << 20  # bytes of remembered tokens: a server seldom sees a text twice, but in the prefix cache
IMAGES = 16 << 20  # of images before the tower: their features are kept
FEATURES = 128 << 20
BUFFERS = 1 << 30  # of freed buffers that MLX keeps on a GPU: batches of every size leave some of every size


class Upkeep:
    """Bounds a model's caches, and gives freed memory back from time to time.

    The arrays of a batch come and go in sizes that hardly ever fit the holes of earlier ones, so glibc's heap
    grows far beyond what is in use, and stays so.
    """

    def __init__(self, model):
        model.bound_caches(texts=TEXTS, images=IMAGES, features=FEATURES)
        if mx.default_device() == mx.gpu:
            mx.set_cache_limit(BUFFERS)
        self._trim = _malloc_trim()
        self._last = time.monotonic()
        self.due = False  # whether anything was done since the last release

    def worked(self) -> None:
        """To be called as often as may be: releases every few seconds."""
        self.due = True
        if time.monotonic() - self._last > EVERY:
            self.release()

    def release(self) -> None:
        """Gives what the heap does not use back to the system, where the C library is glibc."""
        if self._trim is not None:
            self._trim(0)
        self._last, self.due = time.monotonic(), False


def _malloc_trim():
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
