"""Adapters on disk, in the form that ``mlx_vlm.load(base, adapter_path=...)`` and mlx-lm read."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mpi_mlx.errors import ModelError
from mpi_mlx.models.base import Model
from mpi_mlx.models.folders import check_safetensors
from mpi_mlx.models.lora import linears, lora_scale, put_layers
from mpi_mlx.models.lora_layers import DoRALinear, LoRALinear
from mpi_mlx.models.pixels import pixel_limit

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"


def adapter_tensors(model: Model) -> dict[str, mx.array]:
    """Name -> array of the adapters alone, in the order of the names."""
    return {
        name: value
        for name, value in sorted(tree_flatten(model.net.parameters()))
        if name.rsplit(".", 1)[-1] in ("lora_a", "lora_b", "m") and _is_adapter(model, name)
    }


def adapter_config(model: Model) -> dict:
    """adapter_config.json's content for a model with adapters.

    It holds the limit on images' pixels, too: another one shows the adapter pictures that it has not seen so.
    """
    spec = model.lora_spec
    names = [
        name for name, module in model.net.named_modules() if isinstance(module, (LoRALinear, DoRALinear))
    ]
    keys, num_layers = names, -1
    if not model.is_multimodal:
        keys, num_layers = _relative_keys(names, model)
    config = {
        "fine_tune_type": "dora" if spec.kind == "dora" else "lora",
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": spec.rank,
            "scale": lora_scale(spec.rank, spec.alpha, spec.kind),
            "dropout": spec.dropout,
            "keys": keys,
        },
        "mpi_mlx": {"base": model.base, "alpha": spec.alpha, "kind": spec.kind},
    }
    if (limit := pixel_limit(model)) is not None:
        config["mpi_mlx"]["max_pixels"] = limit
    if model.quantization:
        config["base_quantization"] = model.quantization
    return config


def save_adapter(model: Model, folder: str | os.PathLike, spec: Any = None) -> None:
    """Writes ``adapters.safetensors`` and ``adapter_config.json``, each whole or not at all.

    Raises:
        ModelError: the model has no adapters.
    """
    if not model.has_adapters:
        raise ModelError("there are no adapters to save; attach_lora comes first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{os.getpid()}.{WEIGHTS}"
    mx.save_safetensors(str(partial), adapter_tensors(model), {"format": "mlx"})
    text = folder / f".{os.getpid()}.{CONFIG}"
    text.write_text(json.dumps(adapter_config(model), indent=2) + "\n")
    for path, name in ((partial, WEIGHTS), (text, CONFIG)):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(path, folder / name)


def recorded_limit(folder: str | os.PathLike) -> int | None:
    """``max_pixels`` of the model that a saved adapter was trained on; None where it does not say."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        limit = config["mpi_mlx"]["max_pixels"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # load_adapter says what is wrong with the rest
    return limit if isinstance(limit, int) and limit > 0 else None


def load_adapter(model: Model, folder: str | os.PathLike) -> None:
    """Puts a saved adapter on a model, strictly: every tensor must land and none may be left over.

    On a model that has adapters already, the saved one must be of the same shape and replaces their values.

    Raises:
        ModelError: files are missing or broken, or tensors do not fit (all are named, with both shapes).
    """
    folder = Path(folder)
    config, weights = _read(folder)
    fresh = not model.has_adapters
    if fresh:
        spec, names, scale = _plan(model, folder, config)
        put_layers(model, names, spec.rank, scale, spec.dropout, spec.kind == "dora", mx.random.key(0))
        model.lora_spec = spec
    try:
        put_tensors(model, weights, str(folder))
    except ModelError:
        if fresh:
            remove_adapters(model)
        raise


def put_tensors(model: Model, weights: dict[str, mx.array], where: str) -> None:
    """Sets the adapters' values; all of them, or ModelError and none."""
    own = adapter_tensors(model)
    problems = [f"{name} is missing (wanted {list(own[name].shape)})" for name in own if name not in weights]
    problems += [f"{name} {list(weights[name].shape)} is unexpected" for name in weights if name not in own]
    problems += [
        f"{name} is {list(weights[name].shape)}, wanted {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        raise ModelError(
            f"adapter {where} does not fit {model.base}: {len(problems)} tensors differ: "
            + "; ".join(problems)
        )
    model.net.update(tree_unflatten([(name, weights[name].astype(own[name].dtype)) for name in own]))
    mx.eval(model.net.trainable_parameters())


