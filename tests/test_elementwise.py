import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mpi_mlx import elementwise


@pytest.fixture(params=[True, False], ids=["polynomial", "mlx"])
def slow(request, monkeypatch):
    """Both branches on every machine."""
    monkeypatch.setattr(elementwise, "is_slow", lambda x: request.param)


def numbers(*shape):
    mx.random.seed(0)
    return mx.random.normal(shape) * 4


def compare(ours, plain, *arguments):
    """Values and gradients of every argument, under a random cotangent."""
    weight, every = mx.random.normal(plain(*arguments).shape), tuple(range(len(arguments)))

    def gradients(function):
        return mx.grad(lambda *x: (function(*x) * weight).sum(), argnums=every)(*arguments)

    np.testing.assert_allclose(np.array(ours(*arguments)), np.array(plain(*arguments)), rtol=3e-6, atol=1e-6)
    for x, y in zip(gradients(ours), gradients(plain), strict=True):
        assert float(mx.abs(x - y).max()) < 3e-6 * float(mx.abs(y).max())


@pytest.mark.parametrize("size", [501, 40001])  # one kernel for all small sizes, one for each large one
def test_exp_is_exp_over_the_whole_range(slow, size):
    x = np.linspace(-87, 0, size).astype(np.float32)
    relative = np.array(elementwise.exp(mx.array(x))) / np.exp(x.astype(np.float64)) - 1
    assert np.abs(relative).max() < 1e-5  # x log2(e) itself rounds to 2^-24 of up to 126
    near = np.abs(x) < 5
    assert np.abs(relative[near]).max() < 1e-6 and np.abs(relative[near]).mean() < 2e-7


def test_exp_of_masked_scores_is_nothing(slow):
    masked = np.array(elementwise.exp(mx.array([-1e9, -2e9, -3e38, -200.0, -90.0])))
    assert (np.abs(masked) < 1e-37).all()
    assert elementwise.exp(mx.array([0.0])).item() == 1.0


def test_exp_a_rounding_above_zero(slow):
    """A logit less the log-sum-exp of a row that it dominates."""
    assert elementwise.exp(mx.array([1e-6])).item() == pytest.approx(1.0, abs=3e-6)


def test_exp(slow):
    compare(elementwise.exp, mx.exp, -mx.abs(numbers(7, 5)))
    compare(elementwise.exp, mx.exp, -mx.abs(numbers(70, 5, 60))[:, ::2])


def test_softmax(slow):
    compare(elementwise.softmax, lambda x: mx.softmax(x, axis=-1), numbers(3, 4, 33))


def test_logsumexp(slow):
    compare(elementwise.logsumexp, lambda x: mx.logsumexp(x, axis=-1), numbers(3, 4, 33))
    assert elementwise.logsumexp(mx.array([[1000.0, 1000.0]])).item() == pytest.approx(1000 + np.log(2))


def test_swiglu(monkeypatch):
    monkeypatch.setattr(elementwise, "is_slow", lambda x: True)
    compare(elementwise.swiglu, lambda g, x: nn.silu(g) * x, numbers(6, 9) * 5, numbers(6, 9) + 1)
    gate = mx.array([-300.0, -90.0, 0.0, 90.0, 300.0])
    np.testing.assert_allclose(
        np.array(elementwise.swiglu(gate, mx.ones(5))), [0, 0, 0, 90, 300], rtol=1e-6, atol=1e-30
    )


def test_other_types_are_left_to_mlx():
    assert not elementwise.is_slow(mx.zeros(3, mx.bfloat16))
    assert elementwise.swiglu(mx.zeros(3, mx.bfloat16), mx.zeros(3, mx.bfloat16)) is None
