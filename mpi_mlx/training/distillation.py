"""How far a model's next-token distributions have moved from those of its base, with a gradient."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mpi_mlx.elementwise import exp, logsumexp
from mpi_mlx.training.losses import Head, project

CHUNK = 128  # positions whose logits are alive at once: of 150,000 tokens, 77 MB a copy


def kl_from(
    head: Head, teacher: mx.array, hidden: mx.array, chunk: int = CHUNK, teacher_head: Callable | None = None
) -> mx.array:
    """KL(teacher || model) (N,) float32 in nats between softmax(teacher_head(teacher)) and softmax(head(hidden)).

    `teacher`, `hidden` are (N, D) final hidden states; `head` as in `losses.token_logprobs`, `teacher_head` (default:
    `head`) a callable (n, D) -> (n, V). Gradients reach `hidden` and the head's arrays, a callable's own parameters
    count as frozen: by the logits they are softmax(head(hidden)) - softmax(teacher_head(teacher)). The forward takes
    that of `hidden` from the probabilities that it has, so that no logits are kept for the backward.
    """
    weights = [] if callable(head) else list(head) if isinstance(head, tuple) else [head]

    def spread(h, teacher, weights) -> tuple[mx.array, mx.array]:
        """Divergences (n,) of some positions, and their gradients (n, V) by the logits."""
        logits = project(tuple(weights) if weights else head, h)
        old, new = _logprobs(teacher_head(teacher) if teacher_head else project(head, teacher)), _logprobs(logits)
        wanted = exp(old)
        return (wanted * (old - new)).sum(axis=-1), (exp(new) - wanted).astype(h.dtype)

    @mx.custom_function
    def forward(hidden, teacher, *weights):
        values, grads = [], []
        for start in range(0, hidden.shape[0], chunk):
            h = hidden[start : start + chunk]
            if values:
                h = mx.depends([h], [values[-1], grads[-1]])[0]
            value, by_logits = spread(h, teacher[start : start + chunk], weights)
            values.append(value)
            grad = by_logits @ weights[0] if weights else mx.vjp(head, [h], [by_logits])[1][0]
            grads.append(grad.astype(mx.float32))
        return mx.concatenate(values), mx.concatenate(grads)

    @forward.vjp
    def backward(primals, cotangents, outputs):
        hidden, teacher, *weights = primals
        scale = cotangents[0][:, None]
        sums: list[mx.array] = []
        for start in range(0, hidden.shape[0] if weights else 0, chunk):  # lazy: a frozen head's is never computed
            h = hidden[start : start + chunk]
            if sums:
                h = mx.depends([h], sums)[0]
            by_logits = spread(h, teacher[start : start + chunk], weights)[1] * scale[start : start + chunk]
            parts = [by_logits.T @ h, by_logits.sum(axis=0)][: len(weights)]
            sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
        found = [total.astype(w.dtype) for total, w in zip(sums, weights, strict=True)]
        return ((scale * outputs[1]).astype(hidden.dtype), mx.zeros_like(teacher), *found)

    if not hidden.shape[0]:
        return mx.zeros((0,))
    return forward(hidden, mx.stop_gradient(teacher), *weights)[0]


def _logprobs(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - logsumexp(logits)[:, None]
