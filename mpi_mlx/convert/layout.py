"""The list of tensors that a converted folder holds, and the config they go with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from mpi_mlx.convert.families import Family
from mpi_mlx.convert.shards import (
    DTYPE_NAMES,
    Output,
    Stored,
    copied,
    edited,
    from_float32,
    to_float32,
)

FLOATS = {"F32", "F16", "BF16"}


BLOCK_VALUES = 4 << 20  # values of a tensor that are edited at once


@dataclass
class Entry:
    """One tensor under its disk name, in disk axis order.

    ``rows(start, stop)`` gives a run of its rows in the stored form (a scalar counts as one row).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: Callable[[int, int], np.ndarray]
    # set while the tensor is an untouched copy of stored bytes
    stored: Stored | None = None

    @classmethod
    def of(cls, tensor: Stored, name: str) -> Entry:
        """A stored tensor, bits untouched, under a disk name."""
        return cls(name, tensor.dtype, tensor.shape, tensor.rows, tensor)

    @classmethod
    def whole(cls, name: str, dtype: str, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> Entry:
        """A small tensor that is computed in one piece."""
        return cls(name, dtype, shape, lambda start, stop: read()[start:stop])

    def read(self) -> np.ndarray:
        """The whole tensor in its stored form."""
        return self.rows(0, self.shape[0] if self.shape else 1).reshape(self.shape)

    def float32(self) -> np.ndarray:
        return to_float32(self.read(), self.dtype)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Runs of rows of about ``BLOCK_VALUES`` values."""
        count = self.shape[0] if self.shape else 1
        step = max(1, BLOCK_VALUES // max(1, int(np.prod(self.shape[1:], dtype=np.int64))))
        for start in range(0, count, step):
            yield start, min(start + step, count)

    def changed(
        self, change: Callable[[np.ndarray, int, int], np.ndarray], dtype: str | None = None
    ) -> Entry:
        """The tensor after ``change(stored rows, start, stop)``, which works row by row."""
        rows = self.rows
        return Entry(self.name, dtype or self.dtype, self.shape, lambda i, j: change(rows(i, j), i, j))

    def as_type(self, dtype: str) -> Entry:
        """The tensor rounded to another float type; other types stay as they are."""
        if self.dtype not in FLOATS or dtype == self.dtype:
            return self
        old, name = self.dtype, self.name
        return self.changed(lambda data, *_: from_float32(to_float32(data, old), dtype, name), dtype)

    def output(self, dtype: str | None = None) -> Output:
        entry = self.as_type(dtype) if dtype else self
        if entry.stored:
            return copied(entry.stored, entry.name)
        return edited(
            entry.name, entry.dtype, entry.shape, lambda: (entry.rows(i, j) for i, j in entry.spans())
        )


@dataclass
class Layout:
    """Entries by disk name, the config they go with, and what was said on the way."""

    family: Family
    config: dict
    entries: dict[str, Entry]
    tied: bool
    notes: list[str] = field(default_factory=list)
    # mlx saved the checkpoint, so transformers cannot load it as it lies
    from_mlx: bool = False
    # the stored tensors are in MLX's own form: its axis order, qwen3_5's norms plus one
    in_tree: bool = False


def head_and_embedding(family: Family) -> tuple[str, str]:
    """Disk names of the output head and of the input embedding."""
    head = next(row[0] for row in family.prefixes if row[0].endswith("lm_head.")) + "weight"
    text = next(
        row[0] for row in family.prefixes if row[0].endswith(("model.", "language_model.", "text_model."))
        and "vision" not in row[0]
    )  # fmt: skip
    return head, text + "embed_tokens.weight"


def same_values(a: Entry, b: Entry) -> bool:
    """Whether two entries hold the same numbers; stored bytes are compared block by block."""
    if a.shape != b.shape:
        return False
    if a.stored and b.stored and a.dtype == b.dtype:
        return all(x == y for x, y in zip(a.stored.chunks(), b.stored.chunks(), strict=True))
    return all(
        np.array_equal(to_float32(a.rows(i, j), a.dtype), to_float32(b.rows(i, j), b.dtype))
        for i, j in a.spans()
    )


def same_but_for_rounding(a: Entry, b: Entry) -> bool:
    """Whether two entries hold the same numbers, or one of another type holds the other's, rounded to it."""
    if a.shape == b.shape and a.dtype != b.dtype and {a.dtype, b.dtype} <= FLOATS:
        return same_values(a.as_type(b.dtype), b) or same_values(a, b.as_type(a.dtype))
    return same_values(a, b)


def untie(layout: Layout, why: str) -> None:
    """Set tie_word_embeddings to false at every level."""
    layout.config["tie_word_embeddings"] = False
    if "text_config" in layout.config:
        layout.config["text_config"]["tie_word_embeddings"] = False
    layout.tied = False
    layout.notes.append(f"tie_word_embeddings is now false: {why}")


def outputs_of(layout: Layout, *, dtype: str | None = None, for_mlx: bool = False) -> list[Output]:
    """What to write, in checkpoint order; ``for_mlx`` adds the head that some families need when tied."""
    code = DTYPE_NAMES[dtype] if dtype else None
    outputs = [e.output(code) for e in layout.entries.values()]
    if for_mlx and layout.tied and layout.family.tied_head:
        _, embedding = head_and_embedding(layout.family)
        twin = replace(layout.entries[embedding], name=layout.family.tied_head)
        outputs.append(twin.output(code))
    return outputs


def set_dtype(config: dict, dtype: str | None) -> None:
    """Write a new dtype wherever the config names one."""
    if dtype is None:
        return
    config["dtype"] = dtype
    for part in config.values():
        if isinstance(part, dict) and part.get("dtype") is not None:
            part["dtype"] = dtype
