"""Log-probabilities of chosen tokens, and the losses built on them. Needs only mlx (and `elementwise`).

Every loss takes arrays and returns a *sum* and its *normaliser*; the caller adds both over micro-batches and
divides once, so that splitting a batch never changes the loss. Shapes: N positions, D hidden, V vocabulary,
R rows (completions), T tokens.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import mlx.core as mx

from mpi_mlx.elementwise import exp

Aggregation = Literal["sequence", "token", "constant"]
Head = mx.array | tuple[mx.array, mx.array] | Callable[[mx.array], mx.array]

_TILE_BYTES = 128 * 2**20
_TILE_BYTES_CPU = 4 * 2**20  # stays in the cache between the passes over it
_TILE_ROWS = 1024


def token_logprobs(
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    temperature: float = 1.0,
    chunk: int | None = None,
    gradient: bool = True,
) -> mx.array:
    """Log-probabilities (N,) float32 of `targets` (N,) under softmax(head(hidden) / temperature).

    Logits exist in tiles only, `chunk` positions by a stretch of the vocabulary at a time. A log-probability's
    gradient by its hidden state is W[target] - softmax W, whatever it is multiplied by later: the forward takes it
    from the exponentials that give the log-sum-exp, and the backward needs no logits at all. (Liger's and Apple's
    cut cross-entropy compute them a second time.) `gradient=False` spares that where none is wanted.

    `head` is the (V, D) output matrix, `(matrix, bias (V,))`, or a callable hidden (n, D) -> logits (n, V)
    (a quantized head, taken whole). Gradients reach `hidden` and the arrays; a callable's own parameters count as
    frozen. `chunk=None` chooses.

    >>> token_logprobs(mx.zeros((4, 2)), mx.ones((3, 2)), mx.array([0, 1, 2]))   # -log(4) each
    """
    if targets.size == 0:
        return mx.zeros(targets.shape, mx.float32)
    weights = [] if callable(head) else list(head) if isinstance(head, tuple) else [head]
    tiles = _tiles(targets.size, _vocabulary(head, hidden), chunk, whole=not weights)
    tiled = _Tiled(None if weights else head, targets, 1.0 / temperature, *tiles)
    return tiled.function(gradient)(hidden, *weights)[0]


def _vocabulary(head: Head, hidden: mx.array) -> int:
    if callable(head):
        return head(hidden[:1]).shape[-1]  # lazy: only the shape is computed
    return (head[0] if isinstance(head, tuple) else head).shape[0]


Span = tuple[int, int]


def _tiles(positions: int, width: int, chunk: int | None, whole: bool) -> tuple[list[Span], list[Span]]:
    """Spans of positions and of the vocabulary; `whole`: the vocabulary is one span."""
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    limit = (_TILE_BYTES_CPU if on_cpu else _TILE_BYTES) // 4
    if chunk is None:
        chunk = max(32, limit // width) if whole else min(positions, _TILE_ROWS)
    columns = width if whole else min(width, max(1024, limit // chunk))

    def spans(total, step):
        return [(i, min(i + step, total)) for i in range(0, total, step)]

    return spans(positions, chunk), spans(width, columns)


class _Tiled(NamedTuple):
    """The computation behind `token_logprobs`, tile by tile."""

    head: Callable | None  # or weights come as arguments: (matrix,) or (matrix, bias)
    targets: mx.array
    inverse: float  # of the temperature
    rows: list[Span]
    columns: list[Span]

    def function(self, gradient: bool) -> Callable:
        """(hidden, *weights) -> (logprobs (N,), log-sum-exp (N,), gradients of the logprobs by hidden (N, D))."""

        @mx.custom_function
        def forward(hidden, *weights):
            found, last = [], ()
            for start, stop in self.rows:
                # one tile after the other, or all their logits would be alive at once
                rows = self._rows(_after(hidden[start:stop], last), weights, self.targets[start:stop], gradient)
                found.append(rows)
                last = rows
            return tuple(mx.concatenate(parts) for parts in zip(*found, strict=True))

        @forward.vjp
        def backward(primals, cotangents, outputs):
            hidden, *weights = primals if isinstance(primals, (tuple, list)) else (primals,)
            if not gradient:
                raise ValueError("token_logprobs(gradient=False) has no gradient")
            cotangent = cotangents[0][:, None]
            grad = (cotangent * outputs[2]).astype(hidden.dtype)
            grads = self._weight_gradients(hidden, weights, cotangent * self.inverse, outputs[1])
            return (grad, *grads) if weights else grad

        return forward

    def _logits(self, h: mx.array, weights, span: Span) -> mx.array:
        if self.head is not None:
            logits = self.head(h)
        else:
            logits = project(tuple(w[span[0] : span[1]] for w in weights), h)
        logits = logits.astype(mx.float32)
        return logits if self.inverse == 1.0 else logits * self.inverse

    def _rows(self, h: mx.array, weights, targets: mx.array, gradient: bool) -> tuple[mx.array, ...]:
        """Log-probabilities (n,), log-sum-exps (n,) and, with `gradient`, gradients (n, D) of some positions.

        The softmax is online: what has been summed is scaled down when a later tile holds a larger logit.
        In 16 bits the target is left out of softmax W: of a token that is all but certain, W[target] - softmax W would
        be the difference of two roundings of nearly the same vector.
        """
        chosen, top, total, picked, mean, last = targets[:, None], None, None, None, None, ()
        others, apart = None, gradient and bool(weights) and weights[0].dtype.size < 4
        for span in self.columns:
            logits = self._logits(_after(h, last), weights, span)
            at = mx.clip(chosen - span[0], 0, span[1] - span[0] - 1)
            found = mx.take_along_axis(logits, at, axis=-1)
            picked = found if picked is None else mx.where(chosen >= span[0], found, picked)
            largest = logits.max(axis=-1, keepdims=True)
            largest = largest if top is None else mx.maximum(top, largest)
            powers = exp(logits - largest)
            share = powers.sum(axis=-1, keepdims=True)
            shrink = None if top is None else exp(top - largest)
            total = share if shrink is None else total * shrink + share
            if apart:
                powers = mx.where(mx.arange(*span) == chosen, 0.0, powers)
                left = powers.sum(axis=-1, keepdims=True)
                others = left if shrink is None else others * shrink + left
            if gradient and weights:
                matrix = weights[0][span[0] : span[1]]
                part = (powers.astype(matrix.dtype) @ matrix).astype(mx.float32)
                mean = part if shrink is None else mean * shrink + part
            top = largest
            last = tuple(x for x in (picked, total, mean, others) if x is not None)
        normaliser = top + mx.log(total)
        out = ((picked - normaliser).squeeze(-1), normaliser.squeeze(-1))
        if not gradient:
            return out
        if weights:
            own = weights[0][targets].astype(mx.float32)
            own = own * (others / total) if apart else own
            return (*out, (own - mean / total) * self.inverse)
        spread = (-powers / total).at[mx.arange(targets.size), targets].add(1.0) * self.inverse
        return (*out, mx.vjp(self.head, [h], [spread.astype(h.dtype)])[1][0].astype(mx.float32))

    def _weight_gradients(self, hidden, weights, cotangent: mx.array, normalisers: mx.array) -> list[mx.array]:
        """Of the matrix and the bias. Lazy: a frozen weight's gradient is never computed, so its logits are not."""
        sums: list[list[mx.array]] = []
        last: tuple[mx.array, ...] = ()
        for span in self.columns if weights else ():
            matrix = bias = None
            for start, stop in self.rows:
                h = _after(hidden[start:stop], last)
                powers = exp(self._logits(h, weights, span) - normalisers[start:stop, None])
                spread = powers * -cotangent[start:stop]
                part = spread.astype(h.dtype).T @ h
                matrix = part if matrix is None else matrix + part
                part = spread.sum(axis=0)
                bias = part if bias is None else bias + part
                last = (matrix,)
            sums.append([matrix, bias])
        added = [(cotangent * hidden).astype(hidden.dtype), cotangent.squeeze(-1)]
        return [
            mx.concatenate([tile[i] for tile in sums]).at[self.targets].add(added[i]).astype(weight.dtype)
            for i, weight in enumerate(weights)
        ]


