"""A checkpoint in any known layout, as the list of tensors that the converted folder holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from mpi_mlx.convert import families as fam
from mpi_mlx.convert.families import Family
from mpi_mlx.convert.shards import (
    DTYPE_NAMES,
    Checkpoint,
    Output,
    Stored,
    copied,
    edited,
    from_float32,
    to_float32,
)
from mpi_mlx.errors import ConversionError

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
        old = self.dtype
        return self.changed(lambda data, *_: from_float32(to_float32(data, old), dtype), dtype)

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


def _quantization(config: dict) -> dict | None:
    value = config.get("quantization")
    return value if isinstance(value, dict) and "bits" in value else None


def _dequantized(stored: dict[str, Stored], name: str, family: Family, spec: dict) -> Entry:
    """A quantized MLX linear or embedding as a float entry, dequantized by mlx when read."""
    base = name[: -len(".weight")]
    own = spec.get(base) or spec.get(base.removeprefix("language_model.")) or spec
    bits, group = own["bits"], own["group_size"]
    mode = own.get("mode", spec.get("mode", "affine"))
    weight, scales = stored[name], stored[f"{base}.scales"]
    biases = stored.get(f"{base}.biases")
    if mode != "affine" or biases is None:
        raise ConversionError(
            f"{name} is quantized in mode {mode!r}: only affine quantization can be undone here"
        )
    shape = (*weight.shape[:-1], weight.shape[-1] * 32 // bits)

    def rows(start: int, stop: int) -> np.ndarray:
        import mlx.core as mx

        def plain(s: Stored) -> mx.array:
            data = mx.array(s.rows(start, stop))
            return data.view(mx.bfloat16) if s.dtype == "BF16" else data

        with mx.stream(mx.cpu):
            full = mx.dequantize(plain(weight), plain(scales), plain(biases), group_size=group, bits=bits)
            return np.array(full.view(mx.uint16) if scales.dtype == "BF16" else full)

    return Entry(name, scales.dtype, shape, rows)


def _as_disk(family: Family, entry: Entry, base: dict[str, Stored] | None) -> Entry:
    """Undo MLX's axis order and qwen3_5's shift on one entry."""
    if fam.is_convolution(family, entry.name):
        axes = fam.TO_DISK[len(entry.shape)]
        read = entry.read
        shape = fam.transposed(entry.shape, axes)
        return Entry.whole(entry.name, entry.dtype, shape, lambda: read().transpose(axes))
    if fam.is_shifted_norm(family, entry.name):
        source = (base or {}).get(entry.name)
        read, dtype = entry.read, entry.dtype

        def unshifted() -> np.ndarray:
            def add_one(x):
                return to_float32(from_float32(x + 1.0, dtype), dtype)

            theirs = to_float32(source.read(), source.dtype) if source else None
            return from_float32(fam.unshift(to_float32(read(), dtype), theirs, add_one), dtype)

        return Entry.whole(entry.name, dtype, entry.shape, unshifted)
    return entry


def lay_out(
    checkpoint: Checkpoint, raw_config: dict, config: dict, family: Family, base: Checkpoint | None = None
) -> Layout:
    """Every tensor of a checkpoint under its disk name and in disk order.

    ``raw_config`` is the folder's own (it tells about quantization), ``config`` the canonical one. ``base``
    is an unconverted source that qwen3_5's norms may be copied from. Unknown tensors are refused by name.
    """
    stored, spec = checkpoint.tensors, _quantization(raw_config)
    parts = {f"{n[:-7]}{s}" for n in stored for s in (".scales", ".biases") if f"{n[:-7]}.scales" in stored}
    if parts and spec is None:
        raise ConversionError(
            f"{checkpoint.folder} holds quantized tensors, but its config no quantization entry"
        )
    names: dict[str, str] = {}
    unknown = []
    for name in stored:
        if name in parts or fam.is_dropped(family, name):
            continue
        disk = fam.disk_name(family, name)
        if disk is None:
            unknown.append(name)
        elif not fam.is_dropped(family, disk):
            if disk in names:
                raise ConversionError(f"{name} and {names[disk]} both become {disk}")
            names[disk] = name
    if unknown:
        raise ConversionError(
            f"{len(unknown)} tensors have no place in {family.name}'s table, the first is "
            f"{sorted(unknown)[0]}"
        )
    tree = fam.in_tree_order(
        config, {d: stored[n].shape for d, n in names.items()}, family, checkpoint.format
    )
    sources = None
    if base is not None:
        sources = {fam.disk_name(family, n) or n: t for n, t in base.tensors.items()}
    entries = {}
    for disk, name in names.items():
        tensor = stored[name]
        if f"{name[: -len('.weight')]}.scales" in stored and name.endswith(".weight"):
            entry = _dequantized(stored, name, family, spec)
            entry.name = disk
        else:
            entry = Entry.of(tensor, disk)
        entries[disk] = _as_disk(family, entry, sources) if tree else entry
    saved_by_mlx = tree or spec is not None or checkpoint.format == "mlx"
    tied = bool(config["tie_word_embeddings"])
    layout = Layout(family, copy.deepcopy(config), entries, tied, from_mlx=saved_by_mlx, in_tree=tree)
    stated = any("tie_word_embeddings" in c for c in (raw_config, raw_config.get("text_config") or {}))
    _settle_head(layout, stated)
    return layout


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


def _settle_head(layout: Layout, stated: bool) -> None:
    """Tied with an equal head: drop the copy. Tied with another head: it has diverged, so untie.

    ``stated``: whether the folder's own config says tied or not; mlx and transformers differ in their
    defaults, so a missing head speaks where the config does not.
    """
    head, embedding = head_and_embedding(layout.family)
    if embedding not in layout.entries:
        raise ConversionError(f"the checkpoint has no {embedding}")
    if head not in layout.entries:
        if not layout.tied and stated:
            raise ConversionError(f"the config is untied, but the checkpoint has no {head}")
        layout.tied = layout.config["tie_word_embeddings"] = True
        if "text_config" in layout.config:
            layout.config["text_config"]["tie_word_embeddings"] = True
        return
    if layout.tied:
        if same_values(layout.entries[head], layout.entries[embedding]):
            del layout.entries[head]
        else:
            untie(layout, "its head differs from its embedding")


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
