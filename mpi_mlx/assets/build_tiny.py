"""Writes the embedded model's folder without its weights: config, byte-level tokenizer, processor, template.

``python -m mpi_mlx.assets.build_tiny FOLDER``. The weights come from ``recipes/tiny_base.yaml``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from mpi_mlx.data.policy_tree import document_text, random_tree
from mpi_mlx.data.scenes import ATTRIBUTES, CELL_NAMES, random_scenes
from mpi_mlx.data.vocabulary import QUERIES, REPLIES, SECTION_NAMES

IMAGE_SIDE = 84  # 3 x 3 visual tokens of 28 pixels: one for each cell of a scene
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)
PLAIN_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # kept when text is decoded
# The Qwen2 family's split of text into words before byte-pair merges.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ render(message.content) }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
GENERAL_TEXT = (
    "user assistant system tool",
    "The quick brown fox jumps over the lazy dog. This is the first and that was the other one.",
    "You are a helpful agent. Please tell me what you see, and why. Thank you, that is right.",
    "nothing done",
    "What is in the picture? How many are there? Which color, shape, size and material does it have?",
)


def config() -> dict:
    """The qwen2_5_vl architecture at 2.6M parameters; both mlx-vlm's and transformers' field names."""
    mrope = {"type": "mrope", "mrope_section": [8, 12, 12]}
    ids = {name: i for i, name in enumerate(SPECIAL_TOKENS)}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "intermediate_size": 512,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rope_scaling": mrope,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "out_hidden_size": 192,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
            "in_chans": 3,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "hidden_act": "silu",
        },
    }


def corpus() -> list[str]:
    """Text in which every word of the benchmark stands often, with and without a leading space."""
    rng = np.random.default_rng(0)
    scenes = random_scenes(rng, 2000)
    lines = []
    for kinds in [("exists",)] * 60 + [("exists", "count", "relation")] * 20:
        tree = random_tree(rng, 4, kinds=kinds, scenes=scenes)
        lines += [document_text(tree, rng, wording=w) for w in ("compact", "natural")]
        lines += [f"{tree.trace(scenes.scene(i))}\n{tree.replies[0]}" for i in range(20)]
    words = [*SECTION_NAMES, *REPLIES, *CELL_NAMES, *(v for vs in ATTRIBUTES.values() for v in vs), *ATTRIBUTES]
    for word in words:
        lines += [f"{word}\n{word} {word}"] * 20
    for text in (*QUERIES, *GENERAL_TEXT, "yes\nno\nyes no", "Is there: none.", "Describe the picture."):
        lines += [text] * 20
    return lines


def build_tokenizer():
    """A byte-level BPE tokenizer (any text encodes) over :func:`corpus`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=15,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN_TOKENS])
    return tokenizer


def write(folder: Path) -> int:
    """Writes everything but the weights into ``folder``; returns the vocabulary's size (multiple of 16)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    vocabulary = -(-tokenizer.get_vocab_size() // 16) * 16
    tokenizer.save(str(folder / "tokenizer.json"))

    def put(name: str, content: dict) -> None:
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    made = config() | {"vocab_size": vocabulary}
    put("config.json", made)
    put("generation_config.json", {"eos_token_id": made["eos_token_id"], "pad_token_id": made["pad_token_id"]})
    put(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    pixels = IMAGE_SIDE * IMAGE_SIDE
    put(
        "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": pixels,
            "max_pixels": pixels,
            "size": {"shortest_edge": pixels, "longest_edge": pixels},
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )
    return vocabulary


if __name__ == "__main__":
    sys.stdout.write(f"vocabulary {write(Path(sys.argv[1]))}\n")
