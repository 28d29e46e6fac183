"""exp, softmax, log-sum-exp and SwiGLU that do not wait for scalar code on Linux CPUs.

MLX's CPU back end has vector code for Apple's processors only: elsewhere one exp takes about 10 ns, where an
addition takes 0.1, and in a small model most of a training step is spent there. Here exp is range reduction
and a polynomial in plain additions and products, which the compiler turns into vector code: 0.7 ns, and
within 4e-7 of the true value. On Apple's devices, on GPUs and in other types than float32 these functions are
MLX's own. All are differentiable.
"""

import sys
from collections.abc import Callable
from functools import lru_cache, partial

import mlx.core as mx

_LOG2E = 1.4426950408889634
# 2^(f + 1) for -1 < f <= 0, highest power first: of all polynomials of degree 5 that are exact at 0 the one
# with the least relative error, 8.4e-8
_POLYNOMIAL = (1.8898073936158791e-3, 1.841159655607516e-2, 0.11059471668084461, 0.4803602858345223,
               1.38628744230595, 2.0)  # fmt: skip
_MANTISSA = 2.0**23
_SMALL = 16384  # numbers for which a kernel of their own does not pay


def is_slow(x: mx.array) -> bool:
    """Whether MLX would take `x`'s exponentials one by one."""
    return sys.platform == "linux" and x.dtype == mx.float32 and mx.default_device().type == mx.DeviceType.cpu


def _exp_bits(x: mx.array) -> mx.array:
    """The bits (int32) of exp(x) for x <= 0: whole powers of two make the exponent, a polynomial the rest.

    MLX fuses chains of at most eleven operations into one pass, and this is one of eleven.
    """
    a, b, c, d, e, f = (k * _MANTISSA for k in _POLYNOMIAL)
    power = x * _LOG2E
    whole = power.astype(mx.int32)  # towards zero
    rest = power - whole.astype(mx.float32)
    square = rest * rest
    mantissa = (rest * a + b) * (square * square) + (rest * c + d) * square + (rest * e + f)
    exponent = mx.left_shift(mx.maximum(whole, -125) + 125, 23)  # the mantissa brings two more
    return exponent + mantissa.astype(mx.int32)


_exp_bits_of_any_size = mx.compile(_exp_bits, shapeless=True)


@lru_cache(maxsize=512)
def _exp_bits_of_size(size: int) -> Callable:
    """Compiled for one size, or operations that broadcast would count among the eleven: twice as fast."""
    return mx.compile(_exp_bits)


def _exp(x: mx.array) -> mx.array:
    """exp of float32 numbers that are not positive, without a gradient."""
    if x.size < _SMALL:
        return _exp_bits_of_any_size(x).view(mx.float32)
    return _exp_bits_of_size(x.size)(x.reshape(-1)).view(mx.float32).reshape(x.shape)


@mx.custom_function
def _exp_slow(x):
    return _exp(x)


@_exp_slow.vjp
def _(primals, cotangent, output):
    return cotangent * output


def exp(x: mx.array) -> mx.array:
    """exp(x) of numbers that are not positive (by more than rounding).

    On Linux CPUs nothing smaller than 2^-126 comes out, but 0 of what is far below.
    """
    return _exp_slow(x) if is_slow(x) else mx.exp(x)


@mx.custom_function
def _softmax_slow(x):
    powers = _exp(x - mx.max(x, axis=-1, keepdims=True))
    return powers * (1.0 / powers.sum(axis=-1, keepdims=True))


@_softmax_slow.vjp
def _(primals, cotangent, output):
    product = cotangent * output
    return product - output * product.sum(axis=-1, keepdims=True)


def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis, computed in float32."""
    return _softmax_slow(x) if is_slow(x) else mx.softmax(x, axis=-1, precise=True)


@mx.custom_function
def _logsumexp_slow(x):
    largest = mx.max(x, axis=-1, keepdims=True)
    return (largest + mx.log(_exp(x - largest).sum(axis=-1, keepdims=True))).squeeze(-1)


@_logsumexp_slow.vjp
def _(primals, cotangent, output):
    x = primals[0] if isinstance(primals, (tuple, list)) else primals
    return _exp(x - output[..., None]) * cotangent[..., None]


def logsumexp(x: mx.array) -> mx.array:
    """log(sum(exp(x))) over the last axis."""
    return _logsumexp_slow(x) if is_slow(x) else mx.logsumexp(x, axis=-1)


@partial(mx.compile, shapeless=True)
def _minus_size(x):
    return -mx.abs(x)


@partial(mx.compile, shapeless=True)
def _gate(powers, gate, x):
    """gate sigmoid(gate) x and the sigmoid, from exp(-|gate|): the exponential of either sign is below 1."""
    sigmoid = mx.where(gate < 0, powers, 1.0) / (1.0 + powers)
    return gate * sigmoid * x, sigmoid


@partial(mx.compile, shapeless=True)
def _gate_gradients(cotangent, sigmoid, gate, x):
    passed = cotangent * sigmoid
    return passed * x * (1.0 + gate * (1.0 - sigmoid)), passed * gate


@mx.custom_function
def _swiglu_slow(gate, x):
    return _gate(_exp(_minus_size(gate)), gate, x)


@_swiglu_slow.vjp
def _(primals, cotangents, outputs):
    return _gate_gradients(cotangents[0], outputs[1], *primals)


def swiglu(gate: mx.array, x: mx.array) -> mx.array | None:
    """silu(gate) * x of equal shapes; None where MLX's own is as quick."""
    return _swiglu_slow(gate, x)[0] if is_slow(gate) and x.dtype == mx.float32 else None
