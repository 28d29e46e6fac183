"""Rows that are decoded together: they have one adapter, and lengths that go together."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mpi_mlx.serving.decoding import PromptCache, RowsCache, forward_token
from mpi_mlx.serving.jobs import Row

_SLACK = 512  # tokens of padding that are never worth a batch of their own


class Batch:
    """One token a step for each row.

    Rows are padded to the longest, so a long one among short ones would cost as much memory and time as if all
    were long: it gets a batch of its own.

    Attributes:
        variant: the adapter's name.
    """

    def __init__(self, variant: str):
        self.variant = variant
        self.rows: list[Row] = []
        self._caches: list[RowsCache] = []

    def fits(self, row: Row) -> bool:
        """Whether no row would be padded to much more than twice its length, were ``row`` among them."""
        lengths = [row.length, *(other.length for other in self.rows)]
        return row.job.variant == self.variant and max(lengths) <= 2 * min(lengths) + _SLACK

    def join(self, row: Row, caches: Sequence[PromptCache]) -> None:
        """Takes in a row whose prompt is in ``caches``."""
        fresh = [RowsCache.merge([cache]) for cache in caches]
        if not self.rows:
            self._caches = fresh
        else:
            for ours, new in zip(self._caches, fresh, strict=True):
                ours.extend(new)
        self.rows.append(row)

    def forward(self, model) -> mx.array:
        """Hidden states (B, D) after each row's last token."""
        tokens = mx.array([row.ids[-1] for row in self.rows])
        positions = np.array([row.next_position + len(row.ids) - 1 for row in self.rows])
        return forward_token(model, tokens, positions, self._caches)

    def extract(self, index: int) -> tuple[np.ndarray, list[PromptCache]]:
        """The codes of a row, and its keys and values: all but its last token's."""
        row = self.rows[index]
        caches = [cache.extract(index) for cache in self._caches]
        # unevaluated, the row would keep the whole batch's arrays in memory
        mx.eval([cache.keys for cache in caches], [cache.values for cache in caches])
        return np.concatenate([row.codes, np.array(row.ids[:-1], np.int64)]), caches

    def drop(self, gone: set[int]) -> None:
        """Takes out the rows with these numbers."""
        if not gone:
            return
        stay = [i for i in range(len(self.rows)) if i not in gone]
        self.rows = [self.rows[i] for i in stay]
        if stay:
            index = mx.array(stay)
            for cache in self._caches:
                cache.filter(index)
