"""Adapters on an output head of its own are trained, though losses compute logits in tiles of its matrix."""

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_qwen2_5_vl

from mpi_mlx.models import load_model
from mpi_mlx.models.lora import attach_lora
from mpi_mlx.recipe import LoraSpec
from mpi_mlx.stages.rehearsal import Rehearsal
from mpi_mlx.training.losses import token_logprobs

HEAD = "language_model.lm_head"


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return write_qwen2_5_vl(tmp_path_factory.mktemp("untied") / "base", tie_word_embeddings=False)


@pytest.mark.parametrize("quantize", (None, 4))
@pytest.mark.parametrize("kind", ("lora", "dora"))
def test_head_adapter_has_the_gradient_of_whole_logits(untied, kind, quantize):
    model = load_model(untied, quantize=quantize)
    attach_lora(model, LoraSpec(rank=2, targets=[HEAD], kind=kind), mx.random.key(0))
    layer = model.parts.head_module
    layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    hidden = mx.random.normal((5, 64), key=mx.random.key(2))
    targets = mx.array([3, 1, 4, 1, 5])

    def tiled(parameters):
        layer.update(parameters)
        return token_logprobs(model.loss_head(), hidden, targets).sum()

    def whole(parameters):
        layer.update(parameters)
        logits = model.head(hidden)
        chosen = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
        return (chosen - mx.logsumexp(logits, axis=-1)).sum()

    start = {name: layer[name] for name in ("lora_a", "lora_b", "m") if name in layer}
    (value, found), (expected, wanted) = (mx.value_and_grad(f)(start) for f in (tiled, whole))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert set(found) == set(wanted) and all(mx.abs(g).max() > 1e-3 for g in wanted.values())
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-3, atol=1e-5)
    with model.adapters_disabled():
        assert mx.array_equal(model.head(hidden), layer.linear(hidden))
        np.testing.assert_allclose(
            token_logprobs(model.loss_head(), hidden, targets),
            token_logprobs(lambda h: layer.linear(h), hidden, targets), rtol=1e-4,
        )  # fmt: skip


@pytest.mark.parametrize("quantize", (None, 4))
def test_head_adapter_rehearses(untied, quantize):
    """What the model says differently from its base for the head's adapters alone moves them back."""
    model = load_model(untied, quantize=quantize)
    attach_lora(model, LoraSpec(rank=2, targets=[HEAD]), mx.random.key(0))
    layer = model.parts.head_module
    layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    micro = Rehearsal(model, 3).micro([0, 1])

    def loss(lora_b):
        layer.lora_b = lora_b
        return micro.loss(model)

    start = layer.lora_b
    value, grad = mx.value_and_grad(loss)(start)
    assert loss(start - 0.1 * grad / mx.linalg.norm(grad)) < value - 1e-3
    assert abs(loss(mx.zeros_like(start))) < 1e-4
