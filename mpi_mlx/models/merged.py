"""LoRA adapters added to their base matrices for as long as a model only samples."""

import contextlib
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from mpi_mlx.models.base import Model
from mpi_mlx.models.lora_layers import LoRALinear

LEAST_TOKENS = 256  # fewer tokens forwarded do not earn back the merging
MOST_BYTES = 2**30  # the merged matrices exist beside the base's


@contextlib.contextmanager
def merged_adapters(model: Model, tokens: int) -> Iterator[bool]:
    """Within, a linear with LoRA is one matrix, W + scale B A; gives whether that was done.

    Only where it changes no number beyond rounding: float32 bases with plain LoRA. Not for fewer `tokens` than
    are worth it, nor where the matrices would take more than 1 GiB. No gradient reaches the adapters within.
    """
    layers = _mergeable(model) if tokens >= LEAST_TOKENS else []
    if sum(layer.linear.weight.nbytes for layer in layers) > MOST_BYTES:
        layers = []
    for layer in layers:
        layer.merge()
    try:
        yield bool(layers)
    finally:
        for layer in layers:
            layer.unmerge()


def _mergeable(model: Model) -> list[LoRALinear]:
    found = []
    for layer in model.layers:
        for module in layer.modules():
            if type(module) is LoRALinear and module.switch.enabled and not module.merged:
                plain = type(module.linear) is nn.Linear and module.linear.weight.dtype == mx.float32
                dropping = module.training and module.dropout._p_1 < 1
                if plain and not dropping:
                    found.append(module)
    return found
