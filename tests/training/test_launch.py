import signal
import subprocess
import sys
import time

import pytest

from mpi_mlx.training import launch as launching
from mpi_mlx.training.launch import Ended, free_ports, launch

RANK = "import os, sys, time; rank = int(os.environ['MLX_RANK']); "


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(launching, "PATIENCE", 1.5)


def ranks(script, count=2):
    return launch([sys.executable, "-c", RANK + script], count)


def alive(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.strip().startswith("Z")


def test_all_ranks_run_and_sum_over_the_ring():
    script = (
        "import mlx.core as mx; g = mx.distributed.init(strict=True, backend='ring'); "
        "total = mx.distributed.all_sum(mx.array(10.0 + rank)).item(); "
        "sys.exit(0 if (total, g.size()) == (21.0, 2) else 7)"
    )
    assert ranks(script) == Ended(0)


def test_environment_of_a_rank():
    assert ranks("sys.exit(0 if os.environ['OPENBLAS_NUM_THREADS'] == '1' else 3)") == Ended(0)
    assert ranks("sys.exit(0 if os.environ['MPI_MLX_PROCESSES'] == '3' else 3)", 3) == Ended(0)


def test_the_error_of_a_rank_ends_the_others():
    began = time.monotonic()
    ended = ranks(
        "\nif rank == 1:\n    open(os.environ['MPI_MLX_ERROR_FILE'], 'w').write('no such data'); sys.exit(2)"
        "\ntime.sleep(60)"
    )
    assert ended == Ended(2, "no such data") and time.monotonic() - began < 30


def test_the_first_to_fail_is_believed():
    ended = ranks(
        "mine = os.environ['MPI_MLX_ERROR_FILE']"
        "\nif rank == 0:"
        "\n    while not (os.path.exists(mine[:-1] + '1.pid') and open(mine[:-1] + '1.pid').read()):"
        "\n        time.sleep(0.05)"
        "\n    try:"
        "\n        while not os.kill(int(open(mine[:-1] + '1.pid').read()), 0): time.sleep(0.05)"
        "\n    except ProcessLookupError: time.sleep(0.5)"
        "\nelse:"
        "\n    open(mine + '.pid', 'w').write(str(os.getpid()))"
        "\nopen(mine, 'w').write(f'error {rank}'); sys.exit(2 - rank)"
    )
    assert ended == Ended(1, "error 1")


def test_a_rank_without_a_message_is_quoted():
    ended = ranks("\nif rank == 1: sys.exit('its last words')")
    assert ended.code == 1 and ended.error == "process 1 of 2 failed: its last words"


def test_a_killed_rank_is_named():
    ended = ranks("\nif rank == 1: os.kill(os.getpid(), 9)\ntime.sleep(60)")
    assert ended.code == 1 and ended.error.startswith("process 1 of 2 was ended by SIGKILL; out of memory?")


def test_an_interrupted_run_is_passed_on():
    assert ranks("sys.exit(130)") == Ended(130)


def test_no_rank_outlives_a_killed_launcher(tmp_path):
    rank = (
        "import os, time; from mpi_mlx.training.launch import end_with_launcher; end_with_launcher(); "
        f"open({str(tmp_path)!r} + '/' + os.environ['MLX_RANK'], 'w').write(str(os.getpid())); time.sleep(60)"
    )
    starter = (
        "import sys; from mpi_mlx.training.launch import launch; "
        f"launch([sys.executable, '-c', {rank!r}], 2)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", starter])
    files = [tmp_path / "0", tmp_path / "1"]
    deadline = time.monotonic() + 30
    while not all(f.exists() and f.read_text() for f in files) and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(f.read_text()) for f in files]
    assert all(alive(pid) for pid in pids)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def test_free_ports_differ():
    assert len(set(free_ports(5))) == 5
