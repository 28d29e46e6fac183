"""Device, dtype, threads, BLAS and memory: chosen here and nowhere else. Imports no mlx until asked to.

On Linux CPUs MLX's wheel links the reference BLAS. An OpenBLAS opened with RTLD_GLOBAL before mlx is imported
takes its place: training is many times faster. ``import mpi_mlx`` does this.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mpi_mlx.errors import DeviceError

BLAS_VARIABLE = "MPI_MLX_BLAS"  # a path, or "off"
SYSTEM_BLAS = ("libopenblas.so.0", "libopenblas.so")
SMALL_MODEL = 20_000_000  # parameters
_blas = None  # BlasInfo, once looked for
_library = None  # the opened OpenBLAS
_chosen_threads = False  # whether the number of threads is ours to choose


@dataclass(frozen=True)
class BlasInfo:
    """Which OpenBLAS was opened, or why none was."""

    path: str | None
    note: str


@dataclass(frozen=True)
class DeviceInfo:
    """What the machine is. Memory in bytes; ``available`` may be None where the system does not say."""

    device: str
    name: str
    mlx: str
    backend: str  # Metal, CUDA or CPU
    memory_total: int | None
    memory_available: int | None
    cores: int
    threads: int
    compiler: str | None
    blas: BlasInfo


def preload_blas() -> BlasInfo:
    """Opens an OpenBLAS for MLX's CPU back end, once; on macOS (Accelerate) there is nothing to do.

    Looks at $MPI_MLX_BLAS, then at the one inside opencv-python's wheel, then at the system's.
    """
    global _blas
    if _blas is None:
        _blas = _open_blas()
    return _blas


def _open_blas() -> BlasInfo:
    if sys.platform != "linux":
        return BlasInfo(None, "not needed here")
    chosen = os.environ.get(BLAS_VARIABLE)
    if chosen == "off":
        return BlasInfo(None, f"switched off by {BLAS_VARIABLE}")
    if "mlx.core" in sys.modules:
        return BlasInfo(None, "mlx was imported before mpi_mlx; import mpi_mlx first")
    # Threads are read when the library is opened. More than two gain little in models that run on CPUs.
    global _chosen_threads
    _chosen_threads = "OPENBLAS_NUM_THREADS" not in os.environ
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(default_threads()))
    for path in [chosen] if chosen else [*_wheel_blas(), *SYSTEM_BLAS]:
        try:
            library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        # Some builds carry suffixed symbols (cblas_sgemm64_), which MLX does not look for.
        if hasattr(library, "cblas_sgemm"):
            global _library
            _library = library
            return BlasInfo(path, "found")
    if chosen:
        raise DeviceError(f"{BLAS_VARIABLE}={chosen} is no OpenBLAS that can be opened; unset or correct it")
    return BlasInfo(None, "none found; pip install opencv-python, or apt install libopenblas0-pthread")


def fit_threads(parameters: int) -> None:
    """One BLAS thread for a model of few parameters: its products are over before a second one has joined.

    On two idle cores the embedded model trains twice as fast so. $OPENBLAS_NUM_THREADS wins when it was given.
    """
    setter = getattr(_library, "openblas_set_num_threads", None)
    if setter is not None and _chosen_threads:
        threads = 1 if parameters < SMALL_MODEL else default_threads()
        setter(threads)
        os.environ["OPENBLAS_NUM_THREADS"] = str(threads)


def _wheel_blas() -> list[str]:
    """OpenBLAS files inside installed opencv wheels."""
    found: list[str] = []
    for name in ("cv2", "numpy"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        site = Path(spec.origin).parent.parent
        for folder in ("opencv_python.libs", "opencv_python_headless.libs", "opencv_contrib_python.libs"):
            found += [str(p) for p in sorted((site / folder).glob("libopenblas*.so*"))]
    return list(dict.fromkeys(found))


def default_threads() -> int:
    """Two, one when it is one of several processes (also of ``mlx.launch``), fewer on fewer cores."""
    several = int(os.environ.get("MPI_MLX_PROCESSES", "1")) > 1 or "MLX_RANK" in os.environ
    return 1 if several else min(2, cores())


def cores() -> int:
    """Cores that this process may use: its affinity counts, where the system knows of such."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, usable or 1)


