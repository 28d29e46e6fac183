"""One training a folder: a lock that the system takes back when the process ends, however it ends."""

from __future__ import annotations

import os
from pathlib import Path

from mpi_mlx.errors import CheckpointError

LOCK = "lock"  # kept afterwards: one that is deleted could be held twice


class FolderLock:
    """Held until :meth:`release` or the end of the process. Only trainers ask for it; readers need not.

    Raises:
        CheckpointError: another process holds it.
    """

    def __init__(self, folder: Path):
        self._file = None
        try:
            import fcntl
        except ImportError:  # Windows
            return
        self._file = open(folder / LOCK, "a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip()
            self.release()
            which = f"process {holder}" if holder.isdigit() else "another process"
            raise CheckpointError(
                f"{folder} is being trained by {which}; wait until it ends, or choose another --output"
            ) from None
        except OSError:  # a file system without locks
            pass

    def sign(self) -> None:
        """Leaves the process's number for whoever comes second."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.write(f"{os.getpid()}\n")
            self._file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
