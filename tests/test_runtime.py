import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from mpi_mlx import runtime
from mpi_mlx.errors import DeviceError

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


def python(code, **environment):
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    env = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_NUM_THREADS", "MPI_MLX_BLAS")}
    done = subprocess.run(command, capture_output=True, text=True, env=env | environment)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


# ---- BLAS


def provider(tmp_path, **environment):
    """The library that the loader gives libmlx for cblas_sgemm."""
    code = "import mpi_mlx, mlx.core as mx; a = mx.ones((64, 64)); mx.eval(a @ a)"
    python(code, LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(tmp_path / "log"), **environment)
    text = "".join(path.read_text() for path in tmp_path.glob("log.*"))
    bound = [line for line in text.splitlines() if "libmlx.so" in line and "`cblas_sgemm'" in line]
    if not bound:
        pytest.skip("this build of mlx takes no cblas_sgemm from elsewhere, or the C library is not glibc")
    return bound[0].partition(" to ")[2]


@on_linux
def test_matrix_products_run_on_the_openblas_that_was_opened(tmp_path):
    if runtime.preload_blas().path is None:
        pytest.skip("no OpenBLAS on this machine")
    assert "openblas" in provider(tmp_path)


@on_linux
def test_switched_off_they_run_on_mlx_s_own(tmp_path):
    assert "openblas" not in provider(tmp_path, MPI_MLX_BLAS="off")


@on_linux
def test_threads_are_chosen_before_the_library_reads_them():
    code = "import os, mpi_mlx; print(os.environ.get('OPENBLAS_NUM_THREADS'))"
    assert python(code) == str(min(2, runtime.cores()))
    assert python(code, OPENBLAS_NUM_THREADS="5") == "5"
    assert python(code, MPI_MLX_PROCESSES="2") == "1"
    assert python(code, MLX_RANK="0") == "1"


@on_linux
def test_small_models_take_one_thread_unless_told_otherwise():
    if runtime.preload_blas().path is None:
        pytest.skip("no OpenBLAS on this machine")
    code = (
        "from mpi_mlx import runtime; runtime.fit_threads({size}); "
        "print(runtime._library.openblas_get_num_threads(), runtime.device_summary().split(',')[1].split()[0])"
    )
    both = str(min(2, runtime.cores()))
    assert python(code.format(size=3_000_000)) == "1 1"
    assert python(code.format(size=135_000_000)) == f"{both} {both}"
    assert python(code.format(size=3_000_000), OPENBLAS_NUM_THREADS="2") == "2 2"


@on_linux
def test_a_wrong_library_is_named_and_a_late_import_is_noted():
    said = python("import mpi_mlx", MPI_MLX_BLAS="/nowhere.so")
    assert said.startswith("mpi_mlx.errors.DeviceError: MPI_MLX_BLAS=/nowhere.so is no OpenBLAS")
    assert "import mpi_mlx first" in python(
        "import mlx.core; from mpi_mlx import runtime; print(runtime.preload_blas().note)"
    )


def test_importing_the_package_imports_no_mlx_and_gives_its_names():
    heavy = "'mlx.core' in sys.modules or 'pydantic' in sys.modules or 'numpy' in sys.modules"
    assert python(f"import mpi_mlx, sys; print({heavy})") == "False"
    code = "from mpi_mlx import load_recipe, train, load_model, evaluate; print(train.__module__)"
    assert python(code) == "mpi_mlx.training.run"
    assert python("from mpi_mlx import nothing").startswith("ImportError: cannot import name 'nothing'")


# ---- device, memory


def test_cpu_means_float32_and_a_gpu_bfloat16():
    code = "from mpi_mlx import runtime; runtime.on_cpu = lambda: {}; print(runtime.default_dtype())"
    assert [python(code.format(on_cpu)) for on_cpu in (True, False)] == ["float32", "bfloat16"]


def test_device_info():
    import mlx.core as mx

    info = runtime.device_info()
    assert info.mlx == mx.__version__ and info.memory_total > 0
    assert info.memory_available is None or 0 < info.memory_available <= info.memory_total
    assert runtime.backend() in runtime.device_summary()
    assert runtime.measure_gflops(64, 0.01) > 0


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"memory.max": "3000", "memory.current": "1000"}, (3000, 1000)),
        ({"memory.max": "max", "memory.current": "1000"}, (None, 0)),
        ({"memory/memory.limit_in_bytes": "5", "memory/memory.usage_in_bytes": "4"}, (5, 4)),
        ({}, (None, 0)),
    ],
)
def test_a_container_s_memory(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert runtime.container_memory(tmp_path) == expected


def test_a_container_s_limit_counts(monkeypatch):
    monkeypatch.setattr(runtime, "container_memory", lambda: (5_000_000, 4_000_000))
    assert runtime.memory() == (5_000_000, 1_000_000)
    monkeypatch.setattr(runtime, "container_memory", lambda: (2**62, 0))
    assert runtime.memory()[0] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_the_same_seed_draws_the_same():
    import random

    import mlx.core as mx

    def draw():
        runtime.seed(7)
        return random.random(), np.random.rand(), mx.random.uniform().item()

    assert draw() == draw()


# ---- macOS, faked


def test_metal_keeps_the_recommended_working_set_wired():
    wired = []
    mx = SimpleNamespace(
        device_info=lambda: {"max_recommended_working_set_size": 12_345.0}, set_wired_limit=wired.append
    )
    assert runtime.limit_metal_memory(mx) == 12_345 and wired == [12_345]
    old = SimpleNamespace(metal=SimpleNamespace(device_info=mx.device_info), set_wired_limit=wired.append)
    assert runtime.limit_metal_memory(old) == 12_345


def test_a_mac_stays_awake_while_it_trains(monkeypatch):
    calls = []

    def run(command):
        calls.append(command)
        return SimpleNamespace(terminate=lambda: calls.append("ended"))

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(runtime.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(KeyError):
        with runtime.keep_awake(run=run):
            assert calls == [["caffeinate", "-i", "-w", str(os.getpid())]]
            raise KeyError
    assert calls[1:] == ["ended"]
    monkeypatch.setattr(sys, "platform", "linux")
    with runtime.keep_awake(run=run):
        assert len(calls) == 2


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    import mlx.core as mx

    switched = []
    monkeypatch.setattr(mx, "disable_compile", lambda: switched.append("off"))
    monkeypatch.setattr(runtime, "on_cpu", lambda: True)
    monkeypatch.setattr(sys, "platform", "linux")
    runtime.configure()
    assert switched == ([] if runtime.compiler() else ["off"])
    monkeypatch.setattr(runtime, "compiler", lambda: None)
    runtime.configure()
    assert switched[-1] == "off"


def test_blas_variable_raises_a_device_error(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("MPI_MLX_BLAS", "/nowhere.so")
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    with pytest.raises(DeviceError, match="unset or correct it"):
        runtime._open_blas()


def test_free_memory_of_the_device(monkeypatch):
    import mlx.core as mx

    monkeypatch.setattr(runtime, "on_cpu", lambda: True)
    for known, free in (((10, 4), 4), ((10, None), 10), ((None, None), None)):
        monkeypatch.setattr(runtime, "memory", lambda known=known: known)
        assert runtime.free_memory() == free
    monkeypatch.setattr(runtime, "on_cpu", lambda: False)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 30)
    for info, free in (({"max_recommended_working_set_size": 75, "memory_size": 100}, 45),
                       ({"total_memory": 80}, 50), ({"total_memory": 20}, 0), ({}, None)):  # fmt: skip
        monkeypatch.setattr(mx, "device_info", lambda info=info: info)
        assert runtime.free_memory() == free
