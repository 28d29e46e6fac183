"""Adapters that were trained on another folder than the base they go to: what changed is saved whole, or refused."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from hand_made import LLAMA, write_model

from mpi_mlx.convert.adapters import Adapter, LowRank, read_mlx_adapter, write_mlx_adapter
from mpi_mlx.convert.families import FAMILIES
from mpi_mlx.convert.peft import to_peft
from mpi_mlx.convert.shards import (
    Output,
    from_float32,
    open_checkpoint,
    read_header,
    to_float32,
    write_checkpoint,
)
from mpi_mlx.convert.weights import to_mlx
from mpi_mlx.errors import ConversionError

Q = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."


def write_adapter(folder, base, *modules):
    """An MLX adapter of rank 2 on square linears, trained on ``base``."""
    rng = np.random.default_rng(1)
    made = {m: LowRank(*rng.standard_normal((2, 2, 32)).astype(np.float32), 2.0) for m in modules}
    for low in made.values():
        low.b = low.b.T
    folder.mkdir()
    write_mlx_adapter(folder, Adapter("lora", 2, 2.0, 0.0, made), FAMILIES["llama"], 2, str(base))
    return folder


def change(folder, **factors):
    """Rewrite the checkpoint with some tensors (dots as double underscores) multiplied."""
    outputs = []
    for name, tensor in open_checkpoint(folder).tensors.items():
        data = to_float32(tensor.read(), tensor.dtype) * np.float32(factors.get(name.replace(".", "__"), 1))
        data = from_float32(data, tensor.dtype)
        outputs.append(Output(name, tensor.dtype, data.shape, lambda d=data: [d.tobytes()]))
    write_checkpoint(folder, outputs)


def changed_copy(tmp_path, **factors):
    change(shutil.copytree(tmp_path / "base", tmp_path / "trained-on"), **factors)
    return tmp_path / "trained-on"


def written(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config["modules_to_save"], read_header(folder / "adapter_model.safetensors")[0]


@pytest.mark.parametrize("what", ["q_proj", "bias of q_proj"])
def test_a_linear_that_changed_and_is_adapted_too_is_refused(tmp_path, what):
    config = {**LLAMA, "attention_bias": True} if "bias" in what else LLAMA
    write_model(tmp_path / "base", config, bias=("q_proj",) if "bias" in what else ())
    leaf = "bias" if "bias" in what else "weight"
    other = changed_copy(tmp_path, **{f"{Q}.{leaf}".replace(".", "__"): 1.5})
    adapter = write_adapter(tmp_path / "adapter", other, Q)
    match = rf"{Q}.{leaf} of {other} differs from the base and is adapted too, .*--base, or .*mpi-mlx convert fuse"
    with pytest.raises(ConversionError, match=match) as caught:
        to_peft(adapter, tmp_path / "new" / "out", base=tmp_path / "base", check=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtypes", [("BF16", "float16"), ("F32", "bfloat16"), ("BF16", "float32")])
def test_a_base_of_another_type_has_not_changed(tmp_path, dtypes):
    """float16 has no bfloat16 below 6e-8 and rounds those below 6e-5: that is no training."""
    write_model(tmp_path / "base", LLAMA, dtype=dtypes[0])
    change(tmp_path / "base", **{f"{Q}.weight".replace(".", "__"): 1e-5})
    to_mlx(tmp_path / "base", tmp_path / "narrow", dtype=dtypes[1], check=False)
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "narrow", Q)
    report = to_peft(adapter, tmp_path / "out", base=tmp_path / "base", check=False)
    saved, tensors = written(tmp_path / "out")
    assert saved is None and len(tensors) == 2
    assert any("in another type" in note for note in report.notes)


def test_what_changed_besides_the_rounding_is_saved(tmp_path):
    write_model(tmp_path / "base", LLAMA)
    to_mlx(tmp_path / "base", tmp_path / "narrow", dtype="float16", check=False)
    change(tmp_path / "narrow", model__norm__weight=1.5)
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "narrow", Q)
    to_peft(adapter, tmp_path / "out", base=tmp_path / "base", check=False)
    saved, tensors = written(tmp_path / "out")
    assert saved == ["model.norm"] and tensors[PREFIX + "model.norm.weight"].dtype == "F16"


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_a_changed_module_is_saved_whole(tmp_path, leaf):
    write_model(tmp_path / "base", {**LLAMA, "mlp_bias": True}, bias=("down_proj", "up_proj", "gate_proj"))
    name = "model.layers.1.mlp.down_proj"
    other = changed_copy(tmp_path, **{f"{name}.{leaf}".replace(".", "__"): 1.5})
    to_peft(write_adapter(tmp_path / "adapter", other, Q), tmp_path / "out", base=tmp_path / "base", check=False)
    saved, tensors = written(tmp_path / "out")
    assert saved == [name]
    for part in ("weight", "bias"):
        wanted = open_checkpoint(other).tensors[f"{name}.{part}"].read()
        assert np.array_equal(tensors[f"{PREFIX}{name}.{part}"].read(), wanted)


def test_many_small_tensors_are_no_other_model(tmp_path):
    """All norms are a quarter of the tensors; a quarter of the matrices is another model."""
    values = write_model(tmp_path / "base", LLAMA)
    norms = {n: 1.5 for n in values if n.endswith("norm.weight")}
    assert len(norms) > len(values) // 4 - 1
    other = changed_copy(tmp_path, **{n.replace(".", "__"): f for n, f in norms.items()})
    to_peft(write_adapter(tmp_path / "adapter", other, Q), tmp_path / "out", base=tmp_path / "base", check=False)
    assert len(written(tmp_path / "out")[0]) == len(norms)
    matrices = [n for n in values if n not in norms]
    change(other, **{n.replace(".", "__"): 1.5 for n in matrices[: len(matrices) // 4 + 1]})
    with pytest.raises(ConversionError, match=rf"and 4 of its {len(matrices)} matrices differ from the base: give"):
        to_peft(tmp_path / "adapter", tmp_path / "again", base=tmp_path / "base", check=False)


def test_a_changed_embedding_that_is_the_head_too(tmp_path):
    """peft gives the embedding a copy of its own, so that the head has to be saved with it."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    write_model(tmp_path / "base", LLAMA, dtype="F32")
    other = changed_copy(tmp_path, model__embed_tokens__weight=1.5)
    report = to_peft(write_adapter(tmp_path / "adapter", other, Q), tmp_path / "out", base=tmp_path / "base")
    assert written(tmp_path / "out")[0] == ["lm_head", "model.embed_tokens"]
    assert report.errors and report.worst < 1e-5


