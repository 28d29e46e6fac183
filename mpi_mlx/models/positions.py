"""Rotary position ids, computed once per sequence in numpy.

Qwen2-VL's multimodal rotary embedding (arXiv 2409.12191, section 2.1) gives a token three positions: time,
height and width. Text advances all three together; an image of ``(t, h, w)`` merged cells spans a block and
text goes on after the block's largest position. mlx-vlm computes the same ids one token at a time and keeps
them on the module between calls; here they belong to the sequence.
"""

from collections.abc import Sequence

import numpy as np

Grid = tuple[int, int, int]


def contiguous_positions(length: int) -> np.ndarray:
    """Positions ``0 .. length-1`` as int32 of shape (1, T)."""
    return np.arange(length, dtype=np.int32)[None]


def mrope_positions(visual: np.ndarray, grids: Sequence[Grid], merge_size: int) -> np.ndarray:
    """Time, height and width positions of one sequence.

    Args:
        visual: bool (T,), True at image placeholder tokens.
        grids: ``(t, h, w)`` in patches of each image, in reading order.
        merge_size: patches merged into one token along each side.

    Returns:
        int32 (3, T).

    Raises:
        ValueError: the placeholders do not match the grids.

    >>> mrope_positions(np.array([False, True, True, False]), [(1, 2, 4)], 2).tolist()
    [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]
    """
    length = len(visual)
    where = np.flatnonzero(visual)
    if not grids:
        if len(where):
            raise ValueError(f"{len(where)} visual tokens but no image")
        return np.broadcast_to(np.arange(length, dtype=np.int32), (3, length)).copy()
    cells = [(t, h // merge_size, w // merge_size) for t, h, w in grids]
    sizes = [t * h * w for t, h, w in cells]
    if sum(sizes) != len(where):
        raise ValueError(f"{len(where)} visual tokens, but the images need {sum(sizes)}")
    positions = np.empty((3, length), dtype=np.int32)
    cursor, next_position, seen = 0, 0, 0
    for (t, h, w), size in zip(cells, sizes, strict=True):
        start = int(where[seen])
        text = start - cursor
        positions[:, cursor:start] = next_position + np.arange(text, dtype=np.int32)
        next_position += text
        block = np.indices((t, h, w), dtype=np.int32).reshape(3, size)
        positions[:, start : start + size] = next_position + block
        next_position += max(t, h, w)
        cursor, seen = start + size, seen + size
    positions[:, cursor:] = next_position + np.arange(length - cursor, dtype=np.int32)
    return positions
