import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hand_made import LLAMA, QWEN_VL, shapes_of, write_model

from mpi_mlx.convert import families as fam
from mpi_mlx.convert import folders
from mpi_mlx.convert.shards import open_checkpoint
from mpi_mlx.convert.weights import to_hf, to_mlx
from mpi_mlx.errors import ConversionError, DeviceError

QWEN = fam.FAMILIES["qwen2_5_vl"]


def stored(folder):
    return {n: t.read() for n, t in open_checkpoint(folder).tensors.items()}


def same(a, b):
    return set(a) == set(b) and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def mlx_saved(tmp_path, values, config):
    """The folder as mlx-vlm's own convert would leave it: tree names and axis order, format mlx."""
    folder = tmp_path / "saved"
    folder.mkdir()
    tree = {}
    for name, value in values.items():
        array = mx.array(value).view(mx.bfloat16)
        if fam.is_convolution(QWEN, name):
            array = array.transpose(fam.TO_TREE[value.ndim])
        tree[fam.tree_name(QWEN, name)] = mx.contiguous(array)
    mx.save_safetensors(str(folder / "model.safetensors"), tree, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("config", [LLAMA, QWEN_VL], ids=["llama", "qwen2_5_vl"])
def test_bfloat16_round_trip_is_bit_exact(tmp_path, config):
    values = write_model(tmp_path / "source", config, limit=20_000)
    report = to_mlx(tmp_path / "source", tmp_path / "mlx", check=False)
    assert "none missing" in report.covered
    to_hf(tmp_path / "mlx", tmp_path / "back", check=False)
    assert same(stored(tmp_path / "back"), values)
    assert (tmp_path / "back" / "tokenizer.json").exists()
    assert (tmp_path / "back" / "generation_config.json").exists()


def test_an_mlx_saved_folder_goes_back_bit_exact(tmp_path):
    values = write_model(tmp_path / "source", QWEN_VL)
    saved = mlx_saved(tmp_path, values, QWEN_VL)
    report = to_hf(saved, tmp_path / "back", check=False)
    assert same(stored(tmp_path / "back"), values)
    assert report.tensors == len(values)


@pytest.mark.parametrize("space", ["memory", "tree"])
def test_other_spellings_are_carried_over(tmp_path, space):
    rename = (lambda n: fam.memory_name(QWEN, n)) if space == "memory" else (lambda n: fam.tree_name(QWEN, n))
    values = write_model(tmp_path / "source", QWEN_VL, rename=rename)
    to_mlx(tmp_path / "source", tmp_path / "mlx", check=False)
    assert same(stored(tmp_path / "mlx"), values)


def test_the_result_runs_and_equals_the_source_in_mlx(tmp_path):
    values = write_model(tmp_path / "source", QWEN_VL, dtype="F32")
    saved = tmp_path / "saved"
    to_mlx(tmp_path / "source", saved, check=False)
    report = to_hf(saved, tmp_path / "back")
    assert {k.split(":")[0] for k in report.errors} == {"text", "image", "two images", "text after image"}
    ours = {k: v for k, v in report.errors.items() if "transformers" not in k}
    assert max(ours.values()) == 0.0
    assert values["model.norm.weight"].dtype == np.float32


def test_dtype_rounds_every_float(tmp_path):
    write_model(tmp_path / "source", LLAMA, dtype="F32")
    to_mlx(tmp_path / "source", tmp_path / "mlx", dtype="bfloat16", check=False)
    tensors = open_checkpoint(tmp_path / "mlx").tensors
    assert {t.dtype for t in tensors.values()} == {"BF16"}
    assert json.loads((tmp_path / "mlx" / "config.json").read_text())["dtype"] == "bfloat16"
    source = open_checkpoint(tmp_path / "source").tensors["model.norm.weight"].read()
    want = mx.array(source).astype(mx.bfloat16).view(mx.uint16)
    assert np.array_equal(tensors["model.norm.weight"].read(), np.array(want))


def test_a_diverged_head_unties_the_config(tmp_path):
    values = write_model(tmp_path / "source", {**LLAMA, "tie_word_embeddings": False})
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    report = to_mlx(tmp_path / "source", tmp_path / "mlx", check=False)
    assert json.loads((tmp_path / "mlx" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in stored(tmp_path / "mlx") and "lm_head.weight" in values
    assert any("tie_word_embeddings" in n for n in report.notes)


def test_quantize_reports_its_loss_and_goes_back(tmp_path):
    config = {**LLAMA, "hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    write_model(tmp_path / "source", config, dtype="F32")
    report = to_mlx(tmp_path / "source", tmp_path / "q8", quantize=8)
    written = json.loads((tmp_path / "q8" / "config.json").read_text())
    assert written["quantization"]["bits"] == 8
    note = next(n for n in report.notes if "loss of quantizing to 8 bits" in n)
    assert 1e-5 < float(note.split()[-1]) < 0.05
    back = to_hf(tmp_path / "q8", tmp_path / "back")
    ours = {k: v for k, v in back.errors.items() if "transformers" not in k}
    assert max(ours.values()) < 2e-6
    assert set(stored(tmp_path / "back")) == set(shapes_of(config))
    with pytest.raises(ConversionError, match="quantized MLX already"):
        to_mlx(tmp_path / "q8", tmp_path / "again")


def test_the_card_names_base_and_license(tmp_path):
    write_model(tmp_path / "source", LLAMA)
    (tmp_path / "source" / "README.md").write_text("---\nlicense: apache-2.0\n---\nx")
    (tmp_path / "source" / "LICENSE").write_text("Apache")
    to_mlx(tmp_path / "source", tmp_path / "my.model", check=False)
    card = (tmp_path / "my.model" / "README.md").read_text()
    assert "license: apache-2.0" in card and "see LICENSE" in card and str(tmp_path / "source") in card
    assert "# my.model" in card
    # the folder it was made from had it from elsewhere: the result of a result still names the source
    to_hf(tmp_path / "my.model", tmp_path / "back", check=False)
    card = (tmp_path / "back" / "README.md").read_text()
    assert f"base_model: {tmp_path / 'source'}\n" in card and f"as in `{tmp_path / 'my.model'}`" in card


# --- refusals: one sentence, and no folder -----------------------------------------------------------------


def refused(tmp_path, match, error=ConversionError, **keys):
    with pytest.raises(error, match=match) as caught:
        to_mlx(tmp_path / "source", tmp_path / "mlx", check=False, **keys)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mlx").exists()
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def write_config(tmp_path, **changes):
    config = copy.deepcopy({**LLAMA, **changes})
    write_model(tmp_path / "source", {**LLAMA, "tie_word_embeddings": config["tie_word_embeddings"]})
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))


def test_unknown_family(tmp_path):
    write_config(tmp_path, model_type="bloom")
    refused(tmp_path, "no layout table for model_type 'bloom'")


def test_other_activation(tmp_path):
    write_config(tmp_path, hidden_act="gelu")
    refused(tmp_path, "llama with hidden_act = 'gelu'")


def test_ignored_rope_scaling(tmp_path):
    config = copy.deepcopy(QWEN_VL)
    config["text_config"]["rope_parameters"].update(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=64
    )
    write_model(tmp_path / "source", config)
    refused(tmp_path, "qwen2_5_vl with rope scaling 'yarn'")


def test_a_tensor_without_a_place(tmp_path):
    write_model(tmp_path / "source", LLAMA, rename=lambda n: n.replace("model.norm", "final_norm"))
    refused(tmp_path, "1 tensors have no place in llama's table, the first is final_norm.weight")


def test_weights_that_do_not_fit_the_config(tmp_path):
    write_config(tmp_path, intermediate_size=40)
    refused(tmp_path, r"layers.0.mlp.down_proj.weight has shape \(32, 48\), the config asks for \(32, 40\)")
    write_config(tmp_path, num_hidden_layers=3)
    refused(tmp_path, "model.layers.2.input_layernorm.weight is missing")


def test_pickled_weights(tmp_path):
    write_config(tmp_path)
    os.rename(tmp_path / "source" / "model.safetensors", tmp_path / "source" / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin is pickled.*weights_only=True")


def test_truncated_weights(tmp_path):
    write_config(tmp_path)
    path = tmp_path / "source" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    refused(tmp_path, "truncated")


@pytest.mark.parametrize(
    "files, match",
    [
        (
            ["actor/model_world_size_4_rank_0.pt"],
            r"python -m verl.model_merger merge --backend fsdp --local_dir .*actor",
        ),
        (["model_world_size_2_rank_1.pt", "huggingface/config.json"], "scripts/model_merger.py --local_dir"),
        (["dist_ckpt/x"], "--backend megatron"),
        (
            ["global_step_9/actor/model_world_size_2_rank_0.pt", "global_step_10/actor/model_world_size_2_rank_0.pt"],
            r"--backend fsdp --local_dir \S*source/global_step_10/actor ",
        ),
        (["zero_to_fp32.py", "latest"], r"zero_to_fp32.py \. MERGED --safe_serialization"),
        (["pytorch_model_fsdp_0/__0_0.distcp"], "accelerate merge-weights .*pytorch_model_fsdp_0 MERGED"),
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter"),
        (["x.gguf"], "convert gguf"),
        (["config.json"], r"no \*.safetensors"),
        (["a.safetensors"], "no config.json"),
    ],
)
def test_folders_of_other_kinds(tmp_path, files, match):
    for name in files:
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    refused(tmp_path, match)


def test_folders_inside_a_checkpoint_know_their_place(tmp_path):
    """The empty Hugging Face folder that verl leaves beside its shards, and DeepSpeed's folder of shards."""
    actor = tmp_path / "actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "model_world_size_2_rank_0.pt").write_text("")
    (actor / "huggingface" / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(ConversionError, match=rf"--local_dir {actor} "):
        to_mlx(actor / "huggingface", tmp_path / "mlx")
    shards = tmp_path / "checkpoint-5" / "global_step5"
    shards.mkdir(parents=True)
    (shards / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_text("")
    (shards.parent / "zero_to_fp32.py").write_text("")
    with pytest.raises(ConversionError, match=rf"cd {shards.parent} && python zero_to_fp32.py"):
        to_mlx(shards, tmp_path / "mlx")


@pytest.mark.parametrize("dtype, needs", [(None, 1), ("float32", 2)])
def test_the_disk_has_to_hold_what_is_written(tmp_path, monkeypatch, dtype, needs):
    write_config(tmp_path)
    stored = open_checkpoint(tmp_path / "source").nbytes
    free = int(needs * stored * 1.02) + (64 << 20)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda p: SimpleNamespace(free=free - 1000))
    refused(tmp_path, "GB free, mlx needs", DeviceError, dtype=dtype)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda p: SimpleNamespace(free=free + 1))
    to_mlx(tmp_path / "source", tmp_path / "mlx", check=False, dtype=dtype)


def test_a_run_that_trained_a_whole_model(tmp_path):
    run = tmp_path / "run"
    write_model(run / "model", LLAMA)
    (run / "recipe.yaml").write_text("stages: [{stage: pretrain}]\n")
    to_hf(run, tmp_path / "hf", check=False)
    assert same(stored(tmp_path / "hf"), stored(run / "model"))


def test_generation_stops_where_the_config_says(tmp_path):
    write_model(tmp_path / "source", LLAMA)
    path = tmp_path / "source" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.7}))
    to_hf(tmp_path / "source", tmp_path / "one", check=False)
    assert (tmp_path / "one" / path.name).read_bytes() == path.read_bytes()
    path.unlink()
    to_hf(tmp_path / "source", tmp_path / "two", check=False)
    assert json.loads((tmp_path / "two" / path.name).read_text()) == {"bos_token_id": 1, "eos_token_id": 2}


