"""Data parallelism: each process takes every n-th micro-batch; sums travel, ranks other than 0 are silent."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten


@lru_cache(maxsize=1)
def world() -> mx.distributed.Group:
    """The group that ``mlx.launch`` made, or a group of one."""
    return mx.distributed.init()


def is_main() -> bool:
    return world().rank() == 0


def share(items: list) -> list:
    """This process' part of ``items``; every process must be given the same list."""
    return items[world().rank() :: world().size()]


def sum_tree(tree: dict) -> dict:
    """Sums a tree of float arrays over the processes, in one message."""
    if world().size() == 1:
        return tree
    flat = tree_flatten(tree)
    joined = mx.concatenate([v.reshape(-1).astype(mx.float32) for _, v in flat])
    joined = mx.distributed.all_sum(joined, group=world())
    out, at = [], 0
    for name, value in flat:
        out.append((name, joined[at : at + value.size].reshape(value.shape).astype(value.dtype)))
        at += value.size
    return tree_unflatten(out)


def sum_numbers(values: list[float]) -> list[float]:
    """Sums numbers over the processes (float32)."""
    if world().size() == 1:
        return values
    return mx.distributed.all_sum(mx.array(values, mx.float32), group=world()).tolist()


def of_main(value: float | None) -> float | None:
    """Rank 0's number on every process, so that all decide alike (float32); None where it is None everywhere."""
    if value is None or world().size() == 1:
        return value
    return sum_numbers([value if is_main() else 0.0])[0]


def gather_objects(mine: list) -> list:
    """Lists of JSON values of every process, joined in rank order, on every process."""
    import json

    import numpy as np

    if world().size() == 1:
        return mine
    raw = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    sizes = mx.distributed.all_gather(mx.array([raw.size], mx.int32), group=world()).tolist()
    padded = np.zeros(max(sizes), np.uint8)
    padded[: raw.size] = raw
    everything = np.array(mx.distributed.all_gather(mx.array(padded), group=world())).reshape(len(sizes), -1)
    return [item for row, n in zip(everything, sizes, strict=True) for item in json.loads(row[:n].tobytes())]


def barrier() -> None:
    """Waits until every process is here."""
    mx.eval(mx.distributed.all_sum(mx.ones(1), group=world()))
