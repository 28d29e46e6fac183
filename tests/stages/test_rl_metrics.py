"""Figures of an rl step."""

import mlx.core as mx
import numpy as np

from mpi_mlx.models.pieces import Piece, embed_pieces
from mpi_mlx.recipe import RlStage
from mpi_mlx.rollouts.rewards import build_rewards
from mpi_mlx.stages.rl import RolloutSource


def test_entropy_is_that_of_the_distribution_that_drew(adapted, dataset):
    """One token each, so that the exact entropy is known: 400 draws come within four standard errors of it."""
    model = adapted()
    spec = RlStage(stage="rl", steps=1, prompts=1, group_size=400, max_completion_tokens=1, temperature=0.7)
    source = RolloutSource(model, dataset.rl, None, spec, build_rewards(spec.rewards), 5)
    batch = source.batch(0)
    (prompt,) = source._prompts([0], None)
    embeds, positions, _ = embed_pieces(model, [Piece(prompt, 0, len(prompt))])
    logits = model.head(model.hidden(embeds, positions))[0, -1] / 0.7
    logprobs = np.array(logits - mx.logsumexp(logits), np.float64)
    exact = -(np.exp(logprobs) * logprobs).sum()
    error = np.sqrt((np.exp(logprobs) * (logprobs + exact) ** 2).sum() / 400)
    assert 0 < abs(batch.metrics["entropy"] - exact) < 4 * error
