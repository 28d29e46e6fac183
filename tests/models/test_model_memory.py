"""Gradient checkpointing changes memory, never numbers; parameters are counted as what they stand for."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import write_qwen2_5_vl
from mlx.utils import tree_flatten, tree_map

from mpi_mlx.models import load_model, memory
from mpi_mlx.models.gradient_checkpointing import enable_gradient_checkpointing, gradient_checkpointing
from mpi_mlx.models.kv import Block, Prefix, recording_caches, route_attention, shared_prefix_caches
from mpi_mlx.models.lora import attach_lora
from mpi_mlx.models.memory import count_parameters, memory_estimate
from mpi_mlx.rollouts.sampler import sample

SPEC = SimpleNamespace(rank=4, alpha=8, dropout=0.0, targets="all-linear", kind="lora", projector=False)


@pytest.fixture()
def adapted(qwen):
    attach_lora(qwen, SPEC)
    mx.random.seed(0)
    qwen.net.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), qwen.net.trainable_parameters()))
    return qwen


def positions(rows, start, length):
    return np.broadcast_to(np.arange(start, start + length, dtype=np.int32), (3, rows, length))


def plain_loss(model):
    ids = np.arange(24, dtype=np.int32).reshape(2, 12)
    return (model.hidden(model.embed(ids), positions(2, 0, 12)) ** 2).sum()


def shared_loss(model):
    """A prompt of 8 tokens, recorded; 3 completions of 4 that attend to it with gradient."""
    route_attention(model.net)
    caches = recording_caches(model.num_layers)
    prompt = np.arange(8, dtype=np.int32)[None]
    first = model.hidden(model.embed(prompt), positions(1, 0, 8), caches)
    blocks = [Block(3, (Prefix.of(caches, [8]),))]
    tails = np.arange(20, 32, dtype=np.int32).reshape(3, 4)
    second = model.hidden(model.embed(tails), positions(3, 8, 4), shared_prefix_caches(blocks))
    return (first**2).sum() + (second**2).sum()


@pytest.mark.parametrize("loss", [plain_loss, shared_loss])
def test_gradients_are_the_same_with_checkpointing(adapted, loss):
    def run():
        value, grads = nn.value_and_grad(adapted.net, lambda: loss(adapted))()
        return value, dict(tree_flatten(grads))

    value, grads = run()
    enable_gradient_checkpointing(adapted, True)
    again, same = run()
    assert mx.allclose(value, again) and grads.keys() == same.keys()
    for name in grads:
        assert (
            mx.abs(grads[name] - same[name]).max().item() <= 1e-4 * mx.abs(grads[name]).max().item() + 1e-7
        ), name


def test_gradients_are_those_of_the_masks_that_dropped(qwen, monkeypatch):
    """The second forward drops what the first did; mx.checkpoint itself may not change a number."""
    attach_lora(qwen, SimpleNamespace(**{**vars(SPEC), "dropout": 0.2}))
    mx.random.seed(0)
    qwen.net.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), qwen.net.trainable_parameters()))
    qwen.net.train()
    enable_gradient_checkpointing(qwen, True)

    def run():
        mx.random.seed(4)
        value, grads = nn.value_and_grad(qwen.net, lambda: plain_loss(qwen))()
        mx.eval(value, grads)
        return value, dict(tree_flatten(grads)), mx.random.uniform().item()

    value, grads, drawn = run()
    monkeypatch.setattr(mx, "checkpoint", lambda function: function)
    plain_value, plain, plain_drawn = run()
    assert mx.allclose(value, plain_value) and drawn == plain_drawn
    qwen.net.eval()
    assert abs(run()[0].item() - value.item()) > 1e-3 * value.item(), "nothing was dropped"
    for name in plain:
        assert mx.abs(grads[name] - plain[name]).max().item() <= 1e-4 * mx.abs(plain[name]).max().item() + 1e-7, name


def test_sampling_is_the_same_with_checkpointing(adapted):
    """Evaluations and rollouts between the steps of a stage decode with it on."""
    asked = [[{"role": "user", "content": "word " * (i + 1)}] for i in range(3)]
    prompts = [adapted.encode(messages, generation_prompt=True) for messages in asked]

    def drawn():
        options = dict(num_samples=2, max_tokens=12, key=mx.random.key(1), stop_ids=())
        return [c for group in sample(adapted, prompts, **options) for c in group]

    plain = drawn()
    enable_gradient_checkpointing(adapted, True)
    for a, b in zip(plain, drawn(), strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_twice_on_is_once_on_and_off_is_off(adapted, qwen_folder):
    plain = type(adapted.layers[0])
    names = [name for name, _ in tree_flatten(adapted.net.parameters())]
    enable_gradient_checkpointing(adapted, True)
    once = type(adapted.layers[0])
    enable_gradient_checkpointing(adapted, True)
    assert type(adapted.layers[0]) is once and once is not plain and gradient_checkpointing(adapted)
    assert [name for name, _ in tree_flatten(adapted.net.parameters())] == names
    other = load_model(qwen_folder)
    assert type(other.layers[0]) is plain
    enable_gradient_checkpointing(adapted, False)
    enable_gradient_checkpointing(adapted, False)
    assert type(adapted.layers[0]) is plain and not gradient_checkpointing(adapted)


def test_checkpointing_saves_memory(tmp_path):
    # Twelve layers: with few, the one that is computed again is much of the whole.
    adapted = load_model(write_qwen2_5_vl(tmp_path / "deep", num_hidden_layers=12))
    attach_lora(adapted, SPEC)
    ids = np.zeros((16, 64), dtype=np.int32)  # short rows: long scores are computed again anyway

    def peak():
        def loss():
            return adapted.hidden(adapted.embed(ids), positions(16, 0, 64)).sum()

        mx.clear_cache()
        mx.reset_peak_memory()
        held = mx.get_active_memory()  # what other tests keep alive is no part of it
        mx.eval(nn.value_and_grad(adapted.net, loss)())
        return mx.get_peak_memory() - held

    before = peak()
    enable_gradient_checkpointing(adapted, True)
    after = peak()
    assert after < 0.5 * before, (after, before)


def test_parameters_are_counted(qwen, qwen_folder):
    total, trainable = count_parameters(qwen)
    assert (total, trainable) == (sum(v.size for _, v in tree_flatten(qwen.net.parameters())), 0)
    attach_lora(qwen, SPEC)
    more, trainable = count_parameters(qwen)
    # per layer: q 64-64, k and v 64-32, o 64-64, gate and up 64-96, down 96-64, at rank 4
    assert trainable == more - total == 3 * 4 * (128 + 96 + 96 + 128 + 160 + 160 + 160)


def test_packed_weights_count_as_the_numbers_they_stand_for(qwen):
    total, _ = count_parameters(qwen)
    names = {"language_model.model.layers.0.mlp.gate_proj"}
    nn.quantize(qwen.net, 64, 4, class_predicate=lambda name, _: name in names)
    assert count_parameters(qwen)[0] == total


def test_estimate_grows_with_the_batch_and_shrinks_with_checkpointing(adapted):
    small = memory_estimate(adapted, rows=1, tokens=128)
    large = memory_estimate(adapted, rows=8, tokens=128)
    spared = memory_estimate(adapted, rows=8, tokens=128, gradient_checkpointing=True)
    assert large.activations == 8 * small.activations and spared.total < large.total
    assert (
        small.weights == sum(v.nbytes for _, v in tree_flatten(adapted.net.parameters())) - small.adapter // 2
    )
    assert small.optimizer == small.adapter


def test_what_rows_share_is_counted_once_a_group(adapted):
    layer = (10 * 64 + 5 * 96) * 4  # bytes a token and layer, hidden 64, inner 96, float32
    scores = 4 * 8 * 4 * 32 * 128  # 8 rows, 4 heads, 32 own tokens over 128
    estimate = memory_estimate(adapted, rows=8, tokens=128, shared=96, groups=2)
    assert estimate.activations == 3 * ((2 * 96 + 8 * 32) * layer + scores)
    assert estimate.logits == 3 * 448 * adapted.vocab_size * 4
    long = memory_estimate(adapted, rows=8, tokens=4096, shared=96)  # scores over 16 MiB are not kept
    assert long.activations == 3 * (96 + 8 * 4000) * layer


def test_on_a_gpu_the_documents_scores_count_until_training_takes_them_in_blocks(adapted, monkeypatch):
    monkeypatch.setattr(memory.runtime, "on_cpu", lambda: False)
    layer = (10 * 64 + 5 * 96) * 4
    estimate = memory_estimate(adapted, rows=8, tokens=128, shared=96, groups=2)
    scores = 4 * 8 * 4 * 32 * 128 + 2 * 4 * 2 * 4 * 96 * 96  # in parts; MLX's own, four arrays of 16 bits
    assert estimate.activations == 3 * ((2 * 96 + 8 * 32) * layer + scores)
    whole = memory_estimate(adapted, rows=1, tokens=2000)  # 64 MB of scores: MLX's own
    assert whole.activations == 3 * (2000 * layer + 2 * 4 * 4 * 2000 * 2000)
    long = memory_estimate(adapted, rows=1, tokens=8000)  # a gigabyte: in blocks
    assert long.activations == 3 * 8000 * layer


def test_16_bit_weights_that_are_trained_have_float32_copies(adapted):
    adapted.net.update(tree_map(lambda p: p.astype(mx.bfloat16), adapted.net.trainable_parameters()))
    count = sum(v.size for _, v in tree_flatten(adapted.net.trainable_parameters()))
    estimate = memory_estimate(adapted, rows=1, tokens=16)
    assert (estimate.adapter, estimate.optimizer) == (4 * count, 12 * count)
