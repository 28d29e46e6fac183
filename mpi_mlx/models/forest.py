"""Tokens that branch, forwarded at once: each sees itself and what comes before it on its own way, its ancestors.

The tokens of a forward are rows of one token each, as when sampling, so that each has a position of its own in every
family of models; attention alone puts them together. They come depth first: what descends from token i is the run from
i to its end, and what a run of tokens may see is the run itself and the ancestors of its first. So a run costs its
length times (length + depth), wherever in the forest it is.

Shapes: N tokens, Hq query heads, H heads of keys and values, n queries and L keys of a run, D head size.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mpi_mlx.models.attending import AttendingCache, Window
from mpi_mlx.models.attention import CAUSAL_BLOCK, CAUSAL_BLOCK_GPU, KEEP_BYTES, MASKED, attention_over_parts
from mpi_mlx.runtime import on_cpu


def subtree_ends(parents: np.ndarray) -> np.ndarray:
    """Where what descends from each token stops (N,). `parents` (N,) come before their children; -1: none.

    >>> subtree_ends(np.array([-1, 0, 1, 0, -1])).tolist()
    [4, 3, 3, 4, 5]
    """
    ends = np.arange(1, len(parents) + 1)
    for i in range(len(parents) - 1, -1, -1):
        if parents[i] >= 0:
            ends[parents[i]] = max(ends[parents[i]], ends[i])
    return ends


def cut(parents: np.ndarray, each: int) -> list[int]:
    """Where to cut the tokens into runs: 0, ..., N, for the fewest scores, if a run costs `each` squared more.

    >>> cut(np.array([-1, 0, 1, 2, 3, 1, 5, 6]), 2)    # two ways to go on after two tokens
    [0, 2, 5, 8]
    """
    count, depths = len(parents), np.zeros(len(parents), np.int64)
    for i, parent in enumerate(parents):
        depths[i] = depths[parent] + 1 if parent >= 0 else 0
    branches = np.flatnonzero(parents != np.arange(count) - 1)
    forks = parents[branches] + 1  # a way that others leave may be cut where they do
    places = np.unique(np.concatenate([branches, forks, np.arange(0, count, max(1, each // 2)), [0, count]]))
    best, previous = np.zeros(len(places), np.int64), np.zeros(len(places), np.int64)
    for i in range(1, len(places)):
        first = min(i - 1, int(np.searchsorted(places, places[i] - 4 * each)))
        length = places[i] - places[first:i]
        costs = best[first:i] + length * (depths[places[first:i]] + length) + each**2
        previous[i], best[i] = first + costs.argmin(), costs.min()
    cuts, i = [count], len(places) - 1
    while i:
        i = int(previous[i])
        cuts.append(int(places[i]))
    return cuts[::-1]


class _Run(NamedTuple):
    """Tokens [start, stop) as queries, and their keys in parts: those that all of them see (if any), and others."""

    start: int
    stop: int
    parts: list[np.ndarray]

    @property
    def pairs(self) -> int:
        return (self.stop - self.start) * sum(map(len, self.parts))


class Forest:
    """What the caches of all layers share. `parents` (N,) as in `subtree_ends`, `positions` (N,) in the sequence."""

    def __init__(self, parents: np.ndarray, positions: np.ndarray):
        self.positions, self.offset = positions, mx.array(positions.astype(np.int32))
        self.attended = True  # by the layer last asked: whether its attention came through `attend`
        self._ends = subtree_ends(parents)
        self._biases: dict[int | None, list[list[mx.array | None]]] = {}
        cuts = cut(parents, CAUSAL_BLOCK if on_cpu() else CAUSAL_BLOCK_GPU)
        self._query_cuts = cuts[1:-1]
        self.runs = [self._run(start, stop) for start, stop in zip(cuts[:-1], cuts[1:], strict=True)]
        # keys are cut wherever a part begins or stops, so that parts are whole pieces and no gradient is padded
        borders = [place for run in self.runs for keys in run.parts for place in _borders(keys)]
        self._key_cuts = sorted(set(borders) - {0, len(parents)})
        piece = np.searchsorted(self._key_cuts, np.arange(len(parents)), side="right")
        self._pieces = [[tuple(np.unique(piece[keys]).tolist()) for keys in run.parts] for run in self.runs]

    def _run(self, start: int, stop: int) -> _Run:
        above = np.flatnonzero(self._ends[:start] > start)
        common = self._ends[above] >= stop
        others = np.concatenate([above[~common], np.arange(start, stop)])
        return _Run(start, stop, [keys for keys in (above[common], others) if len(keys)])

    def biases(self, window: int | None) -> list[list[mx.array | None]]:
        """For each run, what to add to the scores (1, 1, n, L) of each part of its keys."""
        if window not in self._biases:
            self._biases[window] = [[self._bias(run, keys, window) for keys in run.parts] for run in self.runs]
        return self._biases[window]

    def _bias(self, run: _Run, keys: np.ndarray, window: int | None) -> mx.array | None:
        at = np.arange(run.start, run.stop)[:, None]
        seen = (keys <= at) & (at < self._ends[keys])
        if window is not None:
            seen &= self.positions[at] - self.positions[keys] < window
        return None if seen.all() else mx.where(mx.array(seen), 0.0, MASKED)[None, None]

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None = None
    ) -> mx.array:
        """Attention (1, Hq, N, D) of queries (1, Hq, N, D) over keys and values (1, H, N, D)."""
        sizes = 4 * queries.shape[1] * np.cumsum([run.pairs for run in self.runs])
        keep = (sizes <= KEEP_BYTES).tolist()
        pieces = [mx.split(x, self._key_cuts, axis=2) for x in (keys, values)]
        joined: dict[tuple[int, ...], tuple[mx.array, ...]] = {}

        def part(which):
            if which not in joined:
                chosen = [[x[i] for i in which] for x in pieces]
                joined[which] = tuple(x[0] if len(x) == 1 else mx.concatenate(x, axis=2) for x in chosen)
            return joined[which]

        outputs, split = [], mx.split(queries, self._query_cuts, axis=2)
        for own, parts, biases, whole in zip(split, self._pieces, self.biases(window), keep, strict=True):
            shared = [
                (part(block), bias)
                for which, bias in zip(parts, biases, strict=True)
                for block in ([which] if bias is not None else aligned(which))
            ]
            outputs.append(attention_over_parts(own, *zip(*shared, strict=True), scale, whole))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def aligned(which: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Ascending numbers in blocks of successive ones, a power of two of them from a multiple of it on, the fewest.

    Runs further down a way see the same blocks, and some more: each is joined, and kept for the backward pass, once,
    where every run's keys joined would be so many copies as there are runs.

    >>> aligned((0, 1, 2, 3, 4, 6, 7))
    [(0, 1, 2, 3), (4,), (6, 7)]
    """
    blocks, i = [], 0
    while i < len(which):
        first, size = which[i], 1
        while first % (2 * size) == 0 and which[i + 2 * size - 1 : i + 2 * size] == (first + 2 * size - 1,):
            size *= 2
        blocks.append(which[i : i + size])
        i += size
    return blocks


def _borders(keys: np.ndarray) -> list[int]:
    """Where the runs of successive numbers in `keys` begin and stop."""
    breaks = np.flatnonzero(np.diff(keys) != 1)
    return [int(keys[0]), *(keys[breaks] + 1).tolist(), *keys[breaks + 1].tolist(), int(keys[-1]) + 1]


class ForestCache(AttendingCache):
    """A forest's tokens (N, 1) in one forward, differentiable; stores nothing. Needs `route_attention` on the net."""

    def __init__(self, layout: Forest):
        self.layout = layout

    @property
    def offset(self) -> mx.array:
        return self.layout.offset

    def reach(self, length: int) -> int:
        return int(self.layout.positions.max()) + length

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask) -> mx.array:
        """Attention (N, Hq, 1, D) of rows of one token."""
        self.layout.attended = True
        rows = [x.swapaxes(0, 2) for x in (queries, keys, values)]
        window = mask.size if isinstance(mask, Window) else None
        return self.layout.attend(*rows, scale, window).swapaxes(0, 2)