def compiler() -> str | None:
    """The C++ compiler that ``mx.compile`` calls at run time on CPUs, or None."""
    return shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


def configure() -> None:
    """Settings that need mlx: no compilation without a compiler, a wired limit on Metal. Idempotent."""
    import mlx.core as mx

    if on_cpu() and sys.platform == "linux" and compiler() is None:
        mx.disable_compile()
    if mx.metal.is_available():
        limit_metal_memory(mx)


def limit_metal_memory(mx) -> int:
    """Lets Metal keep up to the recommended working set wired; returns the bytes. ``mx``: mlx.core."""
    info = mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()
    limit = int(info["max_recommended_working_set_size"])
    mx.set_wired_limit(limit)
    return limit


def on_cpu() -> bool:
    import mlx.core as mx

    return mx.default_device().type == mx.DeviceType.cpu


def default_dtype() -> str:
    """``float32`` on CPU (16-bit products are slow there), else ``bfloat16``."""
    return "float32" if on_cpu() else "bfloat16"


def seed(number: int) -> None:
    """Seeds mlx, numpy's legacy generator and random."""
    import mlx.core as mx
    import numpy as np

    mx.random.seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


def backend() -> str:
    """Metal, CUDA or CPU: what arrays are computed on."""
    import mlx.core as mx

    if on_cpu():
        return "CPU"
    if mx.metal.is_available():
        return "Metal"
    return "CUDA" if getattr(mx, "cuda", None) is not None and mx.cuda.is_available() else "GPU"


def device_summary() -> str:
    """One line for headings: ``CPU, 2 threads, OpenBLAS``."""
    kind = backend()
    if kind != "CPU":
        return kind
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "?")
    blas = preload_blas()
    return f"CPU, {threads} thread{'s' * (threads != '1')}, {'OpenBLAS' if blas.path else 'no OpenBLAS'}"


def device_info() -> DeviceInfo:
    """Everything ``mpi-mlx doctor`` shows, but the measured speed."""
    from importlib.metadata import version

    import mlx.core as mx

    total, available = memory()
    return DeviceInfo(
        device=str(mx.default_device()), name=platform.processor() or platform.machine(), mlx=version("mlx"),
        backend=backend(), memory_total=total, memory_available=available, cores=cores(),
        threads=int(os.environ.get("OPENBLAS_NUM_THREADS", "0") or 0), compiler=compiler(),
        blas=preload_blas(),
    )


def memory() -> tuple[int | None, int | None]:
    """(total, available) bytes of main memory; a container's limit counts."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        total = None
    available = None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                available = int(line.split()[1]) * 1024
    except OSError:
        pass
    limit, used = container_memory()
    if limit is not None and total is not None and limit < total:
        total, available = limit, min(available or limit, max(0, limit - used))
    return total, available


def free_memory() -> int | None:
    """Bytes that MLX's device can still take, where that is known: of Metal's working set or a GPU's memory what
    MLX does not use, on CPUs of main memory."""
    import mlx.core as mx

    if on_cpu():
        total, available = memory()
        return total if available is None else available
    info = mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()
    names = ("max_recommended_working_set_size", "total_memory", "memory_size")
    total = next((int(info[name]) for name in names if info.get(name)), None)
    return None if total is None else max(0, total - mx.get_active_memory())


def container_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int]:
    """(limit, used) bytes of this process' control group, version 2 or 1; None without a limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return int((root / limit).read_text()), int((root / used).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None, 0


def measure_gflops(size: int = 1024, seconds: float = 0.5) -> float:
    """float32 matrix products of ``size``, in 10**9 operations a second."""
    import mlx.core as mx

    a = mx.random.normal((size, size))
    mx.eval(a, a @ a)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        mx.eval(a @ a)
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - began) / 1e9


@contextmanager
def keep_awake(run=subprocess.Popen) -> Iterator[None]:
    """Within, a Mac does not fall asleep (``caffeinate -i``); elsewhere nothing happens."""
    if sys.platform != "darwin" or shutil.which("caffeinate") is None:
        yield
        return
    process = run(["caffeinate", "-i", "-w", str(os.getpid())])
    try:
        yield
    finally:
        process.terminate()
