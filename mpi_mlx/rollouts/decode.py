"""Decoding a batch: completions of a prompt together until they differ, then each by itself.

A model that is sure of itself draws the same tokens in most completions of a prompt, and what follows the same
tokens is the same forward. So a slot of the batch begins as all of a prompt's completions and is divided where
they draw different tokens. Once that spares too little, every completion gets a slot of its own, and from then on
a step is launched before the one before it is looked at. Slots that nothing needs any more are dropped.
"""

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


class Batch:
    """Blocks of prompts x slots. `slots` holds, for each block (P, W), what stands in it; -1: empty.

    `hidden` (P, D) and `positions` (P,) are those of the prompts' last and first new token; `rows` is, for each
    prompt, the numbers of the completions that it is asked for.
    """

    def __init__(self, model, blocks, rows: list[np.ndarray], hidden: mx.array, positions: np.ndarray):
        self.model, self.blocks, self.hidden, self.positions = model, blocks, hidden, positions
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
        alone = self._lay_out(self.at[order], self.rows[order])
        shared = len(together[2]) <= SHARE_BELOW * len(alone[2])
        shared = shared and (on_cpu() or len(alone[2]) > SHARE_ABOVE_GPU)
        if not shared:
            self._move(*alone)
            self.at = np.flatnonzero(self.flat >= 0)[np.argsort(order)]
        elif len(sources) > len(np.unique(sources)) or len(together[2]) <= COMPACT_BELOW * len(self.flat):
            self._move(*together)
            self.at = np.flatnonzero(self.flat >= 0)[node]
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
        if len(laid[2]) > COMPACT_BELOW * len(going):
            return None
        self._move(*laid)
        return laid[2]

    def _lay_out(self, sources: np.ndarray, labels: np.ndarray) -> tuple[list, list[np.ndarray], np.ndarray]:
        """Blocks, slots that hold `labels` (N,), and the old slots (B',) that they go on from.

        `sources` (N,) are the old slots of the labels, ascending; each may have several labels, or none. A prompt
        without any is left out, and narrower ones than the block's widest have empty slots.
        """
        blocks, slots, kept, start = [], [], [], 0
        for block, old in zip(self.blocks, self.slots, strict=True):
            first, stop = np.searchsorted(sources, [start, start + block.rows])
            prompt = (sources[first:stop] - start) // old.shape[1]
            counts = np.bincount(prompt, minlength=len(old))
            prompts = np.flatnonzero(counts)
            if len(prompts):
                new = np.full((len(prompts), counts.max()), -1)
                origin = np.repeat((start + prompts * old.shape[1])[:, None], counts.max(), axis=1)
                filled = np.arange(counts.max()) < counts[prompts][:, None]
                new[filled], origin[filled] = labels[first:stop], sources[first:stop]
                slots.append(new)
                kept.append(origin.reshape(-1))
                prefixes = block.prefixes
                if len(prompts) < len(old):
                    prefixes = tuple(p if len(p.lengths) != len(old) else p.take(prompts) for p in prefixes)
                blocks.append(kv.Block(new.size, prefixes))
            start += block.rows
        return blocks, slots, np.concatenate(kept)

    def _move(self, blocks, slots, kept) -> None:
        self.blocks, self.slots, self.positions = blocks, slots, self.positions[kept]
        self.caches = kv.compact(self.caches, blocks, kept)
