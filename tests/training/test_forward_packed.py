"""A packed micro-batch gives the loss and the gradients of the padded one, images and all."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mpi_mlx import elementwise
from mpi_mlx.models import load_model
from mpi_mlx.training.batch import Row, loss_weights, micro_batch
from mpi_mlx.training.forward import micro_logprobs
from mpi_mlx.training.losses import sft_loss
from mpi_mlx.training.packing import PackedBlock


@pytest.fixture(scope="module")
def model():
    model = load_model("embedded:tiny", init="random")
    model.parts.text.unfreeze()
    return model


def rows(model):
    out = []
    for i, repeat in enumerate((1, 12, 2, 3, 1)):
        image = Image.fromarray(np.full((56, 56 + 28 * (i % 2), 3), 40 * i, np.uint8))
        parts = [{"type": "image", "image": image}, {"type": "text", "text": "which cube is red? " * repeat}]
        prompt = model.encode([{"role": "user", "content": parts[i == 2 :]}], generation_prompt=True)
        encoded = prompt.concat(model.encode_completion("the largest cube is red " * (1 + i % 3)))
        out.append(Row(encoded, loss_weights(encoded, "sft")))
    return out


@pytest.mark.parametrize("slow", [True, False])
def test_packed_equals_padded(model, slow, monkeypatch):
    monkeypatch.setattr(elementwise, "is_slow", lambda x: slow)
    some = rows(model)
    packed = micro_batch(some, model.pad_id, packed=True, min_prefix=10**6)
    padded = micro_batch(some, model.pad_id, min_prefix=10**6)
    assert isinstance(packed.tails, PackedBlock) and len(packed.tails.ids) < len(some)
    assert packed.count == padded.count and packed.tokens == padded.tokens

    def loss(micro):
        return sft_loss(*micro_logprobs(model, micro))[0]

    (a, ga), (b, gb) = (nn.value_and_grad(model.net, loss)(m) for m in (packed, padded))
    assert abs(float(a - b)) < 1e-5 * abs(float(b))
    expected = dict(tree_flatten(gb))
    for name, value in tree_flatten(ga):
        scale = float(mx.linalg.norm(expected[name]))
        assert float(mx.linalg.norm(value - expected[name])) < 1e-4 * scale + 1e-7, name
