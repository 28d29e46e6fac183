"""Attention masks and keys/values, as cache objects for the model definitions of mlx-vlm and mlx-lm.

A model asks its cache three things: `make_mask` (which keys may be seen), `offset` (where rotary positions
begin, for text models) and `update_and_fetch` (the keys to attend to). The answers live here:

- `PackedMask`: several sequences in one row, block-diagonal and causal; stores nothing.
- `CausalMask`: plain causal; stores nothing. `RecordingCache`: keeps the keys and values; gradients flow through them.
- `SharedPrefixCache`: rows that continue stored prefixes, many rows a prefix, without copying it to the rows.
- `DecodeCache`: the same, one token at a time, into buffers that grow; rows can be dropped.

The last two need the attention itself to know about prefixes: `route_attention(net)` makes the net's ask the
cache first. Shapes: B rows, S stored prefixes, Hq query heads, H heads of keys and values, T new tokens,
L stored tokens, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mpi_mlx.models.attending import AttendingCache, Window
from mpi_mlx.models.attention import MASKED, attention_over_parts, packed_attention, route_attention

_GROWTH = 64  # tokens by which decode buffers grow


class PackedMask:
    """Attention within segments: token i sees token j <= i of the same row and segment. Stores nothing.

    `segments` is (B, T) int, 0 for padding, else sequences' numbers, each one run of tokens in a row. Padding
    sees padding only (or gives zeros), so nothing is NaN.
    The same object serves every layer: pass `[PackedMask(segments)] * num_layers`. For rotary models, text
    positions need not restart at a segment: only differences matter.
    """

    offset = 0
    plain = gradient = True  # attention is the model's own, or what stands in for it; it is trained through

    def __init__(self, segments: np.ndarray):
        self._segments = mx.array(segments)
        self._masks: dict[int | None, mx.array] = {}
        self._runs = [_runs(row) for row in np.asarray(segments)]
        self._longest = max((b - a for row in self._runs for a, b in row), default=0)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Boolean mask (B, 1, T, T), true where a key may be seen."""
        if window_size is not None and window_size >= length:
            window_size = None
        if window_size not in self._masks:
            same = self._segments[:, :, None] == self._segments[:, None, :]
            position = mx.arange(length)
            seen = position[:, None] >= position
            if window_size is not None:
                seen = seen & (position[:, None] < position + window_size)
            self._masks[window_size] = (same & seen)[:, None]
        return self._masks[window_size]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask) -> mx.array:
        """The same run by run, where that is quicker than a mask."""
        if any(size is not None and size < self._longest for size in self._masks):  # sliding windows
            return attention_over_parts(queries, [(keys, values)], [mx.where(mask, 0.0, MASKED)], scale)
        return packed_attention(queries, keys, values, scale, self._runs)


