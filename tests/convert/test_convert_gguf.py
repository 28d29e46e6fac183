import json

import numpy as np
import pytest
from hand_made import LLAMA, quantized, shapes_of, write_gguf

from mpi_mlx.convert.gguf import read_gguf
from mpi_mlx.convert.gguf_folder import find_gguf, from_gguf, half_split_order, hf_name
from mpi_mlx.convert.shards import open_checkpoint
from mpi_mlx.errors import ConversionError

TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *"abcdefghijklmnopqrstuvwxyz0123456789Ġ.,!?",
    "he",
    "ll",
    "hell",
]
META = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "general.license": "mit",
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 5000.0,
    "llama.rope.dimension_count": 8,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
    "tokenizer.ggml.merges": ["h e", "l l", "he ll"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}",
}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name):
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers.", "blk.")


def interleaved(weight, heads):
    """llama.cpp's own permutation of q and k, as its converter writes it."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def model(tmp_path, kind, meta=META):
    """A GGUF file whose matrices are of one type, and the float32 tensors it stands for."""
    rng = np.random.default_rng(0)
    config = {**LLAMA, "vocab_size": len(TOKENS), "intermediate_size": 64}
    tensors, want = {}, {}
    for name, shape in shapes_of(config).items():
        data = rng.standard_normal(shape).astype(np.float32)
        heads = (
            {"q": 4, "k": 2}.get(name.split(".")[-2][0])
            if "self_attn.q" in name or "self_attn.k" in name
            else None
        )
        if len(shape) == 1:
            tensors[gguf_name(name)] = ("F32", shape, data.tobytes())
            want[name] = data
            continue
        put = interleaved(data, heads) if heads else data
        if kind in ("F32", "F16"):
            raw = put.astype({"F32": "<f4", "F16": "<f2"}[kind])
            value = raw.astype(np.float32)
            tensors[gguf_name(name)] = (kind, shape, raw.tobytes())
        else:
            raw, value = quantized(put, kind)
            tensors[gguf_name(name)] = (kind, shape, raw)
        back = (
            value.reshape(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(shape)
            if heads
            else value
        )
        want[name] = back
    write_gguf(tmp_path / "m.gguf", meta, tensors)
    return tmp_path / "m.gguf", want


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1"])
def test_each_type_is_dequantized_exactly(tmp_path, kind):
    path, want = model(tmp_path, kind)
    report = from_gguf(path, tmp_path / "out", dtype="float32", check=False)
    got = {n: t.read() for n, t in open_checkpoint(tmp_path / "out").tensors.items()}
    assert set(got) == set(want) and report.tensors == len(want)
    for name, value in want.items():
        assert np.array_equal(got[name], value), name


def test_blocks_by_hand(tmp_path):
    d, m = np.float16(0.5), np.float16(-1.0)
    nibbles = bytes(range(16))  # low nibble i, high nibble 0
    write_gguf(tmp_path / "x.gguf", {}, {
        "a": ("Q4_1", (1, 32), d.tobytes() + m.tobytes() + nibbles),
        "b": ("Q4_0", (1, 32), d.tobytes() + nibbles),
        "c": ("Q8_0", (1, 32), d.tobytes() + bytes([255, 127] + [0] * 30)),
    })  # fmt: skip
    t = read_gguf(tmp_path / "x.gguf").tensors
    assert t["a"].read()[0].tolist() == [0.5 * i - 1 for i in range(16)] + [-1.0] * 16
    assert t["b"].read()[0].tolist() == [0.5 * (i - 8) for i in range(16)] + [-4.0] * 16
    assert t["c"].read()[0, :3].tolist() == [-0.5, 63.5, 0.0]


def test_rotary_rows_are_put_back():
    weight = np.arange(16.0)[:, None]
    assert np.array_equal(interleaved(weight, 2)[half_split_order(16, 2)], weight)
    assert half_split_order(4, 1).tolist() == [0, 2, 1, 3]


def test_config_tokenizer_template_and_generation(tmp_path):
    path, _ = model(tmp_path, "Q8_0")
    from_gguf(path, tmp_path / "out", check=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 5000.0 and config["head_dim"] == 8
    assert config["tie_word_embeddings"] and config["eos_token_id"] == 2 and config["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.encode("hello 12<|im_end|>")
    assert tokenizer.convert_ids_to_tokens(ids) == ["hell", "o", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello 12"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a<|im_end|>"


def test_it_runs_in_mlx(tmp_path):
    from mpi_mlx.models import probe

    path, _ = model(tmp_path, "Q4_1")
    from_gguf(path, tmp_path / "out", check=False)
    config = probe.read_config(tmp_path / "out")
    (logits,) = probe.mlx_logits(probe.load_net(tmp_path / "out"), config, probe.probe_inputs(config))
    assert logits.shape == (12, len(TOKENS)) and np.isfinite(logits).all()


def test_names():
    assert hf_name("blk.11.ffn_down.weight") == "model.layers.11.mlp.down_proj.weight"
    assert hf_name("output.weight") == "lm_head.weight"
    assert hf_name("blk.0.ffn_gate_exps.weight") is None


def change(tmp_path, **meta):
    path, _ = model(tmp_path, "F16", {**META, **meta})
    return path


@pytest.mark.parametrize(
    "meta, match",
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not read"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken' is unknown"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer model 't5' is not read"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not carried over"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, meta, match):
    with pytest.raises(ConversionError, match=match):
        from_gguf(change(tmp_path, **meta), tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


def test_k_quants_and_cut_files_are_refused(tmp_path):
    write_gguf(tmp_path / "k.gguf", META, {"token_embd.weight": ("Q4_K", (1, 256), bytes(144))})
    with pytest.raises(ConversionError, match="Q4_K.*llama-quantize --allow-requantize"):
        read_gguf(tmp_path / "k.gguf")
    path, _ = model(tmp_path, "F16")
    whole = path.read_bytes()
    for cut in (whole[:-200], whole[:100]):
        path.write_bytes(cut)
        with pytest.raises(ConversionError, match="truncated|ends inside"):
            read_gguf(path)
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(ConversionError, match="no GGUF file"):
        read_gguf(path)
    with pytest.raises(ConversionError, match="no such file"):
        find_gguf(tmp_path / "nowhere.gguf")


def test_llama3_scaling_is_recognised(tmp_path):
    from mpi_mlx.convert.gguf_folder import _llama3

    wavelength = 2 * np.pi * 500000.0 ** (np.arange(0, 64, 2) / 64)
    smooth = (8192 / wavelength - 1) / 3
    factors = np.where(wavelength < 2048, 1, np.where(wavelength > 8192, 8, 1 / ((1 - smooth) / 8 + smooth)))
    assert _llama3(factors.astype(np.float32), 500000.0, 64)["factor"] == 8.0
    with pytest.raises(ConversionError, match="no Llama 3 scaling"):
        _llama3(np.full(32, 3.0), 500000.0, 64)


def test_sentencepiece_vocabulary(tmp_path):
    from mpi_mlx.convert.gguf_tokenizer import write_tokenizer

    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        "h",
        "e",
        "l",
        "he",
        "ll",
        "hell",
        "▁hell",
    ]
    meta = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -8.0, -7.0, -6.0, -1.0, -2.0, -3.0, -4.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 8,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    write_tokenizer(meta, tmp_path, 128)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("hell é").tokens == ["<s>", "▁hell", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("hell é").ids) == "hell é"
