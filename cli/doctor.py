"""`mpi-mlx doctor`: what this machine has, and what to do about what it lacks."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

SLOW = 60.0  # GFLOP/s of fp32 on CPU below which no good BLAS can be at work
LEAST_MEMORY, LEAST_DISK = 4e9, 2e9


def doctor_command() -> None:
    """Show device, MLX build, BLAS and its speed, compiler, memory and disk; say what to mend."""
    from mpi_mlx import runtime

    info = runtime.device_info()
    checks = findings(info, runtime.measure_gflops(), shutil.disk_usage(Path.cwd()).free, sys.platform)
    _show(checks)


def findings(info, gflops: float, disk_free: int, platform: str) -> list[tuple[str, str, str | None]]:
    """(what, what was found, what to do about it or None). ``info``: a ``runtime.DeviceInfo``."""
    from mpi_mlx_cli.state import size

    on_cpu = info.backend == "CPU"
    out = [
        ("python", sys.version.split()[0], None),
        ("device", f"{info.device} ({info.name})", _device_advice(info, platform)),
        ("mlx", f"{info.mlx}, {info.backend} build", None),
    ]
    if on_cpu and platform == "linux":
        found = info.blas.path or "none"
        advice = None
        if info.blas.path is None:
            advice = f"{info.blas.note}; without an OpenBLAS training is some 20 times slower"
        out.append(("blas", found, advice))
    slow = None
    if on_cpu and gflops < SLOW and info.blas.path is not None:
        slow = "slow for this BLAS: is the machine busy?"
    out.append(("fp32 speed", f"{gflops:,.0f} GFLOP/s", slow))
    if on_cpu:
        out.append(("cores", f"{info.cores}, {info.threads or 'all'} used by the BLAS", None))
        advice = None
        if platform == "linux" and info.compiler is None:
            advice = "mx.compile is off; apt install g++ makes element-wise work somewhat quicker"
        out.append(("c++ compiler", info.compiler or "none", advice))
    if info.memory_total is not None:
        free = "" if info.memory_available is None else f", {size(info.memory_available)} available"
        usable = info.memory_total if info.memory_available is None else info.memory_available
        little = "the quickstart takes up to 4 GB; close other programs" if usable < LEAST_MEMORY else None
        out.append(("memory", f"{size(info.memory_total)}{free}", little))
    full = None
    if disk_free < LEAST_DISK:
        full = "free some space: a run writes checkpoints, a hub model is gigabytes"
    out.append(("disk here", f"{size(disk_free)} free", full))
    return out


def _device_advice(info, platform: str) -> str | None:
    if info.backend != "CPU":
        return None
    if platform == "darwin":
        return "Metal is not available: use a Mac with Apple silicon, and a native arm64 Python"
    if shutil.which("nvidia-smi"):
        return "an NVIDIA GPU is here: pip install 'mpi-mlx[cuda]' to use it"
    return None


def _show(checks: list[tuple[str, str, str | None]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, found, advice in checks:
        mark = Text("✓", "green") if advice is None else Text("!", "bold yellow")
        table.add_row(mark, name, Text(found))
        if advice is not None:
            table.add_row("", "", Text(f"{advice}", "yellow"))
    console.print(table)
    wanting = sum(advice is not None for *_, advice in checks)
    said = f"{wanting} to look at" if wanting else "all well; next: mpi-mlx train quickstart"
    console.print(said, style="bold")
