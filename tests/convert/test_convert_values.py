"""Values and types that have no place in the result are refused by name, and no folder appears."""

import json
import warnings

import numpy as np
import pytest
from hand_made import LLAMA, write_model

from mpi_mlx.convert import families as fam
from mpi_mlx.convert.adapters import CONFIG, PEFT_WEIGHTS, read_json
from mpi_mlx.convert.peft_files import check_numbers, read_peft_adapter
from mpi_mlx.convert.reading import lay_out
from mpi_mlx.convert.shards import (
    ITEM_BYTES,
    NUMPY_TYPES,
    Output,
    from_float32,
    open_checkpoint,
    write_checkpoint,
    write_file,
)
from mpi_mlx.convert.weights import to_mlx
from mpi_mlx.errors import ConversionError

UP = "model.layers.0.mlp.up_proj.weight"


def replaced(folder, dtype, data):
    """Rewrite the checkpoint with one tensor in another type."""
    outputs = []
    for name, tensor in open_checkpoint(folder).tensors.items():
        raw = b"".join(tensor.chunks())
        outputs.append(Output(name, tensor.dtype, tensor.shape, lambda r=raw: [r]))
    outputs = [o for o in outputs if o.name != UP] + [Output(UP, dtype, data.shape, lambda: [data.tobytes()])]
    write_checkpoint(folder, outputs)


def refused(tmp_path, match, **keys):
    with pytest.raises(ConversionError, match=match) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        to_mlx(tmp_path / "base", tmp_path / "out", check=False, **keys)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_value_that_becomes_infinite_is_refused(tmp_path):
    write_model(tmp_path / "base", LLAMA, dtype="F32")
    data = np.full((48, 32), 0.5, np.float32)
    data[3, 4] = -1e6
    replaced(tmp_path / "base", "F32", data)
    refused(tmp_path, rf"{UP} has values up to 1.0e\+06, which are infinite in F16: choose another", dtype="float16")
    to_mlx(tmp_path / "base", tmp_path / "out", dtype="bfloat16", check=False)


@pytest.mark.parametrize("dtype, most", [("F16", 65504.0), ("BF16", 3.3895314e38)])
def test_the_largest_values_and_infinities_themselves_are_kept(dtype, most):
    assert from_float32(np.array([most, np.inf, -np.inf, np.nan], np.float32), dtype).shape == (4,)
    with pytest.raises(ConversionError, match=f"a tensor has values up to .* infinite in {dtype}"):
        from_float32(np.array([np.inf, most * 1.003], np.float32), dtype)


@pytest.mark.parametrize(
    "dtype, match",
    [
        ("F8_E4M3", f"{UP} is F8_E4M3, and the config has no quantization_config .*: convert the 16-bit checkpoint"),
        ("F8_E5M2", f"{UP} is F8_E5M2"),
        ("F64", f"{UP} is F64, which MLX does not load: save the model in float32 first"),
    ],
)
@pytest.mark.parametrize("asked", [None, "float32"])
def test_types_that_cannot_be_carried(tmp_path, dtype, match, asked):
    write_model(tmp_path / "base", LLAMA)
    replaced(tmp_path / "base", dtype, np.zeros((48, 32), NUMPY_TYPES[dtype]))
    refused(tmp_path, match, dtype=asked)


def test_multi_token_prediction_is_left_out_and_said(tmp_path):
    names = ["mtp.fc.weight", "mtp.norm.weight", "model.language_model.embed_tokens.weight"]
    write_checkpoint(tmp_path, [Output(n, "F32", (4, 3), lambda: [bytes(4 * 12)]) for n in names])
    config = {"model_type": "qwen3_5", "tie_word_embeddings": True}
    layout = lay_out(open_checkpoint(tmp_path), config, config, fam.FAMILIES["qwen3_5"])
    assert list(layout.entries) == names[2:]
    assert [n for n in layout.notes if n.startswith("2 tensors of multi-token prediction (mtp.*) are left out")]


# --- what a PEFT config says in numbers --------------------------------------------------------------------

GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
BAD = [
    ({"lora_alpha": 0}, "lora_alpha is 0, not a number above 0"),
    ({"lora_alpha": "16"}, "lora_alpha is '16', not a number above 0"),
    ({"lora_alpha": None}, "lora_alpha is None, not a number above 0"),
    ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    ({"r": None}, "r is None"),
    ({"r": True}, "r is True"),
    ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern of 'q_proj' is 0, not a number"),
    ({"alpha_pattern": {"(": 3}}, r"alpha_pattern '\(' is no pattern"),
    ({"alpha_pattern": [3]}, r"alpha_pattern is \[3\], not an object"),
    ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern of 'q_proj' is '4'"),
]


@pytest.mark.parametrize("change, match", BAD, ids=[str(c) for c, _ in BAD])
def test_numbers_of_a_peft_config(tmp_path, change, match):
    check_numbers(GOOD | {"alpha_pattern": {r"layers\.0\..*q_proj": 7.5}, "rank_pattern": None}, tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(GOOD | change))
    sizes = {"lora_A": (4, 32), "lora_B": (32, 4)}
    name = "base_model.model.model.layers.0.self_attn.q_proj.{}.weight"
    outputs = [
        Output(name.format(leaf), "F32", shape, lambda: [bytes(128 * ITEM_BYTES["F32"])])
        for leaf, shape in sizes.items()
    ]
    write_file(tmp_path / PEFT_WEIGHTS, outputs, "pt")
    with pytest.raises(ConversionError, match=match) as caught:
        read_peft_adapter(tmp_path, fam.FAMILIES["llama"])
    assert "\n" not in str(caught.value) and CONFIG in str(caught.value)


def test_a_config_that_is_no_object(tmp_path):
    (tmp_path / CONFIG).write_text("[]")
    with pytest.raises(ConversionError, match=f"{CONFIG} holds no object"):
        read_json(tmp_path / CONFIG)
