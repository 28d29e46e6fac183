"""The agent's rulebook as an ordered sequence of text and image parts, read from Markdown."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from mpi_mlx.documents.images import check_image, pixels
from mpi_mlx.errors import DataError

TEXT_SUFFIXES = (".md", ".markdown", ".txt")
MAIN_FILES = ("policy.md", "README.md")

_FENCE = re.compile(r"^ {0,3}(```+|~~~+)")
_HEADING = re.compile(r"^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$")
_IMAGE = re.compile(
    r"""!\[[^\]]*\]\(\s*(?:<(?P<angled>[^>]+)>|(?P<plain>[^\s)]+))(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)"""
    r"""|<img\b[^>]*?\bsrc\s*=\s*["'](?P<html>[^"']+)["'][^>]*>"""
)
_SLOT = "\x00{}\x00"  # stands for image n while a document is edited as one text
_SLOTS = re.compile(r"\x00(\d+)\x00")


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
        lines = self.text.split("\n")
        return tuple(heading for _, _, heading in _headings(lines))

    def amend(self, heading: str, body: str, *, folder: str | Path | None = None) -> PolicyDocument:
        """A new document whose section ``heading`` reads ``body``; appended when there is no such section.

        A section runs to the next heading of its level or above, so its subsections are replaced with it.
        ``heading`` matches without regard to case; one that occurs twice raises DataError. ``body`` is
        Markdown; its images are found relative to ``folder`` (the working folder by default).
        """
        flat, images = _flatten(self.parts)
        lines = flat.split("\n")
        found = [(line, level) for line, level, text in _headings(lines) if _same(text, heading)]
        if len(found) > 1:
            raise DataError(
                f"{self.name}: {len(found)} sections are headed {heading!r}; give them different headings"
            )
        extra = _parse(body.strip("\n"), Path(folder or ".").resolve(), f"section {heading!r}")
        new, new_images = _flatten(extra, first=len(images))
        if found:
            start, level = found[0]
            later = [line for line, depth, _ in _headings(lines) if line > start and depth <= level]
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

    In a folder, ``policy.md`` is the document, else ``README.md``, else all ``.md`` files in sorted order.
    ``![alt](path)`` and ``<img src="path">`` become image parts in place (not inside code), relative to
    their file. Raises DataError, naming file:line, for images that are missing, remote or broken, and for
    files that are empty or not UTF-8.
    """
    path = Path(path).expanduser()
    parts: list[dict] = []
    for file in _files(path):
        if parts:
            parts.append({"type": "text", "text": "\n\n"})
        parts += _parse(_read(file), file.parent.resolve(), str(file))
    if all(part.get("text", "x").isspace() for part in parts):
        raise DataError(f"{path}: the document is empty; write the rules into it")
    name = path.resolve().name if path.is_dir() else path.stem
    return _document(name, parts)


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"{path}: no such document; give a Markdown file or a folder with one")
    if path.is_file():
        if path.suffix.lower() not in TEXT_SUFFIXES:
            raise DataError(f"{path}: a document is a {', '.join(TEXT_SUFFIXES)} file or a folder with one")
        return [path]
    for name in MAIN_FILES:
        if (path / name).is_file():
            return [path / name]
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in (".md", ".markdown") and f.is_file())
    if not files:
        raise DataError(f"{path}: the folder holds no Markdown file; write the rules into policy.md there")
    return files


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}: {error.reason}); save it so") from None


def _parse(text: str, folder: Path, where: str) -> list[dict]:
    """Text and image parts; ``where`` names the file in errors. Lines inside code stay text."""
    parts: list[dict] = []
    pending = ""
    fence = None
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        mark = _FENCE.match(line)
        if mark and (fence is None or line.lstrip().startswith(fence)):
            fence = mark[1] if fence is None else None
        elif fence is None:
            rest = 0
            for match in _images_outside_code(line):
                file = _local(match["angled"] or match["plain"] or match["html"], folder, f"{where}:{number}")
                pending += line[rest : match.start()]
                if pending:
                    parts.append({"type": "text", "text": pending})
                parts.append({"type": "image", "image": str(file)})
                pending, rest = "", match.end()
            line = line[rest:]
        pending += line
    if pending:
        parts.append({"type": "text", "text": pending})
    return parts


def _images_outside_code(line: str) -> Iterator[re.Match]:
    code = [m.span() for m in re.finditer(r"(`+)(?!`).*?(?<!`)\1(?!`)", line)]
    for match in _IMAGE.finditer(line):
        if not any(start <= match.start() < end for start, end in code):
            yield match


def _local(target: str, folder: Path, where: str) -> Path:
    if re.match(r"^(https?|data|ftp):", target):
        raise DataError(f"{where}: image {target[:60]!r} is not a local file; save it beside the document")
    file = folder / target
    if not file.exists():
        file = folder / unquote(target)
    problem = check_image(file)
    if problem:
        raise DataError(f"{where}: {problem}; paths are relative to the Markdown file")
    return file.resolve()


def _headings(lines: list[str]) -> Iterator[tuple[int, int, str]]:
    """(line index, level, text) of each heading outside code fences."""
    fence = None
    for index, line in enumerate(lines):
        mark = _FENCE.match(line)
        if mark and (fence is None or line.lstrip().startswith(fence)):
            fence = mark[1] if fence is None else None
        elif fence is None and (match := _HEADING.match(line)):
            yield index, len(match[1]), match[2]


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


def _document(name: str, parts: list[dict]) -> PolicyDocument:
    merged: list[dict] = []
    for part in parts:
        if part["type"] == "text" and merged and merged[-1]["type"] == "text":
            merged[-1] = {"type": "text", "text": merged[-1]["text"] + part["text"]}
        else:
            merged.append(part)
    digest = hashlib.sha256()
    for part in merged:
        data = part["text"].encode() if part["type"] == "text" else pixels(part["image"])
        digest.update(f"{part['type']} {len(data)}\n".encode())
        digest.update(data)
    return PolicyDocument(name, tuple(merged), digest.hexdigest())


from_text = PolicyDocument.from_text
from_parts = PolicyDocument.from_parts
