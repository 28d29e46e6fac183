"""The check on logits is a check: a conversion that is off fails, one that rounds does not."""

import math

import numpy as np
import pytest
from hand_made import LLAMA, write_model

from mpi_mlx.convert import checks, weights
from mpi_mlx.convert.families import FAMILIES
from mpi_mlx.convert.layout import Entry, Layout
from mpi_mlx.convert.shards import Output, from_float32, to_float32
from mpi_mlx.convert.weights import to_hf, to_mlx
from mpi_mlx.errors import ConversionError


def spoil(monkeypatch, factor):
    """Conversions write the first layer's values multiplied."""
    plain = weights.outputs_of

    def spoiled(layout, **keys):
        outputs = {o.name: o for o in plain(layout, **keys)}
        entry = layout.entries["model.layers.0.self_attn.v_proj.weight"]
        data = from_float32(to_float32(entry.read(), entry.dtype) * np.float32(factor), entry.dtype)
        outputs[entry.name] = Output(entry.name, entry.dtype, data.shape, lambda: [data.tobytes()])
        return list(outputs.values())

    monkeypatch.setattr(weights, "outputs_of", spoiled)


@pytest.mark.parametrize("command", [to_mlx, to_hf])
def test_a_result_that_is_off_is_not_written(tmp_path, monkeypatch, command):
    write_model(tmp_path / "base", LLAMA, dtype="F32")
    to_mlx(tmp_path / "base", tmp_path / "source", check=False)
    spoil(monkeypatch, 1.05)
    match = r"the logits are off by \d\.\de-0\d on text: .* on the result .*0\.01 is the most.*; nothing was written"
    if command is to_mlx:
        pytest.importorskip("torch")  # what transformers reads is compared with transformers
    with pytest.raises(ConversionError, match=match) as caught:
        command(tmp_path / "source", tmp_path / "new" / "out")
    assert "\n" not in str(caught.value) and "--no-check writes it anyway" in str(caught.value)
    assert not (tmp_path / "new").exists()
    command(tmp_path / "source", tmp_path / "new" / "out", check=False)
    assert (tmp_path / "new" / "out" / "model.safetensors").is_file()


def layout_of(family, **dtypes):
    entries = {n: Entry(n, d, (2,), lambda i, j: np.zeros(2)) for n, d in dtypes.items()}
    return Layout(FAMILIES[family], {}, entries, True)


NORM = "model.language_model.norm.weight"


@pytest.mark.parametrize(
    "family, stored, dtype, bound",
    [
        ("llama", "BF16", None, checks.COPIED),
        ("llama", "F32", "bfloat16", checks.ROUNDED),
        ("llama", "BF16", "float16", checks.ROUNDED),
        ("llama", "BF16", "bfloat16", checks.COPIED),
        ("llama", "BF16", "float32", checks.COPIED),
        ("qwen3_5", "F32", None, checks.COPIED),
        ("qwen3_5", "BF16", None, checks.ROUNDED),
    ],
)
def test_what_rounds_may_be_off_further(family, stored, dtype, bound):
    layout = layout_of(family, **{NORM: stored})
    assert checks.bound_of(layout, dtype) == bound
    assert checks.bound_of(layout, dtype, rounds=True) == checks.ROUNDED == 0.2 > checks.COPIED == 0.01


def test_an_adapter_of_a_quantized_base_is_off_by_that_much(tmp_path):
    """A run with ``quantize`` remembers the bits: peft on the float base differs, and a note says so."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from mpi_mlx.convert.adapters import Adapter, LowRank, write_mlx_adapter
    from mpi_mlx.convert.peft import to_peft

    config = {**LLAMA, "hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
    write_model(tmp_path / "base", config, dtype="F32")
    low = LowRank(np.ones((2, 64), np.float32), np.ones((64, 2), np.float32), 0.01)
    adapter = Adapter("lora", 2, 0.01, 0.0, {"model.layers.0.self_attn.q_proj": low})
    bits = {"model.layers.0.mlp.up_proj": {"group_size": 64, "bits": 2}}
    (tmp_path / "adapter").mkdir()
    write_mlx_adapter(tmp_path / "adapter", adapter, FAMILIES["llama"], 2, str(tmp_path / "base"), bits)
    report = to_peft(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    assert checks.COPIED < report.worst < math.inf
    assert any("on the float base it is off by that much" in note for note in report.notes)
