"""Completions as a tree of prefixes: every distinct beginning of prompts and completions is forwarded once.

Completions of a prompt share the prompt and what they begin with, and prompts share a document. One forward computes
each token of the tree (`models.forest`), and gradients flow through what is shared.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mpi_mlx.models.forest import Forest, ForestCache
from mpi_mlx.models.pieces import comparable, images_between
from mpi_mlx.training.rows import Group, Scored

Row = tuple[object, np.ndarray]  # a prompt and one of its completions


class Trie(NamedTuple):
    """N different prefixes of R sequences, each standing for its last token, depth first.

    `spans`: (row, start, stop), the tokens of a sequence that are in none before it, in order, N in all;
    `parents` (N,): the prefix one token shorter, -1 for none; `paths`: a sequence's prefixes (T_i,), by row.
    """

    spans: list[tuple[int, int, int]]
    parents: np.ndarray
    paths: list[np.ndarray]

    @staticmethod
    def of(sequences: Sequence[np.ndarray], order: Sequence[int]) -> "Trie":
        """`order`: in which the sequences (T_i,) come. Each shares what it has in common with the one before: all that
        there is where they are sorted.

        >>> trie = Trie.of([np.array([5, 6]), np.array([5, 7])], [0, 1])
        >>> trie.parents.tolist(), [path.tolist() for path in trie.paths]
        ([-1, 0, 0], [[0, 1], [0, 2]])
        """
        spans, parents, paths = [], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)] * len(sequences)
        last, path, count = np.zeros(0, np.int64), np.zeros(0, np.int64), 0
        for row in order:
            sequence = sequences[row]
            shared = _shared(last, sequence)
            added = len(sequence) - shared
            path = np.concatenate([path[:shared], np.arange(count, count + added)])
            parents.append(np.concatenate([[-1], path])[shared:-1])
            spans.append((row, shared, len(sequence)))
            last, paths[row], count = sequence, path, count + added
        return Trie(spans, np.concatenate(parents), paths)

    @staticmethod
    def of_groups(groups: Sequence[Group]) -> "Trie":
        """Of prompts with their completions, a row for each completion; images are told apart."""
        codes = comparable([prompt for prompt, _ in groups])
        rank = {i: n for n, i in enumerate(sorted(range(len(codes)), key=lambda i: codes[i].tolist()))}
        rows = [(i, completion) for i, (_, completions) in enumerate(groups) for completion in completions]
        order = sorted(range(len(rows)), key=lambda row: (rank[rows[row][0]], rows[row][1].tolist()))
        return Trie.of([np.concatenate([codes[i], completion]) for i, completion in rows], order)

    @property
    def inner(self) -> np.ndarray:
        """The prefixes that something follows: those to forward."""
        return np.unique(self.parents[self.parents >= 0])


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """Leading tokens that are the same."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length


def forward_tree(model, groups: Sequence[Group]) -> Scored:
    rows = [(prompt, completion) for prompt, completions in groups for completion in completions]
    trie = Trie.of_groups(groups)
    ids, positions, images = _tokens(trie, rows)
    inner = trie.inner
    number = np.full(len(ids) + 1, -1)  # the last stands for no parent
    number[inner] = np.arange(len(inner))
    forest = Forest(number[trie.parents[inner]], positions[0, inner])
    embeds = model.embed(ids[inner, None], mx.concatenate(model.features(images)) if images else None)
    at = positions[:, inner, None] if model.uses_mrope else positions[0, inner, None]
    hidden = model.hidden(embeds, mx.array(at), [ForestCache(forest) for _ in range(model.num_layers)])[:, 0]
    ends = [path[len(prompt) :] for path, (prompt, _) in zip(trie.paths, rows, strict=True)]
    scored = np.unique(np.concatenate(ends))
    before = number[trie.parents[scored]].astype(np.int32)
    return Scored(hidden[mx.array(before)], ids[scored], [np.searchsorted(scored, end) for end in ends])


def _tokens(trie: Trie, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, list]:
    """Ids (N,) and positions (3 or 1, N) of a tree's tokens, and the images among them."""
    ids, positions, images = [], [], []
    for row, start, stop in trie.spans:
        prompt, completion = rows[row]
        whole = prompt.concat(completion)
        ids.append(whole.ids[start:stop])
        positions.append(whole.position_ids[:, start:stop])
        images += images_between(whole, start, stop)
    return np.concatenate(ids), np.concatenate(positions, axis=1), images


def partition_trees(groups: Sequence[Group], most_tokens: int) -> list[list[int]]:
    """Which groups to forward together: their indices. A forward holds at most `most_tokens` (or one group); groups
    that begin alike are neighbours. Nothing is padded, so that any may share one."""
    owner = np.repeat(np.arange(len(groups)), [len(completions) for _, completions in groups]).tolist()
    sizes: dict[int, int] = {}
    shared: dict[int, int] = {}
    for row, start, stop in Trie.of_groups(groups).spans:
        shared.setdefault(owner[row], start)
        sizes[owner[row]] = sizes.get(owner[row], 0) + stop - start
    parts, held = [], most_tokens
    for i, size in sizes.items():
        if held + size > most_tokens:
            parts.append([])
            held = shared[i]  # is forwarded again
        parts[-1].append(i)
        held += size
    return parts
