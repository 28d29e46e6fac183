"""Writing examples, documents and whole datasets as JSONL, PNGs and Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from mpi_mlx.data.examples import Example
from mpi_mlx.documents.images import ImageRef, open_image


def write_examples(
    path: str | Path, examples: Iterable[Example], *, images: str | None = None
) -> list[Path]:
    """Write examples as JSONL; returns the image files written.

    Images that are not files become PNGs in the folder ``images`` (default ``images/<stem>``) beside the
    file, one for each distinct image object; paths below the file's folder are written relative to it,
    others absolute. Same examples, same bytes.
    """
    path = Path(path)
    folder = images or f"images/{path.stem}"
    written: dict[int, tuple[Path, ImageRef]] = {}
    lines = []
    for example in examples:
        messages = [_plain(message, example.id, path.parent, folder, written) for message in example.messages]
        row = {"id": example.id, "messages": messages}
        for name in ("reasoning", "answer"):
            if getattr(example, name) is not None:
                row[name] = getattr(example, name)
        if example.tools:
            row["tools"] = list(example.tools)
        if example.meta:
            row["meta"] = example.meta
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return [file for file, _ in written.values()]


def _plain(message: dict, identity: str, root: Path, folder: str, written: dict) -> dict:
    content = message["content"]
    if isinstance(content, str):
        return message
    parts = []
    for part in content:
        if part["type"] == "image":
            part = {"type": "image", "image": _saved(part["image"], identity, root, folder, written)}
        parts.append(part)
    return {**message, "content": parts}


def _saved(image: ImageRef, identity: str, root: Path, folder: str, written: dict) -> str:
    if isinstance(image, (str, Path)):
        file, base = Path(image), root.resolve()
        return file.relative_to(base).as_posix() if file.is_relative_to(base) else str(file)
    if id(image) not in written:
        taken = {file for file, _ in written.values()}
        name = re.sub(r"[^\w.-]+", "_", identity)
        file = root / folder / f"{name}.png"
        for again in range(2, len(taken) + 3):
            if file not in taken:
                break
            file = root / folder / f"{name}-{again}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        open_image(image).save(file, format="PNG")
        written[id(image)] = (file, image)  # holding the image keeps its id from being used again
    return written[id(image)][0].relative_to(root).as_posix()
