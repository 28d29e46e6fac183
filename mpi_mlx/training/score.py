"""Differentiable log-probabilities of completions, each prompt forwarded once for its whole group.

The prompt is forwarded without its last token, keeping keys and values; each completion's row begins with
that token and attends to them, so that row position t predicts completion token t. Gradients flow through
the prompt's keys and values. Only completion positions reach the vocabulary.
"""

from collections.abc import Sequence
from itertools import groupby

import mlx.core as mx
import numpy as np

from mpi_mlx.models import kv
from mpi_mlx.models.pieces import Piece, cluster_prompts, embed_pieces
from mpi_mlx.training.losses import token_logprobs

WIDTH_MULTIPLE = 8  # completions are padded to a multiple of this, so that few distinct shapes occur
LEAST_SHARED = 64  # a shorter beginning that prompts share is not worth its own forward

Group = tuple[object, Sequence[np.ndarray]]


def score(
    model,
    groups: Sequence[Group],
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    gradient: bool = True,
) -> tuple[mx.array, mx.array]:
    """Log-probabilities (R, T) float32 of completions under their prompts, and which are real: a mask (R, T).

    `groups` holds (prompt `Encoded`, completions int (T_i,)) pairs; R runs over groups and, within them, over
    completions. T is the longest completion, rounded up to 8; masked entries are 0. (One padded array serves
    a loss better than ragged lists do; `split` makes those.) `temperature` divides the logits, `chunk` and
    `gradient` (False: none is wanted) are those of `token_logprobs`.

    Equals `score_plain`: in float32 losses to 1e-5 and gradients to 1e-4 relative. A document that several
    prompts share is forwarded once for them, and so are completions of one prompt that are the same tokens.
    """
    kv.route_attention(model.net)
    groups, copies = _distinct(groups)
    blocks, order = _prefix_blocks(model, groups)
    ids, targets, mask = _rows([groups[i] for i in order])
    counts = [len(groups[i][1]) for i in order]
    first = np.repeat([groups[i][0].next_position - 1 for i in order], counts)
    positions = (first[:, None] + np.arange(ids.shape[1])).astype(np.int32)
    if model.uses_mrope:
        positions = np.broadcast_to(positions, (3, *positions.shape))
    hidden = model.hidden(model.embed(ids), mx.array(positions), kv.shared_prefix_caches(blocks))
    flat = np.flatnonzero(mask)
    index = mx.array(flat.astype(np.int32))
    chosen = token_logprobs(
        model.loss_head(),
        hidden.reshape(-1, hidden.shape[-1])[index],
        mx.array(targets.reshape(-1)[flat]),
        temperature,
        chunk,
        gradient,
    )
    logprobs = mx.zeros(mask.size).at[index].add(chosen).reshape(mask.shape)
    if order != sorted(order):
        back = np.argsort(np.repeat(order, counts), kind="stable")
        logprobs, mask = logprobs[mx.array(back)], mask[back]
    if len(copies) != len(mask):
        logprobs, mask = logprobs[mx.array(copies)], mask[copies]
    return logprobs, mx.array(mask.astype(np.float32))


def _distinct(groups: Sequence[Group]) -> tuple[list[Group], np.ndarray]:
    """Each group's different completions, and for every completion (R,) the row that stands for it.

    A sure model repeats itself: late in a stage most completions of a prompt are equal.
    """
    kept, copies = [], []
    for prompt, completions in groups:
        first = sum(len(c) for _, c in kept)
        rows: dict[bytes, int] = {}
        for completion in completions:
            copies.append(first + rows.setdefault(np.asarray(completion, np.int32).tobytes(), len(rows)))
        kept.append((prompt, [np.frombuffer(row, np.int32) for row in rows]))
    return kept, np.array(copies, np.int32)


def split(values: mx.array, mask: mx.array) -> list[np.ndarray]:
    """The rows (T_i,) of a padded (R, T) array, as numpy."""
    return [v[m > 0] for v, m in zip(np.array(values), np.array(mask), strict=True)]


def score_plain(model, prompt, completion: np.ndarray, *, temperature: float = 1.0) -> mx.array:
    """Log-probabilities (T,) of one completion by one plain forward of the whole sequence: the reference."""
    whole = prompt.concat(completion)
    embeds, positions, _ = embed_pieces(model, [Piece(whole, 0, len(whole))])
    hidden = model.hidden(embeds, positions)[0, len(prompt) - 1 : -1]
    logits = model.head(hidden).astype(mx.float32) / temperature
    picked = mx.take_along_axis(logits, mx.array(completion)[:, None], axis=-1).squeeze(-1)
    return picked - mx.logsumexp(logits, axis=-1)


def _rows(groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets and mask (R, T); inputs are the prompt's last token and a row's tokens but its last."""
    longest = max(len(c) for _, completions in groups for c in completions)
    width = -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    shape = (sum(len(completions) for _, completions in groups), width)
    ids, targets, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    row = 0
    for prompt, completions in groups:
        for completion in completions:
            ids[row, 0] = prompt.ids[-1]
            ids[row, 1 : len(completion)] = completion[:-1]
            targets[row, : len(completion)] = completion
            mask[row, : len(completion)] = True
            row += 1
    return ids, targets, mask


def _prefix_blocks(model, groups: Sequence[Group]) -> tuple[list[kv.Block], list[int]]:
    """Forward the prompts without their last tokens: blocks of rows, and the groups' order in them."""
    blocks, order = [], []
    for cluster in cluster_prompts([prompt for prompt, _ in groups], LEAST_SHARED):
        indices = sorted(cluster.indices, key=lambda i: len(groups[i][1]))
        prefixes = _prompt_prefixes(model, [groups[i][0] for i in indices], cluster.shared)
        start = 0
        for count, run in groupby(indices, key=lambda i: len(groups[i][1])):
            size = len(list(run))
            if count:
                own = prefixes[-1]
                own = own if size == len(indices) else own.take(np.arange(start, start + size))
                blocks.append(kv.Block(size * count, (*prefixes[:-1], own)))
            start += size
        order += indices
    return blocks, order


def _prompt_prefixes(model, prompts: Sequence, start: int) -> tuple[kv.Prefix, ...]:
    """What the prompts share, their first `start` tokens (if any), and each one's rest but its last token."""
    if start > min(map(len, prompts)) - 2:
        start = 0
    shared = ()
    caches = kv.recording_caches(model.num_layers)
    if start:
        embeds, positions, lengths = embed_pieces(model, [Piece(prompts[0], 0, start)])
        model.hidden(embeds, positions, caches)
        shared = (kv.Prefix.of(caches, lengths),)
        caches = kv.shared_prefix_caches([kv.Block(len(prompts), shared)])
    embeds, positions, lengths = embed_pieces(model, [Piece(p, start, len(p) - 1) for p in prompts])
    model.hidden(embeds, positions, caches)
    return (*shared, kv.Prefix.of(caches, lengths, start))
