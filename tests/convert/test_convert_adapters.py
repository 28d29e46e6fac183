import json
import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hand_made import LLAMA, QWEN_VL, write_model

from mpi_mlx.convert import families as fam
from mpi_mlx.convert.adapters import Adapter, LowRank, read_mlx_adapter, unify, write_mlx_adapter
from mpi_mlx.convert.fuse import fuse
from mpi_mlx.convert.peft import from_peft, to_peft
from mpi_mlx.convert.peft_files import module_scale, write_peft_adapter
from mpi_mlx.convert.shards import open_checkpoint, read_header, to_float32
from mpi_mlx.convert.weights import to_hf, to_mlx
from mpi_mlx.data.dataset import load_dataset
from mpi_mlx.errors import ConversionError
from mpi_mlx.recipe import load_recipe

ROW = fam.FAMILIES["llama"]
WIDE = {**LLAMA, "hidden_size": 64, "head_dim": 16, "intermediate_size": 128}


def low_rank(rng, shape, rank=2, scale=1.5, dora=False):
    m = np.abs(rng.standard_normal(shape[0])).astype(np.float32) + 0.5 if dora else None
    a = rng.standard_normal((rank, shape[1])).astype(np.float32)
    return LowRank(a * 0.2, rng.standard_normal((shape[0], rank)).astype(np.float32) * 0.2, scale, m)


def adapter_for(folder, names=("q_proj", "down_proj"), dora=False, scale=1.5, layers=None):
    rng = np.random.default_rng(1)
    modules = {}
    for name, tensor in open_checkpoint(folder).tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.rsplit(".", 1)[-1] in names and "visual" not in name:
            if layers is None or any(f"layers.{i}." in name for i in layers):
                modules[module] = low_rank(rng, tensor.shape, scale=scale, dora=dora)
    return Adapter("dora" if dora else "lora", 2, scale, 0.0, modules)


@pytest.fixture
def base(tmp_path):
    write_model(tmp_path / "source", LLAMA, dtype="F32")
    to_mlx(tmp_path / "source", tmp_path / "base", check=False)
    return tmp_path / "base"


def save(folder, adapter, base, row=ROW, layers=2, **keys):
    folder.mkdir(parents=True)
    write_mlx_adapter(folder, adapter, row, layers, str(base), **keys)
    return folder


def test_merge_by_hand():
    low = LowRank(np.array([[1.0, 2.0]], np.float32), np.array([[3.0], [0.0]], np.float32), 0.5)
    weight = np.array([[1.0, 0.0], [0.0, 5.0]], np.float32)
    assert low.merged(weight).tolist() == [[2.5, 3.0], [0.0, 5.0]]
    low.magnitude = np.array([1.0, 2.0], np.float32)
    norm = math.hypot(2.5, 3.0)
    assert np.allclose(low.merged(weight), [[2.5 / norm, 3.0 / norm], [0.0, 2.0]])


def test_one_rank_and_one_scale_for_all():
    rng = np.random.default_rng(0)
    modules = {"a": low_rank(rng, (4, 6), rank=1, scale=2.0), "b": low_rank(rng, (4, 6), rank=3, scale=0.5)}
    same = unify(modules, 3, 0.5)
    for name, m in same.items():
        assert m.a.shape == (3, 6) and m.b.shape == (4, 3) and m.scale == 0.5
        assert np.allclose(m.delta(), modules[name].delta(), atol=1e-6)
    assert np.array_equal(same["b"].b, modules["b"].b)


