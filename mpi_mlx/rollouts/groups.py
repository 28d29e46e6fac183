"""Rollouts of one prompt as a group, and their advantages."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True)
class Rollout:
    """A sampled completion with what is known of it. ``reward`` is raw and never overwritten."""

    completion_ids: np.ndarray  # int32 (T,), as drawn, end-of-turn included when it was drawn
    sampled_logprobs: np.ndarray  # float32 (T,), under the distribution that drew them
    text: str
    reward: float
    policy_aware: bool  # drawn with the document in context
    finished: bool
    rewards: dict[str, float] = field(default_factory=dict)  # by kind, unweighted


@dataclass(frozen=True)
class RolloutGroup:
    """All rollouts of one prompt; ``prompt`` is the plain one, on which every rollout is scored."""

    prompt: object  # models.Encoded
    rollouts: tuple[Rollout, ...]
    advantages: np.ndarray  # float32 (G,)
    identity: str = ""

    @property
    def pair(self) -> tuple[object, list[np.ndarray]]:
        """What `training.score` takes."""
        return self.prompt, [r.completion_ids for r in self.rollouts]

    @property
    def has_signal(self) -> bool:
        """Whether the rewards differ at all."""
        rewards = [r.reward for r in self.rollouts]
        return max(rewards) - min(rewards) > 1e-6

    def weighted(self) -> RolloutGroup:
        """The group without the rollouts whose advantage is 0, which have no part in the clipped objective."""
        kept = [n for n, advantage in enumerate(self.advantages) if advantage]
        return replace(self, rollouts=tuple(self.rollouts[n] for n in kept), advantages=self.advantages[kept])


def compute_advantages(
    rewards: np.ndarray, *, scale: bool = True, negative_weight: float = 1.0, eps: float = 1e-4
) -> np.ndarray:
    """Rewards (G,) of one group, centred and (``scale``) divided by their standard deviation.

    GRPO (arXiv 2402.03300, section 4.1.2) scales; Dr.GRPO (arXiv 2503.20783) does not. The union of plain and
    policy-aware rollouts is one group (PolicyRollout). The deviation is the sample's (ddof 1), as in TRL.
    ``negative_weight`` multiplies what is below 0; with 0 only the better completions are learned, as in RAFT++
    (arXiv 2504.11343), which cannot push a model away from what it says without telling it what to say instead.

    >>> compute_advantages(np.array([1.0, 0.0]))      # mean .5, deviation .70711: +-.70701
    """
    rewards = np.asarray(rewards, np.float64)
    centred = rewards - rewards.mean()
    if scale:
        deviation = rewards.std(ddof=1) if len(rewards) > 1 else 0.0
        centred = centred / (deviation + eps)
    centred = np.where(centred < 0, negative_weight * centred, centred)
    return centred.astype(np.float32)


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13): 0 up to limit - buffer, then down to -1.

    >>> overlong_penalty(90, 100, 20), overlong_penalty(100, 100, 20), overlong_penalty(80, 100, 20)
    (-0.5, -1.0, 0.0)
    """
    if buffer <= 0 or length <= limit - buffer:
        return 0.0
    return max(-1.0, (limit - buffer - length) / buffer)
