"""Tiny random checkpoints of real architectures, with real processors and chat templates, for tests."""

import functools
import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
CORPUS = [
    "system user assistant You are a helpful assistant. How many red cubes are there? Answer: yes no",
    "If any object is blue then refuse, otherwise say the colour of the largest sphere. " * 3,
]

# Qwen2.5-VL-Instruct's own template (videos left out).
QWEN_VL_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: "
    "{% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def _bpe(special: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    return tokenizer.to_str()


def write_tokenizer(
    folder: Path, template: str, special=tuple(SPECIAL), eos="<|im_end|>", pad="<|endoftext|>"
) -> Tokenizer:
    """A byte-level BPE (any text encodes) with Qwen's special tokens."""
    text = _bpe(tuple(special))
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": eos,
                "pad_token": pad,
                "model_max_length": 32768,
                "clean_up_tokenization_spaces": False,
                "chat_template": template,
            }
        )
    )
    return Tokenizer.from_str(text)


def write_weights(folder: Path, net, dtype=mx.float32) -> None:
    """The net's own parameters; random biases too, so that a dropped one shows."""
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        {name: value.astype(dtype) for name, value in tree_flatten(net.parameters())},
        {"format": "mlx"},
    )


def shake(net, seed: int = 0, scale: float = 0.1):
    """Adds noise to every parameter (norm weights and biases too)."""
    mx.random.seed(seed)
    net.update(tree_map(lambda p: p + scale * mx.random.normal(p.shape).astype(p.dtype), net.parameters()))
    return net


def qwen2_5_vl_config(tokenizer: Tokenizer, **text) -> dict:
    vocabulary = tokenizer.get_vocab_size()
    config = {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [2],
            "in_channels": 3,
        },
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }
    config.update(text)
    config["vision_config"]["out_hidden_size"] = config["hidden_size"]
    return config


def write_qwen2_5_vl(folder: Path, seed: int = 0, weights: bool = True, **text) -> Path:
    """A 0.2M-parameter qwen2_5_vl checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder, QWEN_VL_TEMPLATE)
    config = qwen2_5_vl_config(tokenizer, **text)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [config["eos_token_id"], tokenizer.token_to_id("<|endoftext|>")]})
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen2_5_VLProcessor",
                "min_pixels": 3136,
                "max_pixels": 12845056,
                "patch_size": 14,
                "temporal_patch_size": 2,
                "merge_size": 2,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
            }
        )
    )
    if weights:
        from mpi_mlx.models.building import build_net

        write_weights(folder, shake(build_net(config, seed=seed), seed))
    return folder
