"""Fold an adapter into its base: a complete folder without LoRA, merged in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from mpi_mlx.convert import checks
from mpi_mlx.convert import families as fam
from mpi_mlx.convert.adapters import Adapter, LowRank, check_fit, find_adapter, read_mlx_adapter
from mpi_mlx.convert.bases import document_of, limit_of, run_recipe, stages_of, view
from mpi_mlx.convert.card import write_card
from mpi_mlx.convert.checks import Side
from mpi_mlx.convert.folders import check_disk, find_source, staged
from mpi_mlx.convert.layout import Entry, Layout, head_and_embedding, untie
from mpi_mlx.convert.report import ConversionReport
from mpi_mlx.convert.shards import DTYPE_NAMES, SHARD_BYTES, from_float32, to_float32
from mpi_mlx.convert.weights import float32_bytes, quantize_in_place, read_layout, write_folder, written_bytes
from mpi_mlx.errors import ConversionError
from mpi_mlx.models.pixels import stated_limit, write_limit


def fuse(
    source: str | Path,
    destination: str | Path,
    *,
    base: str | Path | None = None,
    quantize: int | None = None,
    dtype: str | None = None,
    check: bool = True,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    action: str = "fuse",
) -> ConversionReport:
    """Merge a run's (or a folder's) MLX adapter into its base, in float32, tensor by tensor.

    A quantized base is dequantized first, so the result equals base + adapter; ``quantize`` (4 or 8)
    quantizes the result again and reports what that loses. ``base`` defaults to the one that is recorded.
    """
    if quantize not in (None, 4, 8):
        raise ConversionError(f"quantize is 4 or 8, not {quantize}")
    path = Path(source).expanduser()
    folder = find_adapter(path)
    base_folder = find_source(base) if base else _recorded_base(folder)
    _, layout = read_layout(base_folder, for_mlx=action != "to-hf")
    adapter = read_mlx_adapter(folder, layout.family)
    notes = _apply(layout, adapter, folder, dtype)
    final = Path(destination).expanduser()
    check_disk(final, written_bytes(layout, dtype) * (2 if quantize else 1))
    with staged(final, overwrite=overwrite, sources=[folder, base_folder]) as work:
        report = write_folder(
            layout, base_folder, final, work, dtype=dtype, shard_bytes=shard_bytes, for_mlx=action != "to-hf"
        )
        report.action = action
        report.notes += notes
        limit = _limit_pictures(work, limit_of(folder, adapter), layout, report)
        if check:
            with view(base_folder, "mlx", report, work) as in_mlx:
                sides = [Side("base and adapter", "mlx", in_mlx, folder)] if in_mlx else []
                sides.append(Side("the fused folder", "mlx", work))
                if action == "to-hf":
                    sides.append(Side("transformers on the fused folder", "torch", work, made=True))
                written = {DTYPE_NAMES[dtype] if dtype else e.dtype for e in layout.entries.values()}
                bound = checks.bound_of(layout, rounds=bool(written & {"F16", "BF16"}))
                checks.check_logits(report, layout.config, sides, float32_bytes(layout), bound)
        if quantize:
            quantize_in_place(work, quantize, report, check, layout, shard_bytes)
        recipe = run_recipe(folder)
        write_card(
            work,
            source=str(base or (recipe.get("model") or {}).get("base") or base_folder),
            action=action,
            quantize=quantize,
            stages=stages_of(folder, recipe),
            document=document_of(folder, recipe),
            adapter={"kind": adapter.kind, "rank": adapter.rank, "scale": adapter.scale},
            license_from=base_folder,
            max_pixels=limit,
        )
    return report


def _limit_pictures(work: Path, limit: int | None, layout: Layout, report: ConversionReport) -> int | None:
    """Write the limit on images' pixels that the adapter was trained with into the result's processor files.

    Returns it, or None where the result has it from its base or has no images.
    """
    if limit is None or layout.family.text_only or stated_limit(work) == limit:
        return None
    if write_limit(work, limit):
        report.notes.append(f"an image is cut down to {limit:,} pixels (max_pixels), as in training")
    else:
        report.notes.append(
            f"images had at most {limit:,} pixels in training (max_pixels); the processor of {layout.family.name} "
            "has no such setting: make them so small yourself"
        )
    return limit


def _recorded_base(folder: Path) -> Path:
    recipe = (run_recipe(folder).get("model") or {}).get("base")
    if recipe:
        return find_source(recipe)
    from mpi_mlx.convert.adapters import CONFIG, read_json

    named = read_json(folder / CONFIG).get("mpi_mlx", {}).get("base")
    if not named:
        raise ConversionError(f"{folder} does not name its base: pass --base MODEL")
    return find_source(named)


def _quantized_as_trained(entry: Entry, spec: dict) -> Entry:
    """A float tensor rounded to the bits it was quantized to in training, in its own type."""
    dtype, sizes = entry.dtype, {"group_size": spec["group_size"], "bits": spec["bits"]}

    def rounded(data: np.ndarray, *_) -> np.ndarray:
        import mlx.core as mx

        with mx.stream(mx.cpu):
            weight = mx.array(data)
            weight = weight.view(mx.bfloat16) if dtype == "BF16" else weight
            back = mx.dequantize(*mx.quantize(weight, **sizes), **sizes)
            return np.array(back.view(mx.uint16) if dtype == "BF16" else back)

    return entry.changed(rounded)


def _merged(entry: Entry, low: LowRank, dtype: str) -> Entry:
    def merged(data: np.ndarray, start: int, stop: int) -> np.ndarray:
        return from_float32(low.rows(start, stop).merged(to_float32(data, entry.dtype)), dtype, entry.name)

    return entry.changed(merged, dtype)


def _apply(layout: Layout, adapter: Adapter, folder: Path, dtype: str | None) -> list[str]:
    """Replace the adapted entries by merged ones; nothing is computed before it is written."""
    entries, notes = layout.entries, []
    head, embedding = head_and_embedding(layout.family)
    touched = {n + ".weight" for n in adapter.modules} | set(adapter.saved)
    if layout.tied and head in touched:
        entries[head] = replace(entries[embedding], name=head)
        untie(layout, "the adapter trains the head by itself")
    check_fit(adapter, {n: e.shape for n, e in entries.items()}, folder)
    quantized = 0
    for tree, spec in adapter.base_quantization.items():
        name = fam.disk_name(layout.family, tree + ".weight")
        if name in entries and entries[name].stored is not None:
            entries[name] = _quantized_as_trained(entries[name], spec)
            quantized += 1
    if quantized:
        notes.append(
            f"{quantized} tensors were rounded to the {spec['bits']} bits that the adapter was trained on"
        )
    entries.update(adapter.saved)
    for name, low in adapter.modules.items():
        entry = entries[name + ".weight"]
        # merged straight into the type asked for: one rounding, not two
        entries[entry.name] = _merged(entry, low, DTYPE_NAMES[dtype] if dtype else entry.dtype)
    notes.append(f"{len(adapter.modules)} linears merged in float32")
    return notes