def test_pefts_scale_patterns():
    config = {"lora_alpha": 8, "alpha_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 6}}
    assert module_scale(config, "model.layers.0.self_attn.q_proj", 4) == 0.5
    assert module_scale(config, "model.layers.1.self_attn.v_proj", 4) == 1.5
    assert module_scale(config, "model.layers.0.self_attn.v_proj", 4) == 2.0
    assert module_scale({**config, "use_rslora": True}, "model.layers.0.mlp.up_proj", 4) == 4.0


def test_mlx_lm_keys_are_relative_where_all_layers_are_alike(base, tmp_path):
    alike = json.loads((save(tmp_path / "a", adapter_for(base), base) / "adapter_config.json").read_text())
    assert alike["num_layers"] == 2
    assert alike["lora_parameters"]["keys"] == ["mlp.down_proj", "self_attn.q_proj"]
    one = adapter_for(base, layers=[1])
    config = json.loads((save(tmp_path / "b", one, base) / "adapter_config.json").read_text())
    assert config["num_layers"] == -1 and config["lora_parameters"]["keys"][0].startswith("model.layers.1.")


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("config", [LLAMA, QWEN_VL], ids=["llama", "qwen2_5_vl"])
def test_fused_equals_base_and_adapter_in_mlx(tmp_path, config, dora):
    write_model(tmp_path / "source", config, dtype="F32")
    to_mlx(tmp_path / "source", tmp_path / "base", check=False)
    adapter = adapter_for(tmp_path / "base", dora=dora)
    row = fam.family_of(config)
    save(tmp_path / "adapter", adapter, tmp_path / "base", row)
    report = fuse(tmp_path / "adapter", tmp_path / "fused")
    assert report.errors and report.worst < 1e-5
    name, low = next(iter(adapter.modules.items()))
    before, after = (
        open_checkpoint(tmp_path / n).tensors[name + ".weight"].read() for n in ("base", "fused")
    )
    assert np.abs(after - before).max() > 0.01
    assert np.array_equal(after, low.merged(before))


def test_an_adapter_on_part_of_the_layers_runs(base, tmp_path):
    save(tmp_path / "adapter", adapter_for(base, layers=[1]), base)
    assert fuse(tmp_path / "adapter", tmp_path / "fused").worst < 1e-5


def test_fuse_on_a_quantized_base(tmp_path):
    """Dequantize, merge: equal. Quantize again only when asked, and say what it costs."""
    write_model(tmp_path / "source", WIDE, dtype="F32")
    to_mlx(tmp_path / "source", tmp_path / "float", check=False)
    to_mlx(tmp_path / "source", tmp_path / "q4", quantize=4, check=False)
    save(tmp_path / "adapter", adapter_for(tmp_path / "float"), tmp_path / "q4")
    report = fuse(tmp_path / "adapter", tmp_path / "fused")
    assert report.worst < 1e-5
    assert "quantization" not in json.loads((tmp_path / "fused" / "config.json").read_text())
    again = fuse(tmp_path / "adapter", tmp_path / "again", quantize=4)
    loss = next(n for n in again.notes if n.startswith("loss of quantizing to 4 bits"))
    assert 1e-3 < float(loss.split()[-1]) < 1.0
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization"]["bits"] == 4


@pytest.mark.parametrize("config", [WIDE, QWEN_VL], ids=["llama", "qwen2_5_vl"])
def test_fuse_on_a_base_quantized_while_training(tmp_path, config):
    """The recorded bits are put into the float base first, as mlx-vlm's loader does."""
    if config is QWEN_VL:
        config = json.loads(json.dumps(config))
        config["text_config"] |= {"hidden_size": 64, "intermediate_size": 128}
        config["vision_config"]["out_hidden_size"] = 64
    write_model(tmp_path / "source", config, dtype="F32")
    to_mlx(tmp_path / "source", tmp_path / "base", check=False)
    row = fam.family_of(config)
    adapter = adapter_for(tmp_path / "base")
    spec = {"group_size": 64, "bits": 4, "mode": "affine"}
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.embed_tokens"]
    bits = {fam.tree_name(row, n + ".weight").removesuffix(".weight"): spec for n in names}
    save(tmp_path / "adapter", adapter, tmp_path / "base", row, base_quantization=bits)
    report = fuse(tmp_path / "adapter", tmp_path / "fused")
    assert report.worst < 1e-5
    assert any("3 tensors were rounded to the 4 bits" in n for n in report.notes)
    tensors = {
        n: open_checkpoint(tmp_path / n).tensors["model.embed_tokens.weight"].read()
        for n in ("base", "fused")
    }
    assert not np.array_equal(tensors["base"], tensors["fused"])


def test_bfloat16_is_rounded_once(tmp_path):
    write_model(tmp_path / "source", LLAMA, dtype="BF16")
    to_mlx(tmp_path / "source", tmp_path / "base", check=False)
    adapter = adapter_for(tmp_path / "base")
    save(tmp_path / "adapter", adapter, tmp_path / "base")
    fuse(tmp_path / "adapter", tmp_path / "wide", dtype="float32", check=False)
    fuse(tmp_path / "adapter", tmp_path / "narrow", check=False)
    name = next(iter(adapter.modules)) + ".weight"
    wide = open_checkpoint(tmp_path / "wide").tensors[name]
    narrow = open_checkpoint(tmp_path / "narrow").tensors[name]
    assert (wide.dtype, narrow.dtype) == ("F32", "BF16")
    want = np.array(mx.array(wide.read()).astype(mx.bfloat16).astype(mx.float32))
    assert np.array_equal(to_float32(narrow.read(), "BF16"), want)


def test_a_run_knows_its_base_stages_and_document(base, tmp_path):
    run = tmp_path / "run"
    save(run / "adapter", adapter_for(base), "elsewhere")
    (run / "recipe.yaml").write_text(f"model: {{base: {base}}}\nstages: [{{stage: cpt}}, {{stage: sft}}]\n")
    (run / "environment.json").write_text(json.dumps({"document": {"name": "rules", "sha256": "ab12"}}))
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(ConversionError, match="pass --merge"):
        to_hf(run, tmp_path / "hf")
    report = to_hf(run, tmp_path / "hf", merge=True)
    assert {k: v for k, v in report.errors.items() if "transformers" not in k and v > 1e-5} == {}
    card = (tmp_path / "hf" / "README.md").read_text()
    for piece in (str(base), "cpt, sft", "rules", "ab12", "license: mit", "rank 2"):
        assert piece in card
    assert (tmp_path / "hf" / "tokenizer.json").exists()


def test_the_adapter_of_a_stage_knows_its_run(base, tmp_path):
    run = tmp_path / "my run"
    save(run / "stages" / "1-cpt" / "adapter", adapter_for(base), "elsewhere")
    (run / "environment.json").write_text("{}")
    (run / "recipe.yaml").write_text(
        f"model: {base}\ndata: {{benchmark: clevr_policy, depth: 1, train: 2, test: 0}}\n"
        "stages: [{stage: cpt, steps: 1}, {stage: sft, steps: 1}]\n"
    )
    resolved = load_recipe(run / "recipe.yaml")
    (run / "recipe.yaml").write_text(resolved.to_yaml())
    said = r"is not finished: `mpi-mlx train '.*/my run' --resume`, or give the adapter of its last stage, .*1-cpt"
    with pytest.raises(ConversionError, match=said):
        fuse(run, tmp_path / "fused")
    fuse(run / "stages" / "1-cpt" / "adapter", tmp_path / "fused", check=False)
    card = (tmp_path / "fused" / "README.md").read_text()
    # the run recorded no document: it is the one of its recipe's data
    document = load_dataset(resolved.data, tmp_path).document
    assert str(base) in card and "| Stages | cpt |" in card
    assert f"{document.name} (sha256 `{document.sha256}`)" in card


def test_a_project_is_no_run(base, tmp_path):
    """A recipe beside an adapter folder may be of another base; the adapter's own word counts."""
    (tmp_path / "recipe.yaml").write_text("model: embedded:tiny\nstages: [{stage: cpt}]\n")
    save(tmp_path / "adapter", adapter_for(base), base)
    fuse(tmp_path / "adapter", tmp_path / "fused", check=False)
    card = (tmp_path / "fused" / "README.md").read_text()
    assert str(base) in card and "Stages" not in card


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("config", [LLAMA, QWEN_VL], ids=["llama", "qwen2_5_vl"])
def test_mlx_to_peft_and_back_is_bit_exact(tmp_path, config, dora):
    write_model(tmp_path / "base", config, dtype="F32")
    row = fam.family_of(config)
    save(tmp_path / "adapter", adapter_for(tmp_path / "base", dora=dora), tmp_path / "base", row)
    to_peft(tmp_path / "adapter", tmp_path / "peft", base=tmp_path / "base", check=False)
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["use_dora"]) == (2, 3, dora)
    names = set(read_header(tmp_path / "peft" / "adapter_model.safetensors")[0])
    middle = "model.layers" if config is LLAMA else "model.language_model.layers"
    assert f"base_model.model.{middle}.0.self_attn.q_proj.lora_A.weight" in names
    from_peft(tmp_path / "peft", tmp_path / "again", base=tmp_path / "base", check=False)
    one, two = (read_header(tmp_path / n / "adapters.safetensors")[0] for n in ("adapter", "again"))
    assert set(one) == set(two)
    assert all(np.array_equal(one[n].read(), two[n].read()) for n in one)
    configs = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("adapter", "again")]
    assert configs[0]["lora_parameters"] == configs[1]["lora_parameters"]


