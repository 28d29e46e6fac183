"""Model folders: found, checked before anything is read into memory, and refused with one clear line."""

import json
import os
import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from mpi_mlx.errors import ModelError
from mpi_mlx.models.building import model_type

_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def resolve_base(base: str | os.PathLike) -> Path:
    """The local folder, absolute, of ``embedded:NAME``, a folder, or a hub id (downloaded, weights and config only).

    Raises:
        ModelError: there is no such folder, or the hub cannot be reached or has no such model.
    """
    text = os.fspath(base)
    if text.startswith("embedded:"):
        folder = Path(str(resources.files("mpi_mlx") / "assets" / text.removeprefix("embedded:")))
        if not (folder / "config.json").is_file():
            raise ModelError(f"there is no embedded model {text!r}; embedded:tiny is the one in the package")
        return folder
    # Absolute: a relative owner/name reads as a hub id, and transformers asks the hub about it.
    folder = Path(text).expanduser().absolute()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(f"{text} is a file; give the model folder that holds config.json")
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ModelError(f"{text} is neither a folder nor a hub id (owner/name); check the path")
    return _download(text)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except (HFValidationError, RepositoryNotFoundError):
        raise ModelError(
            f"{name} is neither a folder nor a model on the hub (or it is private: "
            "log in with `hf auth login`)"
        ) from None
    except HfHubHTTPError as error:
        raise ModelError(f"the hub refused {name}: {str(error).splitlines()[0]}") from None
    except Exception as error:  # no network shows as many types, down to httpx's
        raise ModelError(
            f"{name} is not a local folder and the hub cannot be reached "
            f"({type(error).__name__}); connect, or give a folder"
        ) from None


def read_config(folder: Path) -> dict:
    """config.json, with generation_config.json's ``eos_token_id``. Raises ModelError when unusable."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} has no config.json; give a model folder as transformers or mlx-vlm save it"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        generation = folder / "generation_config.json"
        extra = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{folder}: broken JSON beside the weights ({error}); download the model again"
        ) from None
    if not isinstance(config, dict) or not isinstance(extra, dict):
        raise ModelError(f"{path} holds no object; download the model again")
    if config.get("model_file") or config.get("auto_map", {}).get("AutoModel") and "model_type" not in config:
        raise ModelError(
            f"{folder} wants to run its own Python code, which is never done; choose another base"
        )
    if extra.get("eos_token_id") is not None:
        config["eos_token_id"] = extra["eos_token_id"]
    model_type(config)
    return config


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint, as transformers chooses them; none is opened.

    ``model.safetensors`` where it stands alone, even beside an index whose shards are gone (saving again with
    another shard size leaves that); else the shards that the index names; else whatever is there.

    Raises:
        ModelError: the index is broken, a shard is missing, or the folder holds ``model.safetensors`` and shards, so
            that libraries would read different weights from it.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    others = [p for p in folder.glob("*.safetensors") if not p.name.startswith(("adapter", "consolidated"))]
    names = None
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{index} is no index: it needs a weight_map; download the model again") from None
        shards = [name for name in names if (folder / name).is_file()]
    else:
        shards = sorted(p.name for p in others if _SHARD.fullmatch(p.name))
    if single.is_file() and single.name not in (names or []):
        if shards:
            more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
            raise ModelError(
                f"{folder} holds two checkpoints, model.safetensors and the shards {shards[0]}{more}; delete the one "
                "that you do not mean (transformers reads model.safetensors)"
            )
        if names is not None:
            return [single]
    if names is None:
        return sorted(others)
    missing = [name for name in names if name not in shards]
    if missing:
        raise ModelError(
            f"{folder} lacks {missing[0]} ({len(missing)} of {len(names)} weight files missing); download the model "
            "again"
        )
    return [folder / name for name in names]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files, each checked to be whole. Raises ModelError when missing or truncated."""
    files = checkpoint_files(folder)
    if not files:
        others = [
            path.name for pattern in ("*.bin", "*.gguf", "*.pt", "*.npz") for path in folder.glob(pattern)
        ]
        hint = f" ({others[0]} is not read: convert it to safetensors)" if others else ""
        raise ModelError(f"{folder} has no weights (*.safetensors){hint}; download the model again")
    for path in files:
        check_safetensors(path)
    return files


@contextmanager
def only_files(folder: Path, files: list[Path]) -> Iterator[Path]:
    """A folder whose safetensors are exactly ``files``: ``folder`` itself, or a temporary one of links.

    mlx-vlm and mlx-lm read every safetensors file that a folder holds, in no order, the later ones over the
    earlier: a second checkpoint or an adapter beside the weights would be mixed in. What they opened stays open
    when the links are gone.
    """
    index = folder / INDEX
    if set(folder.glob("*.safetensors")) == set(files) and not (index.is_file() and len(files) == 1):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mpi-mlx-weights-") as name:
        for path in folder.iterdir():
            if path in files or not path.name.endswith((".safetensors", ".safetensors.index.json")):
                (Path(name) / path.name).symlink_to(path.absolute())
        yield Path(name)


def check_safetensors(path: Path) -> dict:
    """The header of a safetensors file whose length agrees with its content.

    Raises:
        ModelError: the file is truncated or not safetensors.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not length or 8 + length > size:
            raise ModelError(
                f"{path} is truncated or no safetensors file ({size:,} bytes); download it again"
            )
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{path} has a broken header; download it again") from None
    wanted = 8 + length + max(ends, default=0)
    if size != wanted:
        raise ModelError(f"{path} is truncated: {size:,} of {wanted:,} bytes; download it again")
    return header


def check_rope(config: dict, reads_rope_parameters: bool) -> None:
    """Refuses a config as transformers 5 saves it where the mlx definition would read wrong rotary bases.

    Raises:
        ModelError: ``rope_parameters`` without the ``rope_theta`` that the definition reads; it loads without
            a word and gives wrong logits otherwise.
    """
    if reads_rope_parameters:
        return
    for scope in (config, config.get("text_config") or {}):
        if (
            isinstance(scope, dict)
            and scope.get("rope_parameters")
            and "rope_theta" not in scope
            and "rope_theta" not in config
        ):
            raise ModelError(
                "this folder was saved by transformers 5 (rope_parameters), which the MLX definition "
                "misreads; run `mpi-mlx convert` on it first"
            )
