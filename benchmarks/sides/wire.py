"""What every side of a comparison does: the same BLAS, and one measurement each time the controller asks.

Standard library only: the sides run in the peers' own environments.
"""

import ctypes
import json
import os
import sys
import time

_out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever a trainer prints goes to stderr


def preload_blas() -> None:
    """Open the BLAS that the controller chose, before mlx is imported, for every side alike."""
    path = os.environ.get("BENCH_BLAS")
    if path:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def settings() -> dict:
    return json.loads(sys.argv[1])


def wait() -> None:
    """Block until the controller asks for the next measurement; leave when it is done asking."""
    if sys.stdin.readline().strip() != "go":
        os._exit(0)


def report(**values) -> None:
    _out.write(json.dumps(values) + "\n")
    _out.flush()


class Clock:
    """Wall and processor seconds since it was made."""

    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict:
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}


def time_batches(source, then=lambda batch: None) -> dict:
    """Clock `source.batch`, and call `then` after each; the dict holds what the last batch took."""
    drawing, taken = source.batch, {}

    def timed(step):
        clock = Clock()
        batch = drawing(step)
        taken.update(clock.read())
        then(batch)
        return batch

    source.batch = timed
    return taken


def phases(step: dict, rollout: dict) -> dict:
    """A step's seconds, its rollout's and its update's."""
    found = {f"rollout_{key}": rollout[key] for key in step}
    return step | found | {f"update_{key}": step[key] - rollout[key] for key in step}
