"""exp, softmax, log-sum-exp and SwiGLU that do not wait for scalar code on Linux CPUs.

MLX's CPU back end has vector code for Apple's processors only: elsewhere one exp takes about 10 ns, where an
addition takes 0.1, and in a small model most of a training step is spent there. Here exp is range reduction
and a polynomial in plain additions and products, which the compiler turns into vector code: 1.5 to 2 ns, and
as exact as `mx.exp`. On Apple's devices, on GPUs and in other types than float32 these functions are MLX's
own. All are differentiable.
"""

import sys
from functools import partial

import mlx.core as mx

_LOG2E = 1.4426950408889634
_ROUND = 12582912.0  # 1.5 x 2^23: adding it rounds to an integer, which stands in the low bits
# 2^f for |f| <= 1/2, highest power first (minimax of degree 6, Cephes' exp2f)
_POLYNOMIAL = (1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2,
               2.402264791363012e-1, 6.931472028550421e-1, 1.0)  # fmt: skip


def is_slow(x: mx.array) -> bool:
    """Whether MLX would take `x`'s exponentials one by one."""
    return sys.platform == "linux" and x.dtype == mx.float32 and mx.default_device().type == mx.DeviceType.cpu


@partial(mx.compile, shapeless=True)
def _reduce(x):
    """x as n and 2^f with exp(x) = 2^n 2^f: n in the low bits of the first, the second a polynomial."""
    scaled = mx.minimum(mx.maximum(x * _LOG2E, -126.0), 126.0)
    rounded = scaled + _ROUND
    rest = scaled - (rounded - _ROUND)
    power = rest * _POLYNOMIAL[0] + _POLYNOMIAL[1]
    for coefficient in _POLYNOMIAL[2:]:
        power = power * rest + coefficient
    return rounded, power


@partial(mx.compile, shapeless=True)
def _scale(rounded, power):
    return power + mx.left_shift(rounded, mx.array(23, mx.int32))


def _exp(x: mx.array) -> mx.array:
    """exp of float32 between 2^-126 and 2^126, without a gradient."""
    rounded, power = _reduce(x)
    return _scale(rounded.view(mx.int32), power.view(mx.int32)).view(mx.float32)


@mx.custom_function
def _exp_slow(x):
    return _exp(x)


@_exp_slow.vjp
def _(primals, cotangent, output):
    return cotangent * output


def exp(x: mx.array) -> mx.array:
    """exp(x). On Linux CPUs results are clamped to [2^-126, 2^126] instead of 0 and infinity."""
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
def _gate(powers, gate, x):
    sigmoid = 1.0 / (1.0 + powers)
    return gate * sigmoid * x, sigmoid


@partial(mx.compile, shapeless=True)
def _gate_gradients(cotangent, sigmoid, gate, x):
    passed = cotangent * sigmoid
    return passed * x * (1.0 + gate * (1.0 - sigmoid)), passed * gate


@mx.custom_function
def _swiglu_slow(gate, x):
    return _gate(_exp(-gate), gate, x)


@_swiglu_slow.vjp
def _(primals, cotangents, outputs):
    return _gate_gradients(cotangents[0], outputs[1], *primals)


def swiglu(gate: mx.array, x: mx.array) -> mx.array | None:
    """silu(gate) * x of equal shapes; None where MLX's own is as quick."""
    return _swiglu_slow(gate, x)[0] if is_slow(gate) and x.dtype == mx.float32 else None