def test_targets_are_suffixes_only_where_they_hit_the_same_linears(tmp_path):
    write_model(tmp_path / "base", QWEN_VL, dtype="F32")
    row = fam.FAMILIES["qwen2_5_vl"]

    def targets(names):
        folder = tmp_path / "-".join(names)
        save(folder, adapter_for(tmp_path / "base", names), tmp_path / "base", row)
        to_peft(folder, folder / "peft", base=tmp_path / "base", check=False)
        return json.loads((folder / "peft" / "adapter_config.json").read_text())["target_modules"]

    assert targets(["q_proj", "v_proj"]) == ["q_proj", "v_proj"]
    # the vision tower has down_proj too: a suffix would adapt it as well
    assert targets(["down_proj"]) == [f"model.language_model.layers.{i}.mlp.down_proj" for i in (0, 1)]


def test_rslora_keeps_its_kind(base, tmp_path):
    adapter = adapter_for(base, scale=3.0)
    adapter.kind = "rslora"
    save(tmp_path / "adapter", adapter, base)
    own = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["mpi_mlx"]
    assert own["kind"] == "rslora" and own["alpha"] == pytest.approx(3 * math.sqrt(2))
    to_peft(tmp_path / "adapter", tmp_path / "peft", base=base, check=False)
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert written["use_rslora"] and written["lora_alpha"] == pytest.approx(3 * math.sqrt(2))


