"""Attention in forests of tokens against a dense mask; where they are cut, by hand."""

import mlx.core as mx
import numpy as np
import pytest

from mpi_mlx.models import forest as forest_module
from mpi_mlx.models.forest import Forest, cut, subtree_ends


def drawn(rng, count, stay):
    """A random forest, depth first: most tokens follow the one before, others branch off its ancestors or are roots."""
    parents = [-1]
    for i in range(1, count):
        parent = i - 1
        while parent >= 0 and rng.random() > stay:
            parent = parents[parent]
        parents.append(parent)
    return np.array(parents)


def ancestors(parents):
    """(N, N) bool: which tokens each sees, and positions (N,)."""
    seen = np.eye(len(parents), dtype=bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            seen[i] |= seen[parent]
    return seen, seen.sum(axis=1) - 1


def use_blocks(monkeypatch, size):
    monkeypatch.setattr(forest_module, "CAUSAL_BLOCK", size)
    monkeypatch.setattr(forest_module, "CAUSAL_BLOCK_GPU", size)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("count", "stay"), [(1, 1.0), (40, 1.0), (60, 0.9), (90, 0.6), (200, 0.97)])
@pytest.mark.parametrize("keep", [True, False])
def test_attention_is_that_of_a_dense_mask(count, stay, window, keep, monkeypatch):
    use_blocks(monkeypatch, 8)
    monkeypatch.setattr(forest_module, "KEEP_BYTES", 2**30 if keep else 0)
    parents = drawn(np.random.default_rng(count), count, stay)
    seen, positions = ancestors(parents)
    forest = Forest(parents, positions)
    if window:
        seen &= positions[:, None] - positions < window
    mx.random.seed(0)
    queries, keys, values = (mx.random.normal((1, h, count, 8)) for h in (4, 2, 2))
    weight = mx.random.normal(queries.shape)

    def ours(*x):
        return (forest.attend(*x, 0.3, window) * weight).sum()

    def dense(q, k, v):
        scores = q @ mx.repeat(k, 2, axis=1).swapaxes(-1, -2) * 0.3
        scores = mx.where(mx.array(seen), scores, -mx.inf)
        return (mx.softmax(scores, axis=-1) @ mx.repeat(v, 2, axis=1) * weight).sum()

    (a, found), (b, expected) = (mx.value_and_grad(f, argnums=(0, 1, 2))(queries, keys, values) for f in (ours, dense))
    assert a.item() == pytest.approx(b.item(), rel=1e-4, abs=1e-4)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(x), np.array(y), atol=2e-5)


def test_ends_are_where_descendants_stop():
    parents = drawn(np.random.default_rng(1), 80, 0.7)
    seen, _ = ancestors(parents)
    ends = subtree_ends(parents)
    for i in range(80):  # a descendant sees it: those of depth-first order are a run
        assert np.flatnonzero(seen[:, i]).tolist() == list(range(i, ends[i]))


def test_cuts_are_where_scores_are_fewest(monkeypatch):
    # two tokens, then two ways of three: 2 x 2 + 3 x (2 + 3) + 3 x (2 + 3) scores, against 8 x 8 uncut
    parents = np.array([-1, 0, 1, 2, 3, 1, 5, 6])
    assert cut(parents, 2) == [0, 2, 5, 8]
    use_blocks(monkeypatch, 2)
    assert [run.pairs for run in Forest(parents, ancestors(parents)[1]).runs] == [4, 15, 15]
    assert cut(parents, 10) == [0, 8]
    # two trees are cut apart: 3 x 3 + 3 x 3 + 2 x 9 = 36 against 36 + 9
    assert cut(np.array([-1, 0, 1, -1, 3, 4]), 3) == [0, 3, 6]
    assert cut(np.array([-1]), 128) == [0, 1]
