"""Adapters as one table: modules by disk name, with their low-rank factors in PEFT's orientation.

MLX (mlx-vlm, mlx-lm and this project's trainer) keeps ``lora_a`` (in, r), ``lora_b`` (r, out) and, for DoRA,
``m`` (out,), with one rank and one scale for all modules. PEFT keeps A (r, in), B (out, r) and a magnitude
vector, with rank and alpha by module.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mpi_mlx.convert import families as fam
from mpi_mlx.convert.families import Family
from mpi_mlx.convert.layout import Entry
from mpi_mlx.convert.reading import as_disk
from mpi_mlx.convert.shards import Output, Stored, read_header, to_float32, write_file
from mpi_mlx.errors import ConversionError

MLX_WEIGHTS, PEFT_WEIGHTS, CONFIG = "adapters.safetensors", "adapter_model.safetensors", "adapter_config.json"


@dataclass
class LowRank:
    """One adapted linear: float32 ``a`` (r, in), ``b`` (out, r), ``scale``; DoRA's ``magnitude`` (out,)."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    def rows(self, start: int, stop: int) -> LowRank:
        """The part that belongs to some outputs: they are independent of each other."""
        magnitude = None if self.magnitude is None else self.magnitude[start:stop]
        return LowRank(self.a, self.b[start:stop], self.scale, magnitude)

    def delta(self) -> np.ndarray:
        """scale * B A, float32 (out, in)."""
        return np.float32(self.scale) * (self.b @ self.a)

    def merged(self, weight: np.ndarray) -> np.ndarray:
        """The linear's weight (out, in) with the adapter in it, in float32."""
        weight = weight + self.delta()
        if self.magnitude is None:
            return weight
        return weight * (self.magnitude / np.linalg.norm(weight, axis=1))[:, None]


@dataclass
class Adapter:
    """``modules`` by disk module name (no ".weight"); ``saved``: whole tensors by disk tensor name."""

    kind: str  # "lora", "rslora" or "dora" (a DoRA with rsLoRA's scale is "dora")
    rank: int
    scale: float
    dropout: float
    modules: dict[str, LowRank]
    saved: dict[str, Entry] = field(default_factory=dict)
    base: str | None = None
    base_quantization: dict = field(default_factory=dict)
    max_pixels: int | None = None  # the limit on images' pixels that it was trained with, if it is known


def read_float32(tensor: Stored) -> np.ndarray:
    return to_float32(tensor.read(), tensor.dtype)


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConversionError(f"{path.parent} is no adapter: it has no {path.name}") from None
    except ValueError as e:
        raise ConversionError(f"{path} is not JSON: {e}") from None
    if not isinstance(found, dict):
        raise ConversionError(f"{path} holds no object: save the adapter again")
    return found


def unify(modules: dict[str, LowRank], rank: int, scale: float) -> dict[str, LowRank]:
    """The same adapters at one rank and scale: factors padded with zeros, scales folded into B."""
    out = {}
    for name, m in modules.items():
        pad = rank - m.a.shape[0]
        ratio = np.float32(m.scale / scale)
        a = np.pad(m.a, ((0, pad), (0, 0)))
        b = np.pad(m.b if ratio == 1 else m.b * ratio, ((0, 0), (0, pad)))
        out[name] = LowRank(a, b, scale, m.magnitude)
    return out


# --- MLX's form -------------------------------------------------------------------------------------------


def _number(stage: str) -> int:
    number = stage.partition("-")[0]
    return int(number) if number.isdigit() else 0


def find_adapter(path: Path) -> Path:
    """The adapter folder of a run, or the folder itself."""
    for folder in (path, path / "adapter"):
        if (folder / MLX_WEIGHTS).exists():
            return folder
    if (path / PEFT_WEIGHTS).exists():
        raise ConversionError(f"{path} is a PEFT adapter: use `mpi-mlx convert from-peft` first")
    stages = sorted(path.glob(f"stages/*/adapter/{MLX_WEIGHTS}"), key=lambda p: _number(p.parent.parent.name))
    if stages:
        raise ConversionError(
            f"{path} is not finished: `mpi-mlx train {shlex.quote(str(path))} --resume`, or give the adapter of "
            f"its last stage, {stages[-1].parent}"
        )
    if (path / "model" / "config.json").exists():
        raise ConversionError(f"{path} trained a whole model, no adapter: it is in {path / 'model'}")
    raise ConversionError(f"{path} has no {MLX_WEIGHTS} and no adapter folder: is it a run?")


