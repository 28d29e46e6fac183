"""What ``rl`` minimises on a batch of rollouts: the clipped surrogate, k3 KL, and labelled rows mixed in."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mpi_mlx.rollouts.groups import Rollout, RolloutGroup
from mpi_mlx.stages.supervised import SupervisedObjective
from mpi_mlx.training.batch import MicroBatch
from mpi_mlx.training.losses import aggregate, importance_weights, k3_kl, surrogate
from mpi_mlx.training.score import score


@dataclass
class RolloutMicro:
    """Some groups of a step, as one forward. R completions of up to T tokens."""

    groups: list[RolloutGroup]
    tree: bool | None = None  # how they are forwarded, as in `score`
    old_logprobs: mx.array | None = None  # (R, T), scored before the first update on this batch
    reference_logprobs: mx.array | None = None  # (R, T), adapters switched off
    trained: bool = False

    @property
    def rollouts(self) -> list[Rollout]:
        return [r for g in self.groups for r in g.rollouts]

    @property
    def pairs(self) -> list[tuple[object, list[np.ndarray]]]:
        return [g.pair for g in self.groups]


@dataclass
class LabelledMicro:
    """Labelled rows mixed into RL: their summed loss counts ``scale`` times."""

    batch: MicroBatch
    scale: float


class RolloutObjective:
    """The clipped surrogate, with k3 KL to the reference when ``kl_coef`` is positive: (sum, metrics)."""

    def __init__(self, model, spec):
        self.model, self.spec = model, spec
        self.supervised = SupervisedObjective(model)

    def prepare(self, micro: RolloutMicro | LabelledMicro) -> None:
        if isinstance(micro, LabelledMicro):
            return self.supervised.prepare(micro.batch)
        for group in micro.groups:
            if group.prompt.images:
                self.model.features(group.prompt.images)

    def __call__(self, micro: RolloutMicro | LabelledMicro) -> tuple[mx.array, dict]:
        if isinstance(micro, LabelledMicro):
            loss, _ = self.supervised(micro.batch)
            return loss * micro.scale, {}
        spec = self.spec
        logprobs, mask = score(self.model, micro.pairs, temperature=spec.temperature or 1.0, tree=micro.tree)
        if micro.old_logprobs is None:
            # Before the first update on this batch the model is the one that the ratio is taken against.
            micro.old_logprobs = mx.stop_gradient(logprobs)
        advantages = mx.array(np.concatenate([g.advantages for g in micro.groups]))
        importance = None
        if spec.importance_weight:
            importance = importance_weights(micro.old_logprobs, self._sampled(micro, mask.shape), mask)
        result = surrogate(
            logprobs, micro.old_logprobs, advantages, mask, spec.clip_low, spec.clip_high, importance, spec.dual_clip
        )
        loss = result.loss
        count = mask.sum()
        metrics = {"clip_fraction": (result.clipped.sum(), count)}
        if micro.reference_logprobs is not None:
            kl = k3_kl(logprobs, micro.reference_logprobs, mask)
            loss = loss + spec.kl_coef * kl
            metrics["kl"] = (mx.stop_gradient(kl).sum(), count)
        if not micro.trained:
            metrics["drift"] = self._drift(micro, mask)
            micro.trained = True
        total, _ = aggregate(loss, mask, spec.aggregation, spec.max_completion_tokens)
        return total, metrics

    @staticmethod
    def _sampled(micro: RolloutMicro, shape: tuple[int, int]) -> mx.array:
        """sampled_logprobs padded to (R, T)."""
        out = np.zeros(shape, np.float32)
        for row, rollout in enumerate(micro.rollouts):
            out[row, : len(rollout.sampled_logprobs)] = rollout.sampled_logprobs
        return mx.array(out)

    def _drift(self, micro: RolloutMicro, mask: mx.array) -> tuple[mx.array, mx.array]:
        """Mean |scored - sampled| log-probability of the plain rollouts, which the same model drew."""
        plain = mx.array(np.array([not r.policy_aware for r in micro.rollouts], np.float32))[:, None] * mask
        difference = mx.abs(micro.old_logprobs - self._sampled(micro, mask.shape))
        return (difference * plain).sum(), plain.sum()
