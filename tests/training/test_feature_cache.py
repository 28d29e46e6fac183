"""Losses and gradients with the features of a frozen tower kept, encoded anew, and by mlx-vlm's own forward."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mpi_mlx.training.batch import Row, loss_weights, micro_batch
from mpi_mlx.training.forward import micro_logprobs
from mpi_mlx.training.losses import sft_loss


def row(model, seed, size, query, answer):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    content = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": query}]
    prompt = model.encode([{"role": "user", "content": content}], generation_prompt=True)
    whole = prompt.concat(model.encode_completion(answer))
    return Row(whole, loss_weights(whole, "sft"), query)


def differences(a, b):
    """Relative differences of two gradients, parameter by parameter."""
    a, b = dict(tree_flatten(a)), dict(tree_flatten(b))
    assert a.keys() == b.keys() and any(mx.abs(v).max().item() > 0 for v in b.values())
    return [mx.linalg.norm(a[n] - b[n]).item() / max(mx.linalg.norm(b[n]).item(), 1e-6) for n in b]


def test_kept_features_change_neither_loss_nor_gradients(model):
    rows = [
        row(model, 0, (56, 56), "which?", "the red one"),
        row(model, 1, (84, 56), "and which is larger?", "no"),
        row(model, 0, (56, 56), "how many?", "two cubes and a sphere"),
    ]
    micro = micro_batch(rows, model.pad_id)

    def kept():
        logprobs, weights = micro_logprobs(model, micro)
        return sft_loss(logprobs, weights)[0]

    def plain():
        """Row by row, pixels in and logits out."""
        total = 0.0
        for r in rows:
            encoded = r.encoded
            pixels = mx.array(np.concatenate([i.pixel_values for i in encoded.images]))
            grid = mx.array([i.grid for i in encoded.images])
            positions = mx.array(encoded.position_ids[:, None])
            output = model.net(mx.array(encoded.ids[None]), pixels, image_grid_thw=grid, position_ids=positions)
            losses = nn.losses.cross_entropy(output.logits[0, :-1], mx.array(encoded.ids[1:]))
            total = total + (losses * mx.array(r.weights[1:])).sum()
        return total

    expected, gradients = nn.value_and_grad(model.net, plain)()
    model.forget_features()
    results = [nn.value_and_grad(model.net, kept)() for _ in range(2)]  # encoded, then taken from the cache
    for loss, gradient in results:
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert max(differences(gradient, gradients)) < 1e-4