@pytest.fixture()
def qwen3_5(tmp_path):
    """A tiny bfloat16 qwen3_5 of transformers, whose norms MLX holds plus one."""
    torch = pytest.importorskip("torch")
    from mpi_mlx.convert import specimens, torch_side

    torch.set_num_threads(1)
    with torch_side.silence():
        specimens.build("qwen3_5").to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_trained_norms_of_qwen3_5_come_back(qwen3_5, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from mpi_mlx.convert import torch_side
    from mpi_mlx.convert.peft import from_peft

    model, _ = torch_side.load_torch(qwen3_5)
    options = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["input_layernorm", "norm"])
    model = peft.get_peft_model(model, options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.add_(0.25)
    model.save_pretrained(tmp_path / "peft")
    from_peft(tmp_path / "peft", tmp_path / "adapter", base=qwen3_5, check=False)
    to_peft(tmp_path / "adapter", tmp_path / "back", base=qwen3_5, check=False)
    before, after = (read_header(tmp_path / n / "adapter_model.safetensors")[0] for n in ("peft", "back"))
    norms = [n for n in before if "layernorm" in n]
    assert norms and set(before) == set(after)
    assert all(np.array_equal(before[n].read(), after[n].read()) for n in before)


def test_norms_of_qwen3_5_that_mlx_saved_changed_where_they_were_trained(qwen3_5, tmp_path):
    """MLX's own form holds them plus one, rounded: that alone is no change, either way round."""
    from mpi_mlx.convert.changed import add_changed_modules
    from mpi_mlx.convert.specimens import as_mlx_saves
    from mpi_mlx.convert.weights import read_layout

    to_mlx(qwen3_5, tmp_path / "mlx", check=False)
    saved, _ = as_mlx_saves(tmp_path / "mlx", tmp_path / "saved")

    def changed(trained_on, base):
        adapter = Adapter("lora", 2, 2.0, 0.0, {})
        add_changed_modules(adapter, read_layout(base)[1], base, trained_on)
        return sorted(adapter.saved)

    assert changed(saved, qwen3_5) == changed(qwen3_5, saved) == []
    change(saved, language_model__model__norm__weight=1.5)
    assert changed(saved, qwen3_5) == changed(qwen3_5, saved) == ["model.language_model.norm.weight"]


def test_whole_tensors_of_an_mlx_adapter_are_in_mlx_form(tmp_path):
    """mlx-vlm saves trained modules beside the adapters: norms of qwen3_5 plus one, convolutions in its own order."""
    family, low = FAMILIES["qwen3_5"], LowRank(np.zeros((2, 4), np.float32), np.zeros((4, 2), np.float32), 1.0)
    adapter = Adapter("lora", 2, 1.0, 0.0, {"model.language_model.layers.3.self_attn.q_proj": low})
    write_mlx_adapter(tmp_path, adapter, family, 4, "base")
    patch = np.arange(2 * 3 * 5 * 7 * 3, dtype=np.float32).reshape(2, 3, 5, 7, 3)
    norm = np.full(4, 1.25, np.float32)
    whole = {"language_model.model.norm.weight": norm, "vision_tower.patch_embed.proj.weight": patch}
    path = str(tmp_path / "adapters.safetensors")
    weights = dict(mx.load(path)) | {n: mx.array(d) for n, d in whole.items()}
    mx.eval(weights)
    mx.save_safetensors(path, weights, {"format": "mlx"})
    saved = read_mlx_adapter(tmp_path, family).saved
    assert np.array_equal(saved["model.language_model.norm.weight"].read(), np.full(4, 0.25, np.float32))
    assert np.array_equal(saved["model.visual.patch_embed.proj.weight"].read(), patch.transpose(0, 4, 1, 2, 3))