def test_tensors_that_differ_from_the_base_become_saved_modules(base, tmp_path):
    """The way back of from-peft's modules_to_save: the run's base holds them, --base does not."""
    changed = tmp_path / "changed"
    changed.mkdir()
    weights = dict(mx.load(str(base / "model.safetensors")))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    mx.save_safetensors(str(changed / "model.safetensors"), weights, metadata={"format": "pt"})
    (changed / "config.json").write_text((base / "config.json").read_text())
    save(tmp_path / "adapter", adapter_for(base), changed)
    to_peft(tmp_path / "adapter", tmp_path / "peft", base=base, check=False)
    names = read_header(tmp_path / "peft" / "adapter_model.safetensors")[0]
    assert "base_model.model.model.norm.weight" in names
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.norm"]
    report = from_peft(tmp_path / "peft", tmp_path / "back", base=base)
    assert any("load the adapter on that base" in n for n in report.notes)
    got = open_checkpoint(tmp_path / "back" / "model").tensors["model.norm.weight"].read()
    assert np.array_equal(got, np.array(weights["model.norm.weight"]))
    own = json.loads((tmp_path / "back" / "adapter_config.json").read_text())["mpi_mlx"]
    assert own["base"] == str(tmp_path / "back" / "model")


# --- refusals ----------------------------------------------------------------------------------------------


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    write_model(tmp_path / "other", {**WIDE, "num_hidden_layers": 3}, dtype="F32")
    save(tmp_path / "adapter", adapter_for(tmp_path / "other"), tmp_path / "other")
    with pytest.raises(ConversionError, match="the base has"):
        fuse(tmp_path / "adapter", tmp_path / "fused", base=base)
    save(tmp_path / "deep", adapter_for(tmp_path / "other", layers=[2]), "elsewhere")
    with pytest.raises(ConversionError, match="was trained on .*other, whose .* the base has not"):
        to_peft(tmp_path / "adapter", tmp_path / "peft", base=base)
    with pytest.raises(ConversionError, match="adapts model.layers.2.*which the base does not have"):
        to_peft(tmp_path / "deep", tmp_path / "peft", base=base)
    assert not (tmp_path / "fused").exists() and not (tmp_path / "peft").exists()


