"""Quantized bases: made, undone, and described in mlx-vlm's words."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mpi_mlx.errors import ModelError

GROUP_SIZE = 64
_QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


def quantization_of(net: nn.Module) -> dict[str, dict]:
    """``{module: {group_size, bits, mode}}`` of the quantized modules (mlx-vlm's ``base_quantization``)."""
    return {
        name: {
            "group_size": module.group_size,
            "bits": module.bits,
            "mode": getattr(module, "mode", "affine"),
        }
        for name, module in net.named_modules()
        if isinstance(module, _QUANTIZED)
    }


def quantize(net: nn.Module, bits: int) -> dict[str, dict]:
    """Quantizes the text stack's linears and embedding in place; vision towers and projectors stay.

    A net that is quantized already is left alone if its bits agree. Returns what was quantized.

    Raises:
        ModelError: it is quantized to other bits, or no layer's width is divisible by the group size.
    """
    found = quantization_of(net)
    if found:
        other = {entry["bits"] for entry in found.values()} - {bits}
        if other:
            raise ModelError(
                f"the base is quantized to {other.pop()} bits already; "
                "leave quantize out or choose the float base"
            )
        return found
    language = getattr(net, "language_model", net)
    names = {
        f"language_model.{name}" if language is not net else name
        for name, module in language.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding)) and module.weight.shape[-1] % GROUP_SIZE == 0
    }
    if not names:
        raise ModelError(f"no layer of this model has a width divisible by {GROUP_SIZE}; leave quantize out")
    nn.quantize(net, group_size=GROUP_SIZE, bits=bits, class_predicate=lambda name, _: name in names)
    return quantization_of(net)


def dequantized_weight(module: nn.Module) -> mx.array:
    """The float weight of a linear or embedding, quantized or not."""
    if not isinstance(module, _QUANTIZED):
        return module.weight
    return mx.dequantize(
        module.weight,
        module.scales,
        module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=getattr(module, "mode", "affine"),
    )


def dequantize(net: nn.Module) -> None:
    """Replaces quantized modules by float ones of the same numbers."""
    replacements = []
    for name, module in net.named_modules():
        if not isinstance(module, _QUANTIZED):
            continue
        weight = dequantized_weight(module)
        if isinstance(module, nn.QuantizedEmbedding):
            float_module = nn.Embedding(1, 1)
        else:
            float_module = nn.Linear(1, 1, bias="bias" in module)
            if "bias" in module:
                float_module.bias = module.bias
        float_module.weight = weight
        replacements.append((name, float_module))
    if replacements:
        net.update_modules(tree_unflatten(replacements))
