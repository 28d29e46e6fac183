"""Whole checkpoints: Hugging Face folders to MLX and back."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from mpi_mlx.convert import checks
from mpi_mlx.convert.card import write_card
from mpi_mlx.convert.checks import Side
from mpi_mlx.convert.configs import canonical_config, check_supported, mlx_config, read_json
from mpi_mlx.convert.families import family_of
from mpi_mlx.convert.folders import check_disk, copy_companions, find_source, refuse_other_formats, staged
from mpi_mlx.convert.layout import Layout, outputs_of, set_dtype
from mpi_mlx.convert.reading import lay_out
from mpi_mlx.convert.report import ConversionReport
from mpi_mlx.convert.shards import SHARD_BYTES, Checkpoint, Output, open_checkpoint, write_checkpoint
from mpi_mlx.errors import ConversionError


def read_layout(source: Path, base: Path | None = None, *, for_mlx: bool = True) -> tuple[Checkpoint, Layout]:
    """Open a folder in any known layout; nothing but headers is read."""
    refuse_other_formats(source)
    raw = read_json(source / "config.json")
    _refuse_foreign_quantization(raw, source)
    config = canonical_config(source)
    check_supported(config, for_mlx=for_mlx)
    checkpoint = open_checkpoint(source)
    other = open_checkpoint(base) if base else None
    return checkpoint, lay_out(checkpoint, raw, config, family_of(config), other)


def _refuse_foreign_quantization(raw: dict, folder: Path) -> None:
    """MLX writes ``quantization`` (and ``quantization_config`` again), other tools only the latter."""
    theirs = raw.get("quantization_config") or (raw.get("text_config") or {}).get("quantization_config")
    if theirs and "quantization" not in raw:
        raise ConversionError(
            f"{folder} is quantized by {theirs.get('quant_method', 'another tool')}: convert the float "
            "checkpoint, and quantize it here with --quantize"
        )


def is_quantized(folder: Path) -> bool:
    return "quantization" in read_json(folder / "config.json")


def write_folder(
    layout: Layout,
    source: Path,
    destination: Path,
    work: Path,
    *,
    dtype: str | None,
    shard_bytes: int = SHARD_BYTES,
    for_mlx: bool = True,
) -> ConversionReport:
    """Write config, weights and companions of a layout into ``work``; ``destination`` is only reported."""
    set_dtype(layout.config, dtype)
    config = mlx_config(layout.config, for_mlx=for_mlx)
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    covered = checks.check_coverage(layout, work)
    outputs = outputs_of(layout, dtype=dtype, for_mlx=True)
    write_checkpoint(work, outputs, limit=shard_bytes)
    copy_companions(source, work)
    write_generation_config(work, config)
    return ConversionReport(
        "", destination, layout.family.name, len(outputs), sum(o.nbytes for o in outputs), covered,
        notes=list(layout.notes),
    )  # fmt: skip


def write_generation_config(work: Path, config: dict) -> None:
    """Where generation stops, as the config has it; nothing where the source's own file was copied."""
    path = work / "generation_config.json"
    found = {**(config.get("text_config") or {}), **config}
    keys = {k: found[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if found.get(k) is not None}
    if keys and not path.exists():
        path.write_text(json.dumps(keys, indent=2) + "\n")


def to_mlx(
    source: str | Path,
    destination: str | Path,
    *,
    quantize: int | None = None,
    dtype: str | None = None,
    check: bool = True,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> ConversionReport:
    """Convert a Hugging Face checkpoint into a folder that mlx-vlm (mlx-lm) and transformers 5 both load.

    ``quantize`` (4 or 8) writes an MLX-only folder instead, quantized by mlx-vlm itself. Tensors keep their
    bits unless ``dtype`` asks for another type. Raises ConversionError for what cannot be carried,
    DeviceError for a disk too small; the destination then does not appear.
    """
    folder = find_source(source)
    if quantize not in (None, 4, 8):
        raise ConversionError(f"quantize is 4 or 8, not {quantize}")
    refuse_other_formats(folder)
    if is_quantized(folder):
        raise ConversionError(f"{folder} is quantized MLX already; `mpi-mlx convert to-hf` dequantizes it")
    _, layout = read_layout(folder)
    final = Path(destination).expanduser()
    check_disk(final, written_bytes(layout, dtype) * (2 if quantize else 1))
    with staged(final, overwrite=overwrite, sources=[folder]) as work:
        report = write_folder(layout, folder, final, work, dtype=dtype, shard_bytes=shard_bytes)
        report.action = "to-mlx"
        if check:
            sides = [_source_side(folder, mlx=layout.from_mlx), Side("mlx on the result", "mlx", work)]
            bound = checks.bound_of(layout, dtype)
            checks.check_logits(report, layout.config, sides, float32_bytes(layout), bound)
        if quantize:
            quantize_in_place(work, quantize, report, check, layout, shard_bytes)
        write_card(work, source=str(source), action="to-mlx", quantize=quantize, license_from=folder)
    return report


def _source_side(folder: Path, *, mlx: bool) -> Side:
    return Side("mlx on the source", "mlx", folder) if mlx else Side("transformers on the source", "torch", folder)


def loads_in_mlx(layout: Layout) -> bool:
    """False for a head that was trained apart from its embedding where mlx-vlm only knows tied ones."""
    try:
        check_supported(layout.config)
    except ConversionError:
        return False
    return True


def written_bytes(layout: Layout, dtype: str | None = None) -> int:
    """Bytes of the weights that :func:`write_folder` writes."""
    return sum(o.nbytes for o in outputs_of(layout, dtype=dtype, for_mlx=True))


def float32_bytes(layout: Layout) -> int:
    return sum(4 * int(_product(e.shape)) for e in layout.entries.values())


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def _evaluated(tensors: dict, name: str) -> Output:
    """A tensor of mlx that is computed when its turn comes, and then forgotten."""
    codes = {"uint32": "U32", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

    def make() -> Iterator[memoryview]:
        import mlx.core as mx
        import numpy as np

        array = tensors.pop(name)
        array = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        mx.eval(array)
        yield memoryview(np.ascontiguousarray(np.array(array, copy=False))).cast("B")
        del array
        mx.clear_cache()

    return Output(name, codes[str(tensors[name].dtype).rpartition(".")[2]], tuple(tensors[name].shape), make)


def quantize_in_place(
    work: Path, bits: int, report: ConversionReport, check: bool, layout: Layout, shard_bytes: int = SHARD_BYTES
) -> None:
    """Replace the float weights of ``work`` by quantized ones, and report what that costs."""
    from mpi_mlx.models.probe import quantized_lazily

    out = work / ".quantized"
    out.mkdir()
    config, tensors = quantized_lazily(work, bits)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_checkpoint(out, [_evaluated(tensors, name) for name in list(tensors)], format="mlx", limit=shard_bytes)
    if check:
        loss = ConversionReport("", work, report.family)
        sides = [Side("the float result", "mlx", work), Side(f"{bits} bits", "mlx", out)]
        checks.check_logits(loss, layout.config, sides, float32_bytes(layout), math.inf)
        if loss.errors:
            report.notes.append(f"loss of quantizing to {bits} bits, as logits error: {loss.worst:.1e}")
    for path in work.glob("*.safetensors*"):
        path.unlink()
    for path in out.iterdir():
        path.replace(work / path.name)
    shutil.rmtree(out)
    report.nbytes = sum(p.stat().st_size for p in work.glob("*.safetensors"))


def to_hf(
    source: str | Path,
    destination: str | Path,
    *,
    merge: bool = False,
    base: str | Path | None = None,
    dtype: str | None = None,
    check: bool = True,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> ConversionReport:
    """Convert an MLX folder, or a run with ``merge``, into a complete transformers folder.

    Quantized weights are dequantized; a run's adapter is merged in float32. ``base``: the checkpoint an MLX
    folder was made from, to copy qwen3_5's norms from (MLX holds them plus one, which rounds in bfloat16).
    """
    path = Path(source).expanduser()
    if _has_adapter(path):
        from mpi_mlx.convert.fuse import fuse

        if not merge:
            raise ConversionError(
                f"{path} holds an adapter: pass --merge to fold it into the weights, or use `convert to-peft`"
            )
        keys = {"base": base, "dtype": dtype, "check": check, "overwrite": overwrite, "shard_bytes": shard_bytes}
        return fuse(path, destination, **keys, action="to-hf")
    folder = find_source(source)
    base_folder = find_source(base) if base else None
    _, layout = read_layout(folder, base_folder, for_mlx=False)
    final = Path(destination).expanduser()
    check_disk(final, written_bytes(layout, dtype))
    sources = [folder, base_folder] if base_folder else [folder]
    with staged(final, overwrite=overwrite, sources=sources) as work:
        report = write_folder(
            layout, folder, final, work, dtype=dtype, shard_bytes=shard_bytes, for_mlx=False
        )
        report.action = "to-hf"
        in_mlx = loads_in_mlx(layout)
        if not in_mlx:
            report.notes.append(
                f"mlx-vlm cannot load the result back: it only knows tied {layout.family.name} heads"
            )
        if check:
            converted = "mlx_keys" in read_json(folder / "config.json")
            sides = [_source_side(folder, mlx=layout.from_mlx or converted)]
            if in_mlx:
                sides.append(Side("mlx on the result", "mlx", work))
            sides.append(Side("transformers on the result", "torch", work, made=True))
            bound = checks.bound_of(layout, dtype, rounds=is_quantized(folder))
            checks.check_logits(report, layout.config, sides, float32_bytes(layout), bound)
        write_card(work, source=str(source), action="to-hf", license_from=folder)
    return report


def _has_adapter(path: Path) -> bool:
    return (path / "adapter" / "adapter_config.json").exists() or (path / "adapters.safetensors").exists()
