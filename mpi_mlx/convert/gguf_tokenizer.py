"""A Hugging Face tokenizer from the vocabulary, merges and types that a GGUF file carries."""

from __future__ import annotations

import json
from pathlib import Path

from mpi_mlx.errors import ConversionError

CONTROL, USER_DEFINED, BYTE = 3, 4, 6
# the pre-tokenizers that llama.cpp knows by name, in the words of the tokenizers library
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PRE_TOKENIZERS = ("smollm", "gpt-2", "llama-bpe", "qwen2")


def _pre_tokenizer(kind: str):
    from tokenizers import Regex, pre_tokenizers

    if kind == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    pattern = Regex(_LLAMA3 if kind == "llama-bpe" else _QWEN2)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_level(meta: dict, tokens: list[str]):
    """GPT-2 style: merges over bytes written as printable characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    kind = meta.get("tokenizer.ggml.pre", "gpt-2")
    if kind not in PRE_TOKENIZERS:
        raise ConversionError(
            f"the GGUF's pre-tokenizer {kind!r} is unknown; known: {', '.join(PRE_TOKENIZERS)}. "
            "Copy tokenizer.json from the original model instead"
        )
    merges = [tuple(m.split(" ", 1)) for m in meta["tokenizer.ggml.merges"]]
    vocab = {t: i for i, t in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=kind == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(kind)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _merges_from_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece keeps scores, not merges: every split of a piece into two pieces, best first."""
    ids = {t: i for i, t in enumerate(tokens)}
    found = []
    for piece, score in zip(tokens, scores, strict=True):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        splits = [(a, b) for a, b in splits if a in ids and b in ids]
        found += [(score, a, b) for a, b in sorted(splits, key=lambda s: (ids[s[0]], ids[s[1]]))]
    found.sort(key=lambda f: -f[0])
    return [(a, b) for _, a, b in found]


def _sentence_piece(meta: dict, tokens: list[str], unknown: str | None):
    from tokenizers import Tokenizer, decoders, models, normalizers

    merges = _merges_from_scores(tokens, meta["tokenizer.ggml.scores"])
    vocab = {t: i for i, t in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Replace(" ", "▁")]
    strip = []
    if meta.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        strip = [decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _named(meta: dict, tokens: list[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    out = {}
    for key, word in keys.items():
        index = meta.get(f"tokenizer.ggml.{word}_token_id")
        if index is not None and 0 <= index < len(tokens):
            out[key] = tokens[index]
    return out


def write_tokenizer(meta: dict, folder: Path, context: int) -> dict[str, str]:
    """Write tokenizer.json, tokenizer_config.json and the chat template; returns the special tokens."""
    from tokenizers import AddedToken, processors

    tokens = meta.get("tokenizer.ggml.tokens")
    model = meta.get("tokenizer.ggml.model")
    if not tokens or model not in ("gpt2", "llama"):
        raise ConversionError(f"the GGUF's tokenizer model {model!r} is not read: gpt2 and llama are")
    named = _named(meta, tokens)
    if model == "gpt2":
        tokenizer = _byte_level(meta, tokens)
    else:
        tokenizer = _sentence_piece(meta, tokens, named.get("unk_token"))
    types = meta.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for token, kind in zip(tokens, types, strict=True):
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    if meta.get("tokenizer.ggml.add_bos_token", model == "llama") and "bos_token" in named:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        **named,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(named, indent=2, ensure_ascii=False) + "\n")
    template = meta.get("tokenizer.chat_template")
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return named
