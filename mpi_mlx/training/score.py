"""Differentiable log-probabilities of completions, each prompt forwarded once for its whole group.

Completions that have much in common, as a trained model's do, are forwarded as a tree (`training.tree`), others as
rows (`training.rows`), whichever computes less. Only completion positions reach the vocabulary.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mpi_mlx.models import kv
from mpi_mlx.models.pieces import Piece, embed_pieces
from mpi_mlx.training.losses import token_logprobs
from mpi_mlx.training.rows import Group, Shape, forward_rows, padded, partition_rows, shared_lengths
from mpi_mlx.training.tree import Trie, forward_tree, partition_trees

TREE_TOKEN = 1.2  # what a token of a tree costs, in tokens of rows: attention is computed in smaller parts
TREE_SHARED = 0.06  # and each prompt's part of one that prompts share, whose keys are seen in many parts
TREE_DEPTH = 4096  # of longer prompts and completions, trees would keep too many copies of keys for the backward pass


def score(
    model,
    groups: Sequence[Group],
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    gradient: bool = True,
    tree: bool | None = None,
) -> tuple[mx.array, mx.array]:
    """Log-probabilities (R, T) float32 of completions under their prompts, and which are real: a mask (R, T).

    `groups` holds (prompt `Encoded`, completions int (T_i,)) pairs; R runs over groups and, within them, over
    completions. T is the longest completion, rounded up to 8; masked entries are 0. (One padded array serves
    a loss better than ragged lists do; `split` makes those.) `temperature` divides the logits, `chunk` and
    `gradient` (False: none is wanted) are those of `token_logprobs`. `tree`: how to forward them, as `forwards` chose;
    None: what is cheaper for these alone.

    Equals `score_plain`: in float32 losses to 1e-5 and gradients to 1e-4 relative.
    """
    kv.route_attention(model.net)
    if tree is None:
        tree = sum(trees_spare(groups, model.num_layers)) > 0
    forward = forward_tree if tree else forward_rows
    hidden, targets, found = forward(model, groups)
    logprobs = token_logprobs(model.loss_head(), hidden, mx.array(targets), temperature, chunk, gradient)
    places = np.zeros((len(found), padded(max(map(len, found)))), np.int32)
    real = np.zeros(places.shape, bool)
    for row, at in enumerate(found):
        places[row, : len(at)] = at
        real[row, : len(at)] = True
    real = mx.array(real)
    return mx.where(real, logprobs[mx.array(places)], 0.0), real.astype(mx.float32)


def trees_spare(groups: Sequence[Group], layers: int) -> list[float]:
    """How many tokens fewer each group costs as a tree than as rows; what its prompt shares with others left out."""
    spared = []
    for (prompt, completions), shared in zip(groups, shared_lengths([p for p, _ in groups]), strict=True):
        own = len(Trie.of_groups([(prompt, completions)]).inner) - shared
        deep = len(prompt) + max(map(len, completions), default=0) > TREE_DEPTH
        rows = Shape.of(len(prompt) - shared, completions).cost(layers)
        spared.append(-float("inf") if deep else rows - TREE_TOKEN * own - TREE_SHARED * shared)
    return spared


def forwards(groups: Sequence[Group], most_tokens: int, layers: int) -> list[tuple[list[int], bool]]:
    """Which groups to score in one call each: their indices, and whether as a tree.

    A forward holds at most `most_tokens` (or one group). Each group has completions.
    """
    spared, parts = trees_spare(groups, layers), []
    for partition, which in ((partition_trees, True), (partition_rows, False)):
        indices = [i for i, s in enumerate(spared) if (s > 0) == which]
        for part in partition([groups[i] for i in indices], most_tokens):
            parts.append(([indices[i] for i in part], which))
    return parts


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
