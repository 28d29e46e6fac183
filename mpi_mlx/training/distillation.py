"""How far a model's next-token distributions have moved from those of its base, with a gradient."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mpi_mlx.elementwise import exp, logsumexp

CHUNK = 128  # positions whose logits are alive at once: of 150,000 tokens, 77 MB a copy


def kl_from(
    head: Callable, teacher: mx.array, hidden: mx.array, chunk: int = CHUNK, teacher_head: Callable | None = None
) -> mx.array:
    """KL(teacher || model) (N,) float32 in nats between softmax(teacher_head(teacher)) and softmax(head(hidden)).

    `teacher`, `hidden` are (N, D) final hidden states, `teacher_head` (default: `head`) and `head` (n, D) -> (n, V),
    whose own parameters count as frozen. Gradients reach `hidden` alone: softmax(head(hidden)) -
    softmax(head(teacher)), through the head. The forward makes them from the probabilities that it has, so that no
    logits are kept for the backward.
    """

    @mx.custom_function
    def forward(hidden, teacher):
        values, grads = [], []
        for start in range(0, hidden.shape[0], chunk):
            h = hidden[start : start + chunk]
            if values:
                h = mx.depends([h], [values[-1], grads[-1]])[0]
            old, new = _logprobs((teacher_head or head)(teacher[start : start + chunk])), _logprobs(head(h))
            weights = exp(old)
            values.append((weights * (old - new)).sum(axis=-1))
            spread = exp(new) - weights
            grads.append(mx.vjp(head, [h], [spread.astype(h.dtype)])[1][0].astype(mx.float32))
        return mx.concatenate(values), mx.concatenate(grads)

    @forward.vjp
    def backward(primals, cotangents, outputs):
        hidden, teacher = primals
        return (cotangents[0][:, None] * outputs[1]).astype(hidden.dtype), mx.zeros_like(teacher)

    if not hidden.shape[0]:
        return mx.zeros((0,))
    return forward(hidden, mx.stop_gradient(teacher))[0]


def _logprobs(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - logsumexp(logits)[:, None]
