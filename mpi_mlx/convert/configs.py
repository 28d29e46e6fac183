"""One config.json that both sides read.

The canonical form is what transformers 5 itself would save (older layouts are carried over by it). MLX reads
some values under other names, and has defaults of its own for what is missing, so those are written beside:
transformers ignores them or reads the same value from them. What MLX would silently ignore is refused.
"""

from __future__ import annotations

import copy
import json
import logging
from contextlib import contextmanager
from pathlib import Path

from mpi_mlx.convert.families import Family, family_of
from mpi_mlx.convert.supported import check_supported, pattern_of, rope_of
from mpi_mlx.errors import ConversionError


@contextmanager
def quiet_transformers():
    """transformers warns about token ids and deprecated names while it reads older configs."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path.parent} has no {path.name}: is it a model folder?") from None
    except ValueError as e:
        raise ConversionError(f"{path} is not JSON: {e}") from None


def canonical_config(folder: Path) -> dict:
    """The folder's config as transformers 5 would save it: values spelled out, older layouts carried over."""
    raw = read_json(folder / "config.json")
    if "model_type" not in raw:
        raise ConversionError(
            f"{folder / 'config.json'} has no model_type: is it an adapter or a raw export?"
        )
    family_of(raw)
    with quiet_transformers():
        from transformers import AutoConfig

        try:
            config = AutoConfig.for_model(raw["model_type"]).from_dict(_plain(raw))
        except Exception as e:
            raise ConversionError(
                f"transformers cannot read {folder / 'config.json'}: {_one_line(e)}"
            ) from None
        out = json.loads(config.to_json_string(use_diff=True))
    out.setdefault("architectures", raw.get("architectures") or [_architecture(raw["model_type"])])
    for key in ("quantization", "quantization_config"):
        out.pop(key, None)
    if "tie_word_embeddings" not in out:
        out["tie_word_embeddings"] = bool(getattr(config, "tie_word_embeddings", False))
    return out


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _architecture(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    found = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    found = found or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if found is None:
        raise ConversionError(f"model_type {model_type!r} has no generating architecture in transformers")
    return found


def _plain(raw: dict) -> dict:
    """Undo our own MLX additions, so that converting a converted folder changes nothing."""
    raw = copy.deepcopy(raw)
    for key in raw.pop("mlx_keys", []):
        parent, _, leaf = key.rpartition(".")
        at = raw.get(parent, {}) if parent else raw
        at.pop(leaf, None)
    for key, value in raw.pop("mlx_vision_model_type", {}).items():
        raw.setdefault(key, {})["model_type"] = value
    return raw


# --- MLX additions -----------------------------------------------------------------------------------------


def _legacy_rope(text: dict) -> dict:
    params = rope_of(text)
    out = {"rope_theta": params.get("rope_theta", 10000.0)}
    if params.get("rope_type", "default") != "default":
        out["rope_scaling"] = {**params, "type": params["rope_type"]}
    return out


def _gemma3_rope(text: dict) -> dict:
    params = rope_of(text)
    full, local = params["full_attention"], params["sliding_attention"]
    out = {
        "rope_theta": full["rope_theta"],
        "rope_global_base_freq": full["rope_theta"],
        "rope_local_base_freq": local["rope_theta"],
        "sliding_window_pattern": pattern_of(text),
    }
    if full.get("rope_type", "default") != "default":
        out["rope_scaling"] = {**full, "type": full["rope_type"]}
    return out


def _mrope(text: dict, kind: str) -> dict:
    section = rope_of(text)["mrope_section"]
    return {
        "rope_theta": rope_of(text)["rope_theta"],
        "rope_scaling": {"type": kind, "mrope_section": section},
    }


def _additions(family: Family, config: dict) -> dict[str, object]:
    """Dotted path -> value, for everything MLX reads under a name that transformers does not write."""
    text = config.get("text_config") or config
    name = family.name
    add: dict[str, object] = {}
    if name in ("qwen2_vl", "qwen2_5_vl"):
        skip = {
            "model_type",
            "dtype",
            "architectures",
            "rope_parameters",
            "layer_types",
            "transformers_version",
        }
        add = {k: v for k, v in text.items() if k not in skip and k not in config}
        add.update(_mrope(text, "mrope"))
    elif name in ("qwen3_vl", "qwen3_5"):
        if name == "qwen3_vl":
            add = {f"text_config.{k}": v for k, v in _mrope(text, "default").items()}
    elif name == "gemma3":
        add = {f"text_config.{k}": v for k, v in _gemma3_rope(text).items()}
        add["hidden_size"] = text["hidden_size"]
        add["text_config.mm_tokens_per_image"] = config["mm_tokens_per_image"]
        add["vocab_size"] = text["vocab_size"]
        add["pad_token_id"] = text.get("pad_token_id") or 0
    elif name == "gemma3_text":
        add = _gemma3_rope(text)
    elif family.text_only:
        add = _legacy_rope(text)
    else:
        add = {f"text_config.{k}": v for k, v in _legacy_rope(text).items()}
    if name == "internvl" and text.get("head_dim") is None:
        add["text_config.head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    if name in ("llava", "llava_onevision", "gemma3", "paligemma") and "image_token_index" not in config:
        add["image_token_index"] = config["image_token_id"]
    if name in ("llava", "smolvlm", "idefics3", "internvl") and "text_config" in config:
        add.setdefault("text_config.tie_word_embeddings", config["tie_word_embeddings"])
    return add


def mlx_config(config: dict, *, for_mlx: bool = True) -> dict:
    """A canonical config with MLX's names added; ``mlx_keys`` lists them, to take them out again."""
    family = check_supported(config, for_mlx=for_mlx)
    out = copy.deepcopy(config)
    keys = []
    for path, value in _additions(family, config).items():
        parent, _, leaf = path.rpartition(".")
        at = out[parent] if parent else out
        if leaf in at and at[leaf] == value:
            continue
        if leaf not in at:
            keys.append(path)
        at[leaf] = value
    if family.name.startswith("qwen") and "vision_config" in out:
        before = out["vision_config"].get("model_type")
        if before != family.name:
            out["mlx_vision_model_type"] = {"vision_config": before}
            out["vision_config"]["model_type"] = family.name
    out["mlx_keys"] = keys
    return out