def _runs(segments: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of each run of equal numbers other than 0."""
    cuts = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]
    return [(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True) if segments[a]]


class CausalMask:
    """Plain causal attention over one forward. Stores nothing: one serves every layer.

    `gradient`: whether it is trained through, so that long sequences must not keep all their scores.
    """

    offset = 0
    plain = True  # attention is the model's own, or what stands in for it

    def __init__(self, gradient: bool = True):
        self.gradient = gradient

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None):
        if window_size is None or window_size >= length:
            if not return_array:
                return "causal" if length > 1 else None
            window_size = length
        position = mx.arange(length)
        return (position[:, None] >= position) & (position[:, None] < position + window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values


class RecordingCache(CausalMask):
    """A `CausalMask` that keeps `keys` and `values` (B, H, T, D), gradients and all."""

    keys: mx.array | None = None
    values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values


@dataclass(frozen=True)
class Prefix:
    """Stored keys and values of S sequences, one array (S, H, L, D) a layer, right-padded.

    `lengths` (S,) counts the valid tokens, `start` (S,) those that came before (an earlier prefix).
    """

    keys: list[mx.array]
    values: list[mx.array]
    lengths: np.ndarray
    start: np.ndarray

    @staticmethod
    def of(caches: Sequence, lengths: Sequence[int], start: int = 0) -> "Prefix":
        """What `RecordingCache`s or `SharedPrefixCache`s (one a layer) recorded."""
        lengths = np.asarray(lengths, np.int32)
        return Prefix(
            [c.keys for c in caches], [c.values for c in caches], lengths, np.full_like(lengths, start)
        )

    @staticmethod
    def join(parts: Sequence["Prefix"]) -> "Prefix":
        """The sequences of all parts, padded to the longest."""
        if len(parts) == 1:
            return parts[0]
        width = max(p.width for p in parts)

        def pad(x):
            return x if x.shape[2] == width else mx.pad(x, [(0, 0), (0, 0), (0, width - x.shape[2]), (0, 0)])

        def cat(name):
            layers = zip(*(getattr(p, name) for p in parts), strict=True)
            return [mx.concatenate([pad(x) for x in layer]) for layer in layers]

        lengths, start = (np.concatenate([getattr(p, n) for p in parts]) for n in ("lengths", "start"))
        return Prefix(cat("keys"), cat("values"), lengths, start)

    @property
    def width(self) -> int:
        return self.keys[0].shape[2]

    def take(self, index: np.ndarray) -> "Prefix":
        """The sequences `index` (S',), cut to the longest of them."""
        width, rows = int(self.lengths[index].max()), mx.array(index)
        cut = [[x[rows, :, :width] for x in xs] for xs in (self.keys, self.values)]
        return Prefix(cut[0], cut[1], self.lengths[index], self.start[index])


@dataclass(frozen=True)
class Block:
    """`rows` consecutive rows that continue the same prefixes, in order of position.

    A prefix of S sequences serves rows / S consecutive rows with each: a document of S = 1 serves all of
    them, prompts of S = P the completions of each prompt.
    """

    rows: int
    prefixes: tuple[Prefix, ...]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens (rows,) before each row's own."""
        total = np.zeros(self.rows, np.int32)
        for prefix in self.prefixes:
            total += np.repeat(prefix.lengths, self.rows // len(prefix.lengths))
        return total


class Layout:
    """What the caches of all layers share: how rows continue prefixes, and the masks that follow."""

    def __init__(self, blocks: Sequence[Block]):
        self.blocks = tuple(blocks)
        self.lengths = np.concatenate([b.lengths for b in self.blocks])
        self._base = mx.array(self.lengths)
        self._offset = (-1, self._base)
        self._biases: dict = {}
        self.attended = True  # by the layer last asked: whether its attention came through `attend`

    def offset(self, own: int) -> mx.array:
        """Position (B,) of the next token when each row has `own` tokens of its own."""
        if self._offset[0] != own:
            self._offset = (own, self._base + own)
        return self._offset[1]

    def biases(self, new: int, own: int, window: int | None) -> list[list[mx.array | None]]:
        """For each block, what to add to the scores of each prefix and of the rows' own tokens.

        Entries broadcast to (B, 1, T, L) and are None where all is seen. `new` counts the queries, `own` the
        rows' own tokens, those queries included.
        """
        # without a window, only causality among several new tokens depends on the counts
        key = (new, own, window) if window or new > 1 else None
        if key not in self._biases:
            if window:
                self._biases.clear()
            self._biases[key] = [self._block_biases(b, new, own, window) for b in self.blocks]
        return self._biases[key]

    @staticmethod
    def _block_biases(block: Block, new: int, own: int, window: int | None) -> list[mx.array | None]:
        position = block.lengths[:, None] + np.arange(own - new, own)  # (B, T) of the queries

        def bias(start, lengths, width, causal):
            key = np.arange(width)
            seen = (key < lengths[:, None])[:, None, None, :]
            at = (start[:, None] + key)[:, None, None, :]
            if causal and new > 1:
                seen = seen & (at <= position[:, None, :, None])
            if window:
                seen = seen & (at > position[:, None, :, None] - window)
            return None if seen.all() else mx.where(mx.array(seen), 0.0, MASKED)

        entries = []
        for prefix in block.prefixes:
            # without a window, one mask a prefix is enough
            repeat = block.rows // len(prefix.lengths) if window else 1
            start, lengths = prefix.start.repeat(repeat), prefix.lengths.repeat(repeat)
            entries.append(bias(start, lengths, prefix.width, False))
        if window is None:
            causal = np.tril(np.ones((new, own), bool), own - new)
            entries.append(None if causal.all() else mx.where(mx.array(causal)[None, None], 0.0, MASKED))
        else:
            entries.append(bias(block.lengths, np.full(block.rows, own), own, True))
        return entries


class SharedPrefixCache(AttendingCache):
    """Rows that continue the prefixes of a `Layout`, several new tokens in one forward, differentiable.

    Records the new `keys` and `values` (B, H, T, D), so that they can be a `Prefix` in turn. Rows may be
    right-padded. Needs `route_attention` on the net.
    """

    def __init__(self, layout: Layout, layer: int):
        self.layout, self.layer, self.length = layout, layer, 0
        self.prefixes = [[(p.keys[layer], p.values[layer]) for p in b.prefixes] for b in layout.blocks]
        self.keys = self.values = None

    @property
    def offset(self) -> mx.array:
        return self.layout.offset(self.length)

    def reach(self, length: int) -> int:
        return int(self.layout.lengths.max()) + self.length + length

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        keys, values = super().update_and_fetch(keys, values)
        self.length = keys.shape[2]
        return keys, values

    def _store(self, keys, values):
        self.keys, self.values = keys, values
        return keys, values

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask) -> mx.array:
        """Attention (B, Hq, T, D) of `queries` over prefixes and the rows' own `keys` (B, H, L, D)."""
        self.layout.attended = True
        window = mask.size if isinstance(mask, Window) else None
        biases = self.layout.biases(queries.shape[2], keys.shape[2], window)
        blocks, options = self.layout.blocks, dict(gradient=self.gradient)
        if len(blocks) == 1:
            return attention_over_parts(queries, [*self.prefixes[0], (keys, values)], biases[0], scale, **options)
        outputs, start = [], 0
        for block, prefixes, bias in zip(blocks, self.prefixes, biases, strict=True):
            rows = slice(start, start + block.rows)
            own = (keys[rows], values[rows])
            outputs.append(attention_over_parts(queries[rows], [*prefixes, own], bias, scale, **options))
            start += block.rows
        return mx.concatenate(outputs)


class DecodeCache(SharedPrefixCache):
    """A `SharedPrefixCache` that appends token after token, in place, into buffers grown by 64 tokens."""

    gradient = False

    def _store(self, keys, values):
        stop = self.length + keys.shape[2]
        if self.keys is None or stop > self.keys.shape[2]:
            extra = -(-(stop - self.length) // _GROWTH) * _GROWTH
            room = mx.zeros((*keys.shape[:2], extra, keys.shape[3]), keys.dtype)
            self.keys = room if self.keys is None else mx.concatenate([self.keys, room], axis=2)
            self.values = room + 0 if self.values is None else mx.concatenate([self.values, room], axis=2)
        self.keys[:, :, self.length : stop] = keys
        self.values[:, :, self.length : stop] = values
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def take(self, layout: Layout, rows: mx.array) -> "DecodeCache":
        """The cache of `rows` (B',) under a new layout."""
        other = DecodeCache(layout, self.layer)
        other.length = self.length
        if self.keys is not None:
            other.keys, other.values = self.keys[rows], self.values[rows]
        return other


def recording_caches(num_layers: int, gradient: bool = True) -> list[RecordingCache]:
    return [RecordingCache(gradient) for _ in range(num_layers)]


def shared_prefix_caches(blocks: Sequence[Block]) -> list[SharedPrefixCache]:
    """One `SharedPrefixCache` a layer over rows in the order of `blocks`."""
    layout = Layout(blocks)
    return [SharedPrefixCache(layout, i) for i in range(len(layout.blocks[0].prefixes[0].keys))]


def decode_caches(blocks: Sequence[Block]) -> list[DecodeCache]:
    """One empty `DecodeCache` a layer over rows in the order of `blocks`."""
    layout = Layout(blocks)
    return [DecodeCache(layout, i) for i in range(len(layout.blocks[0].prefixes[0].keys))]


def compact(caches: Sequence[DecodeCache], blocks: Sequence[Block], rows: np.ndarray) -> list[DecodeCache]:
    """Caches that keep only `rows` (B',) of the old ones, in the order of the new `blocks`."""
    layout, index = Layout(blocks), mx.array(rows)
    return [c.take(layout, index) for c in caches]


__all__ = [
    "Block", "CausalMask", "DecodeCache", "Layout", "PackedMask", "Prefix", "RecordingCache", "SharedPrefixCache",
    "compact", "decode_caches", "recording_caches", "route_attention", "shared_prefix_caches",
]  # fmt: skip
