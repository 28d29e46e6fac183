"""Which prompts' completions are forwarded together as rows, and what that costs: by hand."""

import itertools

import numpy as np

from mpi_mlx.training.rows import FORWARD_TOKENS, Shape, padded, together


def rows(*lists):
    return [np.array(x, np.int32) for x in lists]


def test_shape_counts_different_completions():
    shape = Shape.of(9, rows([1, 2, 3], [1, 2, 3], [1, 2, 4, 5]))
    assert shape == Shape(prompt=9, rows=2, longest=4)
    assert shape.cost(layers=4) == 8 * 3 / 4 + 2 * 8  # a prompt's last layer is spared; rows are padded to 8


def cost(shapes):
    before = max(s.prompt - 1 for s in shapes) * len(shapes)
    return before + sum(s.rows for s in shapes) * max(padded(s.longest) for s in shapes) + FORWARD_TOKENS


def test_together_finds_the_cheapest_of_all_partitions_in_order_of_length():
    random = np.random.default_rng(3)
    shapes = [Shape(*drawn) for drawn in random.integers((5, 1, 1), (40, 9, 60), size=(8, 3)).tolist()]
    found = together(shapes, most_tokens=10**6)
    order = [i for part in found for i in part]
    assert sorted(order) == list(range(8))
    lengths = [shapes[i].longest for i in order]
    assert lengths == sorted(lengths)
    best = min(
        sum(cost([shapes[i] for i in order[a:b]]) for a, b in zip((0, *cuts), (*cuts, 8), strict=True))
        for n in range(8)
        for cuts in itertools.combinations(range(1, 8), n)
    )
    assert sum(cost([shapes[i] for i in part]) for part in found) == best
    assert 1 < len(found) < 8


def test_together_keeps_within_the_limit_but_for_one_prompt_s():
    shapes = [Shape(10, 4, 32), Shape(10, 4, 32), Shape(10, 40, 32)]
    assert together(shapes, most_tokens=10**6) == [[0, 1, 2]]
    assert together(shapes, most_tokens=274) == [[0, 1], [2]]  # 2 x 9 + 8 x 32; 40 x 32 stand alone
    assert together(shapes, most_tokens=273) == [[0], [1], [2]]
    assert together([], most_tokens=256) == []


def test_a_beginning_that_prompts_share_keeps_them_together():
    shapes = [Shape(10, 4, 8), Shape(10, 4, 64)]  # apart: 4 x 56 tokens less
    assert together(shapes, most_tokens=10**6) == [[0], [1]]
    assert together(shapes, most_tokens=10**6, each=1000) == [[0, 1]]
