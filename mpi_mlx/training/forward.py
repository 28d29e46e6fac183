"""Hidden states and log-probabilities of a micro-batch, its shared prefixes forwarded once."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mpi_mlx.models.kv import Block as RowBlock
from mpi_mlx.models.kv import CausalMask, PackedMask, Prefix, recording_caches, shared_prefix_caches
from mpi_mlx.training.batch import Block, MicroBatch
from mpi_mlx.training.losses import token_logprobs
from mpi_mlx.training.packing import PackedBlock


def _embedded(model, block: Block, features: mx.array | None) -> mx.array:
    if features is None and block.images:
        features = mx.concatenate(model.features(block.images))
    return model.embed(block.ids, features)


def encode_images(model, micro: MicroBatch) -> None:
    """Puts the micro-batch's visual features into the model's cache: under a gradient's trace MLX would take the
    frozen tower's attention in the form that keeps every score."""
    for block in (micro.prefix, micro.tails):
        if block is not None and block.images:
            model.features(block.images)


def hidden_states(
    model, micro: MicroBatch, features: tuple[mx.array | None, mx.array | None] = (None, None)
) -> tuple[mx.array | None, mx.array]:
    """Final hidden states of the prefixes (P, Lp, D), or None, and of the tails (B, T, D).

    ``features``: visual features (N, D) of the prefixes' and the tails' images; None takes the frozen
    tower's, from the model's cache. Gradients flow through the prefixes' keys and values.
    """
    tails = micro.tails
    embeds, positions = _embedded(model, tails, features[1]), _axes(model, tails.position_ids)
    if micro.prefix is None:
        mask = PackedMask(tails.segments) if isinstance(tails, PackedBlock) else CausalMask()
        return None, model.hidden(embeds, positions, [mask] * model.num_layers)
    prefix = micro.prefix
    recorded = recording_caches(model.num_layers)
    before = model.hidden(
        _embedded(model, prefix, features[0]), _axes(model, prefix.position_ids), recorded
    )
    blocks = _blocks(Prefix.of(recorded, prefix.lengths), micro.owner)
    return before, model.hidden(embeds, positions, shared_prefix_caches(blocks))


def _blocks(prefix: Prefix, owner: np.ndarray) -> list[RowBlock]:
    """Runs of prefixes with equally many rows; rows of one prefix are consecutive."""
    sizes = np.bincount(owner, minlength=len(prefix.lengths))
    if (sizes == sizes[0]).all():
        return [RowBlock(len(owner), (prefix,))]
    cuts = [0, *(np.flatnonzero(np.diff(sizes)) + 1).tolist(), len(sizes)]
    return [
        RowBlock(int(sizes[a:b].sum()), (prefix.take(np.arange(a, b)),))
        for a, b in zip(cuts[:-1], cuts[1:], strict=True)
    ]


def _axes(model, positions: np.ndarray) -> mx.array:
    """(3, B, T) for multimodal rotary families, (B, T) for the others."""
    return mx.array(positions if model.uses_mrope else positions[0])


def weighted_logprobs(model, hidden: mx.array, block: Block) -> tuple[mx.array, mx.array]:
    """Log-probabilities (N,) and weights (N,) at the N positions of ``block`` that have a weight."""
    flat = np.flatnonzero(block.weights.reshape(-1))
    index = mx.array(flat.astype(np.int32))
    chosen = hidden.reshape(-1, hidden.shape[-1])[index]
    targets = mx.array(block.targets.reshape(-1)[flat])
    logprobs = token_logprobs(model.loss_head(), chosen, targets)
    return logprobs, mx.array(block.weights.reshape(-1)[flat])


def micro_logprobs(model, micro: MicroBatch, features=(None, None)) -> tuple[mx.array, mx.array]:
    """All trained positions of prefixes and tails: log-probabilities (N,) and weights (N,)."""
    before, after = hidden_states(model, micro, features)
    logprobs, weights = weighted_logprobs(model, after, micro.tails)
    if before is not None and micro.prefix.weights.any():
        more = weighted_logprobs(model, before, micro.prefix)
        logprobs, weights = mx.concatenate([logprobs, more[0]]), mx.concatenate([weights, more[1]])
    return logprobs, weights
