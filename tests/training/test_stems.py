"""What completions share, what that saves, and which prompts are forwarded together: by hand."""

import itertools

import numpy as np
import pytest

from mpi_mlx.training.stems import FORWARD_TOKENS, Shape, common_stem, padded, split_by_stem, stem_limit, together


def rows(*lists):
    return [np.array(x, np.int32) for x in lists]


@pytest.mark.parametrize(
    ("completions", "stem"),
    [
        (rows([5, 6, 7, 8], [5, 6, 9, 8]), 2),
        (rows([5, 6, 7], [4, 6, 7]), 0),
        (rows([5, 6, 7]), 2),  # alone: all but its last token
        (rows([5, 6], [5, 6, 7]), 1),  # each keeps a token of its own
        (rows([5], [5, 6]), 0),
        ([], 0),
    ],
)
def test_common_stem(completions, stem):
    assert common_stem(completions) == stem


def test_shape_counts_different_completions():
    assert Shape.of(9, rows([1, 2, 3], [1, 2, 3], [1, 2, 4, 5])) == Shape(prompt=9, rows=2, longest=4, stem=2)


def test_a_stem_goes_with_its_prompt_where_that_is_cheaper():
    # rows of 32 tokens become rows of 8: 4 x 24 tokens less, for 24 more in the prompt and a layer of its 10 + 24
    assert stem_limit([Shape(11, 4, 32, 24)], layers=10) == 24
    # a prompt of 1,000: its last layer, a tenth of it, is more than 2 x 24
    assert stem_limit([Shape(1001, 2, 32, 24)], layers=10) == 0
    # beside three prompts without a stem each of which would be padded by 24
    assert stem_limit([Shape(11, 4, 32, 24), *[Shape(11, 4, 32, 0)] * 3], layers=10) == 0
    assert stem_limit([Shape(11, 4, 32, 0)], layers=10) == 0


def cost(shapes):
    before = max(s.prompt - 1 + s.stem for s in shapes) * len(shapes)
    return before + sum(s.rows for s in shapes) * max(padded(s.longest - s.stem) for s in shapes) + FORWARD_TOKENS


def test_together_finds_the_cheapest_of_all_partitions_in_order_of_tails():
    random = np.random.default_rng(3)
    drawn = random.integers((5, 1, 0), (40, 9, 60), size=(8, 3)).tolist()
    shapes = [Shape(prompt, rows, 60, stem) for prompt, rows, stem in drawn]
    found = together(shapes, most_tokens=10**6)
    order = [i for part in found for i in part]
    assert sorted(order) == list(range(8))
    tails = [shapes[i].longest - shapes[i].stem for i in order]
    assert tails == sorted(tails)
    best = min(
        sum(cost([shapes[i] for i in order[a:b]]) for a, b in zip((0, *cuts), (*cuts, 8), strict=True))
        for n in range(8)
        for cuts in itertools.combinations(range(1, 8), n)
    )
    assert sum(cost([shapes[i] for i in part]) for part in found) == best
    assert 1 < len(found) < 8


def test_together_keeps_within_the_limit_but_for_one_prompt_s():
    shapes = [Shape(10, 4, 32, 0), Shape(10, 4, 32, 0), Shape(10, 40, 32, 0)]
    assert together(shapes, most_tokens=10**6) == [[0, 1, 2]]
    assert together(shapes, most_tokens=274) == [[0, 1], [2]]  # 2 x 9 + 8 x 32; 40 x 32 stand alone
    assert together(shapes, most_tokens=273) == [[0], [1], [2]]
    assert together([], most_tokens=256) == []


def test_a_beginning_that_prompts_share_keeps_them_together():
    shapes = [Shape(10, 4, 8, 0), Shape(10, 4, 64, 0)]  # apart: 4 x 56 tokens less
    assert together(shapes, most_tokens=10**6) == [[0], [1]]
    assert together(shapes, most_tokens=10**6, each=1000) == [[0, 1]]


def ids(*completions):
    return [np.array([int(c) for c in completion], np.int32) for completion in completions]


def test_one_that_differs_early_is_put_apart():
    """123456, 123457 and 89 after a prompt of 2: as one 2 + 6 + 6 + 2 = 16, apart (2 + 5 + 2) + (2 + 1 + 1) = 13."""
    assert split_by_stem(2, ids("123456", "123457", "89")) == [[0, 1], [2]]
    # a prompt of 6 costs more than the stem of 5 spares: 6 + 14 = 20 against (6 + 5 + 2) + (6 + 2) = 21
    assert split_by_stem(6, ids("123456", "123457", "89")) == [[0, 1, 2]]
    # equal ones stay together, in the order they came in
    assert split_by_stem(2, ids("89", "123456", "89", "123457")) == [[0, 2], [1, 3]]
    assert split_by_stem(2, ids("5", "5")) == [[0, 1]] and split_by_stem(0, []) == []
    # parts of parts: three stems
    assert split_by_stem(1, ids("11111123", "11111145", "11222267", "11222289", "99")) == [[0, 1], [2, 3], [4]]


def test_apart_never_costs_more():
    rng = np.random.default_rng(3)
    for prompt in (0, 1, 5, 30):
        same = [rng.integers(0, 9) for _ in range(9)]
        found = [np.concatenate([np.zeros(n), rng.integers(0, 3, 8)]).astype(np.int32) for n in same]
        parts = split_by_stem(prompt, found)
        assert sorted(i for part in parts for i in part) == list(range(9))

        def tokens(part, found=found, prompt=prompt):
            shape = Shape.of(prompt, [found[i] for i in part])
            different = {found[i].tobytes(): len(found[i]) for i in part}.values()
            return prompt + shape.stem + sum(n - shape.stem for n in different)

        assert sum(map(tokens, parts)) <= tokens(range(9))
