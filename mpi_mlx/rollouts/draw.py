"""Tokens from logits: by their probabilities, or the likeliest."""

import mlx.core as mx
import numpy as np

from mpi_mlx.elementwise import exp, logsumexp

_BLOCK = 64  # tokens of the vocabulary that are looked at together


class Draw:
    """Tokens (B,) and their log-probabilities (B,) from hidden states (B, D)."""

    def __init__(self, model, temperature: float, top_p: float, logprobs: bool):
        self.model, self.temperature, self.top_p, self.logprobs = model, temperature, top_p, logprobs
        self.allowed = None
        if model.visual_ids:
            allowed = np.ones(model.vocab_size, bool)
            allowed[sorted(model.visual_ids)] = False
            self.allowed = mx.array(allowed)

    def __call__(
        self, hidden: mx.array, uniforms: np.ndarray | None, at: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """Draws from each row of `hidden` (B, D), or from its rows `at` (B',), which may repeat."""
        logits = self.model.head(hidden).astype(mx.float32)
        if self.temperature == 0:
            tokens, logprobs = self._greedy(logits)
            return (tokens, logprobs) if at is None else (tokens[at], logprobs[at])
        if self.temperature != 1:
            logits = logits * (1.0 / self.temperature)
        weights = exp(logits - logits.max(axis=-1, keepdims=True))
        total = weights.sum(axis=-1, keepdims=True)
        kept, order = self._kept(weights)
        if at is not None:
            weights, total, kept = weights[at], total[at], kept[at]
            order = None if order is None else order[at]
        tokens = invert_cumulated(kept, mx.array(uniforms)[:, None])
        if order is not None:
            tokens = mx.take_along_axis(order, tokens, axis=-1)
        share = mx.take_along_axis(weights, tokens, axis=-1) / total
        return tokens.squeeze(-1), mx.log(share).squeeze(-1)

    def _greedy(self, logits):
        masked = logits if self.allowed is None else mx.where(self.allowed, logits, -mx.inf)
        tokens = mx.argmax(masked, axis=-1)
        if not self.logprobs:
            return tokens, mx.zeros(tokens.shape)
        picked = mx.take_along_axis(logits, tokens[:, None], axis=-1).squeeze(-1)
        return tokens, picked - logsumexp(logits)

    def _kept(self, weights: mx.array) -> tuple[mx.array, mx.array | None]:
        """`weights` (B, V) of what may be drawn, and the tokens that they belong to; None: in their own order."""
        if self.allowed is not None:
            weights = weights * self.allowed
        if self.top_p >= 1.0:
            return weights, None
        order = mx.argsort(-weights, axis=-1)
        weights = mx.take_along_axis(weights, order, axis=-1)
        before = mx.cumsum(weights, axis=-1) - weights
        return weights * (before < self.top_p * weights.sum(axis=-1, keepdims=True)), order


def invert_cumulated(weights: mx.array, uniforms: mx.array) -> mx.array:
    """The first index (B, 1) at which the cumulated share of `weights` (B, V) passes `uniforms` (B, 1).

    First among blocks of the vocabulary, then within one: only the blocks' sums read all weights. Never an index
    of no weight.
    """
    rows, width = weights.shape
    if width % _BLOCK:
        weights = mx.pad(weights, [(0, 0), (0, -width % _BLOCK)])
    blocks = weights.reshape(rows, -1, _BLOCK)
    sums = blocks.sum(axis=-1)
    block, rest = _passed(sums, uniforms)
    chosen = mx.take_along_axis(blocks, block[..., None], axis=1).squeeze(1)
    return block * _BLOCK + _passed(chosen, rest)[0]


def _passed(weights: mx.array, uniforms: mx.array) -> tuple[mx.array, mx.array]:
    """The index (B, 1) of the same, and how far (B, 1) into that index' weight, as a share of it."""
    cumulated = mx.cumsum(weights, axis=-1)
    # a hair below, so that rounding never puts the target beyond the last one
    target = uniforms * (cumulated[:, -1:] * (1.0 - 1e-6))
    index = mx.argmax((cumulated > target) & (weights > 0), axis=-1, keepdims=True)
    weight = mx.take_along_axis(weights, index, axis=-1)
    before = mx.take_along_axis(cumulated, index, axis=-1) - weight
    return index, mx.clip((target - before) / weight, 0.0, 1.0)
