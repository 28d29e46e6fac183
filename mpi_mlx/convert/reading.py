"""A checkpoint in any known layout, read as a :class:`~mpi_mlx.convert.layout.Layout`."""

from __future__ import annotations

import copy

import numpy as np

from mpi_mlx.convert import families as fam
from mpi_mlx.convert.families import Family
from mpi_mlx.convert.layout import Entry, Layout, head_and_embedding, same_values, untie
from mpi_mlx.convert.shards import Checkpoint, Stored, from_float32, to_float32
from mpi_mlx.errors import ConversionError


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


def as_disk(family: Family, entry: Entry, base: dict[str, Stored] | None = None) -> Entry:
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
    names = _disk_names(stored, parts, family)
    for name in names.values():
        _refuse_type(stored[name])
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
        entries[disk] = as_disk(family, entry, sources) if tree else entry
    saved_by_mlx = tree or spec is not None or checkpoint.format == "mlx"
    tied = bool(config["tie_word_embeddings"])
    layout = Layout(family, copy.deepcopy(config), entries, tied, from_mlx=saved_by_mlx, in_tree=tree)
    stated = any("tie_word_embeddings" in c for c in (raw_config, raw_config.get("text_config") or {}))
    _settle_head(layout, stated)
    ahead = sum(name.startswith("mtp.") for name in stored)
    if ahead:
        layout.notes.append(
            f"{ahead} tensors of multi-token prediction (mtp.*) are left out: neither mlx-vlm nor transformers loads "
            "them"
        )
    return layout


def _disk_names(stored: dict[str, Stored], parts: set[str], family: Family) -> dict[str, str]:
    """Stored names by disk name, without ``parts`` of quantized tensors and what no library needs."""
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
    return names


def _refuse_type(tensor: Stored) -> None:
    if tensor.dtype.startswith("F8_"):
        raise ConversionError(
            f"{tensor.name} is {tensor.dtype}, and the config has no quantization_config to say what its values stand "
            "for: convert the 16-bit checkpoint"
        )
    if tensor.dtype == "F64":
        raise ConversionError(
            f"{tensor.name} is F64, which MLX does not load: save the model in float32 first (model.float())"
        )


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