def read_mlx_adapter(folder: Path, family: Family) -> Adapter:
    """Read adapters.safetensors and its config, as mlx-vlm, mlx-lm or this project wrote them.

    Raises ConversionError for unknown kinds and for tensors that have no place in the family's table.
    """
    config = read_json(folder / CONFIG)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora") or "lora_parameters" not in config:
        raise ConversionError(
            f"{folder / CONFIG} is of kind {kind!r}, not lora or dora with lora_parameters: cannot be carried"
        )
    parameters, own = config["lora_parameters"], config.get("mpi_mlx", {})
    rank, scale = int(parameters["rank"]), float(parameters["scale"])
    tensors, _ = read_header(folder / MLX_WEIGHTS)
    modules, saved = {}, {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        low_rank = leaf in ("lora_a", "lora_b", "m")
        disk = fam.disk_name(family, module + ".weight" if low_rank else name)
        if disk is None:
            raise ConversionError(f"{name} of {folder} has no place in {family.name}'s table")
        if not low_rank:
            saved[disk] = as_disk(family, Entry.of(tensor, disk))
        elif leaf == "lora_a":
            pair, m = tensors.get(f"{module}.lora_b"), tensors.get(f"{module}.m")
            if pair is None:
                raise ConversionError(f"{folder} has {name} but no {module}.lora_b")
            if kind == "dora" and m is None:
                raise ConversionError(f"{folder} is DoRA, but has no {module}.m")
            modules[disk.removesuffix(".weight")] = LowRank(
                read_float32(tensor).T, read_float32(pair).T, scale, None if m is None else read_float32(m)
            )
    if not modules:
        raise ConversionError(f"{folder} has no lora_a tensor")
    named = own.get("kind", "lora") if kind == "lora" else "dora"
    return Adapter(
        named,
        rank,
        scale,
        float(parameters.get("dropout", 0.0)),
        modules,
        saved,
        own.get("base"),
        config.get("base_quantization", {}),
        own.get("max_pixels"),
    )


def _array_output(name: str, data: np.ndarray) -> Output:
    data = np.ascontiguousarray(data, np.float32)
    return Output(name, "F32", data.shape, lambda: [memoryview(data).cast("B")])


def write_mlx_adapter(
    folder: Path,
    adapter: Adapter,
    family: Family,
    layers: int,
    base: str,
    base_quantization: dict | None = None,
) -> int:
    """Write an adapter as mlx-vlm (mlx-lm for text-only families) and this project load it."""
    unified = unify(adapter.modules, adapter.rank, adapter.scale)
    outputs = []
    for name, m in unified.items():
        tree = fam.tree_name(family, name + ".weight").removesuffix(".weight")
        outputs += [_array_output(f"{tree}.lora_a", m.a.T), _array_output(f"{tree}.lora_b", m.b.T)]
        if m.magnitude is not None:
            outputs.append(_array_output(f"{tree}.m", m.magnitude))
    names = [fam.tree_name(family, n + ".weight").removesuffix(".weight") for n in unified]
    keys, count = _relative(names, layers) if family.text_only else (names, -1)
    alpha = adapter.scale * (math.sqrt(adapter.rank) if adapter.kind == "rslora" else adapter.rank)
    config = {
        "fine_tune_type": "dora" if adapter.kind == "dora" else "lora",
        "num_layers": count,
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": adapter.scale,
            "dropout": adapter.dropout,
            "keys": sorted(keys),
        },
        "mpi_mlx": {"base": base, "alpha": alpha, "kind": adapter.kind},
    }
    if adapter.max_pixels:
        config["mpi_mlx"]["max_pixels"] = adapter.max_pixels
    if base_quantization:
        config["base_quantization"] = base_quantization
    write_file(folder / MLX_WEIGHTS, outputs, "mlx")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return len(outputs)


def _relative(names: Iterable[str], layers: int) -> tuple[list[str], int]:
    """mlx-lm's keys relative to a layer where all layers are adapted alike, else qualified names."""
    by_layer: dict[int, set[str]] = {}
    names = list(names)
    for name in names:
        parts = name.split(".", 3)
        if parts[:2] != ["model", "layers"] or len(parts) < 4:
            return names, -1
        by_layer.setdefault(int(parts[2]), set()).add(parts[3])
    sets = list(by_layer.values())
    if len(sets) == layers and all(s == sets[0] for s in sets):
        return sorted(sets[0]), layers
    return names, -1


# --- fitting an adapter to a base -------------------------------------------------------------------------


def check_fit(adapter: Adapter, shapes: dict[str, tuple[int, ...]], where: Path) -> None:
    """Refuse an adapter whose modules the base lacks or has in other shapes; the first is named."""
    for name, m in adapter.modules.items():
        shape = shapes.get(name + ".weight")
        if shape is None:
            raise ConversionError(f"the adapter {where} adapts {name}, which the base does not have")
        want = (m.b.shape[0], m.a.shape[1])
        if len(shape) != 2:
            raise ConversionError(
                f"the adapter {where} adapts the convolution {name}: MLX adapts linears only"
            )
        if tuple(shape) != want:
            raise ConversionError(
                f"the adapter {where} fits {name} of shape {want}, the base has {tuple(shape)}"
            )
    for name, entry in adapter.saved.items():
        if name in shapes and tuple(shapes[name]) != tuple(entry.shape):
            raise ConversionError(
                f"{where} saves {name} with shape {entry.shape}, the base has {tuple(shapes[name])}"
            )
