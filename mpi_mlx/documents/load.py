"""The agent's rulebook as an ordered sequence of text and image parts, read from Markdown."""

from __future__ import annotations

import hashlib
import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from mpi_mlx.documents.images import check_image, pixels
from mpi_mlx.documents.markdown import headings, pictures, unescaped
from mpi_mlx.errors import DataError

TEXT_SUFFIXES = (".md", ".markdown", ".txt")
MAIN_FILE = "policy.md"
OTHER_SUFFIXES = (".adoc", ".doc", ".docx", ".htm", ".html", ".odt", ".org", ".pdf", ".rst", ".rtf", ".tex")
PICTURE_SUFFIXES = (".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".png", ".svg", ".tif", ".tiff", ".webp")

_SLOT = "\x00{}\x00"  # stands for image n while a document is edited as one text
_SLOTS = re.compile(r"\x00(\d+)\x00")


@dataclass(frozen=True)
class Origin:
    """Where a document was read: ``path`` as it was given, the ``files`` in the order in which they were read.

    ``warnings``: what in them is text though it may not be meant so, as ``file:line: what``.
    """

    path: Path
    files: tuple[Path, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PolicyDocument:
    """A rulebook: what the model is to follow once it can no longer see it.

    ``parts`` are chat content parts in reading order: ``{"type": "text", "text": str}`` and
    ``{"type": "image", "image": absolute path}`` (or a PIL image, or one that draws itself, in generated
    documents).
    ``sha256`` covers texts, pixels and their order, not the name, place or file format.

    >>> document = PolicyDocument.from_text("# Refunds\\n\\nRefund within 30 days.", name="refunds")
    >>> document.amend("Refunds", "Refund within 14 days.").text
    '# Refunds\\n\\nRefund within 14 days.'
    """

    name: str
    parts: tuple[dict, ...]
    sha256: str
    origin: Origin | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_text(cls, text: str, name: str = "document") -> PolicyDocument:
        """A document of text alone; Markdown image syntax in it stays text."""
        if not text.strip():
            raise DataError(f"{name}: the document is empty; write the rules into it")
        return _document(name, [{"type": "text", "text": text}])

    @classmethod
    def from_parts(cls, parts: Sequence[dict], name: str = "document") -> PolicyDocument:
        """A document of ready text and image parts."""
        return _document(name, [dict(p) for p in parts])

    @property
    def text(self) -> str:
        """The text parts joined; images leave nothing behind."""
        return "".join(p["text"] for p in self.parts if p["type"] == "text")

    @property
    def images(self) -> tuple:
        """Images in reading order: absolute paths, PIL images or images that draw themselves."""
        return tuple(p["image"] for p in self.parts if p["type"] == "image")

    @property
    def sections(self) -> tuple[str, ...]:
        """The headings in order, without their ``#``."""
        return tuple(heading for _, _, heading in headings(self.text))

    def amend(self, heading: str, body: str, *, folder: str | Path | None = None) -> PolicyDocument:
        """A new document whose section ``heading`` reads ``body``; appended when there is no such section.

        A section runs to the next heading of its level or above, so its subsections are replaced with it.
        ``heading`` matches without regard to case; one that occurs twice raises DataError. ``body`` is
        Markdown; its images are found relative to ``folder`` (the working folder by default).
        """
        flat, images = _flatten(self.parts)
        lines = flat.split("\n")
        found = [(line, level) for line, level, text in headings(flat) if _same(text, heading)]
        if len(found) > 1:
            raise DataError(
                f"{self.name}: {len(found)} sections are headed {heading!r}; give them different headings"
            )
        extra, _ = _parse(body.strip("\n"), Path(folder or ".").resolve(), f"section {heading!r}")
        new, new_images = _flatten(extra, first=len(images))
        if found:
            start, level = found[0]
            later = [line for line, depth, _ in headings(flat) if line > start and depth <= level]
            end = later[0] if later else len(lines)
            tail = ["", *lines[end:]] if later else []
            lines = [*lines[: start + 1], "", *new.split("\n"), *tail]
        else:
            lines = [*flat.rstrip("\n").split("\n"), "", f"## {heading}", "", *new.split("\n")]
        return _document(self.name, _unflatten("\n".join(lines), [*images, *new_images]))

    def to_markdown(self, image_paths: list[str]) -> str:
        """The document as Markdown, image n as ``![](image_paths[n])``."""
        flat, images = _flatten(self.parts)
        if len(image_paths) != len(images):
            raise ValueError(f"{len(images)} images but {len(image_paths)} paths")
        return _SLOTS.sub(lambda m: f"![]({image_paths[int(m[1])]})", flat)


def load_document(path: str | Path) -> PolicyDocument:
    """Read a Markdown file, or a folder that holds one.

    In a folder, ``policy.md`` is the document, else all text files in the order of their names, README.md
    among them. Pictures (``![alt](path)``, ``![alt][label]``, ``<img src="path">``) become image parts in place,
    relative to their file, but not in code; HTML comments are left out. Raises DataError, naming file:line, for
    pictures that are missing, remote, broken or not written as one, and for files that are empty or not UTF-8.
    """
    path = Path(path).expanduser()
    files = _files(path)
    parts: list[dict] = []
    errors: list[str] = []
    warnings: list[str] = []
    for file in files:
        if parts:
            parts.append({"type": "text", "text": "\n\n"})
        try:
            found, doubts = _parse(_read(file), file.parent.resolve(), str(file))
        except DataError as error:
            errors.append(str(error))
            continue
        parts += found
        warnings += doubts
    if errors:
        raise DataError("\n".join(errors))
    if all(part.get("text", "x").isspace() for part in parts):
        raise DataError(f"{path}: the document is empty; write the rules into it")
    name = path.resolve().name if path.is_dir() else path.stem
    return _document(name, parts, Origin(path, tuple(files), tuple(warnings)))


def unread_files(document: PolicyDocument) -> list[Path]:
    """Texts and pictures of the document's folder that are no part of it, relative to the folder."""
    origin = document.origin
    if origin is None or not origin.path.is_dir():
        return []
    used = {str(file.resolve()) for file in origin.files} | set(map(str, document.images))
    kinds = (*TEXT_SUFFIXES, *OTHER_SUFFIXES, *PICTURE_SUFFIXES)
    found = []
    for folder, below, names in os.walk(origin.path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        files = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        found += [f for f in files if f.suffix.lower() in kinds and str(f.resolve()) not in used]
    return [file.relative_to(origin.path) for file in found]


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"{path}: no such document; give a Markdown file or a folder with one")
    if path.is_file():
        if path.suffix.lower() not in TEXT_SUFFIXES:
            raise DataError(f"{path}: a document is a {', '.join(TEXT_SUFFIXES)} file or a folder with one")
        return [path]
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in TEXT_SUFFIXES and f.is_file())
    files = [f for f in files if not f.name.startswith(".")]  # macOS puts ._policy.md beside policy.md
    if not files:
        raise DataError(f"{path}: the folder holds no Markdown file; write the rules into {MAIN_FILE} there")
    return [f for f in files if f.name.lower() == MAIN_FILE] or files


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}: {error.reason}); save it so") from None


