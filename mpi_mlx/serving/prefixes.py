"""Keys and values of earlier requests, for those that begin alike."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mpi_mlx.serving.decoding import PromptCache, same_cache, shared_length, trim


class PrefixCache:
    """The least recently used prefixes are forgotten beyond ``limit_bytes``.

    A prefix belongs to a label (an adapter): other weights give other keys and values.
    """

    def __init__(self, limit_bytes: int, most: int = 256):
        self.limit_bytes, self.most = limit_bytes, most
        self.used_bytes = 0
        self._entries: list[tuple[str, np.ndarray, list[PromptCache], int]] = []  # oldest first

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forgets all."""
        self._entries, self.used_bytes = [], 0

    def fetch(self, label: str, codes: np.ndarray) -> tuple[list[PromptCache] | None, int]:
        """Caches of the longest known beginning of ``codes`` (T,), and its length; (None, 0): nothing known.

        The caches may be written to: arrays are copied by MLX when they are.
        """
        best, length = -1, 0
        for index, (name, kept, _, _) in enumerate(self._entries):
            common = shared_length(kept, codes) if name == label else 0
            if common > length:
                best, length = index, common
        if best < 0:
            return None, 0
        entry = self._entries.pop(best)
        self._entries.append(entry)
        caches = [same_cache(cache) for cache in entry[2]]
        trim(caches, length)
        return caches, length

    def put(self, label: str, codes: np.ndarray, caches: Sequence[PromptCache]) -> None:
        """Keeps ``caches`` of exactly ``codes``; what they begin with is dropped."""
        caches = [_tight(cache) for cache in caches]
        mx.eval([cache.keys for cache in caches], [cache.values for cache in caches])
        size = sum(cache.nbytes for cache in caches)
        if size > self.limit_bytes:
            return
        stays = []
        for entry in self._entries:
            name, kept, _, used = entry
            if name == label and len(kept) <= len(codes) and np.array_equal(kept, codes[: len(kept)]):
                self.used_bytes -= used
            else:
                stays.append(entry)
        self._entries = [*stays, (label, codes, caches, size)]
        self.used_bytes += size
        while self.used_bytes > self.limit_bytes or len(self._entries) > self.most:
            self.used_bytes -= self._entries.pop(0)[3]


def _tight(cache: PromptCache) -> PromptCache:
    """Its keys and values, without the room for more where that is much."""
    kept, length = same_cache(cache), cache.offset
    if cache.keys.shape[2] > 1.1 * length:
        kept.keys, kept.values = (mx.contiguous(x[..., :length, :]) for x in (cache.keys, cache.values))
    return kept
