"""PEFT adapters (LoRA, rsLoRA, DoRA) to MLX and back. Formats as of peft 0.21; only safetensors are read."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from mpi_mlx.convert import checks
from mpi_mlx.convert import families as fam
from mpi_mlx.convert.adapters import (
    CONFIG,
    PEFT_WEIGHTS,
    Adapter,
    LowRank,
    check_fit,
    find_adapter,
    read_float32,
    read_json,
    read_mlx_adapter,
    write_mlx_adapter,
)
from mpi_mlx.convert.bases import base_of, mlx_view
from mpi_mlx.convert.card import write_card
from mpi_mlx.convert.families import Family
from mpi_mlx.convert.folders import check_disk, find_source, staged
from mpi_mlx.convert.layout import Entry, Layout, head_and_embedding, same_values, untie
from mpi_mlx.convert.report import ConversionReport
from mpi_mlx.convert.shards import Output, Stored, read_header, write_file
from mpi_mlx.convert.weights import float32_bytes, is_quantized, read_layout, write_folder
from mpi_mlx.errors import ConversionError

_PREFIX = "base_model.model."
# options that change what the tensors mean; each is refused when it is set
_REFUSED = (
    "lora_bias",
    "fan_in_fan_out",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "megatron_config",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
)
# inits that subtract the adapter's start from the base's weights
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _scale(config: dict, module: str, rank: int) -> float:
    """alpha / r of one module; PEFT matches patterns against the end of its name."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def refuse_unknown(config: dict, folder: Path) -> None:
    """Refuse, by name, what has no counterpart in MLX's adapters."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConversionError(
            f"{folder} is a PEFT adapter of type {kind}: only LORA (rsLoRA, DoRA) is carried over"
        )
    for key in _REFUSED:
        if config.get(key):
            raise ConversionError(f"{folder} uses PEFT's {key}, which MLX adapters have no place for")
    if config.get("bias", "none") != "none":
        raise ConversionError(
            f"{folder} trains biases (bias={config['bias']!r}): merge it with peft's merge_and_unload first"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGED_BASE):
        raise ConversionError(
            f"{folder} was started with init_lora_weights={init!r}, which changes the base: save it again with "
            "peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _split(name: str) -> tuple[str, str]:
    """(module, leaf) of a PEFT tensor name without its prefix; leaf is "" for a saved whole tensor."""
    for leaf in ("lora_A", "lora_B", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B"):
        at = name.find(f".{leaf}")
        if at >= 0:
            return name[:at], leaf
    return name, ""


def read_peft_adapter(folder: Path, family: Family) -> Adapter:
    """Read a PEFT adapter folder; names of before and after transformers 4.52 are both known.

    Raises ConversionError for other adapter types, options without a counterpart, and unknown modules.
    """
    config = read_json(folder / CONFIG)
    refuse_unknown(config, folder)
    if not (folder / PEFT_WEIGHTS).exists():
        if (folder / "adapter_model.bin").exists():
            raise ConversionError(
                f"{folder / 'adapter_model.bin'} is pickled, and opening a pickle can run code; where you trust it, "
                "load it with peft and save_pretrained(..., safe_serialization=True)"
            )
        raise ConversionError(f"{folder} has no {PEFT_WEIGHTS}")
    tensors, _ = read_header(folder / PEFT_WEIGHTS)
    parts: dict[str, dict[str, Stored]] = {}
    saved: dict[str, Entry] = {}
    memory_names: dict[str, str] = {}
    for name, tensor in tensors.items():
        # peft saves the base's own weight too where it adapts an output head
        short = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
        module, leaf = _split(short)
        disk = fam.disk_name(family, module + ".weight" if leaf else module)
        if disk is None:
            raise ConversionError(f"{name} of {folder} has no place in {family.name}'s table")
        if leaf.startswith("lora_embedding"):
            raise ConversionError(f"{folder} adapts the embedding {module}: MLX adapts linears only")
        if leaf:
            disk = disk.removesuffix(".weight")
            parts.setdefault(disk, {})[leaf] = tensor
            memory_names[disk] = module
        else:
            saved[disk] = Entry.of(tensor, disk)
    modules = {}
    for disk, found in parts.items():
        modules[disk] = _low_rank(config, memory_names[disk], found, folder)
    if not modules and not saved:
        raise ConversionError(f"{folder} holds no adapter tensors")
    return _assemble(config, modules, saved)


def _low_rank(config: dict, module: str, found: dict[str, Stored], folder: Path) -> LowRank:
    if "lora_A" not in found or "lora_B" not in found:
        raise ConversionError(f"{folder} has only a part of the adapter of {module}: {sorted(found)}")
    a, b = found["lora_A"], found["lora_B"]
    if len(a.shape) != 2:
        raise ConversionError(f"{folder} adapts the convolution {module}: MLX adapts linears only")
    magnitude = found.get("lora_magnitude_vector")
    if config.get("use_dora") and magnitude is None:
        raise ConversionError(f"{folder} is DoRA, but {module} has no magnitude vector")
    m = None if magnitude is None else read_float32(magnitude).reshape(-1)
    return LowRank(read_float32(a), read_float32(b), _scale(config, module, a.shape[0]), m)


def _assemble(config: dict, modules: dict[str, LowRank], saved: dict[str, Entry]) -> Adapter:
    rank = max((m.a.shape[0] for m in modules.values()), default=int(config["r"]))
    scales = [m.scale for m in modules.values()]
    # the commonest scale stays as it is; others are folded into their B
    scale = max(set(scales), key=scales.count) if scales else float(config["lora_alpha"]) / config["r"]
    kind = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    return Adapter(
        kind, rank, scale, float(config.get("lora_dropout") or 0.0), modules, saved,
        config.get("base_model_name_or_path"),
    )  # fmt: skip


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
    needs_model = _apply_saved(layout, adapter)
    check_fit(adapter, {n: e.shape for n, e in layout.entries.items()}, folder)
    final = Path(destination).expanduser()
    text = layout.config.get("text_config") or layout.config
    if needs_model:
        check_disk(final, sum(e.output().nbytes for e in layout.entries.values()))
    with staged(final, overwrite=overwrite) as work:
        named = str(final / "model") if needs_model else str(base)
        report = ConversionReport("from-peft", final, family.name)
        model = base_folder
        if needs_model:
            model = work / "model"
            model.mkdir()
            inner = write_folder(layout, base_folder, final / "model", model, dtype=None)
            report.notes += inner.notes
            report.notes.append(
                f"modules_to_save and an adapted tied head are in {final / 'model'}: load the adapter on that base"
            )
            write_card(model, source=str(base), action="from-peft", license_from=base_folder)
        report.tensors = write_mlx_adapter(work, adapter, family, text["num_hidden_layers"], named)
        report.nbytes = sum(p.stat().st_size for p in work.glob("*.safetensors"))
        report.covered = f"all {len(adapter.modules)} adapted modules found in the base with their shapes"
        if check:
            with mlx_view(model, report) as runnable:
                sides = [("peft on the source", "torch", base_folder, folder)]
                if runnable:
                    sides.append(("mlx on the result", "mlx", runnable, work))
                checks.check_logits(report, layout.config, sides, float32_bytes(layout))
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
                f"the adapter saves {name} with shape {entry.shape}, the base has {tuple(mine.shape)}: resize the "
                "base as it was resized in training first"
            )
        if same_values(mine, entry):
            del adapter.saved[name]
    head_adapted = head.removesuffix(".weight") in adapter.modules
    if layout.tied and (head in adapter.saved or embedding in adapter.saved or head_adapted):
        source = layout.entries[embedding]
        layout.entries[head] = Entry(head, source.dtype, source.shape, source.read, source.stored)
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
    _add_changed_modules(adapter, layout, base_folder, folder)
    shapes = {n: e.shape for n, e in layout.entries.items()}
    head, embedding = head_and_embedding(family)
    if layout.tied:
        shapes[head] = shapes[embedding]
    check_fit(adapter, shapes, folder)
    final = Path(destination).expanduser()
    with staged(final, overwrite=overwrite) as work:
        count = write_peft_adapter(work, adapter, family, shapes, str(base))
        report = ConversionReport("to-peft", final, family.name, count)
        report.nbytes = (work / PEFT_WEIGHTS).stat().st_size
        report.covered = f"all {len(adapter.modules)} adapted modules found in the base with their shapes"
        trained_on = base_of(folder, adapter)
        if adapter.base_quantization or (trained_on and is_quantized(trained_on)):
            report.notes.append(
                "the adapter was trained on a quantized base; on the float base it is off by that much"
            )
        if check and not adapter.saved:
            with mlx_view(base_folder, report) as runnable:
                sides = [("mlx on the source", "mlx", runnable, folder)] if runnable else []
                sides.append(("peft on the result", "torch", base_folder, work))
                checks.check_logits(report, layout.config, sides, float32_bytes(layout))
    return report


def _add_changed_modules(adapter: Adapter, layout: Layout, base_folder: Path, folder: Path) -> None:
    trained_on = base_of(folder, adapter)
    if trained_on is None or trained_on.resolve() == base_folder.resolve() or is_quantized(trained_on):
        return
    _, other = read_layout(trained_on)
    head, embedding = head_and_embedding(layout.family)
    changed = {}
    for name, entry in other.entries.items():
        mine = layout.entries.get(embedding if name == head and layout.tied else name)
        if mine is None or mine.shape != entry.shape:
            raise ConversionError(f"the adapter was trained on {trained_on}, whose {name} the base has not")
        # qwen3_5's norms lose bits in MLX's own form, trained or not
        if not fam.is_shifted_norm(layout.family, name) and not same_values(mine, entry):
            changed[name] = entry
    if len(changed) > len(other.entries) // 4:
        raise ConversionError(
            f"the adapter was trained on {trained_on}, and {len(changed)} of its {len(other.entries)} tensors differ "
            "from the base: give the base it was trained on"
        )
    adapter.saved.update(changed)


def _targets(modules: set[str], family: Family, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Suffixes when they hit exactly the adapted linears, else full names."""
    linears = {
        n.removesuffix(".weight")
        for n, s in shapes.items()
        if n.endswith(".weight") and len(s) == 2 and not re.search(r"embed|position", n.rsplit(".", 2)[-2])
    }
    suffixes = {m.rsplit(".", 1)[-1] for m in modules}
    plain = all(not s.isdigit() for s in suffixes)
    hit = {n for n in linears if n.rsplit(".", 1)[-1] in suffixes}
    # a convolution of that name would be adapted as well
    convolutions = {n for n, s in shapes.items() if len(s) > 2 and n.split(".")[-2] in suffixes}
    if plain and hit == modules and not convolutions:
        return sorted(suffixes)
    return sorted(fam.memory_name(family, m + ".weight").removesuffix(".weight") for m in modules)