def _after(x: mx.array, before: tuple[mx.array, ...]) -> mx.array:
    """`x`, once all of `before` have been computed."""
    return mx.depends([x], list(before))[0] if before else x


def project(head: Head | tuple[mx.array], hidden: mx.array) -> mx.array:
    """Logits (n, V) of hidden states (n, D)."""
    if callable(head):
        return head(hidden)
    matrix, *bias = head if isinstance(head, tuple) else (head,)
    return mx.addmm(bias[0], hidden, matrix.T) if bias else hidden @ matrix.T


def sft_loss(logprobs: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
    """Cross-entropy as (sum, count): -sum(weights x logprobs) and sum(weights); any equal shapes.

    >>> sft_loss(mx.array([-1.0, -2.0, -9.0]), mx.array([1.0, 1.0, 0.0]))   # (3, 2)
    """
    weights = weights.astype(mx.float32)
    return -_masked(logprobs, weights).sum(), weights.sum()


class Surrogate(NamedTuple):
    """Per-token arrays (R, T): the clipped objective's loss, where it was clipped, and the ratio."""

    loss: mx.array
    clipped: mx.array
    ratio: mx.array


def surrogate(
    logprobs: mx.array,
    old_logprobs: mx.array,
    advantages: mx.array,
    mask: mx.array,
    clip_low: float,
    clip_high: float,
    importance: mx.array | None = None,
    dual_clip: float | None = None,
) -> Surrogate:
    """PPO's clipped objective, negated, per token: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    That is unbounded where A < 0 and r is large; `dual_clip`, above 1 + clip_high, bounds r there.

    `logprobs`, `old_logprobs`, `mask` are (R, T), `advantages` (R,) or (R, T). `importance`, (R,) or (R, T),
    multiplies the loss without gradient (the ratio between the scored and the sampling distribution).
    `clipped` is true where the clip takes the token's gradient away. Masked entries are zero.
    GRPO: arXiv 2402.03300 eq. 3; apart bounds: DAPO, arXiv 2503.14476 eq. 8; dual clip: arXiv 1912.09729 eq. 5.
    """
    mask = mask.astype(mx.float32)
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    # masked entries may hold anything, and exp() of anything times zero is not zero
    difference = mx.where(mask > 0, logprobs - mx.stop_gradient(old_logprobs), 0.0)
    ratio = mx.exp(difference)
    bounded = mx.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    highest = math.inf if dual_clip is None else dual_clip
    loss = -mx.minimum(mx.minimum(ratio, highest) * advantages, bounded * advantages)
    if importance is not None:
        importance = importance[:, None] if importance.ndim == 1 else importance
        loss = loss * mx.stop_gradient(importance)
    falling = (ratio < 1.0 - clip_low) | (ratio > highest)
    clipped = (falling & (advantages < 0)) | ((ratio > 1.0 + clip_high) & (advantages > 0))
    return Surrogate(loss * mask, clipped & (mask > 0), mx.stop_gradient(ratio))


def importance_weights(
    logprobs: mx.array, sampled_logprobs: mx.array, mask: mx.array, cap: float = 2.0
) -> mx.array:
    """Truncated importance weights (R, T) of the tokens: min(cap, exp(logprobs - sampled_logprobs)); 0 where masked.

    A token's own ratio and not its completion's: the product over some tens of tokens is next to nothing for nearly
    all of them. TRL corrects what its sampler draws in the same way. Without gradient.
    """
    difference = _masked(logprobs - sampled_logprobs, mask.astype(mx.float32))
    return mx.stop_gradient(mx.minimum(mx.exp(difference), cap) * mask)


def k3_kl(logprobs: mx.array, reference_logprobs: mx.array, mask: mx.array | None = None) -> mx.array:
    """Schulman's k3 estimate of KL(model || reference) per token: exp(d) - d - 1, d = reference - model.

    Any equal shapes; never negative, unbiased for tokens sampled from the model. Masked entries are zero.
    """
    difference = mx.stop_gradient(reference_logprobs) - logprobs
    if mask is not None:
        difference = mx.where(mask > 0, difference, 0.0)
    return mx.exp(difference) - difference - 1.0


def aggregate(
    values: mx.array,
    mask: mx.array,
    how: Aggregation,
    max_completion_tokens: int | None = None,
) -> tuple[mx.array, mx.array]:
    """Reduce per-token `values` (R, T) to (sum, normaliser) over the tokens in `mask` (R, T).

    - `sequence` (GRPO): sum of each row's mean over its tokens, and the number of rows with tokens;
    - `token` (DAPO): sum over tokens, and their number;
    - `constant` (Dr. GRPO, arXiv 2503.20783): sum over tokens, and rows x `max_completion_tokens`.

    Sums of both over micro-batches, divided once, equal the whole batch's.
    """
    mask = mask.astype(mx.float32)
    tokens = mask.sum(axis=-1)
    rows = (tokens > 0).astype(mx.float32).sum()
    sums = _masked(values, mask).sum(axis=-1)
    if how == "sequence":
        return (sums / mx.maximum(tokens, 1.0)).sum(), rows
    if how == "token":
        return sums.sum(), tokens.sum()
    if how == "constant":
        if not max_completion_tokens:
            raise ValueError("aggregation 'constant' needs max_completion_tokens > 0")
        return sums.sum(), rows * max_completion_tokens
    raise ValueError(f"aggregation {how!r} is none of 'sequence', 'token', 'constant'")


def _masked(values: mx.array, mask: mx.array) -> mx.array:
    """values x mask, with zero (not NaN) where a masked value is not finite."""
    return mx.where(mask > 0, values, 0.0) * mask
