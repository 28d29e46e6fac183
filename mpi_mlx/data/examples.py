"""Examples and their JSONL: one conversation a line, images by local path, errors by file:line and field."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mpi_mlx.data.completion import split_completion
from mpi_mlx.data.json_text import half_character, kind, parse_json
from mpi_mlx.data.tool_calls import calls_text, read_calls
from mpi_mlx.documents.images import ImageRef, check_image
from mpi_mlx.errors import DataError

KEYS = ("id", "messages", "reasoning", "answer", "tools", "images", "meta")
ROLES = ("system", "user", "assistant", "tool")
SHOWN = 10  # errors of one file that a message lists


@dataclass(frozen=True)
class Example:
    """One query with what the model should make of it.

    ``messages`` are chat messages without the document and without the final assistant turn; a content is a
    string or a list of ``{"type": "text", "text": str}`` and ``{"type": "image", "image": ...}`` parts, the
    image an absolute path, a PIL image or an object that draws itself (see documents/images.py). ``answer``
    may be None where a reward needs none.
    """

    id: str
    messages: tuple[dict, ...]
    reasoning: str | None = None
    answer: str | None = None
    tools: tuple[dict, ...] | None = None
    meta: dict = field(default_factory=dict)
    source: str | None = field(default=None, compare=False, repr=False)  # file:line that it was read from

    @property
    def where(self) -> str:
        """For messages: ``train.jsonl:3 (example 'a')``, or ``example 'a'``."""
        return f"example {self.id!r}" if self.source is None else f"{self.source} (example {self.id!r})"

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """Images of all messages in reading order."""
        contents = [m["content"] for m in self.messages if isinstance(m.get("content"), list)]
        return tuple(p["image"] for content in contents for p in content if p["type"] == "image")

    @property
    def query(self) -> str:
        """Text of the last user message."""
        for message in reversed(self.messages):
            if message["role"] == "user":
                content = message["content"]
                if isinstance(content, str):
                    return content
                return "".join(p["text"] for p in content if p["type"] == "text")
        return ""


def load_examples(
    path: str | Path, *, require: Sequence[str] = (), thorough: bool = False
) -> list[Example]:
    """Read a JSONL file of examples; image paths are relative to it.

    A line's messages may end in an assistant turn: its text is then split into reasoning and answer, over
    which the line's own ``reasoning`` and ``answer`` win. ``{"type": "image"}`` without a path takes the next
    of the line's ``images``. ``require`` names fields (``answer``, ``reasoning``) that may not be missing;
    ``thorough`` decodes every image instead of looking at its structure. Raises one DataError with all
    errors of the file, each as ``file:line: field: what``.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"{path}: no such file of examples (JSONL, one conversation a line)")
    reader = _Reader(path, tuple(require), thorough)
    examples = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason}); save it so") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            example = reader.example(line, number)
            if example is not None:
                examples.append(example)
    if reader.errors:
        raise DataError(collected(reader.errors, str(path)))
    if not examples:
        raise DataError(f"{path}: the file is empty; write one conversation a line")
    return examples


def collected(errors: Sequence[str], where: str) -> str:
    """One message for all errors of a file: the error itself, or a list of the first ten."""
    if len(errors) == 1:
        return errors[0]
    more = [f"... and {len(errors) - SHOWN} more"] if len(errors) > SHOWN else []
    return "\n  ".join([f"{where}: {len(errors)} errors", *errors[:SHOWN], *more])


