"""Rows that are decoded together: they have one adapter, and lengths that go together."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mpi_mlx.serving.decoding import PromptCache, RowsCache, forward_token
from mpi_mlx.serving.jobs import Row

_SLACK = 512  # tokens of padding that are never worth a batch of their own
_SHIFT = 64  # columns that no row needs any more, before they are cut off


class Batch:
    """One token a step for each row.

    Rows end in the same column of the keys and values, and are padded on the left to the longest: a long one
    among short ones would cost as much memory and time as if all were long, so it gets a batch of its own.
    A row that has ended leaves its place to the next that comes, because taking it out copies all the others.

    Attributes:
        variant: the adapter's name.
    """

    def __init__(self, variant: str):
        self.variant = variant
        self._places: list[Row | None] = []
        self._caches: list[RowsCache] = []

    @property
    def rows(self) -> list[Row]:
        """Those that have not ended."""
        return [row for row in self._places if row is not None]

    def fits(self, row: Row) -> bool:
        """Whether no row would be padded to much more than twice its length, were ``row`` among them."""
        lengths = [row.length, *(other.length for other in self.rows)]
        return row.job.variant == self.variant and max(lengths) <= 2 * min(lengths) + _SLACK

    def join(self, row: Row, caches: Sequence[PromptCache]) -> None:
        """Takes in a row whose prompt is in ``caches``."""
        if None in self._places and row.stored <= self._caches[0].size():
            place = self._places.index(None)
            for ours, new in zip(self._caches, caches, strict=True):
                ours.put(place, new)
            self._places[place] = row
            self._pad()
            return
        self._close_up()
        fresh = [RowsCache.merge([cache]) for cache in caches]
        if not self._places:
            self._caches = fresh
        else:
            for ours, new in zip(self._caches, fresh, strict=True):
                ours.extend(new)
        self._places.append(row)

    def forward(self, model) -> mx.array:
        """Hidden states (B, D) after each row's last token."""
        places = [(row.ids[-1], row.next_position + len(row.ids) - 1) if row else (0, 0) for row in self._places]
        tokens, positions = zip(*places, strict=True)
        hidden = forward_token(model, mx.array(tokens), np.array(positions), self._caches)
        taken = self._taken()
        return hidden if len(taken) == len(places) else hidden[mx.array(taken)]

    def extract(self, row: Row) -> tuple[np.ndarray, list[PromptCache]]:
        """The codes of a row, and its keys and values: all but its last token's."""
        place = self._places.index(row)
        caches = [cache.extract(place) for cache in self._caches]
        # unevaluated, the row would keep the whole batch's arrays in memory
        mx.eval([cache.keys for cache in caches], [cache.values for cache in caches])
        return np.concatenate([row.codes, np.array(row.ids[:-1], np.int64)]), caches

    def drop(self, gone: Sequence[Row]) -> None:
        """Takes out rows."""
        self._places = [None if row in gone else row for row in self._places]
        if 4 * self._places.count(None) > len(self._places):
            self._close_up()
        elif gone:
            self._pad()

    def _taken(self) -> list[int]:
        return [place for place, row in enumerate(self._places) if row is not None]

    def _close_up(self) -> None:
        """Only places that are taken stay."""
        taken = self._taken()
        if len(taken) == len(self._places):
            return
        self._places = self.rows
        if taken:
            index = mx.array(taken)
            for cache in self._caches:
                cache.filter(index)

    def _pad(self) -> None:
        """Tells the caches where rows begin; columns before all of them are cut off from time to time."""
        width = self._caches[0].size()
        padding = np.array([width - row.stored if row else width - 1 for row in self._places])
        cut = int(padding.min())
        cut = cut if cut >= _SHIFT else 0
        left, offset = mx.array(padding - cut), mx.array(width - padding)
        for cache in self._caches:
            cache.pad(left, offset, cut)
