"""Tiny random checkpoints of every supported family, built by transformers itself (needs torch).

They are what the table of measured errors and the tests run on.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

VISION = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
TEXT = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    vocab_size=128,
    max_position_embeddings=512,
)


def rope(theta=5000.0, **extra):
    return {"rope_type": "default", "rope_theta": theta, **extra}


def _qwen_vl(kind: str, tied: bool):
    import transformers as tf

    text = {**TEXT, "rope_parameters": rope(mrope_section=[2, 3, 3]), "tie_word_embeddings": tied}
    ids = dict(image_token_id=120, video_token_id=121, vision_start_token_id=122, vision_end_token_id=123)
    common = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
    if kind == "qwen2_vl":
        vision = {**common, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        config = tf.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
        return tf.Qwen2VLForConditionalGeneration, config
    if kind == "qwen2_5_vl":
        vision = {
            **common,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        }
        config = tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
        return tf.Qwen2_5_VLForConditionalGeneration, config
    vision = {
        **common,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
    }
    if kind == "qwen3_vl":
        vision["deepstack_visual_indexes"] = [0, 1]
        text["head_dim"] = 16
        config = tf.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
        return tf.Qwen3VLForConditionalGeneration, config
    text.update(
        head_dim=32,
        num_hidden_layers=4,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_conv_kernel_dim=4,
        rope_parameters=rope(mrope_section=[2, 1, 1], partial_rotary_factor=0.25),
    )
    config = tf.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
    return tf.Qwen3_5ForConditionalGeneration, config


def _idefics(kind: str, tied: bool):
    import transformers as tf

    text = tf.LlamaConfig(**TEXT, rope_parameters=rope(), tie_word_embeddings=tied).to_dict()
    vision = {**VISION, "image_size": 16, "patch_size": 4}
    keys = dict(text_config=text, vision_config=vision, scale_factor=2, image_token_id=120)
    if kind == "smolvlm":
        config = tf.SmolVLMConfig(**keys, tie_word_embeddings=tied)
        return tf.SmolVLMForConditionalGeneration, config
    config = tf.Idefics3Config(**keys, tie_word_embeddings=tied)
    return tf.Idefics3ForConditionalGeneration, config


def _llava(kind: str, tied: bool):
    import transformers as tf

    text_class = tf.LlamaConfig if kind == "llava-llama" else tf.Qwen2Config
    text = text_class(**TEXT, rope_parameters=rope(), tie_word_embeddings=tied)
    if kind == "llava_onevision":
        vision = tf.SiglipVisionConfig(**VISION, image_size=16, patch_size=4, vision_use_head=False)
        config = tf.LlavaOnevisionConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=120,
            video_token_id=121,
            image_token_index=120,
            video_token_index=121,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            image_grid_pinpoints=[[16, 16], [16, 32], [32, 16], [32, 32]],
            vision_aspect_ratio="anyres_max_9",
            tie_word_embeddings=tied,
        )
        return tf.LlavaOnevisionForConditionalGeneration, config
    vision = tf.CLIPVisionConfig(**VISION, image_size=16, patch_size=4, projection_dim=32)
    config = tf.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=120, tie_word_embeddings=tied
    )
    return tf.LlavaForConditionalGeneration, config


def _internvl(tied: bool):
    import transformers as tf

    text = tf.Qwen3Config(**TEXT, head_dim=24, rope_parameters=rope(), tie_word_embeddings=tied)
    vision = tf.InternVLVisionConfig(
        **VISION, image_size=[16, 16], patch_size=[4, 4], use_qk_norm=False, attention_bias=True
    )
    config = tf.InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=120, tie_word_embeddings=tied
    )
    return tf.InternVLForConditionalGeneration, config


def _gemma3_text_config(layers=6):
    import transformers as tf

    return tf.Gemma3TextConfig(
        **{**TEXT, "num_hidden_layers": layers},
        head_dim=24,
        query_pre_attn_scalar=20,
        sliding_window=8,
        layer_types=["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)],
        rope_parameters={
            "full_attention": rope(50000.0),
            "sliding_attention": rope(3000.0),
        },
        pad_token_id=0,
    )


def _gemma(kind: str, tied: bool):
    import transformers as tf

    vision = {**VISION, "image_size": 16, "patch_size": 4, "vision_use_head": False}
    if kind == "gemma3":
        config = tf.Gemma3Config(
            text_config=_gemma3_text_config(),
            vision_config=tf.SiglipVisionConfig(**vision),
            mm_tokens_per_image=4,
            image_token_id=120,
            image_token_index=120,
            tie_word_embeddings=tied,
        )
        return tf.Gemma3ForConditionalGeneration, config
    if kind == "paligemma2":
        text = tf.Gemma2Config(
            **TEXT, head_dim=24, rope_parameters=rope(), pad_token_id=0, sliding_window=512
        )
    else:
        text = tf.GemmaConfig(**TEXT, head_dim=16, rope_parameters=rope(), pad_token_id=0)
    config = tf.PaliGemmaConfig(
        text_config=text,
        vision_config=tf.SiglipVisionConfig(**vision, projection_dim=64),
        projection_dim=64,
        hidden_size=64,
        image_token_id=120,
        image_token_index=120,
        tie_word_embeddings=tied,
    )
    return tf.PaliGemmaForConditionalGeneration, config


def _text(kind: str, tied: bool):
    import transformers as tf

    if kind == "gemma3_text":
        config = _gemma3_text_config()
        config.tie_word_embeddings = tied
        return tf.Gemma3ForCausalLM, config
    extra = {"head_dim": 24} if kind == "qwen3" else {}
    llama3 = dict(
        rope_type="llama3",
        rope_theta=5000.0,
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )
    parameters = llama3 if kind == "llama" and not tied else rope()
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    config = getattr(tf, name + "Config")(
        **TEXT, **extra, rope_parameters=parameters, tie_word_embeddings=tied
    )
    return getattr(tf, name + "ForCausalLM"), config


FAMILIES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "smolvlm",
    "idefics3",
    "llava-llama",
    "llava-qwen2",
    "llava_onevision",
    "internvl",
    "gemma3",
    "paligemma",
    "paligemma2",
    "llama",
    "qwen2",
    "qwen3",
    "gemma3_text",
)


def build(kind: str, tied: bool = False, seed: int = 0):
    """A tiny model of the family with every parameter random, norms and biases included."""
    import torch

    if kind.startswith("qwen") and kind.endswith(("vl", "3_5")):
        cls, config = _qwen_vl(kind, tied)
    elif kind in ("smolvlm", "idefics3"):
        cls, config = _idefics(kind, tied)
    elif kind.startswith("llava"):
        cls, config = _llava(kind, tied)
    elif kind == "internvl":
        cls, config = _internvl(tied)
    elif kind in ("gemma3", "paligemma", "paligemma2"):
        cls, config = _gemma(kind, tied)
    else:
        cls, config = _text(kind, tied)
    torch.manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                # slow decay: mlx-vlm's chunked delta rule sums log-decays and loses 3e-5 at fast ones
                p.uniform_(-4, -2)
            elif p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.1)
            else:
                p.normal_(0, 1.5 / np.sqrt(np.prod(p.shape[1:])))
    return model


def as_mlx_saves(folder: Path, destination: Path, *, noise: float = 0.0, seed: int = 0):
    """Load a converted folder, change every weight a little, and save it as mlx-vlm or mlx-lm would.

    Returns (destination, the changed module).
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    from mpi_mlx.models import probe

    net = probe.load_net(folder)
    rng = np.random.default_rng(seed)
    weights = {}
    for name, value in tree_flatten(net.parameters()):
        factor = 1 + noise * rng.standard_normal(value.shape).astype(np.float32)
        weights[name] = (value * mx.array(factor)).astype(value.dtype)
    net.update(tree_unflatten(list(weights.items())))
    destination.mkdir(parents=True)
    mx.save_safetensors(str(destination / "model.safetensors"), weights, metadata={"format": "mlx"})
    shutil.copy(folder / "config.json", destination / "config.json")
    return destination, net