def _parse(text: str, folder: Path, where: str) -> tuple[list[dict], list[str]]:
    """Text and image parts, and warnings; ``where`` names the file. Raises one DataError for all errors."""
    cuts, findings = pictures(text)

    def line(at: int) -> str:
        return f"{where}:{text.count(chr(10), 0, at) + 1}"

    errors = [(f.at, f"{line(f.at)}: {f.what}") for f in findings if f.wrong]
    parts: list[dict] = []
    at = 0
    for cut in cuts:
        parts.append({"type": "text", "text": text[at : cut.start]})
        if cut.path is not None:
            try:
                file = _local(cut.path, folder, line(cut.start))
                parts.append({"type": "image", "image": str(file)})
            except DataError as error:
                errors.append((cut.start, str(error)))
        at = cut.stop
    if errors:
        raise DataError("\n".join(said for _, said in sorted(errors)))
    parts.append({"type": "text", "text": text[at:]})
    doubts = [f"{line(f.at)}: {f.what}" for f in findings if not f.wrong]
    return [p for p in _merged(parts) if p.get("text") != ""], doubts


def _local(target: str, folder: Path, where: str) -> Path:
    if re.match(r"^(https?|data|ftp):", target, re.IGNORECASE):
        raise DataError(f"{where}: image {target[:60]!r} is not a local file; save it beside the document")
    plain = unescaped(target)
    names = [target, plain, unquote(plain), unquote(html.unescape(plain))]
    file = next((folder / name for name in names if os.path.exists(folder / name)), folder / target)
    problem = check_image(file, decode=True)
    if problem:
        raise DataError(f"{where}: {problem}; paths are relative to the Markdown file")
    return file.resolve()


def _same(a: str, b: str) -> bool:
    return a.strip().lstrip("#").strip().casefold() == b.strip().lstrip("#").strip().casefold()


def _flatten(parts: Sequence[dict], first: int = 0) -> tuple[str, list]:
    images = [p["image"] for p in parts if p["type"] == "image"]
    slots = iter(range(first, first + len(images)))
    text = "".join(p["text"] if p["type"] == "text" else _SLOT.format(next(slots)) for p in parts)
    return text, images


def _unflatten(text: str, images: list) -> list[dict]:
    parts: list[dict] = []
    for index, piece in enumerate(_SLOTS.split(text)):
        if index % 2:
            parts.append({"type": "image", "image": images[int(piece)]})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _merged(parts: Sequence[dict]) -> list[dict]:
    merged: list[dict] = []
    for part in parts:
        if part["type"] == "text" and merged and merged[-1]["type"] == "text":
            merged[-1] = {"type": "text", "text": merged[-1]["text"] + part["text"]}
        else:
            merged.append(part)
    return merged


def _document(name: str, parts: Sequence[dict], origin: Origin | None = None) -> PolicyDocument:
    merged = _merged(parts)
    digest = hashlib.sha256()
    for part in merged:
        data = part["text"].encode() if part["type"] == "text" else pixels(part["image"])
        digest.update(f"{part['type']} {len(data)}\n".encode())
        digest.update(data)
    return PolicyDocument(name, tuple(merged), digest.hexdigest(), origin)


from_text = PolicyDocument.from_text
from_parts = PolicyDocument.from_parts