def test_folders_that_are_no_adapters(base, tmp_path):
    with pytest.raises(ConversionError, match="is it a run"):
        fuse(base, tmp_path / "x")
    write_model(tmp_path / "whole" / "model", LLAMA)
    with pytest.raises(ConversionError, match="trained a whole model, no adapter: it is in .*whole/model"):
        fuse(tmp_path / "whole", tmp_path / "x")
    folder = save(tmp_path / "adapter", adapter_for(base), base)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "fine_tune_type": "full"}))
    with pytest.raises(ConversionError, match="of kind 'full'"):
        fuse(folder, tmp_path / "x")
    (folder / "adapter_config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "mpi_mlx"})
    )
    with pytest.raises(ConversionError, match="pass --base"):
        fuse(folder, tmp_path / "x")
    (tmp_path / "peft").mkdir()
    write_peft_adapter(tmp_path / "peft", adapter_for(base), ROW, {}, str(base))
    with pytest.raises(ConversionError, match="use `mpi-mlx convert from-peft` first"):
        fuse(tmp_path / "peft", tmp_path / "x")


def test_half_an_adapter_is_refused(base, tmp_path):
    folder = save(tmp_path / "adapter", adapter_for(base), base)
    weights = dict(mx.load(str(folder / "adapters.safetensors")))
    gone = "model.layers.1.mlp.down_proj.lora_b"
    del weights[gone]
    mx.eval(weights)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    with pytest.raises(ConversionError, match="no model.layers.1.mlp.down_proj.lora_b"):
        read_mlx_adapter(folder, ROW)
    weights = {"model.layers.0.odd.lora_q": mx.zeros((2, 2)), "nonsense": mx.zeros(1)}
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    with pytest.raises(ConversionError, match="nonsense of .* has no place in llama's table"):
        read_mlx_adapter(folder, ROW)


def test_a_pickled_peft_adapter_is_refused(base, tmp_path):
    (tmp_path / "peft").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "peft" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ConversionError, match="adapter_model.bin is pickled"):
        from_peft(tmp_path / "peft", tmp_path / "x", base=base)


def test_our_trainers_adapter_is_read(base):
    """What models.adapters writes for a text-only model and what is read here agree."""
    from mpi_mlx.models.adapters import _relative_keys

    names = [f"model.layers.{i}.{k}" for i in (0, 1) for k in ("mlp.down_proj", "self_attn.q_proj")]
    ours = _relative_keys(names, SimpleNamespace(num_layers=2))
    assert (sorted(ours[0]), ours[1]) == (["mlp.down_proj", "self_attn.q_proj"], 2)
