"""Several sequences in one row: unequal lengths without padding.

Sequences are moved, never cut: each stays a run of tokens with its own positions, loss weights and number in
`segments`, and `models.kv.PackedMask` keeps them apart in attention. Losses and gradients equal the padded
batch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpi_mlx.training.batch import WIDTH_MULTIPLE, Block

WORTHWHILE = 0.85  # packed rows are at most this share of the padded ones


@dataclass(frozen=True)
class PackedBlock(Block):
    """A `Block` whose rows hold several sequences; `segments` int32 (B, T) numbers them from 1, 0 is padding.

    `lengths` and `targets`, `weights` and so on are those of the rows; images are in reading order over them.
    """

    segments: np.ndarray


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices whose `lengths` sum to at most `capacity`: first fit, longest first.

    >>> first_fit([5, 2, 3, 4], 7)
    [[0, 1], [3, 2]]
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((b for b, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            bins.append([])
            room.append(capacity)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


def pack(block: Block, capacity: int | None = None) -> Block:
    """The sequences of a padded block in fewer rows of `capacity` tokens (the block's width by default).

    Returns the block itself where that would not save a sixth of it.
    """
    rows, width = block.ids.shape
    capacity = max(capacity or 0, width)
    bins = first_fit(block.lengths.tolist(), capacity)
    used = max(sum(int(block.lengths[i]) for i in b) for b in bins)
    used = -(-used // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    if len(bins) * used > WORTHWHILE * rows * width:
        return block
    shape, images = (len(bins), used), _images_by_row(block)

    def moved(array: np.ndarray, axis: int = 0) -> np.ndarray:
        out = np.zeros((*array.shape[:axis], *shape), array.dtype)
        if array is block.ids or array is block.targets:
            out[:] = block.ids[0, -1]
        for row, members in enumerate(bins):
            start = 0
            for i in members:
                n = int(block.lengths[i])
                out[..., row, start : start + n] = array[..., i, :n]
                start += n
        return out

    numbers = np.broadcast_to(np.arange(1, rows + 1, dtype=np.int32)[:, None], (rows, width))
    plain = replace(
        block,
        ids=moved(block.ids),
        position_ids=moved(block.position_ids, 1),
        lengths=np.array([sum(int(block.lengths[i]) for i in b) for b in bins], np.int32),
        targets=moved(block.targets),
        weights=moved(block.weights),
        images=tuple(image for members in bins for i in members for image in images[i]),
        visual=moved(block.visual),
    )
    return PackedBlock(**vars(plain), segments=moved(numbers))


def _images_by_row(block: Block) -> list[list]:
    """The block's images, which are in reading order, row by row."""
    left, rows = list(block.images), []
    for count in block.visual.sum(axis=1).tolist():
        mine: list = []
        while sum(image.num_tokens for image in mine) < count:
            mine.append(left.pop(0))
        rows.append(mine)
    return rows
