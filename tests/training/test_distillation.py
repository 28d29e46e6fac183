"""KL from a teacher's hidden states, and its gradient."""

import mlx.core as mx
import numpy as np
import pytest

from mpi_mlx.training.distillation import kl_from


def test_by_hand():
    # two tokens, the head is the identity: teacher (1/2, 1/2), model (3/4, 1/4)
    teacher, hidden = mx.zeros((1, 2)), mx.log(mx.array([[3.0, 1.0]]))
    value = kl_from(lambda h: h, teacher, hidden)
    np.testing.assert_allclose(value, [0.5 * np.log(2 / 3) + 0.5 * np.log(2.0)], rtol=1e-6)
    grad = mx.grad(lambda h: kl_from(lambda x: x, teacher, h).sum())(hidden)
    np.testing.assert_allclose(grad, [[0.25, -0.25]], rtol=1e-6)


def test_a_teacher_s_own_head():
    hidden = mx.log(mx.array([[3.0, 1.0]]))  # under the teacher's head, which gives nothing but 0: (1/2, 1/2)
    value = kl_from(lambda h: h, hidden, hidden, teacher_head=lambda h: 0 * h)
    np.testing.assert_allclose(value, [0.5 * np.log(2 / 3) + 0.5 * np.log(2.0)], rtol=1e-6)


def test_gradient_is_autodiff_s_and_chunks_change_nothing():
    keys = mx.random.split(mx.random.key(0), 4)
    weight, scale = mx.random.normal((11, 5), key=keys[0]), mx.random.normal((7,), key=keys[3])
    teacher, hidden = mx.random.normal((7, 5), key=keys[1]), mx.random.normal((7, 5), key=keys[2])

    def head(h):
        return h @ weight.T

    def plain(h):
        old, new = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (head(teacher), head(h)))
        return ((mx.exp(old) * (old - new)).sum(axis=-1) * scale).sum()

    value, grad = mx.value_and_grad(plain)(hidden)
    for chunk in (2, 7, 100):
        found, slope = mx.value_and_grad(lambda h, n=chunk: (kl_from(head, teacher, h, n) * scale).sum())(hidden)
        np.testing.assert_allclose(found, value, rtol=1e-5)
        np.testing.assert_allclose(slope, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("with_bias", (False, True))
def test_a_head_given_as_arrays_has_its_gradient_too(with_bias):
    keys = mx.random.split(mx.random.key(4), 6)
    weight, base = (mx.random.normal((11, 5), key=k) for k in keys[:2])
    head = (weight, mx.random.normal((11,), key=keys[2])) if with_bias else (weight,)
    scale, teacher, hidden = (mx.random.normal(s, key=k) for s, k in zip(((7,), (7, 5), (7, 5)), keys[3:], strict=True))

    def plain(h, matrix, *bias):
        new = h @ matrix.T + (bias[0] if bias else 0.0)
        old, new = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (teacher @ base.T, new))
        return ((mx.exp(old) * (old - new)).sum(axis=-1) * scale).sum()

    def chunked(h, *arrays):
        given = arrays if with_bias else arrays[0]
        return (kl_from(given, teacher, h, chunk=3, teacher_head=lambda t: t @ base.T) * scale).sum()

    everything = list(range(1 + len(head)))
    value, grads = mx.value_and_grad(plain, everything)(hidden, *head)
    found, slopes = mx.value_and_grad(chunked, everything)(hidden, *head)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    for slope, grad in zip(slopes, grads, strict=True):
        np.testing.assert_allclose(slope, grad, rtol=1e-4, atol=1e-5)


def test_none_at_the_teacher_itself_and_none_for_nothing():
    hidden = mx.random.normal((3, 4), key=mx.random.key(1))
    np.testing.assert_allclose(kl_from(lambda h: h, hidden, hidden), np.zeros(3), atol=1e-6)
    assert kl_from(lambda h: h, hidden[:0], hidden[:0]).shape == (0,)