def write_peft_adapter(
    folder: Path, adapter: Adapter, family: Family, shapes: dict[str, tuple[int, ...]], base: str
) -> int:
    """Write adapter_model.safetensors and adapter_config.json as peft's save_pretrained does."""
    outputs: list[Output] = []
    for disk, m in adapter.modules.items():
        name = _PREFIX + fam.memory_name(family, disk + ".weight").removesuffix(".weight")
        pieces = {"lora_A.weight": m.a, "lora_B.weight": m.b, "lora_magnitude_vector": m.magnitude}
        for leaf, data in pieces.items():
            if data is not None:
                flat = np.ascontiguousarray(data, np.float32)
                outputs.append(
                    Output(f"{name}.{leaf}", "F32", flat.shape, lambda d=flat: [memoryview(d).cast("B")])
                )
    saved_modules = set()
    for disk, entry in adapter.saved.items():
        memory = fam.memory_name(family, disk)
        outputs.append(replace(entry.output(), name=_PREFIX + memory))
        saved_modules.add(memory.rpartition(".")[0])
    rslora = adapter.kind == "rslora"
    alpha = adapter.scale * (math.sqrt(adapter.rank) if rslora else adapter.rank)
    alpha = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": rslora,
        "use_dora": adapter.kind == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": _targets(set(adapter.modules), family, shapes),
        "modules_to_save": sorted(saved_modules) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    write_file(folder / PEFT_WEIGHTS, outputs, "pt")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return len(outputs)
