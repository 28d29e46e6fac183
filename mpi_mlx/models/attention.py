"""Softmax attention over keys in several parts, and the routing of a model's attention to it.

A part of the keys may belong to many rows at once (a prompt to its completions, a document to all prompts):
it is multiplied once, as one matrix for all their queries, and never copied to the rows (shared-prefix
attention as in Hydragen, arXiv 2402.05099). Shapes: B rows, S sequences of a part, Hq query heads, H heads of
keys and values, T queries, L keys, D head size.
"""

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mpi_mlx import elementwise
from mpi_mlx.errors import ModelError
from mpi_mlx.runtime import on_cpu

MASKED = -1e9
CAUSAL_BLOCK, CAUSAL_BLOCK_GPU = 128, 512  # queries a block: keys after the block are never looked at
KEEP_BYTES = 16 * 2**20
"""Scores of one call up to this size are kept for the backward pass; larger ones are computed again."""
_BLOCK_BYTES, _BLOCK_BYTES_GPU = 32 * 2**20, 256 * 2**20
"""Scores that are alive at once: longer queries are taken in blocks."""
LARGE_BYTES = 256 * 2**20
"""Float32 scores of one call from which training does not leave attention to MLX. Where gradients are traced, that
makes all scores at once on GPUs, and several arrays of their size: 11 GB a layer at 10,000 tokens and 16 heads."""

Part = tuple[mx.array, mx.array]