def test_a_disk_too_small_is_said_beforehand(tmp_path, monkeypatch):
    write_config(tmp_path)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda p: SimpleNamespace(free=5))
    refused(tmp_path, "has 0.0 GB free", DeviceError)


def test_an_existing_destination_is_kept(tmp_path):
    write_config(tmp_path)
    to_mlx(tmp_path / "source", tmp_path / "mlx", check=False)
    (tmp_path / "mlx" / "mine").write_text("x")
    with pytest.raises(ConversionError, match="pass --overwrite"):
        to_mlx(tmp_path / "source", tmp_path / "mlx", check=False)
    assert (tmp_path / "mlx" / "mine").read_text() == "x"
    to_mlx(tmp_path / "source", tmp_path / "mlx", check=False, overwrite=True)
    assert not (tmp_path / "mlx" / "mine").exists() and (tmp_path / "mlx" / "config.json").exists()


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    write_config(tmp_path)
    monkeypatch.setattr("mpi_mlx.convert.weights.copy_companions", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        to_mlx(tmp_path / "source", tmp_path / "mlx", check=False)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_what_a_killed_conversion_left_is_removed(tmp_path):
    write_config(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".mlx.{pid}.partial").mkdir()
    to_mlx(tmp_path / "source", tmp_path / "mlx", check=False)
    hidden = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert hidden == [f".mlx.{os.getppid()}.partial"]  # that process still runs: the folder may be its own


def test_converting_twice_changes_nothing(tmp_path):
    write_model(tmp_path / "source", QWEN_VL)
    to_mlx(tmp_path / "source", tmp_path / "one", check=False)
    to_mlx(tmp_path / "one", tmp_path / "two", check=False)
    assert same(stored(tmp_path / "one"), stored(tmp_path / "two"))
    one, two = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("one", "two"))
    assert one == two


def test_weights_quantized_by_another_tool(tmp_path):
    write_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(tmp_path, "is quantized by gptq: convert the float checkpoint")
