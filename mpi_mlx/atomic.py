"""Files and folders that are there whole or not at all: written beside, flushed, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside ``path``; what is written there takes its name when the block ends.

    The temporary name keeps the suffix. If the block raises, ``path`` is as it was and nothing is left over.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """``text`` as UTF-8 with ``\\n`` line ends."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json_atomic(path: str | os.PathLike, value: Any) -> None:
    """``value`` as indented JSON. Numbers that JSON cannot hold (NaN, infinity) raise ValueError."""
    write_text_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def temporary_dir(path: str | os.PathLike) -> Iterator[Path]:
    """An empty folder beside ``path``, for :func:`replace_dir`; deleted at the end if it is still there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    temporary.chmod(0o777 & ~_umask())
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_dir(temporary: str | os.PathLike, path: str | os.PathLike) -> None:
    """Flushes every file of ``temporary`` and gives it the name ``path``, in place of a folder of that name.

    Killed in between, either folder may be missing under its name, but no folder is ever half-written: the
    old one is renamed away, the new one renamed in, the old one deleted.
    """
    temporary, path = Path(temporary), Path(path)
    for folder, _, names in os.walk(temporary):
        for name in names:
            _flush(Path(folder) / name)
        _flush(Path(folder))
    old = None
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
        os.replace(path, old)  # a rename onto an empty folder replaces it
    os.replace(temporary, path)
    _flush(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    """fsync of a file or folder; file systems that cannot are left alone."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        import errno

        if error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