def remove_adapters(model: Model) -> None:
    """Takes the adapters off; the base is as it was loaded."""
    found = [
        (name, module.linear)
        for name, module in model.net.named_modules()
        if isinstance(module, (LoRALinear, DoRALinear))
    ]
    model.net.update_modules(tree_unflatten(found))
    model.lora_spec, model.projector_trained = None, False
    model.forget_features()


def _is_adapter(model: Model, name: str) -> bool:
    module = model.net
    for part in name.split(".")[:-1]:
        module = module[int(part)] if isinstance(module, list) else module[part]
    return isinstance(module, (LoRALinear, DoRALinear))


def _relative_keys(names: list[str], model: Model) -> tuple[list[str], int]:
    """mlx-lm's keys relative to a layer when all layers are adapted alike, else qualified names."""
    pattern = re.compile(r"model\.layers\.(\d+)\.(.+)")
    layers: dict[int, list[str]] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if not match:
            return names, -1
        layers.setdefault(int(match[1]), []).append(match[2])
    alike = len({tuple(keys) for keys in layers.values()}) == 1 and len(layers) == model.num_layers
    return (next(iter(layers.values())), model.num_layers) if alike else (names, -1)


def _read(folder: Path) -> tuple[dict, dict[str, mx.array]]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(
                f"{folder} is no MLX adapter: {name} is missing; PEFT adapters go through "
                "`mpi-mlx convert` first"
            )
    check_safetensors(folder / WEIGHTS)
    try:
        config = json.loads((folder / CONFIG).read_text())
        parameters = config["lora_parameters"]
        parameters["rank"], parameters["scale"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / CONFIG} lacks mlx-vlm's lora_parameters ({error}); PEFT adapters go through "
            "`mpi-mlx convert` first"
        ) from None
    return config, mx.load(str(folder / WEIGHTS))


def _plan(model: Model, folder: Path, config: dict) -> tuple[SimpleNamespace, list[str], float]:
    """What the config asks for: a spec, the modules' qualified names, the scale."""
    parameters = config["lora_parameters"]
    available = linears(model)
    if config.get("fine_tune_type", "lora") not in ("lora", "dora"):
        raise ModelError(f"{folder} is a {config['fine_tune_type']!r} checkpoint, not an adapter")
    keys = parameters.get("keys")
    if keys is None:
        layers = {
            name.removesuffix(".lora_a")
            for name in mx.load(str(folder / WEIGHTS))
            if name.endswith(".lora_a")
        }
        names = [name for name in available if name in layers]
        missing = sorted(layers - set(names))
    else:
        count = config.get("num_layers", -1)
        first = max(0, model.num_layers - count) if count and count > 0 else 0
        paths = [f"{model.parts.text_path}{index}." for index in range(first, model.num_layers)]
        names, missing = [], []
        for key in keys:
            found = [key] if key in available else [path + key for path in paths if path + key in available]
            names += found
            missing += [] if found else [key]
    if missing or not names:
        raise ModelError(
            f"adapter {folder} does not fit {model.base}: it has no linear "
            f"{', '.join(missing[:5]) or 'of those names'}"
        )
    names = [name for name in available if name in set(names)]
    extra = config.get("mpi_mlx", {})
    kind = "dora" if config.get("fine_tune_type") == "dora" else extra.get("kind", "lora")
    rank, scale = int(parameters["rank"]), float(parameters["scale"])
    alpha = scale * (rank**0.5 if kind == "rslora" else rank)
    path = model.parts.projector_path
    spec = SimpleNamespace(
        rank=rank,
        alpha=extra.get("alpha", alpha),
        dropout=float(parameters.get("dropout", 0.0)),
        kind=kind,
        targets=names,
        projector=bool(path) and any(name.startswith(path + ".") for name in names),
    )
    return spec, names, scale
