"""Log-probabilities of chosen tokens, and the losses built on them. Needs only mlx (and `elementwise`).

Every loss takes arrays and returns a *sum* and its *normaliser*; the caller adds both over micro-batches and
divides once, so that splitting a batch never changes the loss. Shapes: N positions, D hidden, V vocabulary,
R rows (completions), T tokens.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import mlx.core as mx

from mpi_mlx.elementwise import exp, logsumexp

Aggregation = Literal["sequence", "token", "constant"]
Head = mx.array | tuple[mx.array, mx.array] | Callable[[mx.array], mx.array]

_KEEP_BYTES = 64 * 2**20
"""Logits up to this size are kept for the backward pass; larger ones are recomputed chunk by chunk."""
_CHUNK_BYTES = 128 * 2**20
_CHUNK_BYTES_CPU = 4 * 2**20  # stays in the cache between the passes over it


def token_logprobs(
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> mx.array:
    """Log-probabilities (N,) float32 of `targets` (N,) under softmax(head(hidden) / temperature).

    Logits are computed for `chunk` positions at a time: the forward keeps only their log-sum-exp, the
    backward computes them again (as in Liger's and Apple's cut cross-entropy). Where all N x V logits take
    less than 64 MiB they are kept instead, which saves the second matmul.

    `head` is the (V, D) output matrix, `(matrix, bias (V,))`, or a callable hidden (n, D) -> logits (n, V)
    (a quantized head). Gradients reach `hidden` and the arrays; a callable's own parameters count as frozen.
    `chunk=None` chooses.

    >>> token_logprobs(mx.zeros((4, 2)), mx.ones((3, 2)), mx.array([0, 1, 2]))   # -log(4) each
    """
    if targets.size == 0:
        return mx.zeros(targets.shape, mx.float32)
    width = _vocabulary(head, hidden)
    if chunk is None:
        small = mx.default_device().type == mx.DeviceType.cpu
        chunk = max(32, (_CHUNK_BYTES_CPU if small else _CHUNK_BYTES) // (4 * width))
    if callable(head):
        weights, project = [], lambda h: head(h)
    elif isinstance(head, tuple):
        weights, project = list(head), lambda h, w, b: mx.addmm(b, h, w.T)
    else:
        weights, project = [head], lambda h, w: h @ w.T
    keep = targets.size * width * 4 <= _KEEP_BYTES
    return _chosen(project, targets, 1.0 / temperature, chunk, keep)(hidden, *weights)[0]


def _vocabulary(head: Head, hidden: mx.array) -> int:
    if callable(head):
        return head(hidden[:1]).shape[-1]  # lazy: only the shape is computed
    return (head[0] if isinstance(head, tuple) else head).shape[0]


def _chosen(project: Callable, targets: mx.array, inverse: float, chunk: int, keep: bool) -> Callable:
    """The custom function (hidden, *weights) -> (logprobs (N,), log-sum-exp (N,), *kept logits)."""
    bounds = [(i, min(i + chunk, targets.size)) for i in range(0, targets.size, chunk)]

    def scaled(h, weights):
        logits = project(h, *weights).astype(mx.float32)
        return logits if inverse == 1.0 else logits * inverse

    @mx.custom_function
    def forward(hidden, *weights):
        logprobs, normalisers, kept = [], [], []
        for start, stop in bounds:
            h = hidden[start:stop]
            if logprobs:  # one chunk after the other, or all their logits would be alive at once
                h = mx.depends([h], [logprobs[-1]])[0]
            logits = scaled(h, weights)
            normaliser = logsumexp(logits)
            picked = mx.take_along_axis(logits, targets[start:stop, None], axis=-1).squeeze(-1)
            logprobs.append(picked - normaliser)
            normalisers.append(normaliser)
            if keep:
                kept.append(logits)
        return (mx.concatenate(logprobs), mx.concatenate(normalisers), *kept)

    @forward.vjp
    def backward(primals, cotangents, outputs):
        hidden, *weights = primals if isinstance(primals, (tuple, list)) else (primals,)
        grad_hidden, grad_weights = [], None
        for i, (start, stop) in enumerate(bounds):
            h, chosen = hidden[start:stop], targets[start:stop]
            cotangent = cotangents[0][start:stop, None] * inverse
            if grad_hidden:
                h = mx.depends([h], [grad_hidden[-1]])[0]
            logits = outputs[2 + i] if keep else scaled(h, weights)
            probabilities = exp(logits - outputs[1][start:stop, None])
            grads = _project_vjp(project, h, weights, chosen, probabilities, cotangent)
            grad_hidden.append(grads[0])
            grad_weights = grads[1:] if grad_weights is None else list(map(mx.add, grad_weights, grads[1:]))
        grad = mx.concatenate(grad_hidden)
        return (grad, *grad_weights) if weights else grad

    return forward


def _project_vjp(project, h, weights, chosen, probabilities, cotangent) -> list[mx.array]:
    """Gradients of `h` and of each weight where logits have the gradient (onehot - softmax) x cotangent.

    The one-hot share is added to the products, not to a matrix of the logits' size. All is lazy: a frozen
    weight's gradient is never computed.
    """
    cotangent = cotangent.astype(h.dtype)
    spread = probabilities.astype(h.dtype) * -cotangent
    if not weights:
        spread = spread.at[mx.arange(chosen.size), chosen].add(cotangent.squeeze(-1))
        return mx.vjp(project, [h], [spread])[1]
    matrix = weights[0]
    grads = [spread @ matrix + cotangent * matrix[chosen], (spread.T @ h).at[chosen].add(cotangent * h)]
    if len(weights) == 2:
        grads.append(spread.sum(axis=0).at[chosen].add(cotangent.squeeze(-1)))
    return grads


def entropy(head: Head, hidden: mx.array, temperature: float = 1.0, chunk: int = 256) -> mx.array:
    """Entropy (N,) in nats of softmax(head(hidden) / temperature); a metric, no gradient flows through it."""
    if callable(head):
        project = head
    elif isinstance(head, tuple):
        project = lambda h: mx.addmm(head[1], h, head[0].T)  # noqa: E731
    else:
        project = lambda h: h @ head.T  # noqa: E731
    values = []
    for start in range(0, hidden.shape[0], chunk):
        h = mx.stop_gradient(hidden[start : start + chunk])
        if values:
            h = mx.depends([h], [values[-1]])[0]
        logits = project(h).astype(mx.float32) / temperature
        logprobs = logits - logsumexp(logits)[:, None]
        values.append(mx.stop_gradient(-(exp(logprobs) * logprobs).sum(axis=-1)))
    return mx.concatenate(values) if values else mx.zeros((0,))


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
) -> Surrogate:
    """PPO's clipped objective, negated, per token: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    `logprobs`, `old_logprobs`, `mask` are (R, T), `advantages` (R,) or (R, T). `importance`, (R,) or (R, T),
    multiplies the loss without gradient (the ratio between the scored and the sampling distribution).
    `clipped` is true where the clip takes the token's gradient away. Masked entries are zero.
    GRPO: arXiv 2402.03300 eq. 3; apart bounds: DAPO, arXiv 2503.14476 eq. 8.
    """
    mask = mask.astype(mx.float32)
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    # masked entries may hold anything, and exp() of anything times zero is not zero
    difference = mx.where(mask > 0, logprobs - mx.stop_gradient(old_logprobs), 0.0)
    ratio = mx.exp(difference)
    bounded = mx.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = -mx.minimum(ratio * advantages, bounded * advantages)
    if importance is not None:
        importance = importance[:, None] if importance.ndim == 1 else importance
        loss = loss * mx.stop_gradient(importance)
    clipped = ((ratio < 1.0 - clip_low) & (advantages < 0)) | ((ratio > 1.0 + clip_high) & (advantages > 0))
    return Surrogate(loss * mask, clipped & (mask > 0), mx.stop_gradient(ratio))


def importance_weights(
    logprobs: mx.array, sampled_logprobs: mx.array, mask: mx.array, cap: float = 2.0
) -> mx.array:
    """Truncated sequence weights (R,): min(cap, exp(mean over tokens of logprobs - sampled_logprobs)).

    The geometric mean a token (GSPO, arXiv 2507.18071) keeps weights of long completions from vanishing.
    Without gradient.
    """
    mask = mask.astype(mx.float32)
    difference = _masked(logprobs - sampled_logprobs, mask).sum(axis=-1) / mx.maximum(mask.sum(axis=-1), 1.0)
    return mx.stop_gradient(mx.minimum(mx.exp(difference), cap))


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
