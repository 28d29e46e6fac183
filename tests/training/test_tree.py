"""Trees of prefixes, and which prompts share a forward: by hand."""

from types import SimpleNamespace

import numpy as np

from mpi_mlx.training.tree import Trie, partition_trees


def ids(*completions):
    return [np.array([int(c) for c in completion], np.int32) for completion in completions]


def prompt(text):
    return SimpleNamespace(ids=ids(text)[0], images=())


def test_every_beginning_stands_once():
    """123, 124, 12 and 5 after a prompt of 9: 9, then 91, 912 (a whole completion), 9123, 9124 and 95."""
    trie = Trie.of_groups([(prompt("9"), ids("5", "124", "12", "123", "12"))])
    assert trie.parents.tolist() == [-1, 0, 1, 2, 2, 0]
    assert [path.tolist() for path in trie.paths] == [[0, 5], [0, 1, 2, 4], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2]]
    # by row: what is new in each, sorted: 912, 912 again, 9123, 9124, 95
    assert trie.spans == [(2, 0, 3), (4, 3, 3), (3, 3, 4), (1, 3, 4), (0, 1, 2)]
    assert trie.inner.tolist() == [0, 1, 2]  # something follows


def test_prompts_share_their_beginning_and_may_share_nothing():
    trie = Trie.of_groups([(prompt("71"), ids("3")), (prompt("5"), ids("6")), (prompt("72"), ids("3"))])
    # 56, then 713, of which 723 has 7
    assert trie.parents.tolist() == [-1, 0, -1, 2, 3, 2, 5]
    assert [path.tolist() for path in trie.paths] == [[2, 3, 4], [0, 1], [2, 5, 6]]


def test_images_are_told_apart():
    def pictured(key):
        image = SimpleNamespace(key=key, num_tokens=2)
        visual = np.array([False, True, True, False])
        return SimpleNamespace(ids=ids("1663")[0], images=(image,), visual=visual)

    same = Trie.of_groups([(pictured("a"), ids("4")), (pictured("a"), ids("5"))])
    other = Trie.of_groups([(pictured("a"), ids("4")), (pictured("b"), ids("5"))])
    assert (len(same.parents), len(other.parents)) == (4 + 2, 1 + 2 * 4)


def test_a_forward_holds_what_is_new_and_what_it_begins_with():
    groups = [(prompt("111"), ids("22", "23")), (prompt("5"), ids("6")), (prompt("1112"), ids("88", "89"))]
    # sorted: 111 with 22 and 23 is 6 tokens; 1112 with 88 and 89 has 4 in common and 3 of its own; 56 is 2
    assert partition_trees(groups, 11) == [[0, 2, 1]]
    assert partition_trees(groups, 9) == [[0, 2], [1]]
    assert partition_trees(groups, 8) == [[0], [2], [1]]  # 1112 and its own are 7 alone, and 2 more are 9
    assert partition_trees(groups, 1) == [[0], [2], [1]]
    assert partition_trees([], 9) == []
