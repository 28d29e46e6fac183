"""From a name to a :class:`~mpi_mlx.models.base.Model`."""

import inspect
import json
import logging
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mpi_mlx import runtime
from mpi_mlx.errors import ModelError
from mpi_mlx.models.attention import route_attention
from mpi_mlx.models.base import Model
from mpi_mlx.models.building import build_net, is_multimodal, model_type, text_classes
from mpi_mlx.models.families import Qwen2_5VL, TextFamily
from mpi_mlx.models.folders import check_rope, only_files, read_config, resolve_base, weight_files
from mpi_mlx.models.quantization import dequantize, quantization_of, quantize
from mpi_mlx.models.vision_families import Idefics3, Llava, Qwen2VL, Qwen3VL

_FAMILIES: dict[str, type[TextFamily]] = {
    "qwen2_5_vl": Qwen2_5VL,
    "qwen2_vl": Qwen2VL,
    "qwen3_vl": Qwen3VL,
    "smolvlm": Idefics3,
    "idefics3": Idefics3,
    "llava": Llava,
}
_CHECKED_TEXT = ("llama", "qwen2", "qwen3", "gemma3_text")
_FROM_FOLDER = {"trust_remote_code": False, "local_files_only": True}  # all is in the folder: the hub is not asked
_HEAD_EXTRAS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


def load_model(
    base: str | os.PathLike,
    *,
    quantize: int | None = None,
    max_pixels: int | None = None,
    dtype: str | None = None,
    adapter: str | os.PathLike | None = None,
    init: str = "weights",
    seed: int = 0,
) -> Model:
    """Loads a model from a hub id, a local folder or ``embedded:tiny``.

    Args:
        base: the name. Vision-language models run mlx-vlm's definitions, text-only ones mlx-lm's. Code that a
            checkpoint brings is never run.
        quantize: 4 or 8 bits for the text stack's weights (QLoRA); on CPU they are rounded so and kept in
            float32, the same numbers at full speed.
        max_pixels: upper bound on an image's pixels before it is cut into patches; by default the adapter's, where it
            has recorded one, else the base's own.
        dtype: of the unquantized weights; by default float32 on CPU, else the checkpoint's if 16-bit, else
            ``runtime.default_dtype()``. The embedded model stays float32.
        adapter: a folder with ``adapters.safetensors``, put on strictly.
        init: "weights", or "random" to draw them from ``seed`` (the folder then needs no safetensors).

    Raises:
        ModelError: the folder is missing or broken, or the family is not supported.
    """
    folder = resolve_base(base)
    config = read_config(folder)
    multimodal = is_multimodal(config)
    check_rope(config, _reads_rope_parameters(config, multimodal))
    if init == "random":
        net = build_net(config, seed)
    elif init == "weights":
        net = _read_net(folder, config, multimodal)
    else:
        raise ValueError(f"init is 'weights' or 'random', not {init!r}")
    quantization = _prepare(net, dtype, quantize, str(base).startswith("embedded:"))
    net.freeze()
    net.eval()
    if max_pixels is None and adapter is not None and multimodal:
        from mpi_mlx.models.adapters import recorded_limit

        max_pixels = recorded_limit(adapter)
    model = _assemble(net, folder, config, os.fspath(base), max_pixels)
    model.quantization = quantization
    runtime.fit_threads(sum(value.size for _, value in tree_flatten(net.parameters())))
    if adapter is not None:
        from mpi_mlx.models.adapters import load_adapter

        load_adapter(model, adapter)
    return model


def _read_net(folder: Path, config: dict, multimodal: bool) -> nn.Module:
    files = weight_files(folder)
    level = logging.root.level
    try:
        with only_files(folder, files) as place:
            if multimodal:
                from mlx_vlm.utils import load_model as load_net

                return load_net(place, lazy=True)  # read as it is cast or quantized: never all of it twice
            from mlx_lm.utils import load_model as load_net

            text_classes(config)
            return load_net(place, lazy=True)[0]
    except ModelError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ModelError(
            f"{folder} does not load as {model_type(config)}: {' '.join(lines[:3])[:300]}; if "
            "transformers saved it, run `mpi-mlx convert` on it first"
        ) from error
    finally:
        logging.root.setLevel(level)


def _reads_rope_parameters(config: dict, multimodal: bool) -> bool:
    if multimodal:
        return False
    try:
        return "rope_parameters" in inspect.getsource(inspect.getmodule(text_classes(config)[0]))
    except OSError:
        return False


