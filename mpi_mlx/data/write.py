"""Writing examples, documents and whole datasets as JSONL, PNGs and Markdown."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from mpi_mlx.atomic import replace_dir, temporary_dir, write_text_atomic
from mpi_mlx.data.dataset import Dataset
from mpi_mlx.data.examples import Example
from mpi_mlx.documents import PolicyDocument
from mpi_mlx.documents.images import ImageRef, open_image
from mpi_mlx.errors import DataError

Progress = Callable[[int, int], None]  # pictures done, pictures in all


def write_examples(
    path: str | Path, examples: Iterable[Example], *, images: str | None = None
) -> list[Path]:
    """Write examples as JSONL; returns the image files written.

    Images that are not files become PNGs in the folder ``images`` (default ``images/<stem>``) beside the
    file, one for each distinct image object; paths below the file's folder are written relative to it,
    others absolute. Same examples, same bytes.
    """
    path = Path(path)
    plan = _ImagePlan(path.parent, images or f"images/{path.stem}", copy=False)
    _write_lines(path, examples, plan)
    save_images(plan.jobs)
    return [file for file, _ in plan.jobs]


def write_document(folder: str | Path, document: PolicyDocument) -> Path:
    """Write ``policy.md`` and its images into ``folder``; reading the folder gives the same sha256."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [f"images/{n}.png" for n in range(1, len(document.images) + 1)]
    save_images([(folder / p, image) for p, image in zip(paths, document.images, strict=True)])
    (folder / "policy.md").write_text(document.to_markdown(paths), encoding="utf-8", newline="\n")
    return folder / "policy.md"


def write_dataset(
    folder: str | Path, dataset: Dataset, *, recipe: str | None = None, workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Write a dataset into a new folder: ``document/``, a JSONL a split, their images, ``recipe.yaml``.

    ``rl.jsonl`` is left out when rl is the training split itself. All images are copied or drawn into the
    folder, by ``workers`` processes. The folder appears under its name only when all is written. Raises
    DataError when it exists.
    """
    folder = Path(folder).expanduser()
    if folder.exists():
        raise DataError(f"{folder}: exists already; choose another name or remove it")
    try:
        with temporary_dir(folder) as partial:
            if dataset.document is not None:
                write_document(partial / "document", dataset.document)
            jobs = []
            for name in written_splits(dataset):
                plan = _ImagePlan(partial, f"images/{name}", copy=True)
                _write_lines(partial / f"{name}.jsonl", dataset.splits[name], plan)
                jobs += plan.jobs
            save_images(jobs, workers=workers, progress=progress)
            if recipe is not None:
                (partial / "recipe.yaml").write_text(recipe, encoding="utf-8", newline="\n")
            replace_dir(partial, folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return folder


def written_splits(dataset: Dataset) -> list[str]:
    """Names of the splits that :func:`write_dataset` gives a file."""
    splits = {name: rows for name, rows in dataset.splits.items() if rows}
    if splits.get("rl") == dataset.train:
        splits.pop("rl", None)
    return list(splits)


def save_images(
    jobs: list[tuple[Path, ImageRef]], *, workers: int = 1, progress: Progress | None = None
) -> None:
    """Draw or copy images to PNG files, in ``workers`` processes (over 1: in a guarded main module)."""
    for file, _ in jobs:
        file.parent.mkdir(parents=True, exist_ok=True)
    workers = min(workers, -(-len(jobs) // 8))
    if workers < 2:
        for done, job in enumerate(jobs, 1):
            _save(job)
            if progress:
                progress(done, len(jobs))
        return
    # Fresh interpreters: a fork would copy the parent's threads' locks.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for done, _ in enumerate(pool.map(_save, jobs, chunksize=4), 1):
            if progress:
                progress(done, len(jobs))


def _save(job: tuple[Path, ImageRef]) -> None:
    file, image = job
    if isinstance(image, (str, Path)) and Path(image).suffix.lower() == file.suffix:
        shutil.copyfile(image, file)
    else:
        open_image(image).save(file, format="PNG")


class _ImagePlan:
    """Which image goes to which file of a folder.

    ``jobs``: (file, image) of each image to be written. Images that are files stay where they are unless
    ``copy``.
    """

    def __init__(self, root: Path, folder: str, *, copy: bool):
        self.root, self.folder, self.copy = root, folder, copy
        self.jobs: list[tuple[Path, ImageRef]] = []
        self._known: dict[object, str] = {}
        self._taken: set[Path] = set()

    def path(self, image: ImageRef, identity: str) -> str:
        """What to write for ``image`` of example ``identity``, relative to the root where it can be."""
        on_disk = isinstance(image, (str, Path))
        if on_disk and not self.copy:
            file, base = Path(image), self.root.resolve()
            return file.relative_to(base).as_posix() if file.is_relative_to(base) else str(file)
        key = str(image) if on_disk else id(image)  # self.jobs keeps the image, so its id stays its own
        if key not in self._known:
            suffix = Path(image).suffix if on_disk else ".png"
            file = self._free(re.sub(r"[^\w.-]+", "_", identity), suffix)
            self.jobs.append((file, image))
            self._known[key] = file.relative_to(self.root).as_posix()
        return self._known[key]

    def _free(self, stem: str, suffix: str) -> Path:
        file, again = self.root / self.folder / f"{stem}{suffix}", 2
        while file in self._taken:
            file = self.root / self.folder / f"{stem}-{again}{suffix}"
            again += 1
        self._taken.add(file)
        return file


def _write_lines(path: Path, examples: Iterable[Example], plan: _ImagePlan) -> None:
    lines = []
    for example in examples:
        messages = [_plain(message, example.id, plan) for message in example.messages]
        row = {"id": example.id, "messages": messages}
        for name in ("reasoning", "answer"):
            if getattr(example, name) is not None:
                row[name] = getattr(example, name)
        if example.tools:
            row["tools"] = list(example.tools)
        if example.meta:
            row["meta"] = example.meta
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text_atomic(path, "".join(lines))


def _plain(message: dict, identity: str, plan: _ImagePlan) -> dict:
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return message
    parts = [
        {"type": "image", "image": plan.path(part["image"], identity)} if part["type"] == "image" else part
        for part in content
    ]
    return {**message, "content": parts}
