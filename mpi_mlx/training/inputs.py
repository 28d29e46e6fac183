"""What a run reads beside its recipe: a hash of each, so that one that goes on goes on with the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

DOCUMENT = "the document"


def input_hashes(recipe, dataset) -> dict[str, str]:
    """Name -> SHA-256 of the document, each JSONL, its pictures, and each file with a reward of one's own.

    A name is what a person would look for: the path, or what it is. Generated data comes from the recipe alone.
    """
    hashes: dict[str, str] = {}
    if dataset is not None:
        if dataset.document is not None:
            hashes[document_name(recipe)] = dataset.document.sha256
        for split, examples in dataset.splits.items():
            path = getattr(recipe.data, split, None)
            if isinstance(path, str):
                hashes[path] = _file(Path(recipe.folder, path))
                pictures = [i for e in examples for i in e.images if isinstance(i, (str, Path))]
                if pictures:
                    hashes[f"a picture of {path}"] = _files(dict.fromkeys(map(str, pictures)))
    for stage in recipe.stages:
        for reward in getattr(stage, "rewards", ()):
            if reward.kind == "function":
                path = reward.function.rpartition(":")[0]
                hashes[path] = _file(Path(recipe.folder, path))
    return hashes


def not_yet_read(recipe, begun: Callable[[int], bool]) -> set[str]:
    """Names, as :func:`input_hashes` gives them, of what only stages read that have not ``begun`` (by index)."""
    late, read = set(), set()
    rl = getattr(recipe.data, "rl", None)
    for index, stage in enumerate(recipe.stages):
        names = {r.function.rpartition(":")[0] for r in getattr(stage, "rewards", ()) if r.kind == "function"}
        if stage.stage == "rl" and isinstance(rl, str):
            names |= {rl, f"a picture of {rl}"}
        (read if begun(index) else late).update(names)
    others = {getattr(recipe.data, split, None) for split in ("train", "validation", "test")}
    return late - read - others - {f"a picture of {path}" for path in others}


def changed(known: dict[str, str], now: dict[str, str]) -> list[str]:
    """Names of what is in both and not the same."""
    return [name for name, value in known.items() if now.get(name, value) != value]


def document_name(recipe) -> str:
    path = getattr(recipe.data, "document", None)
    return DOCUMENT if path is None else f"{DOCUMENT} {path}"


def _file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(paths) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(_file(Path(path)).encode())
    return digest.hexdigest()
