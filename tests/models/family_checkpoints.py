"""Tiny random checkpoints of the other families."""

import json
from pathlib import Path

from checkpoints import (
    CHATML_TEMPLATE,
    QWEN_VL_TEMPLATE,
    SPECIAL,
    qwen2_5_vl_config,
    shake,
    write_tokenizer,
    write_weights,
)

from mpi_mlx.models.building import build_net

# SmolVLM-Instruct's own template
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}"
    "{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# llava-hf's own template, Vicuna style
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}"
    "{% endfor %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}
QWEN_IMAGES = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def _write(folder: Path, config: dict, files: dict) -> Path:
    for name, content in {"config.json": config, **files}.items():
        (folder / name).write_text(json.dumps(content))
    write_weights(folder, shake(build_net(config)))
    return folder


def write_text(folder: Path, family: str, template: str = CHATML_TEMPLATE, **changes) -> Path:
    """llama, qwen2, qwen3, gemma3_text and others that take the same words."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder, template)
    config = {
        "model_type": family,
        **TEXT,
        "vocab_size": tokenizer.get_vocab_size(),
        "tie_word_embeddings": True,
        "head_dim": 16,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }
    if family == "gemma3_text":
        config |= {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}
    return _write(folder, config | changes, {})


def write_qwen2_vl(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder, QWEN_VL_TEMPLATE)
    config = qwen2_5_vl_config(tokenizer, model_type="qwen2_vl")
    config["vision_config"] = {
        "model_type": "qwen2_vl",
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "mlp_ratio": 2,
        "in_channels": 3,
        "image_size": 384,
    }
    return _write(
        folder,
        config,
        {
            "preprocessor_config.json": {
                **QWEN_IMAGES,
                "patch_size": 14,
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen2VLProcessor",
            }
        },
    )


def write_qwen3_vl(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder, QWEN_VL_TEMPLATE)
    base = qwen2_5_vl_config(tokenizer)
    text = {
        **TEXT,
        "model_type": "qwen3_vl_text",
        "vocab_size": base["vocab_size"],
        "head_dim": 16,
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        "tie_word_embeddings": True,
    }
    vision = {
        "model_type": "qwen3_vl",
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "num_heads": 2,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    config = {
        "model_type": "qwen3_vl",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": True,
        **{name: base[name] for name in base if name.endswith("_token_id")},
    }
    return _write(
        folder,
        config,
        {
            "preprocessor_config.json": {
                **QWEN_IMAGES,
                "patch_size": 16,
                "image_processor_type": "Qwen2VLImageProcessorFast",
                "processor_class": "Qwen3VLProcessor",
            }
        },
    )


def write_smolvlm(folder: Path, family: str = "smolvlm") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    special = [
        "<|im_start|>",
        "<|im_end|>",
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
        "<end_of_utterance>",
        *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)),
    ]
    tokenizer = write_tokenizer(folder, SMOLVLM_TEMPLATE, special, eos="<end_of_utterance>", pad="<|im_end|>")
    image = tokenizer.token_to_id("<image>")
    config = {
        "model_type": family,
        "image_token_id": image,
        "scale_factor": 2,
        "vocab_size": tokenizer.get_vocab_size(),
        "text_config": {**TEXT, "model_type": "llama", "vocab_size": tokenizer.get_vocab_size()},
        "vision_config": {
            "model_type": "smolvlm_vision" if family == "smolvlm" else "idefics3",
            "hidden_size": 32,
            "num_attention_heads": 2,
            "patch_size": 14,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "image_size": 56,
        },
    }
    name = "SmolVLM" if family == "smolvlm" else "Idefics3"
    return _write(
        folder,
        config,
        {
            "processor_config.json": {"image_seq_len": 4, "processor_class": f"{name}Processor"},
            "preprocessor_config.json": {
                "image_processor_type": f"{name}ImageProcessor",
                "size": {"longest_edge": 112},
                "max_image_size": {"longest_edge": 56},
                "do_image_splitting": True,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            },
        },
    )


def write_llava(folder: Path, strategy: str = "default") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder, LLAVA_TEMPLATE, [*SPECIAL, "<image>"], eos="<|endoftext|>")
    config = {
        "model_type": "llava",
        "image_token_index": tokenizer.token_to_id("<image>"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": strategy,
        "vocab_size": tokenizer.get_vocab_size(),
        "text_config": {**TEXT, "model_type": "llama", "vocab_size": tokenizer.get_vocab_size()},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "num_attention_heads": 2,
            "patch_size": 14,
            "num_hidden_layers": 3,
            "intermediate_size": 48,
            "image_size": 56,
        },
    }
    return _write(
        folder,
        config,
        {
            "processor_config.json": {
                "patch_size": 14,
                "vision_feature_select_strategy": strategy,
                "num_additional_image_tokens": 1,
                "processor_class": "LlavaProcessor",
            },
            "preprocessor_config.json": {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": 56},
                "crop_size": {"height": 56, "width": 56},
            },
        },
    )
