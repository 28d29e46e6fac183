"""Differentiable log-probabilities of completions, each prompt forwarded once for its whole group.

The prompt is forwarded without its last token, keeping keys and values; each completion's row begins with
that token and attends to them, so that row position t predicts completion token t. What all completions of a
prompt begin with, their stem, is forwarded with the prompt: a sure model's completions differ late. Gradients flow
through the prompt's keys and values. Only completion positions reach the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import mlx.core as mx
import numpy as np

from mpi_mlx.models import kv
from mpi_mlx.models.pieces import Cluster, Piece, cluster_prompts, embed_pieces
from mpi_mlx.training.losses import token_logprobs
from mpi_mlx.training.stems import Shape, common_stem, padded, split_by_stem, stem_limit, together

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
    prompts share is forwarded once for them, and so are a prompt's completions that are the same tokens, and what
    all of them begin with.
    """
    kv.route_attention(model.net)
    groups, copies = _distinct(groups)
    trees, order, blocks, stems = _begin(model, groups)
    ids, targets, mask = _rows([trees[i] for i in order])
    counts = [len(trees[i].tails) for i in order]
    first = np.repeat([trees[i].begun.next_position - 1 for i in order], counts)
    positions = (first[:, None] + np.arange(ids.shape[1])).astype(np.int32)
    if model.uses_mrope:
        positions = np.broadcast_to(positions, (3, *positions.shape))
    hidden = model.hidden(model.embed(ids), mx.array(positions), kv.shared_prefix_caches(blocks))
    flat = mx.array(np.flatnonzero(mask).astype(np.int32))
    chosen = mx.concatenate([*stems, hidden.reshape(-1, hidden.shape[-1])[flat]])
    wanted = np.concatenate([*(trees[i].stem for i in order), targets.reshape(-1)[mask.reshape(-1)]])
    logprobs = token_logprobs(model.loss_head(), chosen, mx.array(wanted), temperature, chunk, gradient)
    places, real = _places(trees, order)
    places, real = mx.array(places[copies]), mx.array(real[copies])
    return mx.where(real, logprobs[places], 0.0), real.astype(mx.float32)


@dataclass(frozen=True)
class _Tree:
    """A prompt, the stem (S,) of its completions, and how each different one goes on; `begun`: prompt and stem."""

    prompt: object
    stem: np.ndarray
    tails: list[np.ndarray]
    begun: object


def parted(groups: Sequence[Group]) -> list[list[list[int]]]:
    """For each group, which completions should be scored apart, as groups of their own: see `split_by_stem`."""
    clusters = cluster_prompts([prompt for prompt, _ in groups], LEAST_SHARED)
    shared = {i: cluster.shared for cluster in clusters for i in cluster.indices}
    return [split_by_stem(len(prompt) - 1 - shared[i], found) for i, (prompt, found) in enumerate(groups)]


def forwards(groups: Sequence[Group], most_tokens: int) -> list[list[int]]:
    """Which groups to score in one call each, so that little is padded: their indices. `most_tokens` as in
    `stems.together`."""
    clusters = cluster_prompts([prompt for prompt, _ in groups], LEAST_SHARED)
    return together(_shapes(groups, clusters), most_tokens, sum(c.shared for c in clusters))


def _shapes(groups: Sequence[Group], clusters: Sequence[Cluster]) -> list[Shape]:
    """What each group costs, what its prompt shares with others left out."""
    shared = {i: cluster.shared for cluster in clusters for i in cluster.indices}
    return [Shape.of(len(prompt) - shared[i], completions) for i, (prompt, completions) in enumerate(groups)]


def _trees(groups: Sequence[Group], clusters: Sequence[Cluster], layers: int) -> list[_Tree]:
    limit = stem_limit(_shapes(groups, clusters), layers)
    found = []
    for prompt, completions in groups:
        cut = min(limit, common_stem(completions))
        stem = completions[0][:cut] if cut else np.zeros(0, np.int32)
        found.append(_Tree(prompt, stem, [c[cut:] for c in completions], prompt.concat(stem) if cut else prompt))
    return found


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


