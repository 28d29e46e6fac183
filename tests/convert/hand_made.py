"""Hand-made checkpoints and GGUF files for tests that run without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from mpi_mlx.convert.shards import Output, from_float32, write_checkpoint

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

QWEN_VL = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 58,
    "vision_end_token_id": 59,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "vision_config": {
        "model_type": "qwen2_5_vl_vision",
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [0],
    },
}


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    """Disk names and shapes of a llama or qwen2_5_vl config's tensors."""
    text = config.get("text_config") or config
    d, f, v = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    heads, kv = text["num_attention_heads"], text["num_key_value_heads"]
    dim = text.get("head_dim") or d // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    for i in range(text["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {
            p + "input_layernorm.weight": (d,),
            p + "post_attention_layernorm.weight": (d,),
            p + "self_attn.q_proj.weight": (heads * dim, d),
            p + "self_attn.k_proj.weight": (kv * dim, d),
            p + "self_attn.v_proj.weight": (kv * dim, d),
            p + "self_attn.o_proj.weight": (d, heads * dim),
            p + "mlp.gate_proj.weight": (f, d),
            p + "mlp.up_proj.weight": (f, d),
            p + "mlp.down_proj.weight": (d, f),
        }
        if "text_config" in config:
            shapes |= {
                p + f"self_attn.{n}_proj.bias": (n_ * dim,) for n, n_ in (("q", heads), ("k", kv), ("v", kv))
            }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    if "vision_config" in config:
        shapes |= _vision_shapes(config["vision_config"])
    return shapes


def _vision_shapes(vision: dict) -> dict[str, tuple[int, ...]]:
    h, f, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    shapes = {"visual.patch_embed.proj.weight": (h, 3, 2, patch, patch), "visual.merger.ln_q.weight": (h,)}
    for i in range(vision["depth"]):
        p = f"visual.blocks.{i}."
        shapes |= {p + "norm1.weight": (h,), p + "norm2.weight": (h,)}
        shapes |= {p + "attn.qkv.weight": (3 * h, h), p + "attn.qkv.bias": (3 * h,)}
        shapes |= {p + "attn.proj.weight": (h, h), p + "attn.proj.bias": (h,)}
        for name, shape in (("gate_proj", (f, h)), ("up_proj", (f, h)), ("down_proj", (h, f))):
            shapes |= {p + f"mlp.{name}.weight": shape, p + f"mlp.{name}.bias": shape[:1]}
    for name, out in (("0", 4 * h), ("2", vision["out_hidden_size"])):
        shapes |= {f"visual.merger.mlp.{name}.weight": (out, 4 * h), f"visual.merger.mlp.{name}.bias": (out,)}
    return shapes


def write_model(
    folder: Path, config: dict, *, dtype: str = "BF16", seed: int = 0, rename=None, bias=(), **keys
) -> dict:
    """Write a random checkpoint; returns its float32 tensors (after rounding) by disk name.

    ``bias``: last names of the linears that have one, beside those of the family.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    values, outputs = {}, []
    shapes = shapes_of(config)
    for name in [n for n in shapes if n.split(".")[-2] in bias]:
        shapes[name.replace(".weight", ".bias")] = shapes[name][:1]
    for name, shape in shapes.items():
        value = rng.standard_normal(shape).astype(np.float32) * (0.3 if len(shape) > 1 else 0.1)
        value = value + 1 if "norm" in name or "ln_q" in name else value
        stored = from_float32(value.astype(np.float32), dtype)
        values[name] = stored
        outputs.append(Output(rename(name) if rename else name, dtype, shape, lambda s=stored: [s.tobytes()]))
    write_checkpoint(folder, outputs, **keys)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return values


# --- GGUF --------------------------------------------------------------------------------------------------


def quantized(rows: np.ndarray, kind: str) -> tuple[bytes, np.ndarray]:
    """Blocks of 32 as ggml writes them, worked value by value, and the float32 values that they stand for."""
    data, values = b"", np.zeros_like(rows, np.float32)
    for r, row in enumerate(rows):
        for b in range(0, len(row), 32):
            block = row[b : b + 32]
            low, high = float(block.min()), float(block.max())
            if kind == "Q8_0":
                d = np.float16(max(abs(low), abs(high)) / 127 or 1)
                q = [int(np.clip(round(float(x) / float(d)), -127, 127)) for x in block]
                data += d.tobytes() + struct.pack("32b", *q)
                values[r, b : b + 32] = [float(d) * x for x in q]
            else:
                m = np.float16(low) if kind == "Q4_1" else np.float16(0)
                d = np.float16((high - low) / 15 if kind == "Q4_1" else max(abs(low), abs(high)) / 8)
                shift = 0 if kind == "Q4_1" else 8
                q = [int(np.clip(round((float(x) - float(m)) / float(d)) + shift, 0, 15)) for x in block]
                packed = bytes(q[i] | q[i + 16] << 4 for i in range(16))
                data += d.tobytes() + (m.tobytes() if kind == "Q4_1" else b"") + packed
                values[r, b : b + 32] = [
                    float(np.float32(d) * np.float32(x - shift) + np.float32(m)) for x in q
                ]
    return data, values


_TYPE_IDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12}


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    kind = {str: 8, int: 5, float: 6}[type(value[0])]
    body = b"".join(_string(v) if kind == 8 else struct.pack("<i" if kind == 5 else "<f", v) for v in value)
    return struct.pack("<IIQ", 9, kind, len(value)) + body


def write_gguf(path: Path, metadata: dict, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """``tensors``: name -> (type, shape with rows first, raw bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_string(k) + _value(v) for k, v in metadata.items())
    body = b""
    for name, (kind, shape, raw) in tensors.items():
        head += _string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", _TYPE_IDS[kind], len(body))
        body += raw + b"\0" * (-len(raw) % 32)
    head += b"\0" * (-len(head) % 32)
    path.write_bytes(head + body)
