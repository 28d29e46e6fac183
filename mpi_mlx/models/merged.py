"""LoRA adapters as they are cheapest while a model only samples: added to their base matrices, or ready to use."""

import contextlib
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from mpi_mlx.models.base import Model
from mpi_mlx.models.lora_layers import Held, LoRALinear, hold_all

LEAST_TOKENS = 256  # fewer tokens forwarded do not earn back the merging
MOST_BYTES = 2**30  # the merged matrices exist beside the base's


@contextlib.contextmanager
def merged_adapters(model: Model, tokens: int) -> Iterator[bool]:
    """Within, a linear with LoRA is one matrix, W + scale B A; gives whether that was done.

    Only where it changes no number beyond rounding: float32 bases with plain LoRA. Not for fewer `tokens` than
    are worth it, nor where the matrices would take more than 1 GiB. All other adapters, DoRA's too, are held as
    they are used (`lora_layers.Held`). No gradient reaches the adapters within.
    """
    layers = _mergeable(model) if tokens >= LEAST_TOKENS else []
    if sum(layer.linear.weight.nbytes for layer in layers) > MOST_BYTES:
        layers = []
    others = []
    try:
        for layer in layers:
            layer.merge()
        others = _holdable(model)
        hold_all(others, model.dtype)
        yield bool(layers)
    finally:
        for layer in layers:
            layer.unmerge()
        for layer in others:
            layer.let_go()


def _adapted(model: Model, kind: type) -> list:
    """The layers' adapted linears that are on and drop nothing."""
    found = [m for layer in model.layers for m in layer.modules() if isinstance(m, kind) and m.switch.enabled]
    return [m for m in found if not (m.training and m.dropout._p_1 < 1)]


def _holdable(model: Model) -> list[Held]:
    return [m for m in _adapted(model, Held) if not m.held and not (isinstance(m, LoRALinear) and m.merged)]


def _mergeable(model: Model) -> list[LoRALinear]:
    found = [m for m in _adapted(model, LoRALinear) if not m.merged]
    return [m for m in found if type(m.linear) is nn.Linear and m.linear.weight.dtype == mx.float32]
