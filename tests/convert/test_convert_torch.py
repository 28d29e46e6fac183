"""Against transformers itself: every family, tied and untied, both ways, layouts of transformers 4 and 5."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from hf_layouts import as_version_4  # noqa: E402

from mpi_mlx.convert import specimens as hf_models  # noqa: E402
from mpi_mlx.convert import torch_side  # noqa: E402
from mpi_mlx.convert.shards import open_checkpoint  # noqa: E402
from mpi_mlx.convert.specimens import as_mlx_saves  # noqa: E402
from mpi_mlx.convert.table import TIED_ONLY  # noqa: E402
from mpi_mlx.convert.weights import to_hf, to_mlx  # noqa: E402
from mpi_mlx.errors import ConversionError  # noqa: E402
from mpi_mlx.models import probe  # noqa: E402

CASES = [
    pytest.param(kind, tied, id=f"{kind}-{'tied' if tied else 'untied'}")
    for kind in hf_models.FAMILIES
    for tied in (True, False)
    if tied or kind not in TIED_ONLY
]
ONE_EACH = [k for k in hf_models.FAMILIES if k not in ("llava-llama", "paligemma2")]


def allowed(kind, name):
    """internvl: mlx-vlm's vision tower has the tanh GELU, transformers the exact one."""
    return 5e-4 if kind == "internvl" and "image" in name and "after" not in name else 1e-5


def compare(kind, errors):
    assert errors
    for name, error in errors.items():
        assert error <= allowed(kind, name), f"{name}: {error:.1e}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Build and save each tiny checkpoint once; gives (folder, torch logits by probe)."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("hf")
    made = {}

    def get(kind, tied):
        if (kind, tied) not in made:
            folder = root / f"{kind}-{tied}"
            hf_models.build(kind, tied).save_pretrained(folder)
            config = probe.read_config(folder)
            model, info = torch_side.load_torch(folder)
            assert not info["missing_keys"] and not info["unexpected_keys"]
            made[kind, tied] = folder, torch_side.torch_logits(model, config, probe.probe_inputs(config))
        return made[kind, tied]

    return get


def mlx_errors(folder, reference):
    """Errors of mlx on a folder against known logits, by probe."""
    config = probe.read_config(folder)
    probes = probe.probe_inputs(config)
    ours = probe.mlx_logits(probe.load_net(folder), config, probes)
    return {p.name: probe.relative_error(a, b) for p, a, b in zip(probes, ours, reference, strict=True)}


def torch_errors(folder, reference):
    """Errors of transformers on a folder, which must load with no key missing, unexpected or mismatched."""
    model, info = torch_side.load_torch(folder)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), (
        info
    )
    config = probe.read_config(folder)
    probes = probe.probe_inputs(config)
    ours = torch_side.torch_logits(model, config, probes)
    return {p.name: probe.relative_error(a, b) for p, a, b in zip(probes, ours, reference, strict=True)}


@pytest.mark.parametrize("kind, tied", CASES)
def test_to_mlx_runs_the_same_in_both(saved, tmp_path, kind, tied):
    source, logits = saved(kind, tied)
    to_mlx(source, tmp_path / "mlx", check=False)
    errors = mlx_errors(tmp_path / "mlx", logits)
    text_only = kind in probe.TEXT_ONLY
    assert set(errors) >= ({"text"} if text_only else {"text", "image", "text after image"})
    compare(kind, errors)
    # one folder serves both sides
    assert max(torch_errors(tmp_path / "mlx", logits).values()) == 0.0


@pytest.mark.parametrize("kind, tied", CASES)
def test_to_hf_of_a_trained_mlx_folder(saved, tmp_path, kind, tied):
    """MLX saves changed weights under its own names; transformers then gives MLX's logits."""
    source, _ = saved(kind, tied)
    to_mlx(source, tmp_path / "mlx", check=False)
    trained, net = as_mlx_saves(tmp_path / "mlx", tmp_path / "trained", noise=0.05)
    report = to_hf(trained, tmp_path / "hf", check=False)
    config = probe.read_config(tmp_path / "hf")
    probes = probe.probe_inputs(config)
    errors = torch_errors(tmp_path / "hf", probe.mlx_logits(net, config, probes))
    compare(kind, errors)
    assert report.tensors == len(open_checkpoint(tmp_path / "hf").tensors)


