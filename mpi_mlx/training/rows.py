"""Completions as rows that continue their prompts: for those that have little in common.

The prompt is forwarded without its last token, keeping keys and values; each completion's row begins with
that token and attends to them, so that row position t predicts completion token t. Gradients flow through the
prompt's keys and values.

Costs are in tokens: what a forward of padded rows computes.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mpi_mlx.models import kv
from mpi_mlx.models.pieces import Piece, cluster_prompts, embed_pieces

WIDTH_MULTIPLE = 8  # completions are padded to a multiple of this, so that few distinct shapes occur
FORWARD_TOKENS = 64  # what one more forward costs besides its tokens
LEAST_SHARED = 64  # a shorter beginning that prompts share is not worth its own forward

Group = tuple[object, Sequence[np.ndarray]]


def padded(width: int) -> int:
    return -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


class Scored(NamedTuple):
    """Hidden states (K, D), the tokens (K,) that they predict, and where each completion's (T_i,) stand in these."""

    hidden: mx.array
    targets: np.ndarray
    places: list[np.ndarray]


def forward_rows(model, groups: Sequence[Group]) -> Scored:
    """A document that several prompts share is forwarded once for them, and so are equal completions of a prompt."""
    groups, copies = _distinct(groups)
    order, blocks = _begin(model, groups)
    ids, targets, mask = _rows([groups[i] for i in order])
    first = np.repeat([groups[i][0].next_position - 1 for i in order], [len(groups[i][1]) for i in order])
    positions = (first[:, None] + np.arange(ids.shape[1])).astype(np.int32)
    if model.uses_mrope:
        positions = np.broadcast_to(positions, (3, *positions.shape))
    hidden = model.hidden(model.embed(ids), mx.array(positions), kv.shared_prefix_caches(blocks))
    flat = mx.array(np.flatnonzero(mask).astype(np.int32))
    lengths = mask.sum(axis=1)
    starts = np.cumsum(lengths) - lengths
    rows = iter([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
    places = {i: [next(rows) for _ in groups[i][1]] for i in order}
    found = [row for i in range(len(groups)) for row in places[i]]
    return Scored(hidden.reshape(-1, hidden.shape[-1])[flat], targets[mask], [found[i] for i in copies])


def _distinct(groups: Sequence[Group]) -> tuple[list[Group], list[int]]:
    """Each group's different completions, and for every completion the row that stands for it."""
    kept, copies = [], []
    for prompt, completions in groups:
        first = sum(len(c) for _, c in kept)
        rows: dict[bytes, int] = {}
        for completion in completions:
            copies.append(first + rows.setdefault(np.asarray(completion, np.int32).tobytes(), len(rows)))
        kept.append((prompt, [np.frombuffer(row, np.int32) for row in rows]))
    return kept, copies


def _rows(groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets and mask (R, T); inputs are the prompt's last token and the completion but its last."""
    rows = [(prompt.ids[-1], completion) for prompt, completions in groups for completion in completions]
    shape = (len(rows), padded(max(len(completion) for _, completion in rows)))
    ids, targets, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, (before, completion) in enumerate(rows):
        ids[row, 0] = before
        ids[row, 1 : len(completion)] = completion[:-1]
        targets[row, : len(completion)] = completion
        mask[row, : len(completion)] = True
    return ids, targets, mask


def _begin(model, groups: Sequence[Group]) -> tuple[list[int], list[kv.Block]]:
    """Forward the prompts without their last tokens: the groups' order in what follows, and blocks of rows."""
    order, blocks = [], []
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
    return order, blocks


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
    embeds, positions, lengths = embed_pieces(model, [Piece(prompt, start, len(prompt) - 1) for prompt in prompts])
    model.hidden(embeds, positions, caches)
    return (*shared, kv.Prefix.of(caches, lengths, start))


class Shape(NamedTuple):
    """A prompt and its completions, as far as their cost goes."""

    prompt: int  # its own tokens, without what it shares with others
    rows: int  # different completions
    longest: int

    @staticmethod
    def of(prompt: int, completions: Sequence[np.ndarray]) -> "Shape":
        different = {np.asarray(c, np.int32).tobytes(): c for c in completions}.values()
        return Shape(prompt, len(different), max(map(len, different), default=0))

    def cost(self, layers: int) -> float:
        """Of a prompt's last layer, only keys and values are computed."""
        return (self.prompt - 1) * (1 - 1 / layers) + self.rows * padded(self.longest)


def shared_lengths(prompts: Sequence) -> list[int]:
    """How many leading tokens each prompt shares with others, and is not forwarded with."""
    shared = {i: cluster.shared for cluster in cluster_prompts(prompts, LEAST_SHARED) for i in cluster.indices}
    return [shared[i] for i in range(len(prompts))]


def partition_rows(groups: Sequence[Group], most_tokens: int) -> list[list[int]]:
    """Which groups to forward together, so that little is padded: their indices. `most_tokens` as in `together`."""
    prompts = [prompt for prompt, _ in groups]
    lengths = zip(groups, shared_lengths(prompts), strict=True)
    shapes = [Shape.of(len(prompt) - shared, completions) for (prompt, completions), shared in lengths]
    return together(shapes, most_tokens, sum(c.shared for c in cluster_prompts(prompts, LEAST_SHARED)))


def together(shapes: Sequence[Shape], most_tokens: int, each: int = 0) -> list[list[int]]:
    """Indices of the shapes that should share a forward: the least padding and the fewest forwards.

    A forward holds at most `most_tokens` of prompts and rows (or one prompt with its own), what prompts share
    not counted; it costs `FORWARD_TOKENS` and `each` (what prompts share) more. Deterministic; they come by how long
    their completions are.
    """
    order = sorted(range(len(shapes)), key=lambda i: shapes[i].longest)
    best, cut = [0.0], [0]
    for stop in range(1, len(order) + 1):
        rows = prompt = width = 0
        found = (float("inf"), stop - 1)
        for start in range(stop - 1, -1, -1):
            shape = shapes[order[start]]
            rows, prompt = rows + shape.rows, max(prompt, shape.prompt - 1)
            width = max(width, padded(shape.longest))
            if start < stop - 1 and (stop - start) * prompt + rows * width > most_tokens:
                break
            cost = best[start] + (stop - start) * prompt + rows * width + FORWARD_TOKENS + each
            found = min(found, (cost, start))
        best.append(found[0])
        cut.append(found[1])
    out, stop = [], len(order)
    while stop:
        out.append(order[cut[stop] : stop])
        stop = cut[stop]
    return out[::-1]
