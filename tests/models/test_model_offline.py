"""A model in a folder is loaded without a word to the hub, whatever the folder is called."""

import json
import shutil
import socket

import huggingface_hub
import pytest
from huggingface_hub import constants

from mpi_mlx.models import load_model

METHODS = ("model_info", "repo_info", "list_repo_files", "list_repo_tree", "file_exists", "snapshot_download")


@pytest.fixture
def asked(monkeypatch):
    """What the hub was asked; asking it fails, as without a network."""
    asked = []

    def ask(name):
        def refuse(*arguments, **options):
            asked.append((name, arguments[1:], options))
            raise OSError("no network in this test")

        return refuse

    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in METHODS:
        monkeypatch.setattr(huggingface_hub.HfApi, name, ask(name))
    monkeypatch.setattr(socket, "getaddrinfo", ask("getaddrinfo"))  # whatever library it is that asks
    return asked


def enlarge_vocabulary(folder):
    """transformers looks a tokenizer of more than 100,000 tokens up, as every Qwen's is: is it Mistral's?"""
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    first = len(raw["model"]["vocab"]) + len(raw["added_tokens"])
    raw["model"]["vocab"] |= {f"never{n}": first + n for n in range(100_001)}
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("many", [False, True], ids=["few tokens", "many tokens"])
def test_a_relative_folder_named_like_a_hub_id(qwen_folder, tmp_path, monkeypatch, asked, many):
    folder = tmp_path / "owner" / "name"
    shutil.copytree(qwen_folder, folder)
    if many:
        enlarge_vocabulary(folder)
    monkeypatch.chdir(tmp_path)
    model = load_model("owner/name")
    assert asked == []
    assert model.base == "owner/name" and model.path == folder
    assert len(model.tokenizer) > 100_000 or not many
    assert "red" in model.decode(model.encode([{"role": "user", "content": "red"}]).ids)


def test_the_hub_is_asked_for_what_is_no_folder(tmp_path, monkeypatch, asked):
    """So that the test above can fail."""
    from mpi_mlx.errors import ModelError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="owner/name is not a local folder and the hub cannot be reached"):
        load_model("owner/name")
    assert asked
