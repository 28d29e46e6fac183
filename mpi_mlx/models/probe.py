"""Probe inputs and the logits that a checkpoint folder gives on them, in plain mlx-vlm or mlx-lm.

Conversion uses this to prove its results: the same token ids and pixels go through the source and the
converted folder, and :func:`relative_error` compares the logits. Everything is batch 1, and position ids are
always explicit, since mlx-vlm's Qwen2-VL and Qwen2.5-VL keep them between calls.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TEXT_ONLY = frozenset({"llama", "qwen2", "qwen3", "gemma3_text"})
MROPE = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"})


@dataclass(frozen=True)
class Probe:
    """One input: ``ids`` int64 (1, T) and, with images, arrays named as transformers names them."""

    name: str
    ids: np.ndarray
    images: dict[str, np.ndarray] = field(default_factory=dict)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Relative L2 norm of the difference of two arrays of logits (T, V); infinite if the shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30))


# --- probe inputs ------------------------------------------------------------------------------------------


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, (list, tuple)) else (int(value), int(value))


def image_id(config: dict) -> int:
    for key in ("image_token_id", "image_token_index"):
        if config.get(key) is not None:
            return int(config[key])
    raise KeyError("image_token_id")


def _qwen_images(config: dict, rng, grids) -> tuple[list[list[int]], dict[str, np.ndarray]]:
    vision = config["vision_config"]
    patch, merge = vision["patch_size"], vision.get("spatial_merge_size", 2)
    width = vision.get("in_channels", 3) * vision.get("temporal_patch_size", 2) * patch * patch
    grid = np.array([(1, h * merge, w * merge) for h, w in grids], np.int64)
    pixels = rng.standard_normal((int(grid.prod(1).sum()), width)).astype(np.float32)
    image = image_id(config)
    start = config.get("vision_start_token_id", 151652)
    end = config.get("vision_end_token_id", 151653)
    runs = [[start] + [image] * (h * w) + [end] for h, w in grids]
    return runs, {"pixel_values": pixels, "image_grid_thw": grid}


def _tile_images(config: dict, rng, count: int) -> tuple[list[list[int]], dict[str, np.ndarray]]:
    """Families that see fixed square tiles: one run of placeholders a tile."""
    kind, vision = config["model_type"], config["vision_config"]
    height, width = _pair(vision["image_size"])
    patch_h, patch_w = _pair(vision["patch_size"])
    tokens = (height // patch_h) * (width // patch_w)
    pixels = rng.standard_normal((count, vision.get("num_channels", 3), height, width)).astype(np.float32)
    if kind in ("smolvlm", "idefics3"):
        tokens //= config.get("scale_factor", 2) ** 2
        pixels = pixels[None]
    elif kind == "internvl":
        tokens = int(tokens * config.get("downsample_ratio", 0.5) ** 2)
    elif kind == "gemma3":
        tokens = int(config.get("mm_tokens_per_image", 256))
    elif kind == "llava" and config.get("vision_feature_select_strategy", "default") == "full":
        tokens += 1
    return [[image_id(config)] * tokens for _ in range(count)], {"pixel_values": pixels}


def _anyres_images(config: dict, rng, sizes) -> tuple[list[list[int]], dict[str, np.ndarray]]:
    """llava_onevision: a base tile and the tiles of the best resolution, newline tokens between the rows."""
    from transformers.image_processing_utils import select_best_resolution

    vision = config["vision_config"]
    side = vision["image_size"] // vision["patch_size"]
    tile = vision["image_size"]
    runs, images = [], []
    for height, width in sizes:
        best_h, best_w = select_best_resolution((height, width), config["image_grid_pinpoints"])
        rows, cols = best_h // tile * side, best_w // tile * side
        if width / height > cols / rows:
            rows -= 2 * ((rows - int(height * cols / width)) // 2)
        else:
            cols -= 2 * ((cols - int(width * rows / height)) // 2)
        runs.append([image_id(config)] * (side * side + rows * (cols + 1)))
        count = 1 + (best_h // tile) * (best_w // tile)
        images.append(rng.standard_normal((count, 3, tile, tile)).astype(np.float32))
    most = max(len(i) for i in images)
    pixels = np.stack([np.pad(i, ((0, most - len(i)), (0, 0), (0, 0), (0, 0))) for i in images])
    return runs, {"pixel_values": pixels, "image_sizes": np.array(sizes, np.int64)}


def _images(config: dict, rng, count: int):
    kind = config["model_type"]
    if kind in MROPE:
        return _qwen_images(config, rng, [(2, 3), (3, 1)][:count])
    if kind == "llava_onevision":
        tile = config["vision_config"]["image_size"]
        return _anyres_images(config, rng, [(tile, 2 * tile - 2), (2 * tile, tile)][:count])
    return _tile_images(config, rng, count)


def probe_inputs(config: dict, *, seed: int = 0, length: int = 12) -> list[Probe]:
    """Text; text with one (non-square where the family allows) and with two images; text after those.

    The probes are meant to be run in this order: the last one catches state kept from the images.
    """
    rng = np.random.default_rng(seed)
    text = config.get("text_config") or config
    vocab = min(int(text.get("vocab_size", 128)), 32000)
    special = {
        int(v)
        for k, v in {**text, **config}.items()
        if k.endswith(("token_id", "token_index")) and type(v) is int
    }
    usable = np.array([i for i in range(3, vocab) if i not in special])

    def words(n: int) -> list[int]:
        return rng.choice(usable, n).tolist()

    probes = [Probe("text", np.array([words(length)], np.int64))]
    if "vision_config" not in config or config["model_type"] in TEXT_ONLY:
        return probes
    # mlx-vlm's paligemma takes one image, and at the start, where its processor puts it
    first = config["model_type"] == "paligemma"
    for name, count in (("image", 1), ("two images", 2))[: 1 if first else 2]:
        runs, arrays = _images(config, rng, count)
        ids = [] if first else words(3)
        for run in runs:
            ids += run + words(3)
        probes.append(Probe(name, np.array([ids + words(length // 2)], np.int64), arrays))
    probes.append(Probe("text after image", np.array([words(length + 5)], np.int64)))
    return probes


# --- mlx ---------------------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> dict:
    return json.loads((Path(folder) / "config.json").read_text())


def load_net(folder: str | Path, *, lazy: bool = False, adapter: str | Path | None = None):
    """The bare module of mlx-lm (text-only families) or mlx-vlm, as those libraries load the folder's checkpoint."""
    from mpi_mlx.models.folders import checkpoint_files, only_files

    folder = Path(folder)
    with only_files(folder, checkpoint_files(folder)) as place:
        return _load_net(place, lazy, adapter)