def _prepare(net: nn.Module, dtype: str | None, bits: int | None, embedded: bool) -> dict:
    """Casts and quantizes in place; returns what was quantized here, by module name."""
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if bits is not None and bits not in (4, 8):
        raise ModelError(f"quantize is 4, 8 or nothing, not {bits}")
    done = quantize(net, bits) if bits is not None else {}
    if on_cpu:
        done = done or quantization_of(net)
        dequantize(net)
    target = dtype or ("float32" if on_cpu or embedded else None)
    if target is not None:
        wanted = getattr(mx, target)
        _cast(net, lambda found: wanted)
    else:
        from mpi_mlx import runtime

        default = getattr(mx, runtime.default_dtype())
        _cast(net, lambda found: default if found == mx.float32 else found)
    mx.eval(net.parameters())
    return done


def _cast(net: nn.Module, choose: Any) -> None:
    def cast(value: mx.array) -> mx.array:
        return value.astype(choose(value.dtype)) if mx.issubdtype(value.dtype, mx.floating) else value

    net.update(tree_map(cast, net.parameters()))


def _assemble(net: nn.Module, folder: Path, config: dict, base: str, max_pixels: int | None) -> Model:
    kind = _FAMILIES.get(model_type(config), TextFamily)
    route_attention(net)
    if kind.is_multimodal:
        processor = _load_processor(folder)
        tokenizer = processor.tokenizer
        template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        signature = _limit_pixels(processor.image_processor, max_pixels)
    else:
        processor, tokenizer, signature = None, _load_tokenizer(folder), ""
        template = getattr(tokenizer, "chat_template", None)
    template = _template_text(template, folder)
    family: TextFamily = kind(net, config, processor)
    eos = config.get("eos_token_id")
    eos_ids = [eos] if isinstance(eos, int) else list(eos or [])
    if tokenizer.eos_token_id is not None:
        eos_ids.append(tokenizer.eos_token_id)
    model = Model(net, family, tokenizer, template, config, folder, base, eos_ids, signature)
    if not kind.is_multimodal and model.family not in _CHECKED_TEXT:
        check_forward(model)
    return model


def check_forward(model: Model) -> None:
    """Compares the split forward (embed, hidden, head) with the module's own on four tokens.

    Raises:
        ModelError: they differ, so the family does something this project would leave out.
    """
    ids = mx.array([[1, 2, 3, 4]])
    same = not any(model.config.get(name) for name in _HEAD_EXTRAS) and _keeps_keys_and_values(model.net)
    try:
        ours = model.head(model.hidden(model.embed(ids), mx.arange(4)[None]))
        own = model.net(ids)
        same = same and ours.shape == own.shape and bool(mx.allclose(ours, own, rtol=1e-2, atol=1e-2))
    except (TypeError, AttributeError, ValueError, KeyError, IndexError):
        same = False
    if not same:
        raise ModelError(
            f"model family {model.family!r} of mlx-lm cannot be split into embedding, layers and "
            "head, which training needs; choose a llama, qwen2, qwen3 or gemma3_text base"
        )


def _keeps_keys_and_values(net: nn.Module) -> bool:
    """False for state-space and hybrid models, whose state is no list of keys and values."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    made = net.make_cache() if hasattr(net, "make_cache") else []
    return all(type(cache) in (KVCache, RotatingKVCache) for cache in made)


def _template_text(template: Any, folder: Path) -> str:
    for name in ("chat_template.jinja", "chat_template.json"):
        if not template and (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8")
            template = json.loads(text)["chat_template"] if name.endswith(".json") else text
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ModelError(f"{folder} has no chat template; choose an instruction-tuned base")
    return template


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), **_FROM_FOLDER)
    except Exception as error:
        raise ModelError(
            f"{folder}: the tokenizer does not load ({_first_line(error)}); is tokenizer.json there?"
        ) from error


def _load_processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(str(folder), **_FROM_FOLDER)
    except Exception as error:
        raise ModelError(
            f"{folder}: the processor does not load ({_first_line(error)}); are tokenizer.json and "
            "preprocessor_config.json there?"
        ) from error
    if getattr(processor, "image_processor", None) is None:
        raise ModelError(f"{folder} has no image processor; is preprocessor_config.json there?")
    return processor


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _limit_pixels(image_processor: Any, max_pixels: int | None) -> str:
    """Sets ``max_pixels`` and returns the settings as text, part of every image's key."""
    if max_pixels is not None:
        if not hasattr(image_processor, "max_pixels"):
            raise ModelError("max_pixels is not a setting of this model's image processor; leave it out")
        least = getattr(image_processor, "min_pixels", 1) or 1
        if max_pixels < least:
            raise ModelError(f"max_pixels {max_pixels} is below the image processor's min_pixels {least}")
        image_processor.max_pixels = max_pixels
        size = getattr(image_processor, "size", None)
        if isinstance(size, dict) and "longest_edge" in size:
            image_processor.size = dict(size, longest_edge=max_pixels)
    names = ("min_pixels", "max_pixels", "size", "patch_size", "merge_size", "image_mean", "image_std")
    return json.dumps(
        {name: getattr(image_processor, name, None) for name in names}, default=str, sort_keys=True
    )
