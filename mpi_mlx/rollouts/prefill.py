"""Prompts into keys and values: what several share once, each prompt's rest once."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mpi_mlx.models.kv import Block, Prefix, recording_caches, shared_prefix_caches
from mpi_mlx.models.pieces import Piece, embed_pieces

TOKENS_PER_FORWARD = 8192  # bounds the activations of a prefill


class Prefilled(NamedTuple):
    """P prompts ready to be continued: their prefixes, and the hidden states (P, D) of their last tokens."""

    prefixes: tuple[Prefix, ...]
    hidden: mx.array


def prefill_shared(model, encoded, length: int) -> Prefix | None:
    """Keys and values of the first `length` tokens, a prefix of one sequence; None for length 0."""
    if not length:
        return None
    caches = recording_caches(model.num_layers, gradient=False)
    embeds, positions, lengths = embed_pieces(model, [Piece(encoded, 0, length)])
    hidden = model.hidden(embeds, positions, caches)
    prefix = Prefix.of(caches, lengths)
    mx.eval(hidden[:, -1], prefix.keys, prefix.values)
    return prefix


def prefill(model, prompts: Sequence, shared: Prefix | None = None) -> Prefilled:
    """Forward each prompt once, after its `shared` tokens, in batches of similar length."""
    start = int(shared.lengths[0]) if shared else 0
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    parts, hidden = [], []
    for batch in _batches([len(prompts[i]) - start for i in order]):
        pieces = [Piece(prompts[order[i]], start, len(prompts[order[i]])) for i in batch]
        embeds, positions, lengths = embed_pieces(model, pieces)
        if shared is None:
            caches = recording_caches(model.num_layers, gradient=False)
        else:
            caches = shared_prefix_caches([Block(len(pieces), (shared,))])
        states = model.hidden(embeds, positions, caches)
        last = states[mx.arange(len(pieces)), mx.array(lengths - 1)]
        part = Prefix.of(caches, lengths, start)
        mx.eval(last, part.keys, part.values)
        parts.append(part)
        hidden.append(last)
    own, hidden = Prefix.join(parts), mx.concatenate(hidden)
    back = np.argsort(order)
    if not np.array_equal(back, np.arange(len(back))):
        own, hidden = own.take(back), hidden[mx.array(back)]
    return Prefilled((own,) if shared is None else (shared, own), hidden)


def _batches(lengths: Sequence[int]) -> list[range]:
    """Ranges of ascending `lengths` whose padded size stays within `TOKENS_PER_FORWARD`."""
    ranges, begin = [], 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or (end + 1 - begin) * lengths[end] > TOKENS_PER_FORWARD:
            ranges.append(range(begin, end))
            begin = end
    return ranges
