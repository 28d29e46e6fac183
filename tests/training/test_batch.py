import numpy as np
import pytest

from mpi_mlx.errors import DataError
from mpi_mlx.models.encoding import Encoded
from mpi_mlx.training.batch import Row, by_length, check_length, common_prefix, loss_weights, micro_batch

V = -1  # stands for a visual placeholder


class Picture:
    def __init__(self, key, num_tokens):
        self.key, self.num_tokens = key, num_tokens


def encoded(ids, images=(), assistant_from=None, positions=None):
    ids = np.array(ids, np.int32)
    visual = ids == V
    start = len(ids) if assistant_from is None else assistant_from
    positions = np.arange(len(ids)) if positions is None else np.array(positions)
    return Encoded(
        np.where(visual, 99, ids).astype(np.int32), np.arange(len(ids)) >= start, visual,
        tuple(Picture(*i) for i in images), np.broadcast_to(positions, (3, len(ids))).astype(np.int32),
    )  # fmt: skip


def row(ids, images=(), weights=None, positions=None, identity=""):
    e = encoded(ids, images, positions=positions)
    weights = np.ones(len(e)) if weights is None else np.array(weights)
    weights = np.where(e.visual | (np.arange(len(e)) == 0), 0, weights)
    return Row(e, weights.astype(np.float32), identity)


def test_loss_weights_by_hand():
    e = encoded([1, 2, V, V, 3, 4, 5], [("a", 2)], assistant_from=5)
    assert loss_weights(e, "cpt").tolist() == [0, 1, 0, 0, 1, 1, 1]  # all text; nothing predicts the first
    assert loss_weights(e, "sft").tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert loss_weights(e, "rl").tolist() == [0, 0, 0, 0, 0, 1, 1]
    shown = encoded([1, 2, V, V, 3], [("a", 2)], assistant_from=1)  # an image in an assistant turn
    assert loss_weights(shown, "sft").tolist() == [0, 1, 0, 0, 1]
    with pytest.raises(ValueError, match="no loss weights"):
        loss_weights(e, "dpo")


def test_whole_rows_as_arrays():
    micro = micro_batch([row([5, 6, 7], identity="a"), row([8, V, V, 9], [("x", 2)], identity="b")], pad_id=0)
    block = micro.tails
    assert micro.prefix is None and micro.identities == ("a", "b")
    assert block.ids.tolist() == [[5, 6, 7, 0, 0, 0, 0, 0], [8, 99, 99, 9, 0, 0, 0, 0]]
    assert block.targets[:, :3].tolist() == [[6, 7, 0], [99, 99, 9]]
    assert block.weights.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0]]
    assert block.lengths.tolist() == [3, 4] and [i.key for i in block.images] == ["x"]
    assert block.position_ids.shape == (3, 2, 8) and block.position_ids[0, 0].tolist() == [
        0,
        1,
        2,
        2,
        2,
        2,
        2,
        2,
    ]
    assert (micro.count, micro.tokens) == (3.0, 7)


def test_a_shared_prefix_counts_for_every_row():
    rows = [row([1, 2, 3, 4, 5]), row([1, 2, 3, 6]), row([1, 2, 3, 7, 8, 9])]
    assert common_prefix(rows) == 3
    micro = micro_batch(rows, pad_id=0, min_prefix=2)
    # the prefix predicts 2; the last shared token, 3, starts each tail and is predicted by the prefix
    assert micro.prefix.ids[0, :2].tolist() == [1, 2] and micro.prefix.lengths.tolist() == [2]
    assert micro.prefix.targets[0, :2].tolist() == [2, 3] and micro.prefix.weights[0].tolist()[:3] == [
        3,
        3,
        0,
    ]
    assert micro.tails.ids[:, :3].tolist() == [[3, 4, 5], [3, 6, 0], [3, 7, 8]]
    assert micro.tails.targets[:, :2].tolist() == [[4, 5], [6, 0], [7, 8]]
    assert micro.tails.position_ids[0, 0, :3].tolist() == [2, 3, 4]
    assert micro.owner.tolist() == [0, 0, 0]
    assert micro.count == sum(r.weights.sum() for r in rows) == 12
    assert micro.tokens == 2 + 3 + 2 + 4
    assert micro_batch(rows, pad_id=0, min_prefix=4).prefix is None


def test_prefixes_of_several_groups():
    rows = [
        row([1, 2, 3, 4]),
        row([1, 2, 3, 5]),
        row([6, 7, 8, 9, 1]),
        row([6, 7, 8, 9, 2]),
        row([6, 7, 8, 9, 3]),
    ]
    micro = micro_batch(rows, pad_id=0, groups=[[2, 3, 4], [0, 1]], min_prefix=2)
    assert micro.owner.tolist() == [0, 0, 0, 1, 1] and micro.prefix.lengths.tolist() == [3, 2]
    assert micro.count == sum(r.weights.sum() for r in rows)
    # a row on its own has nothing to share, and the rows stay whole
    assert micro_batch(rows, pad_id=0, groups=[[0, 1], [2]], min_prefix=2).prefix is None


@pytest.mark.parametrize(
    "other, length",
    [
        (row([1, 2, V, V, V, 3, 5], [("a", 3)]), 6),  # the same image: shared with what follows it
        (row([1, 2, V, V, V, 3, 5], [("b", 3)]), 2),  # another one behind the same placeholders
        (row([1, 2, V, V, 3, 4, 5], [("c", 2)]), 2),  # a smaller one
        (row([1, 2, V, V, V], [("a", 3)]), 2),  # ends with the image
        (row([1, 2, V, V, V, 3, 4], [("a", 3)], positions=[0, 1, 2, 3, 3, 5, 6]), 2),  # positions part in it
        (row([1, 2, V, V, V, 3, 4], [("a", 3)], weights=[0, 1, 0, 0, 0, 0, 1]), 2),  # not a token to spare
    ],
)
def test_a_prefix_never_cuts_through_an_image(other, length):
    first = row([1, 2, V, V, V, 3, 4], [("a", 3)])
    assert common_prefix([first, other]) == common_prefix([other, first]) == length
    micro = micro_batch([first, other], pad_id=0, min_prefix=1)
    images = [i.key for i in micro.tails.images] + [
        i.key for i in (micro.prefix.images if micro.prefix else ())
    ]
    expected = ["a"] if length == 6 else [first.encoded.images[0].key, other.encoded.images[0].key]
    assert sorted(images) == sorted(expected)


def test_the_second_of_two_images_differs():
    rows = [row([1, V, V, 2, V, V, 3, 4], [("a", 2), (key, 2)]) for key in "bc"]
    assert common_prefix(rows) == 4
    micro = micro_batch(rows, pad_id=0, min_prefix=1)
    assert [i.key for i in micro.prefix.images] == ["a"] and [i.key for i in micro.tails.images] == ["b", "c"]


def test_equal_rows_keep_a_token_each():
    rows = [row([1, 2, 3, 4])] * 2
    assert common_prefix(rows) == 3
    assert micro_batch(rows, pad_id=0, min_prefix=2).count == 6


def test_too_long_is_an_error_not_a_cut():
    long = row([1, 2, 3], identity="ex-7")
    assert check_length(long, 3) is long and check_length(long, None) is long
    with pytest.raises(DataError, match="'ex-7': 3 tokens, over max_tokens=2"):
        check_length(long, 2)


def test_by_length():
    rows = [row([1] * n) for n in (5, 2, 9, 3, 4)]
    assert by_length(rows, 2) == [[1, 3], [4, 0], [2]]
