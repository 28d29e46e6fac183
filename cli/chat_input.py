"""Reading a person's lines: history, several lines, paths dropped on the terminal."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from urllib.parse import unquote, urlparse

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif")


def dropped_path(text: str) -> Path:
    """The path meant by what a terminal types when a file is dropped on it, or a person types.

    Quotes, backslashes before blanks, ``file://`` and ``~`` are understood.

    >>> dropped_path(r"/tmp/my\\ picture.png"), dropped_path("'/tmp/my picture.png'")
    (PosixPath('/tmp/my picture.png'), PosixPath('/tmp/my picture.png'))
    """
    text = text.strip()
    if os.path.exists(os.path.expanduser(text)):  # False, not an error, where it is too long for a path
        return Path(text).expanduser()
    if text.startswith("file://"):
        return Path(unquote(urlparse(text).path))
    try:
        words = shlex.split(text)
    except ValueError:  # an apostrophe in the name
        words = [text.replace("\\ ", " ")]
    return Path(" ".join(words)).expanduser()


def dropped_picture(line: str) -> Path | None:
    """The picture, where a whole line is nothing but its path."""
    line = line.strip()
    if "\n" in line or not line:
        return None
    path = dropped_path(line)
    return path if path.suffix.lower() in PICTURES and os.path.isfile(path) else None


def leading_picture(line: str) -> tuple[Path, str] | None:
    """(picture, the rest), where a line begins with a picture's path: dropped, and then written on."""
    found = re.match(r"""\s*('[^']+'|"[^"]+"|(?:/|~|file://)(?:\\.|\S)*)\s+(?=\S)""", line)
    if found is None:
        return None
    path = dropped_picture(found[1])
    return None if path is None else (path, line[found.end() :])


def history_file() -> Path:
    """Where the lines of earlier chats are kept."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "mpi-mlx" / "chat_history"


def prompt_session(commands: dict[str, str]):
    """A prompt: Enter sends; Alt+Enter, or a backslash before Enter, begins a new line; arrows go back."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.formatted_text import HTML
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")  # what Enter was, where it was typed while an answer was being written
    def _(event) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event) -> None:
        event.current_buffer.insert_text("\n")

    file = history_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(file, "a"):
            os.chmod(file, 0o600)
        history = FileHistory(str(file))
    except OSError:
        history = InMemoryHistory()
    completer = WordCompleter(list(commands), meta_dict=commands, sentence=True)
    session: PromptSession = PromptSession(
        HTML("<ansigreen><b>› </b></ansigreen>"),
        multiline=True,
        prompt_continuation="  ",
        key_bindings=keys,
        history=history,
        completer=completer,
        complete_while_typing=Condition(lambda: session.default_buffer.text.startswith("/")),
        enable_open_in_editor=True,
    )
    return session
