"""Sources and destinations: what a path holds, what is refused; folders appear whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mpi_mlx.errors import ConversionError, DeviceError, ModelError

# weights, and what is written anew, are not copied; remote code (*.py) is not carried on
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*",
           "additional_chat_templates/*.jinja")  # fmt: skip
_NOT_COPIED = {
    "config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
}
_OF_A_RUN = ("recipe.yaml", "progress.json", "environment.json")


def find_source(source: str | Path) -> Path:
    """A local folder (a run's model, if it trained one whole), ``embedded:NAME``, or a hub id (downloaded)."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        raise ConversionError(f"{path.name} is a GGUF file: use `mpi-mlx convert gguf {path} DST`")
    if (path / "recipe.yaml").is_file() and (path / "model" / "config.json").is_file():
        return path / "model"  # a run of pretrain stages: it trained the whole model
    if path.is_dir():
        return path
    from mpi_mlx.models.folders import resolve_base

    try:
        folder = resolve_base(str(source))
    except ModelError as e:
        raise ConversionError(str(e)) from None
    if not str(source).startswith("embedded:"):
        _fetch_license(str(source))
    return folder


def _fetch_license(repo: str) -> None:
    """The hub's card and license belong on the result's card; a repository may have neither."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(repo, allow_patterns=["README.md", "LICENSE*", "NOTICE*"])
    except Exception:  # the weights are here: a missing card stops nothing, and the result's card says so
        return


def refuse_other_formats(folder: Path) -> None:
    """Say what a folder without safetensors is, and the command that makes it one that can be read."""
    names = [p.name for p in folder.iterdir()]
    if any(n.endswith(".safetensors") for n in names) and (folder / "config.json").exists():
        return
    for at in _trainer_places(folder):
        if any(at.glob("model_world_size_*.pt")):
            raise ConversionError(
                f"{at} holds FSDP shards of verl or EasyR1; merge them first: `python -m verl.model_merger merge "
                f"--backend fsdp --local_dir {at} --target_dir MERGED` (EasyR1: `python3 scripts/model_merger.py "
                f"--local_dir {at}`, result in {at}/huggingface)"
            )
        if (at / "dist_ckpt").is_dir():
            raise ConversionError(
                f"{at} holds Megatron shards of verl; merge them first: `python -m verl.model_merger merge "
                f"--backend megatron --local_dir {at} --target_dir MERGED`"
            )
    if "zero_to_fp32.py" in names or any("optim_states.pt" in n for n in names):
        above = folder.absolute().parent  # DeepSpeed puts its script beside the folder of shards
        at = above if "zero_to_fp32.py" not in names and (above / "zero_to_fp32.py").is_file() else folder
        raise ConversionError(
            f"{folder} holds DeepSpeed ZeRO shards; merge them first: `cd {at} && python zero_to_fp32.py "
            ". MERGED --safe_serialization`, then put config.json and the tokenizer's files beside the result"
        )
    for path in [folder, *(p for p in folder.iterdir() if p.is_dir())]:
        if any(path.glob("*.distcp")):
            raise ConversionError(
                f"{path} holds FSDP shards of torch.distributed.checkpoint; merge them first: "
                f"`accelerate merge-weights {path} MERGED`"
            )
    pickled = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled and not any(n.endswith(".safetensors") for n in names):
        raise ConversionError(
            f"{folder / pickled[0]} is pickled, and opening a pickle can run code; where you trust it, "
            'rewrite it: `python -c "import transformers as t; t.AutoModelForImageTextToText.from_pretrained('
            f"'{folder}', "
            "weights_only=True, dtype='auto').save_pretrained('DST')\"` (AutoModelForCausalLM for text-only)"
        )
    if any(n.endswith(".gguf") for n in names):
        raise ConversionError(f"{folder} holds a GGUF file: use `mpi-mlx convert gguf`")
    if "adapter_config.json" in names:
        raise ConversionError(f"{folder} is an adapter: use `mpi-mlx convert from-peft` or `to-peft`")
    if not (folder / "config.json").exists():
        raise ConversionError(f"{folder} has no config.json: is it a model folder?")
    raise ConversionError(f"{folder} has no *.safetensors files")


def _trainer_places(folder: Path) -> list[Path]:
    """Where verl and EasyR1 keep the actor's shards, seen from any folder of theirs, the newest step first."""
    steps = [p for p in folder.glob("global_step_*") if p.name.rpartition("_")[2].isdigit()]
    steps.sort(key=lambda p: int(p.name.rpartition("_")[2]), reverse=True)
    places = [folder, folder / "actor", *(p / "actor" for p in steps)]
    return places + ([folder.absolute().parent] if folder.name == "huggingface" else [])


def check_disk(destination: Path, nbytes: int) -> None:
    """Refuse beforehand when the destination's disk cannot hold ``nbytes`` (and 2% and 64 MB to spare)."""
    parent = destination.absolute().parent
    while not parent.exists():
        parent = parent.parent
    need, free = int(nbytes * 1.02) + (64 << 20), shutil.disk_usage(parent).free
    if free < need:
        raise DeviceError(
            f"the disk of {parent} has {free / 1e9:.1f} GB free, {destination.name} needs "
            f"{need / 1e9:.1f} GB: free some or choose another DST"
        )


@contextmanager
def staged(destination: str | Path, *, overwrite: bool = False, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """A fresh folder beside ``destination``, renamed to it on success and removed on failure.

    A destination that is a link stands for the place it points to. ``overwrite`` replaces what a conversion wrote
    and nothing else, and never what the result is made from, ``sources``. Raises ConversionError otherwise.
    """
    final = Path(os.path.realpath(Path(destination).expanduser()))
    _clear_abandoned(final)
    _check_free(final, overwrite, sources)
    missing = [p for p in final.parents if not p.exists()]
    work = final.parent / f".{final.name}.{os.getpid()}.partial"
    try:
        try:
            work.mkdir(parents=True)
        except OSError as e:
            raise ConversionError(f"{final} cannot be made ({e.strerror}): choose another DST") from None
        yield work
        _sync(work)
        _take_place(work, final)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        for parent in missing:  # the innermost first; what is not empty is somebody else's by now
            with suppress(OSError):
                parent.rmdir()
        raise


def _check_free(final: Path, overwrite: bool, sources: Iterable[Path]) -> None:
    if not final.exists() or final.is_dir() and not any(final.iterdir()):
        return
    inside = next((s for s in sources if _lies_in(s, final)), None)
    if inside is not None:
        raise ConversionError(f"{final} holds {inside}, which the result is made from: choose another DST")
    if not final.is_dir():
        raise ConversionError(f"{final} is a file: choose another DST")
    if not overwrite:
        raise ConversionError(f"{final} exists: choose another DST or pass --overwrite")
    model = any((final / name).is_file() for name in ("config.json", "adapter_config.json"))
    run = next((name for name in _OF_A_RUN if (final / name).exists()), None)
    if run or not model or not any(final.glob("*.safetensors")):
        why = f"is a run, it has {run}" if run else "is no model or adapter folder"
        raise ConversionError(f"{final} {why}, so --overwrite does not delete it: choose another DST")


def _lies_in(source: Path, final: Path) -> bool:
    """Whether a source, or what its links point to, is ``final`` or in it."""
    real = source.resolve()
    links = [p.resolve() for p in real.iterdir() if p.is_symlink()] if real.is_dir() else []
    return any(p == final or final in p.parents for p in (real, *links))


def _take_place(work: Path, final: Path) -> None:
    old = final.parent / f".{final.name}.{os.getpid()}.old"
    if final.exists():
        final.rename(old)
    try:
        work.rename(final)
    except BaseException:
        if old.exists():
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _clear_abandoned(final: Path) -> None:
    """Delete what conversions into the same place left behind when they were killed.

    One that was killed between its two renames has left the earlier folder under another name: it comes back.
    """
    for path in sorted(final.parent.glob(f".{glob.escape(final.name)}.*")):
        pid, _, kind = path.name.removeprefix(f".{final.name}.").partition(".")
        if kind not in ("partial", "old") or not pid.isdigit() or int(pid) != os.getpid() and _runs(int(pid)):
            continue
        if kind == "old" and (not final.exists() or final.is_dir() and not any(final.iterdir())):
            path.rename(final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(folder: Path) -> None:
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def copy_companions(source: Path, destination: Path) -> list[str]:
    """Tokenizer, processor, chat template, generation config and license, byte for byte."""
    copied = []
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            name = path.relative_to(source)
            if path.is_file() and path.name not in _NOT_COPIED and not (destination / name).exists():
                (destination / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, destination / name)
                copied.append(str(name))
    return copied
