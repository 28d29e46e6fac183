import math

import mlx.core as mx
import numpy as np
import pytest

from mpi_mlx.training import losses


def plain_logprobs(weight, hidden, targets, temperature=1.0, bias=None):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logits = logits / temperature
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.take_along_axis(logits, targets[:, None], -1)[:, 0]


def relative(a, b):
    return float(mx.abs(a - b).max() / mx.maximum(mx.abs(b).max(), 1e-12))


@pytest.fixture
def problem():
    mx.random.seed(1)
    return (
        mx.random.normal((37, 16)),  # V, D
        mx.random.normal((11, 16)),  # N, D
        mx.random.randint(0, 37, (11,)),
        mx.random.normal((11,)),
        mx.random.normal((37,)),
    )


def test_logprobs_of_uniform_head():
    values = losses.token_logprobs(mx.zeros((4, 2)), mx.ones((3, 2)), mx.array([0, 1, 2]))
    np.testing.assert_allclose(values, [-math.log(4)] * 3, rtol=1e-6)


@pytest.mark.parametrize("chunk", [None, 4, 11, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_equals_plain(problem, chunk, temperature):
    weight, hidden, targets, cot, _ = problem

    def ours(w, h):
        return (losses.token_logprobs(w, h, targets, temperature, chunk) * cot).sum()

    def plain(w, h):
        return (plain_logprobs(w, h, targets, temperature) * cot).sum()

    a, grads_a = mx.value_and_grad(ours, argnums=(0, 1))(weight, hidden)
    b, grads_b = mx.value_and_grad(plain, argnums=(0, 1))(weight, hidden)
    assert abs(float(a - b)) < 1e-5 * abs(float(b))
    for x, y in zip(grads_a, grads_b, strict=True):
        assert relative(x, y) < 1e-5


@pytest.mark.parametrize("bias", [False, True])
def test_tiles_of_the_vocabulary_equal_plain(bias, monkeypatch):
    """2,500 tokens in tiles of 1,024, 1,024 and 452; targets on both sides of every border."""
    monkeypatch.setattr(losses, "_TILE_BYTES", 4096)
    monkeypatch.setattr(losses, "_TILE_BYTES_CPU", 4096)
    mx.random.seed(2)
    weight, hidden, b = mx.random.normal((2500, 16)), mx.random.normal((7, 16)), mx.random.normal((2500,))
    targets, cot = mx.array([0, 1023, 1024, 2047, 2048, 2499, 1500]), mx.random.normal((7,))
    assert losses._tiles(7, 2500, 3, False) == ([(0, 3), (3, 6), (6, 7)], [(0, 1024), (1024, 2048), (2048, 2500)])

    def ours(w, h, b):
        return (losses.token_logprobs((w, b) if bias else w, h, targets, 0.7, 3) * cot).sum()

    def plain(w, h, b):
        return (plain_logprobs(w, h, targets, 0.7, b if bias else None) * cot).sum()

    which = (0, 1, 2) if bias else (0, 1)
    a, grads_a = mx.value_and_grad(ours, argnums=which)(weight, hidden, b)
    c, grads_c = mx.value_and_grad(plain, argnums=which)(weight, hidden, b)
    assert abs(float(a - c)) < 1e-5 * abs(float(c))
    for x, y in zip(grads_a, grads_c, strict=True):
        assert relative(x, y) < 1e-5


@pytest.mark.parametrize("chunk", [None, 3])
def test_bias_gets_its_gradient(problem, chunk):
    weight, hidden, targets, cot, bias = problem
    ours = mx.grad(lambda b: (losses.token_logprobs((weight, b), hidden, targets, chunk=chunk) * cot).sum())
    plain = mx.grad(lambda b: (plain_logprobs(weight, hidden, targets, bias=b) * cot).sum())
    assert relative(ours(bias), plain(bias)) < 1e-5


@pytest.mark.parametrize("chunk", [None, 3])
def test_callable_head(problem, chunk):
    weight, hidden, targets, cot, _ = problem
    head = lambda h: mx.tanh(h @ weight.T)  # noqa: E731

    def plain(h):
        logits = head(h)
        picked = mx.take_along_axis(logits, targets[:, None], -1)[:, 0]
        return ((picked - mx.logsumexp(logits, axis=-1)) * cot).sum()

    ours = mx.grad(lambda h: (losses.token_logprobs(head, h, targets, chunk=chunk) * cot).sum())(hidden)
    assert relative(ours, mx.grad(plain)(hidden)) < 1e-5


@pytest.mark.parametrize("columns", [None, 64])
def test_certain_tokens_keep_their_gradient_in_16_bits(monkeypatch, columns):
    """Relative to float32's of the same rounded numbers; the difference of two roundings would be off by a tenth."""
    if columns:
        rows, spans = [(0, 3), (3, 6), (6, 8)], [(i, i + columns) for i in range(0, 256, columns)]
        monkeypatch.setattr(losses, "_tiles", lambda *_, **__: (rows, spans))
    mx.random.seed(2)
    matrix = (0.05 * mx.random.normal((256, 128))).astype(mx.bfloat16)
    targets = mx.array([3, 77, 200, 255, 0, 64, 128, 9])
    # towards the target's row until it has some 0.99 and more of the probability
    hidden = (40.0 * matrix[targets] * mx.array([0.6, 0.7, 0.8, 0.9, 1.0, 0.8, 0.7, 0.9])[:, None]).astype(mx.bfloat16)

    def gradient(dtype):
        def loss(h):
            return losses.token_logprobs(matrix.astype(dtype), h, targets).sum()

        return mx.grad(loss)(hidden.astype(dtype)).astype(mx.float32)

    exact, rounded = gradient(mx.float32), gradient(mx.bfloat16)
    probability = mx.exp(losses.token_logprobs(matrix.astype(mx.float32), hidden.astype(mx.float32), targets))
    assert (probability > 0.9).sum().item() >= 4, probability
    off = mx.linalg.norm(exact - rounded, axis=-1) / mx.linalg.norm(exact, axis=-1)
    assert off.max().item() < 0.04, (off, probability)


def test_tied_head_adds_to_the_embedding_gradient(problem):
    weight, _, targets, cot, _ = problem
    ids = mx.arange(11)
    ours = mx.grad(lambda w: (losses.token_logprobs(w, mx.tanh(w[ids]), targets, chunk=4) * cot).sum())
    plain = mx.grad(lambda w: (plain_logprobs(w, mx.tanh(w[ids]), targets) * cot).sum())
    assert relative(ours(weight), plain(weight)) < 1e-5


def test_without_gradient_the_values_are_the_same(problem):
    weight, hidden, targets, _, _ = problem
    values = losses.token_logprobs(weight, hidden, targets, chunk=4, gradient=False)
    assert (values == losses.token_logprobs(weight, hidden, targets, chunk=4)).all()
    with pytest.raises(ValueError, match="no gradient"):
        mx.eval(mx.grad(lambda h: losses.token_logprobs(weight, h, targets, gradient=False).sum())(hidden))


def test_no_targets():
    assert losses.token_logprobs(mx.zeros((4, 2)), mx.zeros((0, 2)), mx.zeros((0,), mx.int32)).shape == (0,)


def test_chunks_bound_the_memory():
    weight, hidden = mx.random.normal((4096, 8)), mx.random.normal((4096, 8))
    targets = mx.random.randint(0, 4096, (4096,))
    grad = mx.grad(lambda h: losses.token_logprobs(weight, h, targets, chunk=64).sum())
    mx.eval(weight, hidden, targets)
    mx.reset_peak_memory()
    start = mx.get_active_memory()
    mx.eval(grad(hidden))
    # all logits would be 64 MiB, twice; a chunk's are 1 MiB, and some of them are in flight: 20 MiB in all were
    # seen on a machine whose worker thread got little time
    assert mx.get_peak_memory() - start < 32 * 2**20


def test_sft_loss_by_hand():
    total, count = losses.sft_loss(mx.array([-1.0, -2.0, -math.inf]), mx.array([1, 1, 0]))
    assert (float(total), float(count)) == (3.0, 2.0)


def test_surrogate_by_hand():
    # ratios 1.5 and 0.5 with A = +1, -1; bounds 0.8 and 1.3
    old = mx.zeros((2, 2))
    new = mx.log(mx.array([[1.5, 0.5], [1.5, 0.5]]))
    result = losses.surrogate(new, old, mx.array([1.0, -1.0]), mx.ones((2, 2)), 0.2, 0.3)
    np.testing.assert_allclose(result.loss, [[-1.3, -0.5], [1.5, 0.8]], rtol=1e-6)
    assert result.clipped.tolist() == [[True, False], [False, True]]


def test_surrogate_gradient_is_gone_where_clipped():
    def total(x):
        return losses.surrogate(x, mx.zeros((1, 2)), mx.array([1.0]), mx.ones((1, 2)), 0.2, 0.3).loss.sum()

    grad = mx.grad(total)(mx.log(mx.array([[1.5, 1.1]])))
    np.testing.assert_allclose(grad, [[0.0, -1.1]], rtol=1e-6, atol=1e-7)


def test_dual_clip_bounds_negative_advantages_alone():
    # ratios 5 and 2.5 with A = +1, -1; bounds 0.8, 1.2, and 3 where A < 0
    new = mx.log(mx.array([[5.0, 2.5], [5.0, 2.5]]))

    def total(x):
        return losses.surrogate(x, mx.zeros((2, 2)), mx.array([1.0, -1.0]), ones, 0.2, 0.2, None, 3.0).loss.sum()

    ones = mx.ones((2, 2))
    result = losses.surrogate(new, mx.zeros((2, 2)), mx.array([1.0, -1.0]), ones, 0.2, 0.2, dual_clip=3.0)
    np.testing.assert_allclose(result.loss, [[-1.2, -1.2], [3.0, 2.5]], rtol=1e-6)
    assert result.clipped.tolist() == [[True, True], [True, False]]
    np.testing.assert_allclose(mx.grad(total)(new), [[0.0, 0.0], [0.0, 2.5]], rtol=1e-6, atol=1e-7)


def test_surrogate_ignores_masked_entries():
    mask = mx.array([[1, 0]])
    new, old = mx.array([[0.0, 500.0]]), mx.array([[0.0, -math.inf]])
    value, grad = mx.value_and_grad(
        lambda x: losses.surrogate(x, old, mx.array([2.0]), mask, 0.2, 0.2).loss.sum()
    )(new)
    assert float(value) == -2.0
    assert grad.tolist() == [[-2.0, 0.0]]


def test_importance_by_hand():
    new, sampled = mx.array([[-1.0, -1.0], [0.0, 9.0]]), mx.array([[-2.0, -1.0], [-5.0, 0.0]])
    weights = losses.importance_weights(new, sampled, mx.array([[1, 1], [1, 0]]))
    np.testing.assert_allclose(weights, [[2.0, 1.0], [2.0, 0.0]], rtol=1e-6)
    unlikely = losses.importance_weights(mx.array([[-1.5]]), mx.array([[-1.0]]), mx.ones((1, 1)))
    np.testing.assert_allclose(unlikely, [[math.exp(-0.5)]], rtol=1e-6)
    zeros, ones = mx.zeros((2, 2)), mx.ones((2, 2))
    scaled = losses.surrogate(zeros, zeros, mx.ones((2,)), ones, 0.2, 0.2, importance=mx.array([0.5, 2.0]))
    np.testing.assert_allclose(scaled.loss, [[-0.5, -0.5], [-2.0, -2.0]])


def test_k3_by_hand():
    value = losses.k3_kl(mx.array([-1.0, -1.0, 0.0]), mx.array([-1.0, 0.0, 1e9]), mx.array([1, 1, 0]))
    np.testing.assert_allclose(value, [0.0, math.e - 2.0, 0.0], rtol=1e-6)


VALUES = mx.array([[1.0, 3.0, 7.0], [5.0, 0.0, 0.0], [9.0, 9.0, 9.0]])
MASK = mx.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("how", "expected"), [("sequence", (7.0, 2.0)), ("token", (9.0, 3.0)), ("constant", (9.0, 20.0))]
)
def test_aggregate_by_hand_and_in_parts(how, expected):
    whole = losses.aggregate(VALUES, MASK, how, max_completion_tokens=10)
    assert tuple(map(float, whole)) == expected
    parts = [losses.aggregate(VALUES[i : i + 1], MASK[i : i + 1], how, 10) for i in range(3)]
    assert tuple(float(sum(p[i] for p in parts)) for i in range(2)) == expected


def test_aggregate_refuses():
    with pytest.raises(ValueError, match="constant"):
        losses.aggregate(VALUES, MASK, "constant")
    with pytest.raises(ValueError, match="mean"):
        losses.aggregate(VALUES, MASK, "mean")


@pytest.mark.parametrize("hidden", (mx.bfloat16, mx.float32))
def test_gradients_come_in_the_types_of_what_they_are_of(hidden):
    """Also where a norm in float32 hands its output to a head in 16 bits."""
    matrix, bias = (mx.random.normal(s, key=mx.random.key(1)).astype(mx.bfloat16) for s in ((50, 16), (50,)))
    states = mx.random.normal((5, 16), key=mx.random.key(2)).astype(hidden)
    targets = mx.array([3, 1, 4, 1, 5])

    def tiled(matrix, bias, states):
        return losses.token_logprobs((matrix, bias), states, targets).sum()

    def plain(matrix, bias, states):
        logits = (states @ matrix.T + bias).astype(mx.float32)
        return (mx.take_along_axis(logits, targets[:, None], -1)[:, 0] - mx.logsumexp(logits, axis=-1)).sum()

    found, wanted = (mx.grad(f, argnums=(0, 1, 2))(matrix, bias, states) for f in (tiled, plain))
    assert [g.dtype for g in found] == [mx.bfloat16, mx.bfloat16, hidden]
    for a, b in zip(found, wanted, strict=True):
        assert mx.abs(a - b).max() < 0.03 * mx.abs(b).max()
