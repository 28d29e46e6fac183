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
from mpi_mlx.errors import ConversionError

SCALED_ROPE = {"default", "linear", "llama3", "yarn"}
_SILU, _TANH = {"silu"}, {"gelu_pytorch_tanh"}
# values that mlx-vlm / mlx-lm have built in: anything else would be computed wrong without a word
BUILT_IN: dict[str, dict[str, set]] = {
    "qwen2_vl": {
        "text_config.hidden_act": _SILU,
        "vision_config.hidden_act": {"quick_gelu"},
        "text_config.use_sliding_window": {False, None},
        "vision_config.rope_parameters.rope_theta": {10000.0, None},
    },
    "qwen2_5_vl": {
        "text_config.hidden_act": _SILU,
        "vision_config.hidden_act": _SILU,
        "text_config.use_sliding_window": {False, None},
        "vision_config.rope_parameters.rope_theta": {10000.0, None},
    },
    "qwen3_vl": {
        "text_config.hidden_act": _SILU,
        "vision_config.hidden_act": _TANH,
        "vision_config.rope_parameters.rope_theta": {10000.0, None},
    },
    "qwen3_5": {
        "text_config.hidden_act": _SILU,
        "vision_config.hidden_act": _TANH,
        "vision_config.rope_parameters.rope_theta": {10000.0, None},
    },
    "smolvlm": {
        "text_config.hidden_act": _SILU,
        "vision_config.hidden_act": _TANH,
        "text_config.model_type": {"llama"},
    },
    "idefics3": {
        "text_config.hidden_act": _SILU,
        "vision_config.hidden_act": _TANH,
        "text_config.model_type": {"llama"},
    },
    "llava": {
        "text_config.model_type": {"llama", "qwen2"},
        "text_config.hidden_act": _SILU,
        "vision_config.model_type": {"clip_vision_model"},
        "vision_config.hidden_act": {"quick_gelu"},
        "projector_hidden_act": {"gelu"},
        "text_config.use_sliding_window": {False, None},
    },
    "llava_onevision": {
        "text_config.model_type": {"qwen2"},
        "text_config.hidden_act": _SILU,
        "vision_config.model_type": {"siglip_vision_model"},
        "vision_config.hidden_act": _TANH,
        "projector_hidden_act": {"gelu"},
        "text_config.use_sliding_window": {False, None},
    },
    "internvl": {
        "text_config.model_type": {"qwen3"},
        "text_config.hidden_act": _SILU,
        "vision_config.hidden_act": {"gelu"},
        "projector_hidden_act": {"gelu"},
        "vision_feature_layer": {-1},
        "vision_feature_select_strategy": {"default"},
        "text_config.use_sliding_window": {False, None},
    },
    "gemma3": {
        "text_config.hidden_activation": _TANH,
        "text_config.attn_logit_softcapping": {None},
        "text_config.final_logit_softcapping": {None},
        "text_config.use_bidirectional_attention": {False, None},
        "vision_config.hidden_act": _TANH,
        "tie_word_embeddings": {True},
    },
    "paligemma": {
        "text_config.model_type": {"gemma", "gemma2"},
        "vision_config.hidden_act": _TANH,
        "tie_word_embeddings": {True},
    },
    "llama": {"hidden_act": _SILU},
    "qwen2": {"hidden_act": _SILU, "use_sliding_window": {False, None}},
    "qwen3": {"hidden_act": _SILU, "use_sliding_window": {False, None}},
    "gemma3_text": {
        "hidden_activation": _TANH,
        "attn_logit_softcapping": {None},
        "final_logit_softcapping": {None},
        "use_bidirectional_attention": {False, None},
    },
}
# rope types that the family's MLX code obeys
ROPES: dict[str, set[str]] = {
    "qwen2_vl": {"default", "mrope"},
    "qwen2_5_vl": {"default", "mrope"},
    "qwen3_vl": {"default", "mrope"},
    "qwen3_5": {"default", "mrope"},
    "smolvlm": {"default"},
    "idefics3": {"default"},
    "llava": {"default", "linear"},
    "llava_onevision": {"default", "linear"},
    "paligemma": {"default"},
}


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
    """The folder's config as transformers 5 would save it: every value spelled out, older layouts carried over."""
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


# --- refusals ----------------------------------------------------------------------------------------------


def _at(config: dict, path: str):
    for part in path.split("."):
        config = (config or {}).get(part) if isinstance(config, dict) else None
    return config


def _rope(text: dict) -> dict:
    return text.get("rope_parameters") or {}


def check_supported(config: dict, *, for_mlx: bool = True) -> Family:
    """Refuse, by name, what MLX would ignore or compute otherwise; returns the family.

    ``for_mlx=False`` lets a head pass that was trained apart in MLX, and that mlx-vlm could not load again.
    """
    family = family_of(config)
    for path, allowed in BUILT_IN[family.name].items():
        value = _at(config, path)
        if path == "tie_word_embeddings" and not for_mlx:
            continue
        if value not in allowed:
            can = " or ".join(repr(v) for v in sorted(allowed, key=repr) if v is not None)
            raise ConversionError(
                f"{family.name} with {path} = {value!r}: mlx has {can} built in, so logits would be wrong"
            )
    text = config.get("text_config") or config
    params = _rope(text)
    layers = params.values() if "full_attention" in params else [params]
    for rope in layers:
        kind = rope.get("rope_type", "default")
        if kind not in ROPES.get(family.name, SCALED_ROPE):
            raise ConversionError(
                f"{family.name} with rope scaling {kind!r}: mlx ignores it, so logits would be wrong"
            )
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    if family.name in ("smolvlm", "idefics3", "llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen2"):
        head_dim = text.get("head_dim")
        if head_dim not in (None, hidden // heads):
            raise ConversionError(
                f"{family.name} with head_dim {head_dim}: mlx takes hidden_size / num_attention_heads = {hidden // heads}"
            )
    if family.name == "llava" and not isinstance(config.get("vision_feature_layer", -2), int):
        raise ConversionError("llava with several vision_feature_layer values: mlx-vlm's projector takes one")
    if family.name.startswith("gemma3"):
        pattern_of(text)
    return family


def pattern_of(text: dict) -> int:
    """gemma3's sliding_window_pattern: every n-th layer attends fully. Refused if layer_types is no such pattern."""
    types = text["layer_types"]
    full = [i for i, t in enumerate(types) if t == "full_attention"]
    n = full[0] + 1 if full else len(types) + 1
    if full != list(range(n - 1, len(types), n)):
        raise ConversionError(f"gemma3 with layer_types {types}: mlx only knows every n-th layer full")
    return n


# --- MLX additions -----------------------------------------------------------------------------------------


def _legacy_rope(text: dict) -> dict:
    params = _rope(text)
    out = {"rope_theta": params.get("rope_theta", 10000.0)}
    if params.get("rope_type", "default") != "default":
        out["rope_scaling"] = {**params, "type": params["rope_type"]}
    return out


def _gemma3_rope(text: dict) -> dict:
    params = _rope(text)
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
    section = _rope(text)["mrope_section"]
    return {"rope_theta": _rope(text)["rope_theta"], "rope_scaling": {"type": kind, "mrope_section": section}}


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
    """A canonical config with MLX's names added; ``mlx_keys`` lists them, so that they can be taken out again."""
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
