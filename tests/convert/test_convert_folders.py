"""Destinations: what --overwrite replaces and what it never deletes, and what is left after a failure or a kill."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hand_made import LLAMA, write_model

from mpi_mlx.convert import folders
from mpi_mlx.convert.adapters import Adapter, LowRank, write_mlx_adapter
from mpi_mlx.convert.families import FAMILIES
from mpi_mlx.convert.folders import staged
from mpi_mlx.convert.fuse import fuse
from mpi_mlx.convert.gguf_folder import from_gguf
from mpi_mlx.convert.peft import from_peft, to_peft
from mpi_mlx.convert.weights import to_hf, to_mlx
from mpi_mlx.errors import ConversionError


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def model_folder(path, text="old"):
    """Something that looks like what a conversion wrote."""
    path.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (path / name).write_text(text)
    return path


def write_new(path, **options):
    with staged(path, **options) as work:
        (work / "config.json").write_text("new")


def test_what_a_conversion_wrote_is_overwritten(tmp_path):
    write_new(model_folder(tmp_path / "out"), overwrite=True)
    assert tree(tmp_path) == {"out/config.json": b"new"}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text("old")
    write_new(adapter, overwrite=True)
    assert tree(adapter) == {"config.json": b"new"}


RUN = "is a run, it has {}, so --overwrite does not delete it: choose another DST"
OTHERS = {
    "thesis.tex": "is no model or adapter folder, so --overwrite does not delete it: choose another DST",
    "config.json": "is no model or adapter folder",
    "model.safetensors": "is no model or adapter folder",
    "recipe.yaml": RUN.format("recipe.yaml"),
    "progress.json": RUN.format("progress.json"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_conversion_is_never_deleted(tmp_path, name):
    out = model_folder(tmp_path / "out") if OTHERS[name].startswith("is a run") else tmp_path / "out"
    out.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(ConversionError, match=OTHERS[name]):
        write_new(out, overwrite=True)
    assert tree(tmp_path) == before


def sources(root):
    """A base, an MLX adapter on it and the same as a PEFT adapter, each in a folder of its own."""
    base, adapter, peft = root / "base", root / "a" / "adapter", root / "p" / "peft"
    write_model(base, LLAMA)
    low = LowRank(np.ones((2, 32), np.float32), np.ones((32, 2), np.float32), 1.0)
    made = Adapter("lora", 2, 1.0, 0.0, {"model.layers.0.self_attn.q_proj": low})
    adapter.mkdir(parents=True)
    write_mlx_adapter(adapter, made, FAMILIES["llama"], 2, str(base))
    to_peft(adapter, peft, base=base, check=False)
    return base, adapter, peft


COMMANDS = ["to-mlx", "to-hf", "to-hf --base", "to-hf --merge", "from-peft", "from-peft --base", "to-peft",
            "to-peft --base", "fuse", "fuse --base"]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("above", [False, True])
def test_no_command_deletes_what_it_reads(tmp_path, command, above):
    base, adapter, peft = sources(tmp_path)
    other = shutil.copytree(base, tmp_path / "other" / "model")
    options = {"check": False, "overwrite": True}
    call, source = {
        "to-mlx": (lambda d: to_mlx(other, d, **options), other),
        "to-hf": (lambda d: to_hf(other, d, **options), other),
        "to-hf --base": (lambda d: to_hf(base, d, base=other, **options), other),
        "to-hf --merge": (lambda d: to_hf(adapter, d, merge=True, base=base, **options), adapter),
        "from-peft": (lambda d: from_peft(peft, d, base=base, **options), peft),
        "from-peft --base": (lambda d: from_peft(peft, d, base=other, **options), other),
        "to-peft": (lambda d: to_peft(adapter, d, base=base, **options), adapter),
        "to-peft --base": (lambda d: to_peft(adapter, d, base=other, **options), other),
        "fuse": (lambda d: fuse(adapter, d, base=base, **options), adapter),
        "fuse --base": (lambda d: fuse(adapter, d, base=other, **options), other),
    }[command]
    final = source.parent if above else source
    if above:
        for name in ("config.json", "model.safetensors"):
            (final / name).write_text("{}")
    before = tree(tmp_path)
    with pytest.raises(ConversionError, match=f"{final} holds {source}, which the result is made from: choose"):
        call(final)
    assert tree(tmp_path) == before


def test_the_base_an_adapter_was_trained_on_is_kept_too(tmp_path):
    base, adapter, _ = sources(tmp_path)
    other = shutil.copytree(base, tmp_path / "other")
    with pytest.raises(ConversionError, match=f"{base} holds {base}, which the result"):
        to_peft(adapter, base, base=other, check=False, overwrite=True)


def test_a_gguf_file_is_kept(tmp_path):
    from test_convert_gguf import model as write_gguf_model

    path, _ = write_gguf_model(model_folder(tmp_path / "out"), "F32")
    with pytest.raises(ConversionError, match=f"{tmp_path / 'out'} holds {path}, which the result is made from"):
        from_gguf(path, tmp_path / "out", check=False, overwrite=True)
    assert path.is_file()


def test_links_into_the_destination_count_as_sources(tmp_path):
    source, out = tmp_path / "source", model_folder(tmp_path / "out")
    source.mkdir()
    (source / "model.safetensors").symlink_to(out / "model.safetensors")
    with pytest.raises(ConversionError, match="which the result is made from"):
        write_new(out, overwrite=True, sources=[source])


def test_a_result_may_lie_inside_its_source(tmp_path):
    source = model_folder(tmp_path / "run")
    write_new(source / "fused", sources=[source])
    write_new(model_folder(source / "again"), sources=[source], overwrite=True)
    assert tree(source)["again/config.json"] == b"new"


def test_a_link_stands_for_where_it_points(tmp_path):
    real = model_folder(tmp_path / "disk" / "real")
    (tmp_path / "out").symlink_to(real)
    (tmp_path / "fresh").symlink_to(tmp_path / "disk" / "fresh")
    write_new(tmp_path / "out", overwrite=True)
    write_new(tmp_path / "fresh")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "fresh").is_symlink()
    assert tree(tmp_path / "disk") == {"real/config.json": b"new", "fresh/config.json": b"new"}
    assert not [p for p in tmp_path.rglob(".*")]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_not_replaced(tmp_path, overwrite):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConversionError, match="out is a file: choose another DST"):
        write_new(tmp_path / "out", overwrite=overwrite)
    with pytest.raises(ConversionError, match=r"out/x/y cannot be made \(Not a directory\): choose another DST"):
        write_new(tmp_path / "out" / "x" / "y", overwrite=overwrite)
    assert tree(tmp_path) == {"out": b"mine"}


def test_a_failure_leaves_no_folders_that_it_made(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "mine" / "new" / "deep" / "out"):
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.rglob("*")] == ["mine"]


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch):
    out = model_folder(tmp_path / "out")
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".partial"):
            raise OSError("disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk"):
        write_new(out, overwrite=True)
    assert tree(tmp_path) == {"out/config.json": b"old", "out/model.safetensors": b"old"}


@pytest.mark.parametrize("done", [False, True])
def test_a_kill_between_the_renames_loses_nothing(tmp_path, done):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    model_folder(tmp_path / f".out.{dead.pid}.old")
    if done:  # killed after the second rename: the old folder is a remainder
        model_folder(tmp_path / "out", "newer")
    with pytest.raises(ConversionError, match="out exists"):
        write_new(tmp_path / "out")
    text = b"newer" if done else b"old"
    assert tree(tmp_path) == {"out/config.json": text, "out/model.safetensors": text}


def test_the_old_folder_of_a_conversion_that_runs_is_left_alone(tmp_path):
    model_folder(tmp_path / f".out.{os.getppid()}.old")
    write_new(tmp_path / "out")
    assert (tmp_path / f".out.{os.getppid()}.old").is_dir()


def test_named_chat_templates_are_copied(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (source / "tokenizer.json").write_text(json.dumps({}))
    out.mkdir()
    assert folders.copy_companions(source, out) == ["tokenizer.json", "additional_chat_templates/tool_use.jinja"]
    assert tree(out) == tree(source)
