import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource
from mpi_mlx.allocator import keep_freed_memory
kept = keep_freed_memory()
import mlx.core as mx
x = mx.zeros((2_000_000,))
def use():
    for _ in range(5):
        y = mx.abs(x + 1)
        mx.eval((y * 2.5 + mx.square(y)) / (1.0 + y))
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_pages_are_faulted_in_once_not_for_every_array():
    def run(keep):
        env = {**os.environ, "MPI_MLX_KEEP_MEMORY": keep}
        command = [sys.executable, "-c", SCRIPT]
        output = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
        return tuple(map(int, output.split()))

    (kept, few), (left, many) = run("1"), run("0")
    assert (kept, left) == (1, 0)
    if many < 100:
        pytest.skip("left as it is, malloc faults in no pages here: there is nothing to save")
    assert few < 0.1 * many
