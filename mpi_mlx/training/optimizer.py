"""Optimizers of mlx behind one schedule: AdamW, or Muon on matrices with AdamW on everything else."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

ADAM_SHARE = 0.15  # AdamW's rate beside Muon's: Muon steps have unit spectral norm, Adam's unit element size


def learning_rate_at(step: int, total: int, spec) -> float:
    """The rate of update ``step`` (0-based) of ``total``: linear warm-up, then the schedule.

    ``spec`` needs learning_rate, warmup (fraction of the steps), schedule (cosine, linear or constant) and
    min_lr_ratio (the last rate's share of the peak).

    >>> # warm-up of 2 in 10 steps at peak 1: 0.5, 1.0, then down
    """
    warm = int(round(spec.warmup * total))
    if step < warm:
        return spec.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(1, total - 1 - warm)
    if spec.schedule == "constant":
        return spec.learning_rate
    share = 0.5 * (1 + math.cos(math.pi * progress)) if spec.schedule == "cosine" else 1 - progress
    return spec.learning_rate * (spec.min_lr_ratio + (1 - spec.min_lr_ratio) * share)


class Optimizer:
    """Updates a module's trainable parameters; its whole state is a flat dict of arrays.

    Parameters of 16 bits are updated in float32 copies that it keeps, or small steps would round to nothing.
    ``muon``: hidden matrices (2-D, not an embedding or head) take Muon at the scheduled rate, all other
    parameters AdamW at ``adam_share`` of it.
    """

    def __init__(self, kind: str, *, weight_decay: float = 0.0, adam_share: float = ADAM_SHARE):
        adam = optim.AdamW(learning_rate=0.0, weight_decay=weight_decay, betas=[0.9, 0.99], bias_correction=True)
        if kind == "adamw":
            self.parts = [(adam, 1.0)]
        elif kind == "muon":
            muon = optim.Muon(learning_rate=0.0, weight_decay=weight_decay)
            self.parts = [(muon, 1.0), (adam, adam_share)]
        else:
            raise ValueError(f"unknown optimizer {kind!r}: adamw or muon")
        self.masters: dict[str, mx.array] = {}

    def _split(self, flat: dict[str, mx.array]) -> list[dict[str, mx.array]]:
        if len(self.parts) == 1:
            return [flat]
        matrices = {k: v for k, v in flat.items() if v.ndim == 2 and "embed" not in k and "lm_head" not in k}
        return [matrices, {k: v for k, v in flat.items() if k not in matrices}]

    def init(self, parameters: dict) -> None:
        """Makes the (zero) state for a tree of parameters."""
        whole = {k: v.astype(mx.float32) for k, v in tree_flatten(parameters)}
        for (part, _), flat in zip(self.parts, self._split(whole), strict=True):
            part.init(tree_unflatten(list(flat.items())) if flat else {})

    def update(self, model, gradients: dict, learning_rate: float) -> None:
        """One step on ``model`` in place."""
        flat_grads = dict(tree_flatten(gradients))
        flat_params = dict(tree_flatten(model.trainable_parameters()))
        types = {k: v.dtype for k, v in flat_params.items() if v.dtype.size < 4}
        self.masters = {k: self.masters.get(k, flat_params[k].astype(mx.float32)) for k in types}
        flat_params |= self.masters
        flat_grads = {k: v.astype(flat_params[k].dtype) for k, v in flat_grads.items()}
        for (part, share), grads in zip(self.parts, self._split(flat_grads), strict=True):
            if not grads:
                continue
            part.learning_rate = learning_rate * share
            params = tree_unflatten([(k, flat_params[k]) for k in grads])
            updated = dict(tree_flatten(part.apply_gradients(tree_unflatten(list(grads.items())), params)))
            self.masters |= {k: v for k, v in updated.items() if k in types}
            updated |= {k: updated[k].astype(types[k]) for k in updated if k in types}
            model.update(tree_unflatten(list(updated.items())))

    @property
    def state(self) -> dict[str, mx.array]:
        """Flat names to arrays: what a checkpoint keeps."""
        out = {f"master.{name}": value for name, value in self.masters.items()}
        for n, (part, _) in enumerate(self.parts):
            out |= {f"{n}.{name}": value for name, value in tree_flatten(part.state)}
        return out

    def load_state(self, state: dict[str, mx.array]) -> None:
        """Takes what :attr:`state` gave."""
        for n, (part, _) in enumerate(self.parts):
            mine = [(name.split(".", 1)[1], v) for name, v in state.items() if name.startswith(f"{n}.")]
            part.state = tree_unflatten(mine)
        self.masters = {k.removeprefix("master."): v for k, v in state.items() if k.startswith("master.")}


def clip_by_global_norm(gradients: dict, limit: float) -> tuple[dict, mx.array]:
    """The gradients scaled to a global L2 norm of at most ``limit`` (0: not clipped), and the norm before."""
    norm = mx.sqrt(sum(mx.square(g.astype(mx.float32)).sum() for _, g in tree_flatten(gradients)))
    if limit <= 0:
        return gradients, norm
    scale = mx.minimum(limit / (norm + 1e-6), 1.0)
    return tree_map(lambda g: (g * scale).astype(g.dtype), gradients), norm
