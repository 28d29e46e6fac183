"""Decoding a batch: completions of a prompt together until they differ, then each by itself.

A model that is sure of itself draws the same tokens in most completions of a prompt, and what follows the same
tokens is the same forward. So a slot of the batch begins as all of a prompt's completions and is divided where
they draw different tokens. Once that spares too little, every completion gets a slot of its own, and from then on
a step is launched before the one before it is looked at. Slots that nothing needs any more are dropped.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mpi_mlx.models import kv
from mpi_mlx.rollouts.completions import Collected, SamplingStats
from mpi_mlx.rollouts.draw import Draw
from mpi_mlx.runtime import on_cpu

COMPACT_BELOW = 0.75  # drop slots when those still needed are at most this share of the batch
SHARE_BELOW = 0.75  # completions stay together while that takes at most this share of the slots they need alone
SHARE_ABOVE_GPU = 32
"""Slots up to which a GPU decodes each completion by itself: its step reads the weights, whatever the rows, and one
that is launched before the last is looked at saves more than fewer rows would."""


BLOCK_SLOTS, BLOCK_SLOTS_GPU = 4, 64
"""Slots that must stay empty otherwise, for prompts of one prefill to be decoded as two blocks."""


class Batch:
    """Blocks of prompts x slots. `slots` holds, for each block (P, W), what stands in it; -1: empty.

    `prefilled` are the blocks that it began as; `members` says, for each block now, which of them it is of, and which
    prompts of it: those that need many slots need not leave the others as many.

    `hidden` (P, D) and `positions` (P,) are those of the prompts' last and first new token; `rows` is, for each
    prompt, the numbers of the completions that it is asked for.
    """

    def __init__(self, model, blocks, rows: list[np.ndarray], hidden: mx.array, positions: np.ndarray):
        self.model, self.blocks, self.hidden, self.positions = model, blocks, hidden, positions
        self.prefilled = list(blocks)
        self.members = [(i, np.arange(b.rows)) for i, b in enumerate(blocks)]
        starts = np.cumsum([0, *(b.rows for b in blocks)])
        self.slots = [np.arange(a, b)[:, None] for a, b in zip(starts[:-1], starts[1:], strict=True)]
        self.rows = np.concatenate(rows)
        self.at = np.repeat(np.arange(len(rows)), [len(r) for r in rows])  # the slot of each row
        self.caches = kv.decode_caches(blocks)

    @property
    def flat(self) -> np.ndarray:
        return np.concatenate([s.reshape(-1) for s in self.slots])

    def decode(self, draw: Draw, uniforms: np.ndarray | None, collected: Collected, stats: SamplingStats) -> None:
        """Draw until every row has ended."""
        step, tokens = self._together(draw, uniforms, collected, stats)
        if len(self.rows):
            self._alone(step, tokens, draw, uniforms, collected, stats)
        collected.flush()

    def _together(self, draw, uniforms, collected, stats) -> tuple[int, mx.array]:
        """Draw while slots stand for several rows; the next step, and each slot's token to go on from."""
        hidden, step = self.hidden, 0
        while True:
            numbers = None if uniforms is None else uniforms[self.rows, step]
            tokens, logprobs = draw(hidden, numbers, mx.array(self.at.astype(np.int32)))
            mx.eval(tokens, logprobs)  # until then a log-probability holds its row's whole vocabulary
            going = collected.add(self.rows, step, tokens, logprobs)
            step += 1
            self.rows, self.at, drawn = self.rows[going], self.at[going], np.array(tokens)[going]
            if not len(self.rows) or step >= collected.max_tokens:
                self.rows = self.rows[:0]
                return step, tokens
            shared = self._divide(drawn)
            tokens = np.zeros(len(self.flat), np.int32)
            tokens[self.at] = drawn
            tokens = mx.array(tokens)
            if not shared:
                return step, tokens
            hidden = self._forward(tokens, step - 1)
            stats.row_steps += len(self.flat)

    def _divide(self, drawn: np.ndarray) -> bool:
        """Slots for the rows that have drawn tokens (R,); whether any still stands for several of them."""
        pairs = self.at.astype(np.int64) << 32 | drawn
        unique, node = np.unique(pairs, return_inverse=True)
        sources = unique >> 32
        together, order = self._lay_out(sources, np.arange(len(sources))), np.argsort(self.at, kind="stable")
        alone = self._lay_out(self.at[order], order)
        shared = together.size <= SHARE_BELOW * alone.size
        shared = shared and (on_cpu() or alone.size > SHARE_ABOVE_GPU)
        if not shared:
            self.at = self._move(alone)
            self.slots = [np.where(s >= 0, self.rows[s], -1) for s in self.slots]
        elif len(sources) > len(np.unique(sources)) or together.size <= COMPACT_BELOW * len(self.flat):
            self.at = self._move(together)[node]
        return shared

    def _alone(self, step, tokens, draw, uniforms, collected, stats) -> None:
        """Draw with a slot for each row; a step is launched before the one before it is looked at."""
        slots, pending = self.flat, None
        while step < collected.max_tokens:
            numbers = None if uniforms is None else uniforms[np.maximum(slots, 0), step]
            launched = draw(self._forward(tokens, step - 1), numbers)
            mx.async_eval(*launched)
            stats.row_steps += len(slots)
            if pending is not None:
                going = collected.add(*pending)
                if not going.any():
                    return
                kept = self._compact(going)
                if kept is not None:
                    # the launched step is recorded under the new slots
                    slots, launched = self.flat, [x[mx.array(kept)] for x in launched]
            pending, tokens = (slots, step, *launched), launched[0]
            step += 1
        if pending is not None:
            collected.add(*pending)

    def _forward(self, tokens: mx.array, step: int) -> mx.array:
        position = mx.array((self.positions + step)[:, None])
        if self.model.uses_mrope:
            position = mx.broadcast_to(position[None], (3, *position.shape))
        return self.model.hidden(self.model.embed(tokens[:, None]), position, self.caches)[:, 0]

    def _compact(self, going: np.ndarray) -> np.ndarray | None:
        """Drop prompts that are done and slots that no prompt needs; returns the old slots (B',) kept."""
        living = np.flatnonzero(going)
        laid = self._lay_out(living, self.flat[living])
        if laid.size > COMPACT_BELOW * len(going):
            return None
        self._move(laid)
        return laid.origins

    def _lay_out(self, sources: np.ndarray, labels: np.ndarray) -> "_Laid":
        """Slots that hold `labels` (N,), made from the old slots `sources` (N,), ascending.

        Each may have several labels, or none. A prompt without any is left out, and narrower ones than their block's
        widest have empty slots.
        """
        prompts = [(n, p, s.shape[1]) for (n, ps), s in zip(self.members, self.slots, strict=True) for p in ps]
        first = np.cumsum([0, *(width for *_, width in prompts)])  # old slots come prompt by prompt
        bounds = np.searchsorted(sources, first)
        counts = np.diff(bounds)
        members, slots, kept = [], [], []
        for number in range(len(self.prefilled)):
            wanted = [i for i, (n, *_) in enumerate(prompts) if n == number and counts[i]]
            for part in by_width([int(counts[i]) for i in wanted], BLOCK_SLOTS if on_cpu() else BLOCK_SLOTS_GPU):
                chosen = sorted((wanted[i] for i in part), key=lambda i: prompts[i][1])  # as they were prefilled
                new = np.full((len(chosen), max(counts[i] for i in chosen)), -1)
                origin = np.repeat(first[chosen][:, None], new.shape[1], axis=1)
                for row, i in enumerate(chosen):
                    new[row, : counts[i]] = labels[bounds[i] : bounds[i + 1]]
                    origin[row, : counts[i]] = sources[bounds[i] : bounds[i + 1]]
                members.append((number, np.array([prompts[i][1] for i in chosen])))
                slots.append(new)
                kept.append(origin.reshape(-1))
        return _Laid(members, slots, np.concatenate(kept))

    def _move(self, laid: "_Laid") -> np.ndarray:
        """Lays the slots out anew; where each label stands now, by label, if these are numbered from 0."""
        known = {(n, tuple(ps)): block for (n, ps), block in zip(self.members, self.blocks, strict=True)}
        blocks = []
        for (number, prompts), slots in zip(laid.members, laid.slots, strict=True):
            old, all_of_them = known.get((number, tuple(prompts))), self.prefilled[number]
            prefixes = (old or all_of_them).prefixes
            if old is None and len(prompts) < all_of_them.rows:
                prefixes = tuple(p if len(p.lengths) != all_of_them.rows else p.take(prompts) for p in prefixes)
            blocks.append(kv.Block(slots.size, prefixes))
        self.blocks, self.members, self.slots = blocks, laid.members, laid.slots
        self._forget_prompts()
        self.positions = self.positions[laid.origins]
        self.caches = kv.compact(self.caches, blocks, laid.origins)
        flat = self.flat
        places = np.flatnonzero(flat >= 0)
        return places[np.argsort(flat[places])]


    def _forget_prompts(self) -> None:
        """Lets go of prompts that have ended, where what is left of a prefill is one block."""
        numbers = [number for number, _ in self.members]
        for i, (number, prompts) in enumerate(self.members):
            if numbers.count(number) == 1 and len(prompts) < self.prefilled[number].rows:
                self.prefilled[number] = kv.Block(len(prompts), self.blocks[i].prefixes)
                self.members[i] = (number, np.arange(len(prompts)))


class _Laid(NamedTuple):
    """Blocks' members and slots as in `Batch`, and the old slots (B',) that the new ones go on from."""

    members: list[tuple[int, np.ndarray]]
    slots: list[np.ndarray]
    origins: np.ndarray

    @property
    def size(self) -> int:
        return len(self.origins)


def by_width(counts: list[int], each: int) -> list[list[int]]:
    """Prompts that need `counts` slots in parts, for the fewest slots, if a part costs `each` more: their indices.

    >>> by_width([9, 1, 2, 8], 4)
    [[0, 3], [1, 2]]
    """
    widths = sorted(set(counts), reverse=True)
    number = [sum(count >= width for count in counts) for width in widths]  # of prompts, up to that width
    best, first = [0], [0]
    for stop in range(1, len(widths) + 1):
        ways = [
            (best[start] + (number[stop - 1] - (number[start - 1] if start else 0)) * widths[start] + each, start)
            for start in range(stop)
        ]
        cost, start = min(ways)
        best.append(cost)
        first.append(start)
    parts, stop = [], len(widths)
    while stop:
        start = first[stop]
        parts.append([i for i, count in enumerate(counts) if widths[stop - 1] <= count <= widths[start]])
        stop = start
    return parts[::-1]