@pytest.mark.parametrize("kind", ["gemma3", "smolvlm"])
def test_a_head_that_diverged_from_a_tied_embedding(saved, tmp_path, kind):
    """MLX keeps a separate head for tied gemma3 and smolvlm; training moves it apart: the export unties."""
    source, _ = saved(kind, True)
    to_mlx(source, tmp_path / "mlx", check=False)
    folder, net = as_mlx_saves(tmp_path / "mlx", tmp_path / "trained", noise=0.05)
    config = json.loads((folder / "config.json").read_text())
    if kind == "gemma3":
        with pytest.raises(ConversionError, match="gemma3 with tie_word_embeddings = False"):
            to_mlx(folder, tmp_path / "again", check=False)
    report = to_hf(folder, tmp_path / "hf", check=False)
    assert any("tie_word_embeddings is now false" in n for n in report.notes)
    assert any("cannot load the result back" in n for n in report.notes) == (kind == "gemma3")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False and written["text_config"]["tie_word_embeddings"] is False
    probes = probe.probe_inputs(config)
    compare(kind, torch_errors(tmp_path / "hf", probe.mlx_logits(net, config, probes)))


@pytest.mark.parametrize("in_memory_names", [False, True], ids=["4.49", "4.57 state dict"])
@pytest.mark.parametrize("kind", [*ONE_EACH, "paligemma2"])
def test_layouts_of_transformers_4(saved, tmp_path, kind, in_memory_names):
    source, logits = saved(kind, kind in TIED_ONLY)
    old = as_version_4(source, tmp_path / "old", in_memory_names=in_memory_names)
    to_mlx(old, tmp_path / "mlx", check=False)
    compare(kind, mlx_errors(tmp_path / "mlx", logits))
    assert max(torch_errors(tmp_path / "mlx", logits).values()) == 0.0


@pytest.mark.parametrize("kind, tied", CASES)
def test_round_trip_is_bit_exact_in_bfloat16(tmp_path, kind, tied):
    """HF -> MLX -> saved by MLX -> HF: every tensor keeps its bits (qwen3_5's norms from the source)."""
    model = hf_models.build(kind, tied).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    to_mlx(tmp_path / "source", tmp_path / "mlx", check=False)
    saved, _ = as_mlx_saves(tmp_path / "mlx", tmp_path / "saved")
    to_hf(saved, tmp_path / "back", check=False, base=tmp_path / "source", shard_bytes=60_000)
    again, info = torch_side.load_torch(tmp_path / "back", dtype="bfloat16")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before, after = model.state_dict(), again.state_dict()
    assert set(before) == set(after)
    wrong = [k for k in before if not torch.equal(before[k].view(torch.uint8), after[k].view(torch.uint8))]
    assert not wrong


def test_qwen3_5_norms_round_without_the_source(tmp_path):
    """Why the source is asked for: plus one and minus one in bfloat16 lose bits."""
    model = hf_models.build("qwen3_5").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    to_mlx(tmp_path / "source", tmp_path / "mlx", check=False)
    saved, _ = as_mlx_saves(tmp_path / "mlx", tmp_path / "saved")
    to_hf(saved, tmp_path / "back", check=False)
    before, after = (open_checkpoint(tmp_path / n).tensors for n in ("source", "back"))
    wrong = {n.split(".")[-2] for n in before if not np.array_equal(before[n].read(), after[n].read())}
    assert wrong <= {"input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm"} and wrong


