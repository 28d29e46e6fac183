"""Qwen2.5-VL's vision tower over many images of one size at once.

mlx-vlm runs all images of a call as one sequence and splits the attention per window and image in Python.
Images of one size have the same windows, so here they are a batch: one attention of shape (images x windows,
patches of a window). Same weights (and any adapters on them), equal to mlx-vlm's tower to rounding; the patch
embedding is a matrix product instead of a 3-d convolution, which is also what makes its gradient quick.
"""

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np


@dataclass(frozen=True)
class _Layout:
    """What one image size fixes: the order of merged cells, the windows and the rotary angles."""

    order: mx.array  # (cells,) merged cells in window order
    inverse: mx.array  # (cells,)
    cos: mx.array  # (L, head_dim), patches in window order
    sin: mx.array
    windows: int
    gather: mx.array | None  # (windows, longest) patch index of each padded slot, None when windows are equal
    mask: mx.array | None  # (windows, 1, 1, longest)
    scatter: mx.array | None  # (L,) slot of each patch


@lru_cache(maxsize=64)
def _layout(grid: tuple[int, int, int], merge: int, window_cells: int, head_dim: int) -> _Layout:
    t, h, w = grid
    rows, cols = h // merge, w // merge
    cells = np.arange(t * rows * cols).reshape(t, rows, cols)
    windows = [
        cells[frame, top : top + window_cells, left : left + window_cells].reshape(-1)
        for frame in range(t)
        for top in range(0, rows, window_cells)
        for left in range(0, cols, window_cells)
    ]
    order = np.concatenate(windows)
    # patches come in merged-cell order: (row, column, row in cell, column in cell)
    row, col = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    by_cell = [
        np.tile(x.reshape(rows, merge, cols, merge).transpose(0, 2, 1, 3).reshape(-1, merge * merge), (t, 1))[
            order
        ].reshape(-1)
        for x in (row, col)
    ]
    frequency = 1.0 / 10000.0 ** (np.arange(0, head_dim // 2, 2, dtype=np.float32) / (head_dim // 2))
    angles = np.concatenate([x[:, None].astype(np.float32) * frequency for x in by_cell], axis=1)
    angles = np.concatenate([angles, angles], axis=1)
    sizes = [len(window) * merge * merge for window in windows]
    longest = max(sizes)
    gather = mask = scatter = None
    if len(set(sizes)) > 1:
        starts = np.cumsum([0, *sizes[:-1]])
        slots = np.arange(longest)
        real = slots[None] < np.array(sizes)[:, None]
        gather = mx.array(np.where(real, starts[:, None] + slots, 0).astype(np.int32))
        mask = mx.array(real[:, None, None])
        scatter = mx.array(np.flatnonzero(real.reshape(-1)).astype(np.int32))
    return _Layout(
        mx.array(order.astype(np.int32)),
        mx.array(np.argsort(order).astype(np.int32)),
        mx.array(np.cos(angles)),
        mx.array(np.sin(angles)),
        len(windows),
        gather,
        mask,
        scatter,
    )


def patch_embed(tower: nn.Module, pixels: mx.array) -> mx.array:
    """(N, L, channels * time * height * width) -> (N, L, D)."""
    weight = tower.patch_embed.proj.weight  # (D, time, height, width, channels)
    weight = weight.transpose(0, 4, 1, 2, 3).reshape(weight.shape[0], -1)
    return pixels.astype(weight.dtype) @ weight.T


def vision_states(tower: nn.Module, pixels: mx.array, grid: tuple[int, int, int]) -> mx.array:
    """The tower without its merger.

    Args:
        tower: mlx-vlm's qwen2_5_vl VisionModel.
        pixels: (N, L, channels * time * height * width) from the image processor, N images of one size.
        grid: ``(t, h, w)`` in patches, with t * h * w = L.

    Returns:
        (N, L, D) in the processor's order; ``tower.merger`` of it gives (N * L / merge^2, D_text).
    """
    merge = tower.spatial_merge_size
    first = tower.blocks[0].attn
    layout = _layout(grid, merge, tower.window_size // merge // tower.patch_size, first.head_dim)
    x = patch_embed(tower, pixels)
    count, length, _ = x.shape
    x = _permute_cells(x, layout.order, merge)
    cos, sin = layout.cos.astype(x.dtype), layout.sin.astype(x.dtype)
    for index, block in enumerate(tower.blocks):
        whole = index in tower.fullatt_block_indexes
        windows = grid[0] if whole else layout.windows
        x = x + _attention(block.attn, block.norm1(x), cos, sin, windows, None if whole else layout)
        x = x + block.mlp(block.norm2(x))
    return _permute_cells(x, layout.inverse, merge).reshape(count, length, -1)


def _permute_cells(x: mx.array, order: mx.array, merge: int) -> mx.array:
    count, length, width = x.shape
    return x.reshape(count, length // merge**2, merge**2 * width)[:, order].reshape(count, length, width)


def _attention(
    attn: nn.Module, x: mx.array, cos: mx.array, sin: mx.array, windows: int, layout: _Layout | None
) -> mx.array:
    count, length, width = x.shape
    heads = attn.num_heads
    # one copy to (3, N, heads, L, head_dim): element-wise work on strided views costs twice as much on CPU
    qkv = mx.contiguous(attn.qkv(x).reshape(count, length, 3, heads, -1).transpose(2, 0, 3, 1, 4))
    q, k, v = qkv[0], qkv[1], qkv[2]
    q, k = q * cos + _rotate(q) * sin, k * cos + _rotate(k) * sin
    padded = layout is not None and layout.gather is not None
    mask = None
    if padded:
        q, k, v = (_windows_first(part[:, :, layout.gather]) for part in (q, k, v))
        mask = mx.tile(layout.mask, (count, 1, 1, 1))
    elif windows > 1:
        shape = (count, heads, windows, length // windows, -1)
        q, k, v = (_windows_first(part.reshape(shape)) for part in (q, k, v))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=attn.scale, mask=mask)
    out = out.transpose(0, 2, 1, 3).reshape(count, -1, width)
    if padded:
        out = out[:, layout.scatter]
    return attn.proj(out)


def _windows_first(x: mx.array) -> mx.array:
    """(N, heads, windows, l, d) -> (N * windows, heads, l, d)."""
    count, heads, windows, length, size = x.shape
    return x.transpose(0, 2, 1, 3, 4).reshape(count * windows, heads, length, size)


def _rotate(x: mx.array) -> mx.array:
    half = x.shape[-1] // 2
    return mx.concatenate([-x[..., half:], x[..., :half]], axis=-1)