def _rows(trees: Sequence[_Tree]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets and mask (R, T); inputs are the last token before a tail and its tokens but its last."""
    tails = [(tree.begun.ids[-1], tail) for tree in trees for tail in tree.tails]
    shape = (len(tails), padded(max(len(tail) for _, tail in tails)))
    ids, targets, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, (before, tail) in enumerate(tails):
        ids[row, 0] = before
        ids[row, 1 : len(tail)] = tail[:-1]
        targets[row, : len(tail)] = tail
        mask[row, : len(tail)] = True
    return ids, targets, mask


def _places(trees: Sequence[_Tree], order: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where each different completion's tokens stand among what was scored, and which are real: (R, T), (R, T).

    Scored are, in `order`, first the stems and then the tails.
    """
    stems, tails = {}, {}
    at = 0
    for i in order:
        stems[i] = at
        at += len(trees[i].stem)
    for i in order:
        tails[i] = []
        for tail in trees[i].tails:
            tails[i].append(at)
            at += len(tail)
    rows = [
        np.concatenate([np.arange(stems[i], stems[i] + len(f.stem)), np.arange(start, start + len(tail))])
        for i, f in enumerate(trees)
        for start, tail in zip(tails[i], f.tails, strict=True)
    ]
    places = np.zeros((len(rows), padded(max(map(len, rows)))), np.int32)
    real = np.zeros(places.shape, bool)
    for row, found in enumerate(rows):
        places[row, : len(found)] = found
        real[row, : len(found)] = True
    return places, real


def _begin(model, groups: Sequence[Group]) -> tuple[list[_Tree], list[int], list[kv.Block], list[mx.array]]:
    """Forward the prompts and stems without their last tokens: the groups as trees, their order in what follows; blocks
    of rows, and the hidden states (S, D) that predict the stems."""
    clusters = cluster_prompts([prompt for prompt, _ in groups], LEAST_SHARED)
    trees = _trees(groups, clusters, model.num_layers)
    order, blocks, stems = [], [], []
    for cluster in clusters:
        indices = sorted(cluster.indices, key=lambda i: len(trees[i].tails))
        prefixes, found = _prompt_prefixes(model, [trees[i] for i in indices], cluster.shared)
        start = 0
        for count, run in groupby(indices, key=lambda i: len(trees[i].tails)):
            size = len(list(run))
            if count:
                own = prefixes[-1]
                own = own if size == len(indices) else own.take(np.arange(start, start + size))
                blocks.append(kv.Block(size * count, (*prefixes[:-1], own)))
            start += size
        order += indices
        stems += found
    return trees, order, blocks, stems


def _prompt_prefixes(model, trees: Sequence[_Tree], start: int) -> tuple[tuple[kv.Prefix, ...], list[mx.array]]:
    """What the prompts share, their first `start` tokens (if any), and each one's rest, stem included, but its last
    token; and the hidden states that predict the stems."""
    if start > min(len(f.prompt) for f in trees) - 2:
        start = 0
    shared = ()
    caches = kv.recording_caches(model.num_layers)
    if start:
        embeds, positions, lengths = embed_pieces(model, [Piece(trees[0].prompt, 0, start)])
        model.hidden(embeds, positions, caches)
        shared = (kv.Prefix.of(caches, lengths),)
        caches = kv.shared_prefix_caches([kv.Block(len(trees), shared)])
    embeds, positions, lengths = embed_pieces(model, [Piece(f.begun, start, len(f.begun) - 1) for f in trees])
    hidden = model.hidden(embeds, positions, caches)
    places = [row * hidden.shape[1] + len(f.prompt) - 1 - start + np.arange(len(f.stem)) for row, f in enumerate(trees)]
    flat = np.concatenate(places).astype(np.int32)
    states = [hidden.reshape(-1, hidden.shape[-1])[mx.array(flat)]] if len(flat) else []
    return (*shared, kv.Prefix.of(caches, lengths, start)), states
