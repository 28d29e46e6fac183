"""The one training loop. A stage is a source of batches and an objective; both are plain objects.

A source must be a function of the step alone (and of what its ``state`` keeps), so that a run continued
from a checkpoint takes the same batches as one that was never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mpi_mlx.errors import TrainingError
from mpi_mlx.training import world
from mpi_mlx.training.optimizer import Optimizer, clip_by_global_norm, learning_rate_at
from mpi_mlx.training.reports import StepReport


@dataclass
class Batch:
    """What one step trains on, as seen by this process.

    ``micros``: this process' micro-batches; ``count``: the normaliser of the summed loss over *all*
    processes; ``updates``: optimizer updates made on it; ``metrics``: what the source measured.
    ``minibatches``: further batches, whose updates follow in turn, one of each in every round of ``updates``.
    """

    micros: Sequence[Any]
    count: float
    tokens: int
    updates: int = 1
    metrics: dict[str, float] = field(default_factory=dict)
    identities: tuple[str, ...] = ()
    minibatches: Sequence[Batch] = ()


class Source(Protocol):
    """Gives the batch of a step; ``state`` holds whatever is not a function of the step, as JSON values."""

    def batch(self, step: int) -> Batch: ...

    def state(self) -> dict: ...

    def load_state(self, state: dict) -> None: ...


class Objective(Protocol):
    """(micro-batch) -> summed loss (scalar array) and metrics, each an array pair (sum, weight).

    ``prepare(micro)``, where there is one, is called before, outside of the gradient's trace.
    """

    def __call__(self, micro: Any) -> tuple[mx.array, dict[str, tuple[mx.array, mx.array]]]: ...


def fit(
    module: nn.Module,
    source: Source,
    objective: Objective,
    spec,
    *,
    total: int,
    seed: int,
    optimizer: Optimizer,
    start: int = 0,
) -> Iterator[StepReport]:
    """Trains ``module``'s trainable parameters for steps ``start`` .. ``total`` - 1, a report a step.

    ``spec``: the stage of the recipe (learning rate, schedule, clip_norm). After a report has been yielded
    the parameters and the optimizer are those after that step; the caller may save or stop there.

    Raises:
        TrainingError: the loss or the gradient is not finite; nothing has been updated then.
    """
    for step in range(start, total):
        began = time.perf_counter()
        # each process drops out by masks of its own
        mx.random.seed((seed * 1_000_003 + step + 7_919_000_003 * world.world().rank()) % 2**32)
        batch = source.batch(step)
        rate = learning_rate_at(step, total, spec)
        losses, sums = [], {}
        for _ in range(batch.updates):
            for part in (batch, *batch.minibatches):
                loss, norm, measured = _update(module, part, objective, spec, optimizer, rate, step)
                losses.append(loss)
                for name, pair in measured.items():  # over all updates: clipping happens in the later ones
                    sums[name] = tuple(a + b for a, b in zip(sums.get(name, (0.0, 0.0)), pair, strict=True))
        metrics = batch.metrics | {name: value / max(weight, 1e-9) for name, (value, weight) in sums.items()}
        first_loss = sum(losses[: 1 + len(batch.minibatches)]) / (1 + len(batch.minibatches))
        seconds = time.perf_counter() - began
        yield StepReport(
            stage=spec.stage, step=step + 1, total_steps=total, loss=first_loss, learning_rate=rate,
            tokens=batch.tokens, tokens_per_second=batch.tokens / seconds, seconds=seconds,
            memory_bytes=mx.get_peak_memory(), grad_norm=norm, metrics=metrics,
        )


def _update(module, batch: Batch, objective, spec, optimizer, rate: float, step: int):
    """One optimizer update on all of ``batch``: the loss, the gradient's norm, the metrics as (sum, weight)."""
    value_and_grad = nn.value_and_grad(module, objective)
    gradients, total, sums = None, 0.0, {}
    prepare = getattr(objective, "prepare", lambda micro: None)
    for micro in batch.micros:
        prepare(micro)
        (loss, extra), grads = value_and_grad(micro)
        gradients = grads if gradients is None else tree_map(mx.add, gradients, grads)
        mx.eval(gradients, loss, extra)
        total += loss.item()
        for name, (value, weight) in extra.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + value.item(), before[1] + weight.item())
    if gradients is None:
        gradients = tree_map(mx.zeros_like, module.trainable_parameters())
    gradients = world.sum_tree(gradients)
    names = sorted(set(world.gather_objects(list(sums))))  # a process may have had no rows of some kind
    joined = world.sum_numbers([len(batch.micros), total, *(x for n in names for x in sums.get(n, (0.0, 0.0)))])
    if not joined.pop(0):
        return 0.0, 0.0, {}  # no process had anything: a step of Adam would go on along its moments
    loss = joined[0] / max(batch.count, 1e-9)
    measured = {n: (joined[1 + 2 * i], joined[2 + 2 * i]) for i, n in enumerate(names)}
    scale = 1.0 / max(batch.count, 1e-9)
    gradients = tree_map(lambda g: g * scale, gradients)
    gradients, norm = clip_by_global_norm(gradients, spec.clip_norm)
    norm = norm.item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(_not_finite(spec.stage, step, loss, norm, batch, gradients))
    optimizer.update(module, gradients, rate)
    mx.eval(module.trainable_parameters(), optimizer.state)
    return loss, norm, measured


def _not_finite(stage: str, step: int, loss: float, norm: float, batch: Batch, gradients: dict) -> str:
    bad = [name for name, g in tree_flatten(gradients) if not mx.isfinite(g).all().item()]
    rows = ", ".join(batch.identities[:6]) or "unknown rows"
    return (
        f"stage {stage}, step {step + 1}: loss {loss:g}, gradient norm {norm:g} on rows {rows}"
        + (f"; first bad tensor {bad[0]}" if bad else "")
        + "; nothing was updated: lower learning_rate, or look at these rows"
    )
