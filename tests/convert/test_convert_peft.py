"""Against peft itself: adapters of each kind, both ways."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


from mpi_mlx.convert import specimens as hf_models  # noqa: E402
from mpi_mlx.convert import torch_side  # noqa: E402
from mpi_mlx.convert.fuse import fuse  # noqa: E402
from mpi_mlx.convert.peft import from_peft, to_peft  # noqa: E402
from mpi_mlx.convert.shards import open_checkpoint, read_header  # noqa: E402
from mpi_mlx.convert.weights import to_hf, to_mlx  # noqa: E402
from mpi_mlx.errors import ConversionError  # noqa: E402
from mpi_mlx.models import probe  # noqa: E402

PROJECTORS = {
    "qwen2_5_vl": "merger.mlp.2",
    "llava-llama": "multi_modal_projector",
    "smolvlm": "modality_projection.proj",
    "qwen3_vl": "visual.merger.linear_fc2",
}
KINDS = {
    "lora": dict(target_modules=["q_proj", "v_proj", "down_proj"]),
    "rslora": dict(target_modules=["q_proj", "up_proj"], use_rslora=True),
    "dora": dict(target_modules=["k_proj", "o_proj"], use_dora=True),
    "dora-rslora": dict(target_modules=["q_proj", "gate_proj"], use_dora=True, use_rslora=True),
    "all-linear": dict(target_modules="all-linear"),
    "patterns": dict(
        target_modules=["q_proj", "k_proj", "v_proj"],
        rank_pattern={"q_proj": 3, r"layers\.1\..*k_proj": 8},
        alpha_pattern={"v_proj": 5, r"layers\.0\..*q_proj": 7},
    ),
    "patterns-dora-rslora": dict(
        target_modules=["q_proj", "k_proj"],
        rank_pattern={"q_proj": 3},
        alpha_pattern={"k_proj": 9},
        use_dora=True,
        use_rslora=True,
    ),
    "projector": dict(target_modules=["q_proj"], modules_to_save=["?"]),
}
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "smolvlm", "llava-llama", "llama")
# the rest of the families with one kind that touches everything
OTHERS = ("qwen2_vl", "qwen3_5", "idefics3", "llava_onevision", "internvl", "gemma3", "paligemma", "qwen2",
          "qwen3", "gemma3_text")  # fmt: skip
TIED_ONLY = {"gemma3", "paligemma"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(transformers folder, MLX folder) of a tiny model, made once."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("bases")
    made = {}

    def get(kind, tied=False):
        if (kind, tied) not in made:
            hf, mlx = root / f"{kind}-{tied}", root / f"{kind}-{tied}-mlx"
            hf_models.build(kind, tied).save_pretrained(hf)
            to_mlx(hf, mlx, check=False)
            made[kind, tied] = hf, mlx
        return made[kind, tied]

    return get


def adapt(base, folder, seed=0, **options):
    """A peft adapter with every tensor random, saved; returns the peft model."""
    model, _ = torch_side.load_torch(base)
    keys = {"r": 4, "lora_alpha": 6, **options}
    model = peft.get_peft_model(model, peft.LoraConfig(**keys))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                p.normal_(0, 0.15)
            elif "magnitude" in name:
                p.mul_(1 + 0.2 * torch.rand_like(p))
            elif "modules_to_save" in name:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


def torch_logits(base, model):
    config = probe.read_config(base)
    return torch_side.torch_logits(model, config, probe.probe_inputs(config))


def mlx_logits(mlx, adapter):
    config = probe.read_config(mlx)
    return probe.mlx_logits(probe.load_net(mlx, adapter=adapter), config, probe.probe_inputs(config))


def worst(ours, theirs):
    return max(probe.relative_error(a, b) for a, b in zip(ours, theirs, strict=True))


def options_of(kind, family):
    options = dict(KINDS[kind])
    if kind == "projector":
        options["modules_to_save"] = [PROJECTORS[family]]
    return options


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways(bases, tmp_path, family, kind):
    if kind == "projector" and family == "llama":
        pytest.skip("no projector")
    hf, mlx = bases(family)
    model = adapt(hf, tmp_path / "peft", **options_of(kind, family))
    reference = torch_logits(hf, model)
    assert worst(reference, torch_logits(hf, torch_side.load_torch(hf)[0])) > 0.05
    report = from_peft(tmp_path / "peft", tmp_path / "adapter", base=mlx, check=False)
    base = tmp_path / "adapter" / "model" if kind == "projector" else mlx
    assert worst(mlx_logits(base, tmp_path / "adapter"), reference) < 1e-5
    assert "adapted modules" in report.covered
    report = to_peft(tmp_path / "adapter", tmp_path / "back", base=hf, check=kind == "projector")
    assert kind != "projector" or (report.errors and report.worst < 1e-5)  # the source runs on its own base
    again = peft.PeftModel.from_pretrained(torch_side.load_torch(hf)[0], tmp_path / "back").eval()
    assert worst(torch_logits(hf, again), reference) < 1e-5
    if "patterns" not in kind:
        before, after = (read_header(tmp_path / n / "adapter_model.safetensors")[0] for n in ("peft", "back"))
        assert set(before) == set(after)
        assert all(np.array_equal(before[n].read(), after[n].read()) for n in before)


@pytest.mark.parametrize("family", OTHERS)
def test_the_other_families(bases, tmp_path, family):
    hf, mlx = bases(family, family in TIED_ONLY)
    model = adapt(hf, tmp_path / "peft", target_modules="all-linear")
    limit = 5e-4 if family == "internvl" else 2e-5 if family == "qwen3_5" else 1e-5
    report = from_peft(tmp_path / "peft", tmp_path / "adapter", base=mlx)
    assert report.worst < limit and len(report.errors) == len(probe.probe_inputs(probe.read_config(hf)))
    back = to_peft(tmp_path / "adapter", tmp_path / "back", base=mlx)
    assert back.worst < limit
    again = peft.PeftModel.from_pretrained(torch_side.load_torch(hf)[0], tmp_path / "back").eval()
    assert worst(torch_logits(hf, again), torch_logits(hf, model)) < 1e-6


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=str)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llama"])
def test_saved_heads_of_a_tied_model_untie_it(bases, tmp_path, family, saved):
    hf, mlx = bases(family, True)
    model = adapt(hf, tmp_path / "peft", target_modules=["q_proj"], modules_to_save=saved)
    reference = torch_logits(hf, model)
    report = from_peft(tmp_path / "peft", tmp_path / "adapter", base=mlx, check=False)
    assert any("tie_word_embeddings is now false" in n for n in report.notes)
    assert worst(mlx_logits(tmp_path / "adapter" / "model", tmp_path / "adapter"), reference) < 1e-5


def test_an_adapter_on_a_tied_head(bases, tmp_path):
    hf, mlx = bases("llama", True)
    model = adapt(hf, tmp_path / "peft", target_modules=["q_proj", "lm_head"])
    from_peft(tmp_path / "peft", tmp_path / "adapter", base=mlx, check=False)
    reference = torch_logits(hf, model)
    assert worst(mlx_logits(tmp_path / "adapter" / "model", tmp_path / "adapter"), reference) < 1e-5


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava-llama"])
def test_names_from_before_transformers_4_52(bases, tmp_path, family):
    """peft itself only warns about them and runs the bare base; here they are known."""
    from mpi_mlx.convert import families as fam

    hf, mlx = bases(family)
    model = adapt(hf, tmp_path / "peft", target_modules=["q_proj", "down_proj"])
    row = fam.family_of(probe.read_config(hf))
    tensors, _ = read_header(tmp_path / "peft" / "adapter_model.safetensors")
    from safetensors.numpy import save_file

    old = {}
    for name, tensor in tensors.items():
        module = name.removeprefix("base_model.model.").split(".lora_")[0]
        disk = fam.disk_name(row, module + ".weight").removesuffix(".weight")
        old[name.replace(module, disk)] = tensor.read()
    assert set(old) != set(tensors)
    save_file(old, tmp_path / "peft" / "adapter_model.safetensors")
    from_peft(tmp_path / "peft", tmp_path / "adapter", base=mlx, check=False)
    assert worst(mlx_logits(mlx, tmp_path / "adapter"), torch_logits(hf, model)) < 1e-5


@pytest.mark.parametrize("kind", ["lora", "dora", "patterns"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "llama"])
def test_fused_equals_pefts_merge(bases, tmp_path, family, kind):
    hf, mlx = bases(family)
    model = adapt(hf, tmp_path / "peft", **KINDS[kind])
    from_peft(tmp_path / "peft", tmp_path / "adapter", base=mlx, check=False)
    report = fuse(tmp_path / "adapter", tmp_path / "fused")
    assert report.worst < 1e-5
    assert worst(mlx_logits(tmp_path / "fused", None), torch_logits(hf, model)) < 1e-5
    merged = to_hf(tmp_path / "adapter", tmp_path / "hf", merge=True, base=mlx)
    assert merged.worst < 1e-5 and any("transformers" in k for k in merged.errors)
    ours, theirs = (
        torch_side.load_torch(tmp_path / "hf")[0].state_dict(),
        model.merge_and_unload().state_dict(),
    )
    assert set(ours) == set(theirs)
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-5) for k in ours)


REFUSED = [
    (dict(peft_type="ADALORA"), "of type ADALORA"),
    (dict(bias="all"), "trains biases"),
    (dict(lora_bias=True), "uses PEFT's lora_bias"),
    (dict(trainable_token_indices=[1]), "trainable_token_indices"),
    (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
]


@pytest.mark.parametrize("change, match", REFUSED, ids=[m for _, m in REFUSED])
def test_what_cannot_be_carried_is_refused(bases, tmp_path, change, match):
    hf, mlx = bases("llama")
    adapt(hf, tmp_path / "peft", target_modules=["q_proj"])
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConversionError, match=match):
        from_peft(tmp_path / "peft", tmp_path / "adapter", base=mlx, check=False)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "target, match",
    [("embed_tokens", "adapts the embedding"), ("patch_embed.proj", "adapts the convolution")],
)
def test_embeddings_and_convolutions_are_refused(bases, tmp_path, target, match):
    hf, mlx = bases("qwen2_5_vl")
    adapt(hf, tmp_path / "peft", target_modules=["q_proj", target])
    with pytest.raises(ConversionError, match=match):
        from_peft(tmp_path / "peft", tmp_path / "adapter", base=mlx, check=False)


def test_a_base_of_another_size_is_refused(bases, tmp_path):
    hf, _ = bases("llama")
    adapt(hf, tmp_path / "peft", target_modules=["q_proj"])
    _, other = bases("qwen3")
    with pytest.raises(ConversionError, match="fits model.layers.0.self_attn.q_proj of shape"):
        from_peft(tmp_path / "peft", tmp_path / "adapter", base=other, check=False)


def test_mlx_saved_modules_go_to_peft(bases, tmp_path):
    """mlx-vlm saves whole trained modules beside the adapters: PEFT has modules_to_save for them."""
    import mlx.core as mx

    hf, mlx = bases("llava-llama")
    adapt(hf, tmp_path / "peft", target_modules=["q_proj"])
    from_peft(tmp_path / "peft", tmp_path / "adapter", base=mlx, check=False)
    path = str(tmp_path / "adapter" / "adapters.safetensors")
    weights = dict(mx.load(path))
    for leaf in ("weight", "bias"):
        name = f"multi_modal_projector.linear_2.{leaf}"
        weights[name] = mx.array(open_checkpoint(mlx).tensors[name].read() * 1.5)
    mx.eval(weights)
    mx.save_safetensors(path, weights)
    to_peft(tmp_path / "adapter", tmp_path / "back", base=hf, check=False)
    again = peft.PeftModel.from_pretrained(torch_side.load_torch(hf)[0], tmp_path / "back").eval()
    assert worst(torch_logits(hf, again), mlx_logits(mlx, tmp_path / "adapter")) < 1e-5


@pytest.mark.parametrize("layout", ["saved by mlx", "saved by mlx, quantized", "tied smolvlm of transformers"])
def test_the_check_runs_whatever_the_layout_of_the_base(bases, tmp_path, layout):
    """Each library is given the base's weights in a layout that it loads right."""
    family = "smolvlm" if "smolvlm" in layout else "qwen2_5_vl"
    hf, mlx = bases(family, True)
    base = hf
    if "quantized" in layout:
        base = tmp_path / "base"
        to_mlx(hf, base, quantize=8, check=False)
        to_hf(base, tmp_path / "float", check=False)
        hf = tmp_path / "float"  # what the quantized weights stand for
    elif family == "qwen2_5_vl":
        base, _ = hf_models.as_mlx_saves(mlx, tmp_path / "base")
    model = adapt(hf, tmp_path / "peft", target_modules=["q_proj"])
    report = from_peft(tmp_path / "peft", tmp_path / "adapter", base=base)
    assert len(report.errors) == 4 and report.worst < 1e-5
    back = to_peft(tmp_path / "adapter", tmp_path / "back", base=base)
    assert len(back.errors) == 4 and back.worst < 1e-5
    assert fuse(tmp_path / "adapter", tmp_path / "fused").worst < 1e-5
    assert not [p for p in tmp_path.rglob(".*") if p.is_dir()]
    again = peft.PeftModel.from_pretrained(torch_side.load_torch(hf)[0], tmp_path / "back").eval()
    assert worst(torch_logits(hf, again), torch_logits(hf, model)) < 1e-6


def test_a_folder_that_mlx_saved_is_checked_in_mlx(bases, tmp_path):
    _, mlx = bases("qwen2_5_vl", True)
    saved, _ = hf_models.as_mlx_saves(mlx, tmp_path / "saved", noise=0.05)
    report = to_mlx(saved, tmp_path / "mlx")
    assert len(report.errors) == 4 and report.worst == 0.0 and all("mlx on the source" in k for k in report.errors)


def test_a_result_that_transformers_does_not_load_whole_is_not_written(bases, tmp_path, monkeypatch):
    _, mlx = bases("llama")
    load = torch_side.load_torch
    monkeypatch.setattr(torch_side, "load_torch", lambda f: (load(f)[0], {"missing_keys": {"model.norm.weight"}}))
    with pytest.raises(ConversionError, match="transformers on the result: .*model.norm.weight.*nothing was written"):
        to_hf(mlx, tmp_path / "hf")
    assert not list(tmp_path.iterdir())