class _Reader:
    """Reads the lines of one file and keeps their errors."""

    def __init__(self, path: Path, require: tuple[str, ...], thorough: bool):
        self.path = path
        self.folder = path.parent.resolve()
        self.require = require
        self.thorough = thorough
        self.errors: list[str] = []
        self.lines_of_ids: dict[str, int] = {}
        self.checked: dict[Path, str | None] = {}
        self.number = 0

    def wrong(self, where: str, what: str) -> None:
        self.errors.append(f"{self.path}:{self.number}: {where}: {what}" if where else
                           f"{self.path}:{self.number}: {what}")

    def example(self, line: str, number: int) -> Example | None:
        self.number = number
        before = len(self.errors)
        raw = self._object(line)
        if raw is None:
            return None
        self._check_keys(raw)
        messages = self._messages(raw)
        reasoning = self._text(raw, "reasoning")
        answer = self._text(raw, "answer")
        if messages and messages[-1]["role"] == "assistant":
            said_reasoning, said_answer = split_completion(self._said(messages.pop()))
            reasoning = said_reasoning if reasoning is None else reasoning
            answer = said_answer if answer is None else answer
        if len(self.errors) == before:
            self._check_turns(messages, reasoning, answer)
        tools, meta = self._tools(raw), self._meta(raw)
        identity = self._identity(raw)
        if len(self.errors) > before:
            return None
        source = f"{self.path}:{number}"
        return Example(identity, tuple(messages), reasoning, answer, tools, meta, source)

    def _object(self, line: str) -> dict | None:
        try:
            raw = parse_json(line)
        except DataError as error:
            self.wrong("", f"{error}; one object must fill one line")
            return None
        if not isinstance(raw, dict):
            self.wrong("", f"expected a JSON object, found {kind(raw)}")
            return None
        half = half_character(raw, line)
        if half is not None:
            self.wrong(*half)
            return None
        return raw

    def _check_keys(self, raw: dict) -> None:
        for key in raw:
            if key not in KEYS:
                near = get_close_matches(key, KEYS, 1)
                hint = f"did you mean {near[0]!r}?" if near else "keep your own fields under 'meta'"
                self.wrong(key, f"unknown field; {hint}")

    def _check_turns(self, messages: list, reasoning: str | None, answer: str | None) -> None:
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            self.wrong("messages", "must end in a user or tool turn, or that and one assistant turn")
        for name, value in (("reasoning", reasoning), ("answer", answer)):
            if name in self.require and not value:
                self.wrong(name, f"missing; give {name!r} or a final assistant turn that has one")

    def _said(self, turn: dict) -> str:
        """Text of a final assistant turn; its tool calls become text in the Hermes (Qwen) form."""
        content = turn["content"]
        text = content if isinstance(content, str) else "".join(p.get("text", "") for p in content)
        return "\n".join(part for part in (text, calls_text(turn.get("tool_calls") or [])) if part)

    def _identity(self, raw: dict) -> str:
        identity = raw.get("id", f"{self.path.stem}-{self.number}")
        if isinstance(identity, int) and not isinstance(identity, bool):
            identity = str(identity)
        if not isinstance(identity, str) or not identity:
            self.wrong("id", f"expected a text, found {kind(identity)}")
        elif identity in self.lines_of_ids:
            self.wrong("id", f"{identity!r} was used in line {self.lines_of_ids[identity]}; ids must differ")
        else:
            self.lines_of_ids[identity] = self.number
        return identity

    def _text(self, raw: dict, name: str) -> str | None:
        value = raw.get(name)
        if value is not None and not isinstance(value, str):
            self.wrong(name, f"expected a text, found {kind(value)}")
            return None
        return value

    def _tools(self, raw: dict) -> tuple[dict, ...] | None:
        tools = raw.get("tools")
        if tools is None:
            return None
        if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
            self.wrong("tools", "expected a list of tool schemas (JSON objects)")
            return None
        return tuple(tools) or None

    def _meta(self, raw: dict) -> dict:
        meta = raw.get("meta")
        if meta is not None and not isinstance(meta, dict):
            self.wrong("meta", f"expected a JSON object, found {kind(meta)}")
            return {}
        return meta or {}

    def _messages(self, raw: dict) -> list[dict]:
        value = raw.get("messages")
        if not isinstance(value, list) or not value:
            found = "nothing" if "messages" not in raw else "an empty list" if value == [] else kind(value)
            self.wrong("messages", f"expected a list of chat turns, found {found}")
            return []
        loose = raw.get("images")
        if loose is not None and not (isinstance(loose, list) and all(isinstance(i, str) for i in loose)):
            self.wrong("images", "expected a list of image paths")
            loose = None
        loose = list(loose or [])
        messages = []
        for index, turn in enumerate(value):
            message = self._turn(turn, f"messages[{index}]", loose)
            if message is not None:
                messages.append(message)
        if loose:
            self.wrong("images", f'{len(loose)} more than the messages have {{"type": "image"}} parts')
        return messages

    def _turn(self, turn: Any, where: str, loose: list[str]) -> dict | None:
        if not isinstance(turn, dict):
            self.wrong(where, f"expected an object with role and content, found {kind(turn)}")
            return None
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            self.wrong(f"{where}.role", f"expected one of {', '.join(ROLES)}, found {role!r}")
            return None
        if content is None and role == "assistant" and turn.get("tool_calls"):
            content = ""
        if isinstance(content, list):
            parts = [self._part(p, f"{where}.content[{i}]", loose) for i, p in enumerate(content)]
            if not parts:
                self.wrong(f"{where}.content", "is an empty list")
            content = [p for p in parts if p is not None]
        elif not isinstance(content, str):
            found = "nothing" if content is None else kind(content)
            self.wrong(f"{where}.content", f"expected a text or a list of parts, found {found}")
            return None
        if role == "assistant" and turn.get("tool_calls"):
            try:
                turn = {**turn, "tool_calls": read_calls(turn["tool_calls"])}
            except DataError as error:
                self.wrong(f"{where}.tool_calls", str(error))
                return None
        return {**turn, "content": content}

    def _part(self, part: Any, where: str, loose: list[str]) -> dict | None:
        named = part.get("type") if isinstance(part, dict) else None
        if named == "text":
            if isinstance(part.get("text"), str):
                return {"type": "text", "text": part["text"]}
            self.wrong(f"{where}.text", "expected a text")
        elif named in ("image", "image_url"):
            target = part.get("image", part.get("path", part.get("url", part.get("image_url"))))
            if isinstance(target, dict):
                target = target.get("url")
            if target is None and loose:
                target = loose.pop(0)
            return self._image(target, where)
        else:
            self.wrong(where, f'expected {{"type": "text"}} or "image", found {kind(part, named)}')
        return None

    def _image(self, target: Any, where: str) -> dict | None:
        if not isinstance(target, str) or not target:
            self.wrong(f"{where}.image", 'expected a path: {"type": "image", "image": "pictures/1.png"}')
            return None
        if re.match(r"^(https?|data|ftp):", target):
            hint = f"save it beside {self.path.name}"
            self.wrong(f"{where}.image", f"{target[:60]!r} is not a local file; {hint}")
            return None
        file = self.folder / target.removeprefix("file://")
        if file not in self.checked:
            self.checked[file] = check_image(file, decode=self.thorough)
        if self.checked[file]:
            self.wrong(f"{where}.image", self.checked[file])
            return None
        return {"type": "image", "image": str(file.resolve())}
