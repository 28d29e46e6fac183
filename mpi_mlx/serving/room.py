"""How many bytes of keys and values the answers that are being written may come to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mpi_mlx import runtime
from mpi_mlx.serving.decoding import PromptCache
from mpi_mlx.serving.jobs import Row


class Room:
    """Rows are counted as long as they may become, so that none has to be given up.

    Args:
        limit_bytes: of all rows together; None: half of what the device has free now. A row that is alone is
            always taken. Rows are padded to the longest of their batch, at most to twice their length: the other
            half of the memory is for that, for activations and for the prefix cache.
    """

    def __init__(self, limit_bytes: int | None = None):
        if limit_bytes is None:
            free = runtime.free_memory()
            limit_bytes = None if free is None else free // 2
        self.limit_bytes = limit_bytes
        self.token_bytes = 0  # of a token's keys and values; known after the first prompt

    def measure(self, caches: Sequence[PromptCache]) -> None:
        """Learns from a prompt's keys and values what a token takes."""
        self.token_bytes = sum(cache.nbytes // cache.keys.shape[2] for cache in caches)

    def has(self, rows: Iterable[Row], tokens: int) -> bool:
        """Whether a row that may come to ``tokens`` has room beside ``rows``."""
        longest = [len(row.codes) + row.limit for row in rows]
        return not longest or self.limit_bytes is None or (
            (sum(longest) + tokens) * self.token_bytes <= self.limit_bytes
        )  # fmt: skip
