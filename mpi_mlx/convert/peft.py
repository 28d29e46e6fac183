"""PEFT adapters (LoRA, rsLoRA, DoRA) to MLX and back."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from mpi_mlx.convert import checks
from mpi_mlx.convert import families as fam
from mpi_mlx.convert.adapters import (
    PEFT_WEIGHTS,
    Adapter,
    check_fit,
    find_adapter,
    read_mlx_adapter,
    write_mlx_adapter,
)
from mpi_mlx.convert.bases import base_of, document_of, limit_of, run_recipe, stages_of, view
from mpi_mlx.convert.card import recorded_on_card, write_card
from mpi_mlx.convert.changed import add_changed_modules
from mpi_mlx.convert.checks import Side
from mpi_mlx.convert.folders import check_disk, find_source, staged
from mpi_mlx.convert.layout import Layout, head_and_embedding, same_values, untie
from mpi_mlx.convert.peft_files import read_peft_adapter, write_peft_adapter
from mpi_mlx.convert.report import ConversionReport
from mpi_mlx.convert.weights import float32_bytes, is_quantized, read_layout, write_folder, written_bytes
from mpi_mlx.errors import ConversionError
from mpi_mlx.models.pixels import stated_limit

# --- PEFT -> MLX -------------------------------------------------------------------------------------------


def from_peft(
    source: str | Path,
    destination: str | Path,
    *,
    base: str | Path,
    check: bool = True,
    overwrite: bool = False,
) -> ConversionReport:
    """Turn a PEFT adapter folder into one that mlx-vlm (mlx-lm) and this project's trainer load.

    ``modules_to_save``, and adapters on a tied head, have no place in an MLX adapter: the base with those
    modules in it is then written to ``destination/model``, for the adapter to go on.
    """
    folder = Path(source).expanduser()
    base_folder = find_source(base)
    _, layout = read_layout(base_folder)
    family = layout.family
    adapter = read_peft_adapter(folder, family)
    adapter.max_pixels = recorded_on_card(folder)
    needs_model = _apply_saved(layout, adapter)
    check_fit(adapter, {n: e.shape for n, e in layout.entries.items()}, folder)
    final = Path(destination).expanduser()
    text = layout.config.get("text_config") or layout.config
    if needs_model:
        check_disk(final, written_bytes(layout))
    with staged(final, overwrite=overwrite, sources=[folder, base_folder]) as work:
        given = Path(base).expanduser()
        # the adapter is loaded from anywhere: a folder is named in full
        named = str(final.absolute() / "model") if needs_model else str(given.absolute() if given.is_dir() else base)
        report = ConversionReport("from-peft", final, family.name)
        model = base_folder
        if needs_model:
            model = work / "model"
            model.mkdir()
            inner = write_folder(layout, base_folder, final / "model", model, dtype=None)
            report.notes += inner.notes
            report.notes.append(
                f"modules_to_save and an adapted tied head are in {final / 'model'}: load the adapter on "
                "that base"
            )
            write_card(model, source=str(base), action="from-peft", license_from=base_folder)
        report.tensors = write_mlx_adapter(work, adapter, family, text["num_hidden_layers"], named)
        report.nbytes = sum(p.stat().st_size for p in work.glob("*.safetensors"))
        report.covered = f"all {len(adapter.modules)} adapted modules found in the base with their shapes"
        if check:
            with view(base_folder, "torch", report, work) as in_torch, view(model, "mlx", report, work) as in_mlx:
                sides = [Side("peft on the source", "torch", in_torch, folder)] if in_torch else []
                sides += [Side("mlx on the result", "mlx", in_mlx, work)] if in_mlx else []
                bound = checks.bound_of(layout, rounds=is_quantized(base_folder))
                checks.check_logits(report, layout.config, sides, float32_bytes(layout), bound)
    return report


def _apply_saved(layout: Layout, adapter: Adapter) -> bool:
    """Put whole saved tensors into the base's layout, untying the head where one side of it was trained.

    Returns whether the base has changed.
    """
    head, embedding = head_and_embedding(layout.family)
    for name, entry in list(adapter.saved.items()):
        mine = layout.entries.get(embedding if name == head and layout.tied else name)
        if mine is None:
            raise ConversionError(f"the adapter saves {name}, which the base does not have")
        if tuple(mine.shape) != tuple(entry.shape):
            raise ConversionError(
                f"the adapter saves {name} with shape {entry.shape}, the base has {tuple(mine.shape)}: "
                "resize the base as it was resized in training first"
            )
        if same_values(mine, entry):
            del adapter.saved[name]
    head_adapted = head.removesuffix(".weight") in adapter.modules
    if layout.tied and (head in adapter.saved or embedding in adapter.saved or head_adapted):
        layout.entries[head] = replace(layout.entries[embedding], name=head)
        untie(layout, "the adapter trains the head or the embedding by itself")
    elif not adapter.saved:
        return False
    layout.entries.update(adapter.saved)
    return True


# --- MLX -> PEFT -------------------------------------------------------------------------------------------


def to_peft(
    source: str | Path,
    destination: str | Path,
    *,
    base: str | Path,
    check: bool = True,
    overwrite: bool = False,
) -> ConversionReport:
    """Turn an MLX adapter, or a run, into a PEFT adapter folder for ``base``.

    Where the adapter was trained on another folder than ``base``, tensors that differ become
    ``modules_to_save``. Raises ConversionError for what PEFT has no place for.
    """
    folder = find_adapter(Path(source).expanduser())
    base_folder = find_source(base)
    _, layout = read_layout(base_folder)
    family = layout.family
    adapter = read_mlx_adapter(folder, family)
    trained_on = base_of(folder, adapter)
    rounded = add_changed_modules(adapter, layout, base_folder, trained_on)
    shapes = {n: e.shape for n, e in layout.entries.items()}
    head, embedding = head_and_embedding(family)
    if layout.tied:
        shapes[head] = shapes[embedding]
    check_fit(adapter, shapes, folder)
    final = Path(destination).expanduser()
    sources = [folder, base_folder, *([trained_on] if trained_on else [])]
    with staged(final, overwrite=overwrite, sources=sources) as work:
        count = write_peft_adapter(work, adapter, family, shapes, str(base))
        report = ConversionReport("to-peft", final, family.name, count, notes=list(rounded))
        report.nbytes = (work / PEFT_WEIGHTS).stat().st_size
        report.covered = f"all {len(adapter.modules)} adapted modules found in the base with their shapes"
        quantized = bool(trained_on and is_quantized(trained_on))
        if adapter.base_quantization or quantized:
            report.notes.append(
                "the adapter was trained on a quantized base; on the float base it is off by that much"
            )
        _card(work, folder, adapter, base, base_folder, report)
        if check:
            # the source runs on its own base, which has the modules that become modules_to_save
            own = base_folder if quantized or not trained_on else trained_on
            with view(own, "mlx", report, work) as in_mlx, view(base_folder, "torch", report, work) as in_torch:
                sides = [Side("mlx on the source", "mlx", in_mlx, folder)] if in_mlx else []
                sides += [Side("peft on the result", "torch", in_torch, work)] if in_torch else []
                bound = checks.bound_of(layout, rounds=bool(rounded) or is_quantized(base_folder))
                bound = math.inf if adapter.base_quantization else bound  # as the note says
                checks.check_logits(report, layout.config, sides, float32_bytes(layout), bound)
    return report


def _card(
    work: Path, folder: Path, adapter: Adapter, base: str | Path, base_folder: Path, report: ConversionReport
) -> None:
    """The adapter's card, with the limit on images' pixels where the base has another: a note says so, too."""
    limit = limit_of(folder, adapter)
    if limit == stated_limit(base_folder) or fam.FAMILIES[report.family].text_only:
        limit = None
    if limit:
        report.notes.append(
            f"images had at most {limit:,} pixels in training; an adapter cannot say so to peft: load the base's "
            f"processor with max_pixels={limit}"
        )
    recipe = run_recipe(folder)
    write_card(
        work, source=str(base), action="to-peft", stages=stages_of(folder, recipe),
        document=document_of(folder, recipe),
        adapter={"kind": adapter.kind, "rank": adapter.rank, "scale": adapter.scale},
        license_from=base_folder, max_pixels=limit, peft=True,
    )  # fmt: skip
