import sys

import mlx.core as mx
import numpy as np
import pytest

from mpi_mlx import elementwise
from mpi_mlx.models import attention, kv
from mpi_mlx.models.building import build_net

LLAMA = dict(
    model_type="llama", hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=50, rms_norm_eps=1e-6, num_hidden_layers=2, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(params=["polynomial", "mlx", "recomputed", "in blocks"])
def slow(request, monkeypatch):
    """Both ways to take exponentials, kept or not, at once or in blocks."""
    monkeypatch.setattr(elementwise, "is_slow", lambda x: request.param != "mlx")
    if request.param in ("recomputed", "in blocks"):
        monkeypatch.setattr(attention, "KEEP_BYTES", 0)
    if request.param == "in blocks":
        monkeypatch.setattr(attention, "_BLOCK_BYTES", 600)


def arrays(*shapes):
    mx.random.seed(3)
    return [mx.random.normal(shape) for shape in shapes]


def compare(ours, plain, arguments):
    weight, every = mx.random.normal(plain(*arguments).shape), tuple(range(len(arguments)))

    def gradients(function):
        return mx.grad(lambda *x: (function(*x) * weight).sum(), argnums=every)(*arguments)

    np.testing.assert_allclose(np.array(ours(*arguments)), np.array(plain(*arguments)), rtol=1e-5, atol=1e-6)
    for x, y in zip(gradients(ours), gradients(plain), strict=True):
        assert float(mx.abs(x - y).max()) < 1e-5 * float(mx.abs(y).max()) + 1e-6


def test_parts_equal_one_long_key_sequence(slow):
    """6 rows: a document for all, 3 prompts (one shorter) of 2 rows each, the rows' own causal tokens."""
    queries, *rest = arrays((6, 4, 5, 8), *[(1, 2, 7, 8)] * 2, *[(3, 2, 4, 8)] * 2, *[(6, 2, 5, 8)] * 2)
    short = mx.array([[True] * 4, [True] * 4, [True] * 2 + [False] * 2])
    causal = mx.tril(mx.ones((5, 5), mx.bool_))

    def ours(q, dk, dv, pk, pv, k, v):
        biases = [None, mx.where(short, 0.0, attention.MASKED)[:, None, None],
                  mx.where(causal, 0.0, attention.MASKED)[None, None]]  # fmt: skip
        return attention.attention_over_parts(q, [(dk, dv), (pk, pv), (k, v)], biases, 0.3)

    def plain(q, dk, dv, pk, pv, k, v):
        k, v = (mx.concatenate([mx.repeat(a, 6, 0), mx.repeat(b, 2, 0), c], axis=2)
                for a, b, c in ((dk, pk, k), (dv, pv, v)))  # fmt: skip
        seen = [mx.ones((6, 5, 7), mx.bool_), mx.repeat(short, 2, 0)[:, None], causal[None]]
        mask = mx.concatenate([mx.broadcast_to(m, (6, 5, m.shape[-1])) for m in seen], axis=-1)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask[:, None])

    compare(ours, plain, [queries, *rest])


def test_grouped_heads_and_biases_by_hand():
    """One query of two heads, keys of two parts; the masked key has no share."""
    keys = mx.zeros((1, 1, 2, 2))
    values = mx.array([[[[1.0], [100.0]]]])
    own = (mx.zeros((2, 1, 1, 2)), mx.array([[[[3.0]]], [[[5.0]]]]))
    bias = mx.array([[[[0.0, -1e9]]]])
    out = attention.attention_over_parts(mx.ones((2, 2, 1, 2)), [(keys, values), own], [bias, None], 1.0)
    assert out.squeeze().tolist() == [[2.0, 2.0], [3.0, 3.0]]


@pytest.mark.parametrize("length", [1, 40, 300])
def test_causal_in_blocks(slow, length):
    arguments = arrays((2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 8))
    compare(
        lambda q, k, v: attention.causal_attention(q, k, v, 0.3),
        lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask="causal"),
        arguments,
    )


@pytest.mark.parametrize("new, known", [(1, 9), (5, 3), (7, 0), (6, 20)])
def test_the_last_queries_see_all_keys_before_them(new, known, monkeypatch):
    monkeypatch.setattr(attention, "CAUSAL_BLOCK", 3)
    arguments = arrays((2, 4, new, 8), (2, 2, known + new, 8), (2, 2, known + new, 8))
    compare(
        lambda q, k, v: attention.causal_attention(q, k, v, 0.3),
        lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask="causal"),
        arguments,
    )


@pytest.mark.parametrize("mask", [None, "causal", "boolean", "additive"])
def test_routed_plain_attention_and_swiglu_change_nothing(monkeypatch, mask):
    net = build_net(LLAMA)
    module = sys.modules[type(net.model.layers[0]).__module__]
    originals = {n: getattr(module, n) for n in ("scaled_dot_product_attention", "swiglu")}
    originals = {n: getattr(f, "__wrapped__", f) for n, f in originals.items()}
    for name, function in originals.items():
        monkeypatch.setattr(module, name, function)
    attention.route_attention(net)
    routed = module.scaled_dot_product_attention
    attention.route_attention(net)
    assert module.scaled_dot_product_attention is routed, "routing twice is routing once"
    if mask == "boolean":
        mask = mx.random.uniform(shape=(2, 1, 6, 6)) < 0.7
        mask = mask | mx.eye(6, dtype=mx.bool_)
    elif mask == "additive":
        mask = mx.random.normal((2, 1, 6, 6))
    arguments = arrays((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8))
    for slow in (True, False):
        monkeypatch.setattr(elementwise, "is_slow", lambda x, slow=slow: slow)
        compare(
            lambda q, k, v: routed(q, k, v, None, scale=0.3, mask=mask),
            lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask),
            arguments,
        )
        compare(module.swiglu, originals["swiglu"], arrays((3, 5), (3, 5)))


@pytest.mark.parametrize("gradient, blocks", [(True, True), (False, False)])
def test_training_takes_long_sequences_in_blocks_where_mlx_would_keep_all_scores(monkeypatch, gradient, blocks):
    """In 16 bits, which are not slow here: as on a GPU. Without gradient MLX's fused kernel is the better one."""
    asked = []

    def original(queries, keys, values, cache=None, scale=1.0, mask=None):
        asked.append(mask)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)

    mx.random.seed(0)
    q, k, v = (mx.random.normal((2, h, 300, 16)).astype(mx.bfloat16) for h in (4, 2, 2))
    routed, cache = attention._routed(original), kv.CausalMask(gradient)
    few = routed(q, k, v, cache, scale=0.25, mask=cache.make_mask(300))
    assert asked == ["causal"]
    monkeypatch.setattr(attention, "LARGE_BYTES", 4 * 2 * 4 * 300 * 300 - 1)
    long = routed(q, k, v, cache, scale=0.25, mask=cache.make_mask(300))
    assert (len(asked) == 1) == blocks
    assert mx.abs(long.astype(mx.float32) - few.astype(mx.float32)).max().item() < 0.03
