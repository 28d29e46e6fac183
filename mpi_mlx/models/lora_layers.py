"""LoRA and DoRA layers that mlx-vlm's and mlx-lm's loaders read, with a switch and a cheaper forward."""

import math
from collections.abc import Iterable
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
from mlx_vlm.trainer.peft import DoRALinear as VlmDoRALinear
from mlx_vlm.trainer.peft import LoRALinear as VlmLoRALinear

from mpi_mlx.models.quantization import dequantized_weight

LINEARS = (nn.Linear, nn.QuantizedLinear)


def input_size(linear: nn.Module) -> int:
    """Width of a linear's input, packed or not."""
    columns = linear.weight.shape[1]
    return columns * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else columns


class Dropout(nn.Dropout):
    """`nn.Dropout` that takes its masks from `switch.dropout_key` while there is one: the same key, the same masks."""

    def __init__(self, p: float, switch: SimpleNamespace):
        super().__init__(p)
        self.switch = switch

    def __call__(self, x: mx.array) -> mx.array:
        key = getattr(self.switch, "dropout_key", None)
        if key is None or self._p_1 == 1 or not self.training:
            return super().__call__(x)
        self.switch.dropout_key, own = mx.random.split(key)
        return mx.random.bernoulli(self._p_1, x.shape, own) * x * (1 / self._p_1)


def _set_update(module: nn.Module, linear, rank, scale, dropout, key, switch) -> None:
    """The members of an adapted linear, its own class's constructor left out."""
    nn.Module.__init__(module)
    module.linear = linear
    module.dropout = Dropout(dropout, switch)
    switch.drops = dropout > 0
    module.scale = scale
    module.switch = switch
    inputs, outputs = input_size(linear), linear.weight.shape[0]
    bound = 1 / math.sqrt(inputs)
    module.lora_a = mx.random.uniform(-bound, bound, (inputs, rank), key=key)
    module.lora_b = mx.zeros((rank, outputs))


def _update(module: nn.Module, x: mx.array) -> mx.array:
    """scale B A x, in x's type: adapters are trained in float32, but a float32 copy of x would be kept for each linear.

    The (T, rank) product is scaled, not the (T, outputs) one: element-wise work is what costs on CPU.
    """
    if "_held" in module:
        a, b, _ = module._held
        return (x @ a) @ b
    a, b = module.lora_a.astype(x.dtype), module.lora_b.astype(x.dtype)
    return ((module.dropout(x) @ a) * module.scale) @ b


class Held:
    """Adapted linears that can hold their update as it is now, for as long as they are only sampled from.

    Casting and scaling A and B are small operations, but thousands of them a token: on GPUs, where a decoded token's
    time is that of launching its operations, they take as long as the model itself.
    """

    def hold(self, dtype: mx.Dtype) -> None:
        """Keeps A and scale B in ``dtype``, the model's, until :meth:`let_go`; gives the adapter no gradient."""
        kept = (self.lora_a, self.lora_b * self.scale, self.factor())
        self._held = tuple(m if m is None else mx.stop_gradient(m.astype(dtype)) for m in kept)

    def let_go(self) -> None:
        self.pop("_held", None)

    @property
    def held(self) -> bool:
        return "_held" in self

    def factor(self) -> mx.array | None:
        """What the whole output is multiplied by (outputs,); None: nothing."""
        return None



def hold_all(layers: Iterable[Held], dtype: mx.Dtype) -> None:
    """:meth:`Held.hold` of all, computed now and not again for each token."""
    held = list(layers)
    for layer in held:
        layer.hold(dtype)
    mx.eval([matrix for layer in held for matrix in layer._held if matrix is not None])


