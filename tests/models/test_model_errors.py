"""Folders that cannot be loaded: one clear line each."""

import json
import shutil
import sys

import mlx.core as mx
import pytest
from family_checkpoints import write_text
from mlx.utils import tree_flatten

from mpi_mlx.errors import ModelError
from mpi_mlx.models import load_model
from mpi_mlx.models.folders import check_safetensors, only_files, weight_files


@pytest.fixture()
def folder(qwen_folder, tmp_path):
    return shutil.copytree(qwen_folder, tmp_path / "model")


def refuse(base, words, **options):
    with pytest.raises(ModelError, match=words) as error:
        load_model(base, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


def edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_no_config(folder):
    (folder / "config.json").unlink()
    refuse(folder, "no config.json")


def test_broken_config(folder):
    (folder / "config.json").write_text("{")
    refuse(folder, "broken JSON")


def test_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, r"no weights .*pytorch_model.bin is not read")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuse(folder, "model.safetensors is truncated")


def test_whole_weights_pass(folder):
    assert "language_model.model.norm.weight" in check_safetensors(folder / "model.safetensors")


def write_index(folder, *shards):
    weight_map = {f"tensor{i}": name for i, name in enumerate(shards)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_missing_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-2.safetensors")
    write_index(folder, "model-1.safetensors", "model-2.safetensors")
    refuse(folder, "lacks model-1.safetensors .1 of 2")


def norm(base):
    return load_model(base, dtype="float32").net.language_model.model.norm.weight


def write_other(folder, name):
    """A copy of the weights whose last norm is another."""
    weights = dict(mx.load(str(folder / "model.safetensors")))
    weights["language_model.model.norm.weight"] = weights["language_model.model.norm.weight"] + 5
    mx.save_safetensors(str(folder / name), weights, {"format": "mlx"})


def test_a_whole_file_beside_the_index_of_shards_that_are_gone(folder, qwen_folder):
    write_index(folder, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert mx.array_equal(norm(folder), norm(qwen_folder))


@pytest.mark.parametrize("indexed", [True, False])
def test_a_whole_file_and_shards_are_two_checkpoints(folder, indexed):
    write_other(folder, "model-00001-of-00001.safetensors")
    if indexed:
        write_index(folder, "model-00001-of-00001.safetensors")
    refuse(folder, "two checkpoints, model.safetensors and the shards model-00001-of-00001.safetensors; delete")


def parameters(base):
    return dict(tree_flatten(load_model(base, dtype="float32").net.parameters()))


def test_only_the_checkpoints_own_files_are_read(folder, qwen_folder, tmp_path):
    """mlx-vlm reads every safetensors file, mlx-lm every model*.safetensors, in no order: some may lie beside."""
    for i in range(4):
        write_other(folder, f"adapters{i}.safetensors")
    assert mx.array_equal(norm(folder), norm(qwen_folder))
    with only_files(folder, weight_files(folder)) as place:
        assert [p.name for p in place.glob("*.safetensors")] == ["model.safetensors"]
        assert (place / "config.json").is_file()
    assert not place.exists()
    text = write_text(tmp_path / "text", "llama")
    wanted, weights = parameters(text), dict(mx.load(str(text / "model.safetensors")))
    (text / "model.safetensors").rename(text / "model-00001-of-00001.safetensors")
    write_index(text, "model-00001-of-00001.safetensors")
    for i in range(4):
        mx.save_safetensors(str(text / f"model_{i}.safetensors"), {k: v + 5 for k, v in weights.items()})
    assert all(mx.array_equal(value, wanted[name]).item() for name, value in parameters(text).items())


def test_missing_tensor(folder):
    path = folder / "model.safetensors"
    weights = dict(mx.load(str(path)))
    weights.pop("language_model.model.norm.weight")
    mx.save_safetensors(str(path), weights)
    refuse(folder, "language_model.model.norm.weight")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "nonesuch", "vision_config": None}, "'nonesuch' is unknown"),
        ({"model_type": "moondream9"}, "vision-language family 'moondream9' is not supported"),
        ({"model_type": None}, "no model_type"),
        ({"model_file": "evil.py"}, "own Python code"),
        ({"hidden_size": None}, "qwen2_5_vl"),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 1e6}}, "mpi-mlx convert"),
    ],
)
def test_config_that_cannot_be_built(folder, changes, words):
    edit(folder, **changes)
    refuse(folder, words)


def test_code_of_a_checkpoint_is_never_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    edit(
        folder, model_file="evil.py", auto_map={"AutoModel": "evil.Model", "AutoProcessor": "evil.Processor"}
    )
    refuse(folder, "own Python code")
    assert "evil" not in sys.modules


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    refuse(folder, "processor does not load")


def test_no_chat_template(folder):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template")
    path.write_text(json.dumps(config))
    refuse(folder, "no chat template")


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    refuse(tmp_path / "nowhere", "neither a folder nor a hub id")
    refuse("embedded:huge", "no embedded model")
    (tmp_path / "file").write_text("")
    refuse(tmp_path / "file", "is a file")


@pytest.mark.parametrize(
    "error, words",
    [(ConnectionError("no route"), "cannot be reached"), (TimeoutError(), "cannot be reached")],
)
def test_hub_without_network(monkeypatch, error, words):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refuse("owner/name", "owner/name is not a local folder and the hub " + words)