def attention_over_parts(
    queries: mx.array,
    parts: Sequence[Part],
    biases: Sequence[mx.array | None],
    scale: float,
    keep: bool | None = None,
    gradient: bool = True,
) -> mx.array:
    """Attention (B, Hq, T, D) of `queries` over the keys of all `parts` together, differentiable.

    A part is keys and values (S, H, L, D) with S a divisor of B, used by B / S consecutive rows each.
    `biases` are added to the scores; they broadcast to (S or B, 1, T, L), None adds nothing. `keep` the
    exponentials for the backward pass, or compute them again there; None decides by size. Where they are not
    kept, memory does not grow with T x L. `gradient` False spares what only a backward pass needs.
    """
    rows, heads, length, size = queries.shape
    score_bytes = 4 * rows * heads * length * sum(keys.shape[2] for keys, _ in parts)
    if keep is None:
        keep = score_bytes <= KEEP_BYTES
    most = _BLOCK_BYTES if on_cpu() else _BLOCK_BYTES_GPU
    if score_bytes > most and length > 1:
        step = max(1, length * most // score_bytes)
        blocks = [slice(start, start + step) for start in range(0, length, step)]
        options = dict(keep=keep, gradient=gradient)
        return mx.concatenate(
            [
                attention_over_parts(queries[:, :, b], parts, [_cut(bias, b) for bias in biases], scale, **options)
                for b in blocks
            ],
            axis=2,
        )
    groups = parts[0][0].shape[1]
    # heads first: then a part's rows are neighbours, and every reshape below is free
    queries = (queries * scale).reshape(rows, groups, heads // groups * length, size).swapaxes(0, 1)
    flat = [x.swapaxes(0, 1) for part in parts for x in part]
    if gradient:
        output = _over_parts(tuple(biases), length, keep)(queries, *flat)[0]
    else:
        output = _attended(queries, flat[0::2], flat[1::2], biases, length).output
    output = output.reshape(groups, rows, heads // groups, length, -1).swapaxes(0, 1)
    return output.reshape(rows, heads, length, -1)


def _cut(bias: mx.array | None, block: slice) -> mx.array | None:
    return bias if bias is None or bias.shape[2] == 1 else bias[:, :, block]


class _Attended(NamedTuple):
    """Output (H, B, n, D), one over the sums of exponentials and the largest scores (H, B, n, 1), and the
    exponentials (H, S, n B / S, L) of each part."""

    output: mx.array
    inverse: mx.array
    largest: mx.array
    powers: list[mx.array]


def _scores(queries: mx.array, keys: mx.array, bias: mx.array | None, length: int) -> mx.array:
    """Scores (H, S, n B / S, L) of queries (H, B, n, D) and keys (H, S, L, D)."""
    groups, rows, count, _ = queries.shape
    score = queries.reshape(groups, keys.shape[1], -1, queries.shape[-1]) @ keys.swapaxes(-1, -2)
    score = score.astype(mx.float32)
    if bias is None:
        return score
    if bias.shape[2] == 1 and bias.shape[0] in (1, keys.shape[1]):
        return score + bias.squeeze(1)
    if bias.shape[0] not in (1, rows):
        bias = mx.repeat(bias, rows // bias.shape[0], axis=0)
    return (score.reshape(groups, rows, count // length, length, -1) + bias).reshape(score.shape)


def _attended(queries, keys, values, biases, length: int) -> _Attended:
    """Softmax attention over all parts; shapes as in `_over_parts`."""
    groups, rows, count, _ = queries.shape
    found = [_scores(queries, k, b, length) for k, b in zip(keys, biases, strict=True)]
    largest = None
    for score in found:
        top = score.max(axis=-1).reshape(groups, rows, count, 1)
        largest = top if largest is None else mx.maximum(largest, top)
    output, total, powers = None, None, []
    for score, value in zip(found, values, strict=True):
        power = elementwise.exp(score - largest.reshape(*score.shape[:-1], 1))
        share = power.sum(axis=-1).reshape(groups, rows, count, 1)
        power = power.astype(value.dtype)
        part = (power @ value).reshape(groups, rows, count, -1)
        output, total = (part, share) if output is None else (output + part, total + share)
        powers.append(power)
    inverse = 1.0 / total
    return _Attended(output * inverse.astype(output.dtype), inverse, largest, powers)


def _over_parts(biases: tuple[mx.array | None, ...], length: int, keep: bool) -> Callable:
    """The custom function: queries (H, B, n, D), keys and values (H, S, L, D) of each part."""

    @mx.custom_function
    def attend(queries, *flat):
        output, inverse, largest, powers = _attended(queries, flat[0::2], flat[1::2], biases, length)
        return (output, inverse, *(powers if keep else [largest]))

    @attend.vjp
    def backward(primals, cotangents, outputs):
        queries, keys, values = primals[0], primals[1::2], primals[2::2]
        output, inverse, *kept = outputs
        cotangent = cotangents[0] * inverse.astype(output.dtype)
        delta = (cotangent * output).sum(axis=-1, keepdims=True)
        grad_queries, grads = None, []
        for i, (key, value, bias) in enumerate(zip(keys, values, biases, strict=True)):
            into = (queries.shape[0], key.shape[1], -1, queries.shape[-1])
            if keep:
                power = kept[i]
            else:
                top = kept[0].reshape(*into[:2], -1, 1)
                power = elementwise.exp(_scores(queries, key, bias, length) - top).astype(value.dtype)
            cot = cotangent.reshape(*into[:3], value.shape[-1])
            spread = power * (cot @ value.swapaxes(-1, -2) - delta.reshape(*into[:3], 1))
            part = (spread @ key).reshape(queries.shape)
            grad_queries = part if grad_queries is None else grad_queries + part
            grads += [spread.swapaxes(-1, -2) @ queries.reshape(into), power.swapaxes(-1, -2) @ cot]
        return (grad_queries, *grads)

    return attend


def causal_attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, gradient: bool = True
) -> mx.array:
    """Causal attention (B, Hq, T, D) of the last T of L tokens over L keys, in blocks that skip the keys after them.

    `gradient` False spares what only a backward pass needs.
    """
    rows, heads, length, _ = queries.shape
    known = keys.shape[2] - length  # keys before the first query's own
    keep, outputs = 2 * rows * heads * length * keys.shape[2] <= KEEP_BYTES, []
    if known < 0:
        raise ValueError(f"causal attention of {length} queries over {keys.shape[2]} keys")
    block = CAUSAL_BLOCK if on_cpu() else CAUSAL_BLOCK_GPU
    for start in range(0, length, block):
        stop = min(start + block, length)
        own, before = slice(known + start, known + stop), slice(0, known + start)
        position = mx.arange(stop - start)
        bias = mx.where(position[:, None] >= position, 0.0, MASKED)[None, None]
        parts, biases = [(keys[:, :, own], values[:, :, own])], [bias]
        if before.stop:
            parts.insert(0, (keys[:, :, before], values[:, :, before]))
            biases.insert(0, None)
        outputs.append(attention_over_parts(queries[:, :, start:stop], parts, biases, scale, keep, gradient))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def packed_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    runs: Sequence[Sequence[tuple[int, int]]],
) -> mx.array:
    """Causal attention (B, Hq, T, D) within `runs` of tokens: [(start, stop), ...] for each row, in order.

    Each run is computed alone, so nothing is spent on masked pairs; tokens in no run give zeros.
    """
    rows, length = [], queries.shape[2]
    for row, spans in enumerate(runs):
        pieces, done = [], 0
        for start, stop in [*spans, (length, length)]:
            if start > done:
                pieces.append(mx.zeros((1, queries.shape[1], start - done, values.shape[3]), queries.dtype))
            if stop > start:
                run = [x[row : row + 1, :, start:stop] for x in (queries, keys, values)]
                pieces.append(causal_attention(*run, scale))
            done = stop
        rows.append(pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=2))
    return rows[0] if len(rows) == 1 else mx.concatenate(rows)


def route_attention(net: nn.Module) -> None:
    """Route the attention (and, where exp is slow, the SwiGLU) of a net's layers through this project's.

    `scaled_dot_product_attention` and `swiglu` are replaced in the modules that define the layers. Attention
    goes to `cache.attend` where the cache has one; where MLX's own would take exponentials one by one, or training
    would keep more scores than `LARGE_BYTES`, plain attention is computed here as well. Everything else is what it
    was. Idempotent.
    """
    for name in {type(m).__module__ for m in net.modules()}:
        module = sys.modules.get(name)
        for function, routed in (("scaled_dot_product_attention", _routed), ("swiglu", _routed_swiglu)):
            original = getattr(module, function, None)
            if original is not None and not hasattr(original, "routed"):
                setattr(module, function, routed(original))
                getattr(module, function).routed = True


def _is_large(queries: mx.array, keys: mx.array) -> bool:
    rows, heads, length, _ = queries.shape
    return 4 * rows * heads * length * keys.shape[2] > LARGE_BYTES


def _routed(original: Callable) -> Callable:
    @wraps(original)
    def attention(queries, keys, values, cache=None, scale=1.0, mask=None, **options):
        attend = getattr(cache, "attend", None)
        here = elementwise.is_slow(queries) or (getattr(cache, "gradient", False) and _is_large(queries, keys))
        if attend is not None and (not hasattr(cache, "plain") or here):
            if options.get("sinks") is not None:
                raise ModelError("attention sinks and shared prefixes do not go together; take another base")
            return attend(queries, keys, values, scale, mask)
        own = cache is None or hasattr(cache, "plain")
        if own and not any(v is not None for v in options.values()) and here:
            if isinstance(mask, str) and queries.shape[2] == keys.shape[2]:
                return causal_attention(queries, keys, values, scale)
            if mask is None or (isinstance(mask, mx.array) and mask.ndim == 4 and mask.shape[1] == 1):
                bias = mask
                if mask is not None and mask.dtype == mx.bool_:
                    bias = mx.where(mask, 0.0, MASKED)
                return attention_over_parts(queries, [(keys, values)], [bias], scale)
        return original(queries, keys, values, cache, scale=scale, mask=mask, **options)

    return attention


def _routed_swiglu(original: Callable) -> Callable:
    @wraps(original)
    def swiglu(gate, x):
        output = elementwise.swiglu(gate, x)
        return original(gate, x) if output is None else output

    return swiglu