class LoRALinear(Held, VlmLoRALinear):
    """y = W x + b + scale B A x (arXiv 2106.09685), A = ``lora_a.T``, B = ``lora_b.T``.

    Args:
        linear: the frozen base, quantized or not.
        rank, scale, dropout: of the update; ``scale`` is alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        key: of A's uniform init in +-1/sqrt(inputs); B is zero.
        switch: the update is left out while ``switch.enabled`` is False.
    """

    def __init__(
        self, linear: nn.Module, rank: int, scale: float, dropout: float, key: mx.array, switch: SimpleNamespace
    ):
        _set_update(self, linear, rank, scale, dropout, key, switch)

    @property
    def merged(self) -> bool:
        return "_merged" in self

    def merge(self) -> None:
        """Keeps W + scale B A, and uses it in W's place until :meth:`unmerge`; gives the adapter no gradient."""
        update = (self.lora_a * self.scale) @ self.lora_b
        self._merged = mx.stop_gradient(self.linear.weight + update.T.astype(self.linear.weight.dtype))

    def unmerge(self) -> None:
        self.pop("_merged", None)

    def weight_now(self) -> mx.array:
        """(outputs, inputs): the one matrix that the layer is, dropout aside; its gradient reaches the adapter."""
        weight = dequantized_weight(self.linear)
        if not self.switch.enabled:
            return weight
        return weight + ((self.lora_a * self.scale) @ self.lora_b).T.astype(weight.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        if "_merged" in self and self.switch.enabled:
            product = x @ self._merged.T
            return product + self.linear.bias if "bias" in self.linear else product
        y = self.linear(x)
        if not self.switch.enabled:
            return y
        if "_held" in self:
            a, b, _ = self._held
            return mx.addmm(y, x @ a, b)
        return y + _update(self, x)


class DoRALinear(Held, VlmDoRALinear):
    """DoRA (arXiv 2402.09353): magnitude ``m`` times the direction of W + scale B A, its norm detached.

    The norm of the adapted rows is taken from |W|^2, W A and A^T A, so no matrix of W's size is made.
    Same arguments as :class:`LoRALinear`.
    """

    def __init__(
        self, linear: nn.Module, rank: int, scale: float, dropout: float, key: mx.array, switch: SimpleNamespace
    ):
        _set_update(self, linear, rank, scale, dropout, key, switch)
        weight = dequantized_weight(linear).astype(mx.float32)
        self._square = (weight * weight).sum(axis=1)
        self.m = mx.sqrt(self._square)
        mx.eval(self.m, self._square)

    def _product(self, x: mx.array) -> mx.array:
        linear = self.linear
        if isinstance(linear, nn.QuantizedLinear):
            return mx.quantized_matmul(
                x,
                linear.weight,
                scales=linear.scales,
                biases=linear.get("biases"),
                transpose=True,
                group_size=linear.group_size,
                bits=linear.bits,
                mode=getattr(linear, "mode", "affine"),
            )
        return x @ linear.weight.T

    def _norm(self) -> mx.array:
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b)
        found = self.linear.get("scales", self.linear.weight).dtype
        # scales of mxfp4 and the like are bytes
        base = found if mx.issubdtype(found, mx.floating) else mx.bfloat16
        cross = self._product(a.T.astype(base)).astype(mx.float32)  # (rank, outputs): A^T W^T
        gram = (a.T @ a) @ b
        square = (
            self._square + 2 * self.scale * (cross * b).sum(axis=0) + self.scale**2 * (gram * b).sum(axis=0)
        )
        return mx.sqrt(mx.maximum(square, 1e-24))

    def factor(self) -> mx.array:
        return self.m / self._norm()

    def weight_now(self) -> mx.array:
        """As :meth:`LoRALinear.weight_now`."""
        weight = dequantized_weight(self.linear)
        if not self.switch.enabled:
            return weight
        whole = weight + ((self.lora_a * self.scale) @ self.lora_b).T.astype(weight.dtype)
        return (self.m / self._norm())[:, None].astype(weight.dtype) * whole

    def __call__(self, x: mx.array) -> mx.array:
        if not self.switch.enabled:
            return self.linear(x)
        factor = self._held[2] if "_held" in self else (self.m / self._norm()).astype(x.dtype)
        out = factor * (self._product(x) + _update(self, x))
        return out + self.linear.bias if "bias" in self.linear else out
