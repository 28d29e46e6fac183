"""What chat and server share of generation: prompts into caches, logits into tokens, ids into text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, KVCache

from mpi_mlx import elementwise
from mpi_mlx.models.attention import MASKED, attention_over_parts, causal_attention
from mpi_mlx.models.pieces import Piece, embed_pieces

PREFILL_STEP = 1024  # tokens a forward: bounds activations, and how long a stop waits


def codes(encoded) -> np.ndarray:
    """Token ids (T,) int64, at image placeholders a negative number that stands for the image's content."""
    found = encoded.ids.astype(np.int64)
    if encoded.images:
        digests = [hashlib.sha256(image.key.encode()).digest()[:8] for image in encoded.images]
        numbers = [-1 - (int.from_bytes(digest, "big") >> 2) for digest in digests]
        found[encoded.visual] = np.repeat(numbers, [image.num_tokens for image in encoded.images])
    return found


def shared_length(kept: np.ndarray, wanted: np.ndarray) -> int:
    """Leading tokens that both :func:`codes` share: whole images, and at least one of ``wanted`` is left."""
    length = min(len(kept), len(wanted) - 1)
    differs = np.flatnonzero(kept[:length] != wanted[:length])
    length = int(differs[0]) if len(differs) else length
    while 0 < length and wanted[length] < 0 and wanted[length] == wanted[length - 1]:
        length -= 1
    return length


class PromptCache(KVCache):
    """mlx-lm's cache of a sequence; where MLX takes exponentials one by one, attention is this project's."""

    plain = True  # see models/attention.py: `attend` is asked where MLX's own attention would be slow

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask) -> mx.array:
        """Attention (1, Hq, T, D) of the last T of L tokens over ``keys`` (1, H, L, D), block by block."""
        if isinstance(mask, mx.array) or queries.shape[2] == 1:  # a sliding window, or one token, which sees all
            return _attention(queries, keys, values, scale, mask)
        return causal_attention(queries, keys, values, scale, gradient=False)


class RowsCache(BatchKVCache):
    """mlx-lm's cache of a batch, with this project's attention as in :class:`PromptCache`."""

    plain = True

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask) -> mx.array:
        return _attention(queries, keys, values, scale, mask)

    def put(self, place: int, cache: PromptCache) -> None:
        """Writes a sequence over row ``place``, so that it ends where all rows end."""
        start, stop = self._idx - cache.offset, self._idx
        self.keys[place : place + 1, :, start:stop] = cache.keys[..., : cache.offset, :]
        self.values[place : place + 1, :, start:stop] = cache.values[..., : cache.offset, :]

    def pad(self, left: mx.array, offset: mx.array, cut: int) -> None:
        """Takes off the first ``cut`` columns; rows (B,) then begin at columns ``left``, with ``offset`` tokens."""
        if cut:
            self.keys, self.values = self.keys[..., cut:, :], self.values[..., cut:, :]
            self._idx -= cut
        self.left_padding, self.offset = left, offset

    def extract(self, idx: int) -> PromptCache:
        return same_cache(super().extract(idx))


def _attention(queries, keys, values, scale: float, mask) -> mx.array:
    bias = mask
    if mask is not None:
        bias = mx.where(mask, 0.0, MASKED) if mask.dtype == mx.bool_ else mask
        bias = bias if bias.ndim == 4 else bias[None, None]
    return attention_over_parts(queries, [(keys, values)], [bias], scale, gradient=False)


def same_cache(cache: KVCache) -> PromptCache:
    """A cache of the same keys and values: MLX copies them when one of the two is written to.

    ``x[...]`` is another array of the same buffer. With the array itself, ``keys[..., a:b, :] = new`` in one cache
    would change the other.
    """
    other = PromptCache()
    other.keys, other.values, other.offset = cache.keys[...], cache.values[...], cache.offset
    return other


def new_caches(model) -> list[PromptCache]:
    """An empty cache a layer."""
    return [PromptCache() for _ in range(model.num_layers)]


def trim(caches: Sequence, length: int) -> None:
    """Forgets all but the first ``length`` tokens."""
    for cache in caches:
        cache.trim(cache.offset - length)


