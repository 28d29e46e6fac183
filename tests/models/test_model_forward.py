"""The split forward against mlx-vlm's own, and the batched vision tower against its tower."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import write_qwen2_5_vl
from mlx.utils import tree_flatten
from PIL import Image

from mpi_mlx.models import load_model


def picture(width=84, height=84, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def user(text, *images):
    return {
        "role": "user",
        "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}],
    }


def logits(model, encoded, features=None):
    if features is None and encoded.images:
        features = mx.concatenate(model.features(encoded.images))
    return model.head(model.hidden(model.embed(encoded.ids[None], features), encoded.position_ids[:, None]))


def reference(model, encoded):
    """mlx-vlm's whole forward, with its state reset."""
    model.net.language_model._position_ids = model.net.language_model._rope_deltas = None
    kwargs = {}
    if encoded.images:
        kwargs = {
            "pixel_values": mx.array(np.concatenate([image.pixel_values for image in encoded.images])),
            "image_grid_thw": mx.array([image.grid for image in encoded.images]),
        }
    return model.net(mx.array(encoded.ids)[None], **kwargs).logits


@pytest.mark.parametrize(
    "images", [(), (picture(),), (picture(140, 84), picture(56, 112, 1), picture(140, 84, 2))]
)
def test_logits_equal_mlx_vlm(qwen, images):
    encoded = qwen.encode([user("How many red cubes?", *images)], generation_prompt=True)
    assert mx.abs(logits(qwen, encoded) - reference(qwen, encoded)).max().item() < 1e-4


def test_text_after_an_image_is_not_confused(qwen):
    text = qwen.encode([user("plain " * 20)], generation_prompt=True)
    before = logits(qwen, text)
    logits(qwen, qwen.encode([user("x", picture())]))
    assert mx.array_equal(before, logits(qwen, text))


@pytest.mark.parametrize("size", [(84, 84), (56, 56), (112, 112), (140, 84), (196, 252), (28, 28)])
def test_batched_tower_equals_mlx_vlms(qwen, size):
    images = [qwen.image(picture(*size, seed)) for seed in range(3)]
    ours = qwen.vision(images)
    tower = qwen.net.vision_tower
    own = tower(
        mx.array(np.concatenate([image.pixel_values for image in images])),
        mx.array([image.grid for image in images]),
    ).reshape(ours.shape)
    assert mx.abs(ours - own).max().item() < 1e-5 * max(1.0, mx.abs(own).max().item())
    for image, features in zip(images, qwen.features(images), strict=True):
        assert features.shape[0] == image.num_tokens


def test_tower_gradient_equals_mlx_vlms(qwen):
    images = [qwen.image(picture(140, 84, seed)) for seed in range(2)]
    pixels = mx.array(np.concatenate([image.pixel_values for image in images]))
    grid = mx.array([image.grid for image in images])
    tower = qwen.net.vision_tower
    tower.unfreeze()
    weight = mx.random.normal((1, 64), key=mx.random.key(1))
    ours = nn.value_and_grad(tower, lambda _: (qwen.vision(images) * weight).sum())(None)[1]
    own = nn.value_and_grad(tower, lambda _: (tower(pixels, grid) * weight).sum())(None)[1]
    for (name, a), (_, b) in zip(tree_flatten(ours), tree_flatten(own), strict=True):
        assert mx.abs(a - b).max().item() <= 1e-4 * max(1.0, mx.abs(b).max().item()), name


def test_features_are_encoded_once_and_carry_no_gradient(qwen, monkeypatch):
    calls = []
    own = qwen.parts.tower
    monkeypatch.setattr(
        qwen.parts, "tower", lambda pixels, grid: calls.append(len(pixels)) or own(pixels, grid)
    )
    one, other = qwen.image(picture()), qwen.image(picture(seed=1))
    first = qwen.features([one, other, one])
    assert sum(calls) == 2 and mx.array_equal(first[0], first[2])
    qwen.features([other])
    assert sum(calls) == 2
    qwen.forget_features()
    qwen.features([other])
    assert sum(calls) == 3


def test_features_land_in_reading_order_over_rows(qwen):
    rows = [qwen.encode([user("a", picture(seed=1))]), qwen.encode([user("a", picture(seed=2))])]
    ids = np.stack([row.ids for row in rows])
    features = qwen.features([image for row in rows for image in row.images])
    together = qwen.embed(ids, mx.concatenate(features))
    for index, row in enumerate(rows):
        assert mx.array_equal(together[index], qwen.embed(row.ids[None], features[index])[0])
    with pytest.raises(ValueError, match="placeholders"):
        qwen.embed(ids, features[0])


def test_head_weight_is_the_heads(qwen, tmp_path):
    hidden = mx.random.normal((2, 64), key=mx.random.key(0))
    assert mx.allclose(qwen.head(hidden), hidden @ qwen.head_weight().T, atol=1e-5)
    untied = load_model(write_qwen2_5_vl(tmp_path / "untied", tie_word_embeddings=False))
    assert untied.head_weight() is untied.net.language_model.lm_head.weight
    assert mx.allclose(untied.head(hidden), hidden @ untied.head_weight().T, atol=1e-5)


def test_random_init_is_the_seeds(tmp_path):
    folder = write_qwen2_5_vl(tmp_path / "empty", weights=False)
    key = mx.array(mx.random.state[0])
    one, same, other = (load_model(folder, init="random", seed=seed) for seed in (1, 1, 2))
    assert mx.array_equal(mx.random.state[0], key)
    weights = [model.net.language_model.model.layers[0].mlp.up_proj.weight for model in (one, same, other)]
    assert mx.array_equal(weights[0], weights[1]) and not mx.allclose(weights[0], weights[2])


def test_special_ids(qwen):
    token = qwen.tokenizer.convert_tokens_to_ids
    assert qwen.end_of_turn_id == token("<|im_end|>") and qwen.pad_id == token("<|endoftext|>")
    assert qwen.eos_ids == {token("<|im_end|>"), token("<|endoftext|>")}
    assert {token("<|image_pad|>"), token("<|video_pad|>"), token("<|vision_start|>")} <= qwen.visual_ids
    assert (qwen.num_layers, qwen.hidden_size, qwen.uses_mrope, qwen.is_multimodal) == (3, 64, True, True)