def _load_net(folder: Path, lazy: bool, adapter: str | Path | None):
    config = read_config(folder)
    if config["model_type"] in TEXT_ONLY:
        from mlx_lm.tuner.utils import load_adapters
        from mlx_lm.utils import load_model

        net, _ = load_model(folder, lazy=lazy)
        if adapter:
            _quantize_as_trained(net, adapter)
            load_adapters(net, str(adapter))
            net.eval()
        return net
    from mlx_vlm.trainer.peft.utils import apply_lora_layers
    from mlx_vlm.utils import load_model

    net = load_model(folder, lazy=lazy)
    if adapter:
        net = apply_lora_layers(net, str(adapter))
        net.eval()
    return net


def _quantize_as_trained(net, adapter: str | Path) -> None:
    """mlx-vlm quantizes a base as its adapter's config records; mlx-lm does not know that entry."""
    import mlx.nn as nn

    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    wanted = config.get("base_quantization") or {}
    done = {n for n, m in net.named_modules() if isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding))}
    sizes = ("group_size", "bits")
    wanted = {n: {k: v for k, v in s.items() if k in sizes} for n, s in wanted.items() if n not in done}
    if wanted:
        nn.quantize(net, class_predicate=lambda name, _: wanted.get(name, False))


def _vlm_logits(net, config: dict, probe: Probe):
    import mlx.core as mx

    ids = mx.array(probe.ids.astype(np.int32))
    arrays = {k: mx.array(v) for k, v in probe.images.items()}
    if "image_sizes" in arrays:
        arrays["image_sizes"] = probe.images["image_sizes"]
    kind = config["model_type"]
    if kind in ("gemma3", "paligemma"):
        arrays["mask"] = mx.ones(ids.shape, mx.int32)
    features = net.get_input_embeddings(ids, arrays.pop("pixel_values", None), **arrays)
    embeds = features.inputs_embeds + 0  # gemma3 scales the caller's array in place
    if kind == "internvl":
        return net.language_model(inputs_embeds=embeds).logits
    if kind in MROPE:
        keep = {k: v for k, v in features.to_dict().items() if k != "inputs_embeds" and v is not None}
        return net.language_model(ids, inputs_embeds=embeds, **keep).logits
    # mask=None: causal, as mlx-vlm generates (paligemma: bidirectional, as its config asks)
    return net.language_model(ids, inputs_embeds=embeds, mask=None).logits


