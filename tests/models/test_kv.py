import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mpi_mlx import elementwise
from mpi_mlx.errors import ModelError
from mpi_mlx.models import kv
from mpi_mlx.models.building import build_net

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=50,
    rms_norm_eps=1e-6, num_hidden_layers=2, tie_word_embeddings=True,
)  # fmt: skip
LLAMA = {"model_type": "llama", **SIZES}
SLIDING = {**LLAMA, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
QWEN = {
    "model_type": "qwen2_5_vl",
    **SIZES,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    "vision_config": dict(depth=1, hidden_size=32, intermediate_size=32, out_hidden_size=32, num_heads=2),
}


class Stack:
    """Embeddings, hidden states: the little of a Model that caches need."""

    def __init__(self, config):
        self.net = build_net(config)
        self.mrope = config["model_type"] == "qwen2_5_vl"
        self.text = self.net.language_model.model if self.mrope else self.net.model
        self.layers = len(self.text.layers)
        kv.route_attention(self.net)

    def __call__(self, ids, positions, cache=None):
        ids = mx.array(np.atleast_2d(ids))
        if not self.mrope:
            return self.text(ids, cache=cache)
        positions = mx.broadcast_to(mx.array(np.atleast_2d(positions))[None], (3, *ids.shape))
        return self.text(ids, cache=cache, position_ids=positions)

    def alone(self, ids):
        return self(ids, np.arange(len(ids)))[0]


@pytest.fixture(params=[LLAMA, QWEN, SLIDING], ids=["llama", "qwen", "sliding"])
def stack(request):
    return Stack(request.param)


def close(a, b, tolerance=2e-6):
    np.testing.assert_allclose(np.array(a), np.array(b), atol=tolerance, rtol=1e-5)


def words(rng, *lengths):
    return [rng.integers(0, 50, n).astype(np.int32) for n in lengths]


def padded(rows):
    out = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


@pytest.fixture(params=[True, False], ids=["run by run", "mask"])
def packing(request, monkeypatch):
    monkeypatch.setattr(elementwise, "is_slow", lambda x: request.param)


def test_packed_rows_equal_single_sequences(stack, packing):
    a, b, c = words(np.random.default_rng(0), 7, 12, 9)
    ids = padded([np.concatenate([a, b]), c])
    segments = np.array([[1] * 7 + [2] * 12, [1] * 9 + [0] * 10])
    positions = np.array([[*range(7), *range(12)], [*range(19)]])
    hidden = stack(ids, positions, [kv.PackedMask(segments)] * stack.layers)
    assert not bool(mx.isnan(hidden).any())
    close(hidden[0, :7], stack.alone(a))
    close(hidden[0, 7:], stack.alone(b), 5e-6)
    close(hidden[1, :9], stack.alone(c))


def test_packed_gradients_equal_single_sequences(stack, packing):
    a, b = words(np.random.default_rng(1), 5, 8)
    segments = np.array([[1] * 5 + [2] * 8 + [0] * 3])
    weight = mx.random.normal((32,))

    def packed(_):
        ids = padded([np.concatenate([a, b, [0, 0, 0]])])
        positions = np.array([[*range(5), *range(8), 0, 0, 0]])
        hidden = stack(ids, positions, [kv.PackedMask(segments)] * stack.layers)
        return (hidden[0, :13] @ weight).square().sum()

    def single(_):
        return sum((stack.alone(x) @ weight).square().sum() for x in (a, b))

    compare_gradients(stack, packed, single)


def compare_gradients(stack, ours, plain):
    stack.net.freeze()
    stack.text.unfreeze()
    (x, gx), (y, gy) = (nn.value_and_grad(stack.net, f)(0) for f in (ours, plain))
    assert abs(float(x - y)) < 1e-5 * abs(float(y))
    for (name, a), (_, b) in zip(tree_flatten(gx), tree_flatten(gy), strict=True):
        assert float(mx.abs(a - b).max()) <= 1e-4 * float(mx.abs(b).max()) + 1e-7, name


def continued(stack, document, prompts, completions):
    """Hidden states of each prompt's completions, the document run once and each prompt once.

    `completions` is prompts x G token arrays.
    """
    caches = kv.recording_caches(stack.layers)
    stack(document, np.arange(len(document)), caches)
    first = kv.Prefix.of(caches, [len(document)])
    caches = kv.shared_prefix_caches([kv.Block(len(prompts), (first,))])
    ids = padded(prompts)
    stack(ids, np.tile(len(document) + np.arange(ids.shape[1]), (len(ids), 1)), caches)
    second = kv.Prefix.of(caches, list(map(len, prompts)), len(document))
    rows = [row for group in completions for row in group]
    block = kv.Block(len(rows), (first, second))
    ids = padded(rows)
    return stack(ids, block.lengths[:, None] + np.arange(ids.shape[1]), kv.shared_prefix_caches([block]))


def test_shared_prefixes_equal_whole_sequences(stack):
    rng = np.random.default_rng(2)
    document, *prompts = words(rng, 11, 4, 7, 2)
    completions = [words(rng, 6, 3), words(rng, 1, 8), words(rng, 5, 5)]
    hidden = continued(stack, document, prompts, completions)
    for i, prompt in enumerate(prompts):
        for j, completion in enumerate(completions[i]):
            whole = stack.alone(np.concatenate([document, prompt, completion]))
            close(hidden[2 * i + j, : len(completion)], whole[-len(completion) :], 5e-6)


def test_shared_prefix_gradients_equal_whole_sequences(stack):
    rng = np.random.default_rng(3)
    document, *prompts = words(rng, 9, 4, 6)
    completions = [words(rng, 6, 3, 2), words(rng, 1, 5, 4)]
    weight = mx.random.normal((32,))

    def shared(_):
        hidden = continued(stack, document, prompts, completions)
        flat = [row for group in completions for row in group]
        return sum((hidden[i, : len(row)] @ weight).square().sum() for i, row in enumerate(flat))

    def plain(_):
        return sum(
            (stack.alone(np.concatenate([document, prompt, row]))[-len(row) :] @ weight).square().sum()
            for prompt, group in zip(prompts, completions, strict=True)
            for row in group
        )

    compare_gradients(stack, shared, plain)


def test_decoding_in_blocks_with_compaction_equals_whole_sequences(stack):
    """Two blocks: prompts after a document, and a prompt without; half the rows leave on the way."""
    rng = np.random.default_rng(4)
    document, a, b, alone = words(rng, 8, 3, 5, 6)
    rows = words(rng, *[70] * 6)  # 70 tokens: past the first buffer
    caches = kv.recording_caches(stack.layers)
    stack(document, np.arange(8), caches)
    first = kv.Prefix.of(caches, [8])
    caches = kv.shared_prefix_caches([kv.Block(2, (first,))])
    stack(padded([a, b]), np.tile(8 + np.arange(5), (2, 1)), caches)
    second = kv.Prefix.of(caches, [3, 5], 8)
    caches = kv.recording_caches(stack.layers)
    stack(alone, np.arange(6), caches)
    other = kv.Prefix.of(caches, [6])
    blocks = [kv.Block(4, (first, second)), kv.Block(2, (other,))]
    before = [np.concatenate(x) for x in [(document, a)] * 2 + [(document, b)] * 2] + [alone] * 2

    caches, kept = kv.decode_caches(blocks), np.arange(6)
    got = {i: [] for i in range(6)}
    for step in range(70):
        if step == 40:  # prompt a is done, as are single rows of the others
            kept = np.array([3, 4])
            blocks = [kv.Block(1, (first, second.take(np.array([1])))), kv.Block(1, (other,))]
            caches = kv.compact(caches, blocks, kept)
        lengths = np.concatenate([block.lengths for block in blocks])
        np.testing.assert_array_equal(np.array(caches[0].offset), lengths + step)
        hidden = stack(np.array([[rows[i][step]] for i in kept]), (lengths + step)[:, None], caches)
        mx.eval(hidden)
        for i, h in zip(kept, hidden, strict=True):
            got[i].append(h)
    for i in range(6):
        whole = stack.alone(np.concatenate([before[i], rows[i]]))[-70:]
        close(mx.concatenate(got[i]), whole[: len(got[i])], 1e-5)


def test_join_pads_and_take_cuts():
    def prefix(lengths, value):
        full = mx.full((len(lengths), 1, max(lengths), 2), value)
        return kv.Prefix([full], [full], np.array(lengths), np.zeros(len(lengths), int))

    joined = kv.Prefix.join([prefix([3, 1], 1.0), prefix([5], 2.0)])
    assert joined.keys[0].shape == (3, 1, 5, 2) and joined.lengths.tolist() == [3, 1, 5]
    short = joined.take(np.array([1, 0]))
    assert short.keys[0].shape == (2, 1, 3, 2) and short.lengths.tolist() == [1, 3]


def test_attention_that_cannot_be_routed_is_refused():
    zeros = mx.zeros((1, 1, 1, 2))
    prefix = kv.Prefix([zeros], [zeros], np.array([1]), np.array([0]))
    (cache,) = kv.decode_caches([kv.Block(1, (prefix,))])
    cache.update_and_fetch(zeros, zeros)
    with pytest.raises(ModelError, match="scaled_dot_product_attention"):
        cache.update_and_fetch(zeros, zeros)
