from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from mpi_mlx.training.batch import Block
from mpi_mlx.training.packing import PackedBlock, first_fit, pack


def block(*lengths, width=8):
    """Row i holds 10 i + position; weights are 1 where real but at the first token."""
    rows, real = len(lengths), np.arange(width) < np.array(lengths)[:, None]
    ids = np.where(real, 10 * np.arange(1, rows + 1)[:, None] + np.arange(width), 0).astype(np.int32)
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), (1, rows, width))
    weights = (real & (np.arange(width) > 0)).astype(np.float32)
    visual = np.zeros((rows, width), bool)
    return Block(ids, positions, np.array(lengths, np.int32), ids + 1, weights, (), visual)


def test_first_fit_by_hand():
    assert first_fit([5, 2, 3, 4], 7) == [[0, 1], [3, 2]]
    assert first_fit([3, 3, 3], 3) == [[0], [1], [2]]


def test_pack_by_hand():
    packed = pack(block(3, 8, 2, 3))
    assert isinstance(packed, PackedBlock)
    assert packed.ids.tolist() == [[20, 21, 22, 23, 24, 25, 26, 27], [10, 11, 12, 40, 41, 42, 30, 31]]
    assert packed.segments.tolist() == [[2] * 8, [1, 1, 1, 4, 4, 4, 3, 3]]
    assert packed.position_ids[0].tolist() == [list(range(8)), [0, 1, 2, 0, 1, 2, 0, 1]]
    assert packed.weights[1].tolist() == [0, 1, 1, 0, 1, 1, 0, 1]
    assert (packed.targets == packed.ids + 1).all() and packed.lengths.tolist() == [8, 8]


def test_nothing_to_gain_is_left_alone():
    even = block(8, 7, 8)
    assert pack(even) is even


def test_images_go_with_their_rows():
    a, b, c = (SimpleNamespace(name=n, num_tokens=t) for n, t in (("a", 2), ("b", 1), ("c", 1)))
    padded = block(3, 8, 2, 3)
    visual = padded.visual.copy()
    visual[0, 1:3] = visual[1, 4] = visual[2, 1] = True
    packed = pack(replace(padded, images=(a, b, c), visual=visual))
    assert [image.name for image in packed.images] == ["b", "a", "c"]
    assert np.argwhere(packed.visual).tolist() == [[0, 4], [1, 1], [1, 2], [1, 7]]
