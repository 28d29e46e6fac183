"""What MLX has code for: values it has built in, and rope types it obeys. The rest is refused by name."""

from __future__ import annotations

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


def _at(config: dict, path: str):
    for part in path.split("."):
        config = (config or {}).get(part) if isinstance(config, dict) else None
    return config


def rope_of(text: dict) -> dict:
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
        if path == "tie_word_embeddings" and value not in allowed:
            raise ConversionError(
                f"{family.name} with tie_word_embeddings = False: mlx-vlm puts the embedding in the head's place, "
                "so logits would be wrong"
            )
        if value not in allowed:
            can = " or ".join(repr(v) for v in sorted(allowed, key=repr) if v is not None)
            raise ConversionError(
                f"{family.name} with {path} = {value!r}: mlx has {can} built in, so logits would be wrong"
            )
    text = config.get("text_config") or config
    params = rope_of(text)
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
                f"{family.name} with head_dim {head_dim}: mlx takes hidden_size / num_attention_heads = "
                f"{hidden // heads}"
            )
    if family.name == "llava" and not isinstance(config.get("vision_feature_layer", -2), int):
        raise ConversionError("llava with several vision_feature_layer values: mlx-vlm's projector takes one")
    if family.name.startswith("gemma3"):
        pattern_of(text)
    return family


def pattern_of(text: dict) -> int:
    """gemma3's sliding_window_pattern: every n-th layer attends fully; other layer_types are refused."""
    types = text["layer_types"]
    full = [i for i, t in enumerate(types) if t == "full_attention"]
    n = full[0] + 1 if full else len(types) + 1
    if full != list(range(n - 1, len(types), n)):
        raise ConversionError(f"gemma3 with layer_types {types}: mlx only knows every n-th layer full")
    return n
