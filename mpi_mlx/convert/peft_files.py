"""The files of a PEFT adapter, as of peft 0.21: read and written. Only safetensors are opened."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from mpi_mlx.convert import families as fam
from mpi_mlx.convert.adapters import CONFIG, PEFT_WEIGHTS, Adapter, LowRank, read_float32, read_json
from mpi_mlx.convert.families import Family
from mpi_mlx.convert.layout import Entry
from mpi_mlx.convert.shards import Output, Stored, read_header, write_file
from mpi_mlx.errors import ConversionError

PREFIX = "base_model.model."
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


def module_scale(config: dict, module: str, rank: int) -> float:
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
            f"{folder} was started with init_lora_weights={init!r}, which changes the base: save it again "
            "with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def check_numbers(config: dict, folder: Path) -> None:
    """Refuse ranks and alphas that give no scale, and patterns that match nothing because they are broken."""
    patterns = {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise ConversionError(f"{folder / CONFIG}: {key} is {pattern!r}, not an object of patterns and numbers")
    values = {key: config.get(key) for key in ("r", "lora_alpha")}
    values |= {f"{key} of {name!r}": v for key, pattern in patterns.items() for name, v in pattern.items()}
    for key, value in values.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ConversionError(
                f"{folder / CONFIG}: {key} is {value!r}, not a number above 0: write there what it was trained with"
            )
    for pattern in patterns["alpha_pattern"]:
        try:
            re.compile(pattern)
        except re.error as e:
            raise ConversionError(f"{folder / CONFIG}: alpha_pattern {pattern!r} is no pattern: {e}") from None


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
    check_numbers(config, folder)
    if not (folder / PEFT_WEIGHTS).exists():
        if (folder / "adapter_model.bin").exists():
            raise ConversionError(
                f"{folder / 'adapter_model.bin'} is pickled, and opening a pickle can run code; where you "
                "trust it, load it with peft and save_pretrained(..., safe_serialization=True)"
            )
        raise ConversionError(f"{folder} has no {PEFT_WEIGHTS}")
    tensors, _ = read_header(folder / PEFT_WEIGHTS)
    parts: dict[str, dict[str, Stored]] = {}
    saved: dict[str, Entry] = {}
    memory_names: dict[str, str] = {}
    for name, tensor in tensors.items():
        # peft saves the base's own weight too where it adapts an output head
        short = name.removeprefix(PREFIX).replace(".base_layer.", ".")
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
    return LowRank(read_float32(a), read_float32(b), module_scale(config, module, a.shape[0]), m)


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
        name = PREFIX + fam.memory_name(family, disk + ".weight").removesuffix(".weight")
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
        outputs.append(replace(entry.output(), name=PREFIX + memory))
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