def mlx_logits(net, config: dict, probes: Iterable[Probe]) -> list[np.ndarray]:
    """Logits float32 (T, V) of each probe, run in order on one module."""
    import mlx.core as mx

    out = []
    for probe in probes:
        if config["model_type"] in TEXT_ONLY:
            logits = net(mx.array(probe.ids.astype(np.int32)))
            logits = getattr(logits, "logits", logits)
        else:
            logits = _vlm_logits(net, config, probe)
        out.append(np.array(logits[0].astype(mx.float32)))
    return out


def parameter_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that mlx builds from a folder's config, no weight read."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    config = read_config(folder)
    if config["model_type"] in TEXT_ONLY:
        arch = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
        net = arch.Model(arch.ModelArgs.from_dict(config))
    else:
        from mlx_vlm.utils import get_model_and_args, update_module_configs

        arch, _ = get_model_and_args(dict(config))
        config.setdefault("vision_config", {})
        model_config = arch.ModelConfig.from_dict(config)
        model_config = update_module_configs(model_config, arch, config, ["text", "vision"])
        net = arch.Model(model_config)
    return {k: tuple(v.shape) for k, v in tree_flatten(net.parameters()) if isinstance(v, mx.array)}


def to_float32(net) -> None:
    """Widen every float parameter in place, so that two folders are compared and not two roundings."""
    import mlx.core as mx
    from mlx.utils import tree_map

    net.update(
        tree_map(
            lambda v: v.astype(mx.float32) if mx.issubdtype(v.dtype, mx.floating) else v, net.parameters()
        )
    )


def quantized_lazily(folder: str | Path, bits: int, group_size: int = 64) -> tuple[dict, dict]:
    """The config of a folder quantized by mlx-vlm (mlx-lm), and its tensors by name, none computed yet.

    Vision towers and projectors stay float. A tensor takes memory when it is evaluated, and for as long as
    somebody keeps it.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    config = read_config(folder)
    with mx.stream(mx.cpu):
        net = load_net(folder, lazy=True)
        if config["model_type"] in TEXT_ONLY:
            from mlx_lm.utils import quantize_model

            net, config = quantize_model(net, config, group_size, bits)
        else:
            from mlx_vlm.quant_utils import quantize_model
            from mlx_vlm.utils import skip_multimodal_module

            net, config = quantize_model(
                net,
                config,
                group_size,
                bits,
                quant_predicate=lambda path, _: not skip_multimodal_module(path),
            )
        return config, dict(tree_flatten(net.parameters()))
