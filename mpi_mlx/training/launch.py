"""Data parallelism on one machine: the same command, started once for each rank.

MLX's ring back end over loopback reads MLX_RANK and MLX_HOSTFILE. MLX's own launcher watches its processes in
a busy loop, which costs a core that the training needs; this one sleeps until something ends.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mpi_mlx.errors import TrainingError

LIFELINE = "MPI_MLX_LIFELINE"  # a pipe's end that closes when the launcher dies
PATIENCE = 5.0  # seconds that the other ranks get to say what went wrong themselves, and to end
LAST_LINES = 5


@dataclass(frozen=True)
class Ended:
    """``code``: the exit code to pass on; ``error``: what the rank that failed first had to say."""

    code: int
    error: str | None = None


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen
    error_file: Path
    stderr_file: Path
    ended: float | None = None


def launch(command: Sequence[str], processes: int, *, error_variable: str = "MPI_MLX_ERROR_FILE") -> Ended:
    """Runs ``command`` as ``processes`` ranks and waits for all of them.

    Rank 0 keeps this process' terminal, the others are silent. When a rank fails the others are ended. A
    rank writes the one line that it would show as an error to the file named by ``error_variable``; without
    one, the end of its stderr is taken. Ctrl-C goes to rank 0 alone, which has to agree with the others on
    where to stop.

    Source: the environment that ``mlx.launch --backend ring`` makes.
    """
    with tempfile.TemporaryDirectory(prefix="mpi-mlx-ranks-") as folder:
        reading, writing = os.pipe()
        os.set_inheritable(reading, True)
        ranks: list[_Rank] = []
        handlers = _take_signals(ranks)
        try:
            environment = _environment(Path(folder), processes)
            for number in range(processes):
                ranks.append(_start(command, number, environment, Path(folder), reading, error_variable))
            return _wait(ranks)
        finally:
            _end(ranks)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.close(reading)
            os.close(writing)


def end_with_launcher() -> None:
    """In a rank: ends this process as soon as the launcher is gone, however it went."""
    handle = os.environ.get(LIFELINE)
    if handle is None:
        return

    def watch() -> None:
        with suppress(OSError):
            os.read(int(handle), 1)  # nothing is ever written: returns when the other end is closed
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _environment(folder: Path, processes: int) -> dict[str, str]:
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(processes)]), encoding="utf-8")
    return {
        **os.environ,
        "MLX_HOSTFILE": str(hosts),
        "MPI_MLX_PROCESSES": str(processes),
        "OPENBLAS_NUM_THREADS": "1",  # more threads than cores make every product slower
    }


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nothing listens on now.

    From below those that systems give to outgoing connections, which could take one before it is listened on.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_768), 200):
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise TrainingError(f"no {count} free ports between 20000 and 32768 on this machine, which its processes need")


def _start(command, number: int, environment, folder: Path, reading: int, error_variable: str) -> _Rank:
    error_file, stderr_file = folder / f"error-{number}", folder / f"stderr-{number}"
    environment = {
        **environment, "MLX_RANK": str(number), LIFELINE: str(reading), error_variable: str(error_file),
    }
    silent = {}
    if number > 0:
        nothing = subprocess.DEVNULL
        silent = {"stdin": nothing, "stdout": nothing, "stderr": open(stderr_file, "wb")}
    try:
        process = subprocess.Popen(
            command, env=environment, pass_fds=(reading,), start_new_session=number > 0, **silent
        )
    finally:
        if number > 0:
            silent["stderr"].close()
    return _Rank(number, process, error_file, stderr_file)


def _take_signals(ranks: list[_Rank]) -> dict:
    """Ctrl-C reaches rank 0 by itself, for it shares the terminal; a third one ends all. SIGTERM ends all."""
    presses = 0

    def interrupt(*_) -> None:
        nonlocal presses
        presses += 1
        if presses > 2:
            _end(ranks, patience=0.0)

    def terminate(*_) -> None:
        _end(ranks)

    return {
        number: signal.signal(number, handler)
        for number, handler in ((signal.SIGINT, interrupt), (signal.SIGTERM, terminate))
    }


def _wait(ranks: list[_Rank]) -> Ended:
    """Waits for all; on the first failure lets the others explain themselves, then ends them."""
    finished = threading.Event()

    def watch(rank: _Rank) -> None:
        rank.process.wait()
        rank.ended = time.monotonic()
        finished.set()

    for rank in ranks:
        threading.Thread(target=watch, args=(rank,), daemon=True).start()
    while True:
        finished.wait(1.0)  # signals are handled between waits
        finished.clear()
        gone = sorted((r for r in ranks if r.ended is not None), key=lambda r: r.ended)
        failed = [r for r in gone if r.process.returncode != 0]
        if failed:
            deadline = time.monotonic() + PATIENCE
            while any(r.ended is None for r in ranks) and time.monotonic() < deadline:
                time.sleep(0.1)
            return _failure(failed[0], ranks)
        if len(gone) == len(ranks):
            return Ended(0)


def _failure(first: _Rank, ranks: list[_Rank]) -> Ended:
    """What went wrong: the error of the rank that failed first, or of one that could still say something."""
    code = first.process.returncode
    if ranks[0].process.returncode == 130:  # interrupted
        return Ended(130, _said(ranks[0]))
    said = [_said(rank) for rank in (first, *ranks)]
    if code < 0 and said[0] is None:
        return Ended(1, f"process {first.number} of {len(ranks)} was ended by {_signal_name(-code)}"
                        + ("; out of memory? lower batch_size or processes" if code == -9 else ""))
    error = next((text for text in said if text), None)
    if error is None and first.number > 0:
        tail = first.stderr_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        error = f"process {first.number} of {len(ranks)} failed: " + " | ".join(tail[-LAST_LINES:])
    return Ended(code if code > 0 else 1, error)


def _said(rank: _Rank) -> str | None:
    with suppress(OSError):
        return rank.error_file.read_text(encoding="utf-8").strip() or None
    return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _end(ranks: list[_Rank], patience: float | None = None) -> None:
    """Ends what still runs, politely first."""
    running = [rank for rank in ranks if rank.process.poll() is None]
    for rank in running:
        with suppress(OSError):
            rank.process.terminate()
    deadline = time.monotonic() + (PATIENCE if patience is None else patience)
    while any(rank.process.poll() is None for rank in running) and time.monotonic() < deadline:
        time.sleep(0.05)
    for rank in running:
        if rank.process.poll() is None:
            with suppress(OSError):
                rank.process.kill()
            rank.process.wait()