def prefill(
    model,
    encoded,
    caches: Sequence,
    start: int,
    *,
    step: int = PREFILL_STEP,
    stopped: Callable[[], bool] = lambda: False,
) -> mx.array | None:
    """Forwards tokens [start, T) after those in ``caches``; the last hidden state (1, D) or None."""
    hidden = None
    while start < len(encoded):
        if stopped():
            return None
        stop = _cut(encoded, start, step)
        embeds, positions, _ = embed_pieces(model, [Piece(encoded, start, stop)])
        hidden = model.hidden(embeds, positions, caches)[:, -1]
        mx.eval(hidden, [cache.keys for cache in caches], [cache.values for cache in caches])
        start = stop
    return hidden


def _cut(encoded, start: int, step: int) -> int:
    """Where the next piece ends: not within an image."""
    stop = min(start + step, len(encoded))
    ends = np.cumsum([image.num_tokens for image in encoded.images])
    places = np.flatnonzero(encoded.visual)
    for end, image in zip(ends, encoded.images, strict=True):
        first, last = int(places[end - image.num_tokens]), int(places[end - 1])
        if first < stop <= last:
            return first if first > start else last + 1
    return stop


def forward_token(model, tokens: mx.array, positions: np.ndarray, caches: Sequence) -> mx.array:
    """Hidden states (B, D) after one more token (B,) at rotary positions (B,)."""
    place = mx.array(np.asarray(positions, np.int32)[:, None])
    if model.uses_mrope:
        place = mx.broadcast_to(place[None], (3, *place.shape))
    return model.hidden(model.embed(tokens[:, None]), place, caches)[:, 0]


class Draw:
    """Tokens (B,) from hidden states (B, D), each row with its own temperature and nucleus."""

    def __init__(self, model):
        self.model = model
        allowed = np.ones(model.vocab_size, bool)
        allowed[sorted(model.visual_ids)] = False
        self.bias = mx.where(mx.array(allowed), 0.0, -mx.inf) if model.visual_ids else None

    def __call__(
        self, hidden: mx.array, temperature: Sequence[float], top_p: Sequence[float], uniform: Sequence[float]
    ) -> mx.array:
        """``uniform`` numbers in [0, 1) choose the tokens, by inverting each row's distribution.

        A temperature or a nucleus of 0 takes the likeliest token.
        """
        logits = self.model.head(hidden).astype(mx.float32)
        if self.bias is not None:
            logits = logits + self.bias
        best = mx.argmax(logits, axis=-1)
        nucleus = np.asarray(top_p, np.float32)
        heat = np.where(nucleus > 0, np.asarray(temperature, np.float32), 0.0)
        if not heat.any():
            return best
        chances = elementwise.softmax(logits / mx.array(np.maximum(heat, 1e-4))[:, None])
        if (nucleus < 1.0).any():
            falling = -mx.sort(-chances, axis=-1)
            before = mx.cumsum(falling, axis=-1) - falling
            least = mx.where(before < mx.array(nucleus)[:, None], falling, 1.0).min(axis=-1, keepdims=True)
            chances = mx.where(mx.array(nucleus < 1.0)[:, None] & (chances < least), 0.0, chances)
        summed = mx.cumsum(chances, axis=-1)
        aim = mx.array(np.asarray(uniform, np.float32))[:, None] * (summed[:, -1:] * (1 - 1e-6))
        drawn = mx.argmax((summed > aim) & (chances > 0), axis=-1)
        return mx.where(mx.array(heat > 0), drawn, best)


class TextStream:
    """Ids to text as they come; a character is given out once it is whole."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._from = self._read = 0

    def add(self, token: int) -> str:
        """What ``token`` adds to the text, perhaps nothing yet."""
        self._ids.append(int(token))
        return self._piece(final=False)

    def close(self) -> str:
        """What was held back."""
        return self._piece(final=True)

    def _piece(self, final: bool) -> str:
        known = self._decode(self._ids[self._from : self._read])
        text = self._decode(self._ids[self._from :])
        if len(text) <= len(known) or (text.endswith("\ufffd") and not final and self._fresh() < 8):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def _fresh(self) -> int:
        return len(self._ids) - self._read