def test_the_check_compares_torch_with_mlx(saved, tmp_path):
    source, _ = saved("qwen2_5_vl", True)
    report = to_mlx(source, tmp_path / "mlx")
    assert len(report.errors) == 4 and all("transformers on the source" in k for k in report.errors)
    assert report.worst < 1e-5
    assert any("largest relative error" in line for line in report.lines())
    back = to_hf(tmp_path / "mlx", tmp_path / "hf")
    assert any("transformers on the result" in k for k in back.errors) and back.worst < 1e-5


def config_change(kind, change):
    """A config that MLX would misread, made from a good one."""
    model = hf_models.build(kind, kind in TIED_ONLY)
    config = json.loads(model.config.to_json_string())
    change(config)
    return config


REFUSED = [
    ("smolvlm", lambda c: c["text_config"]["rope_parameters"].update(rope_type="linear", factor=2.0),
     "smolvlm with rope scaling 'linear'"),
    ("idefics3", lambda c: c["text_config"].update(head_dim=32), "idefics3 with head_dim 32"),
    ("internvl", lambda c: c["text_config"].update(model_type="qwen2"),
     "internvl with text_config.model_type = 'qwen2'"),
    ("gemma3",
     lambda c: c["text_config"].update(layer_types=["full_attention"] * 2 + ["sliding_attention"] * 4),
     "gemma3 with layer_types"),
    ("gemma3", lambda c: c.update(tie_word_embeddings=False), "gemma3 with tie_word_embeddings = False"),
    ("paligemma", lambda c: c.update(tie_word_embeddings=False), "paligemma with tie_word_embeddings = False"),
    ("llava-llama", lambda c: c.update(vision_feature_layer=[-2, -1]),
     "llava with several vision_feature_layer"),
    ("llava-llama", lambda c: c["text_config"]["rope_parameters"].update(rope_type="dynamic", factor=2.0),
     "llava with rope scaling 'dynamic'"),
    ("qwen2", lambda c: c.update(use_sliding_window=True, sliding_window=8),
     "qwen2 with use_sliding_window = True"),
    ("qwen3_vl", lambda c: c["vision_config"]["rope_parameters"].update(rope_theta=5e5),
     "rope_theta = 500000.0"),
]  # fmt: skip


@pytest.mark.parametrize("kind, change, match", REFUSED, ids=[m.replace(" ", "-") for *_, m in REFUSED])
def test_what_mlx_would_ignore_is_refused(saved, tmp_path, kind, change, match):
    source, _ = saved(kind, kind in TIED_ONLY)
    config = json.loads((source / "config.json").read_text())
    change(config)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_text(json.dumps(config))
    (bad / "model.safetensors").symlink_to(source / "model.safetensors")
    with pytest.raises(ConversionError, match=match):
        to_mlx(bad, tmp_path / "mlx", check=False)


@pytest.mark.parametrize(
    "kind, scaling",
    [
        ("llama", dict(rope_type="linear", factor=3.0)),
        ("qwen2", dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)),
        ("qwen3", dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                       original_max_position_embeddings=64)),
        ("llava-llama", dict(rope_type="linear", factor=3.0)),
    ],
)  # fmt: skip
def test_rope_scaling_that_mlx_obeys(tmp_path, kind, scaling):
    model = hf_models.build(kind)
    text = getattr(model.config, "text_config", None) or model.config
    text.rope_parameters = {"rope_theta": 5000.0, **scaling}
    model.save_pretrained(tmp_path / "source")
    config = probe.read_config(tmp_path / "source")
    again, _ = torch_side.load_torch(tmp_path / "source")
    probes = probe.probe_inputs(config, length=40)
    to_mlx(tmp_path / "source", tmp_path / "mlx", check=False)
    net = probe.load_net(tmp_path / "mlx")
    ours = probe.mlx_logits(net, config, probes)
    plain = {**config}
    for a, b in zip(ours, torch_side.torch_logits(again, plain, probes), strict=True):
        assert probe.relative_error(a, b) < 1e-5
