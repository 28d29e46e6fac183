"""Gradient checkpointing: a decoder layer keeps only its input and is computed again in the backward pass."""

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mpi_mlx.models.base import Model


def enable_gradient_checkpointing(model: Model, on: bool = True) -> None:
    """Switches it on or off for the model's decoder layers. Any number of calls is like the last one.

    The layers' own class is exchanged for a subclass of it, so other models of that class, parameter names
    and the module tree stay as they are. Keys and values that caches hold or record keep their gradient.
    """
    for layer in model.layers:
        plain = getattr(type(layer), "_checkpointed", None)
        if on and plain is None:
            layer.adapters_switch = model.adapters
            layer.__class__ = _checkpointed_class(type(layer))
        elif not on and plain is not None:
            layer.__class__ = plain


def gradient_checkpointing(model: Model) -> bool:
    """Whether it is on."""
    return all(getattr(type(layer), "_checkpointed", None) is not None for layer in model.layers)


_CLASSES: dict[type, type] = {}


def _checkpointed_class(plain: type) -> type:
    if plain not in _CLASSES:
        _CLASSES[plain] = type(
            plain.__name__,
            (plain,),
            {"__call__": _call, "__module__": plain.__module__, "_checkpointed": plain},
        )
    return _CLASSES[plain]


def _call(layer: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    """mx.checkpoint gives gradients to explicit inputs and outputs only: the trainable parameters, ``x``, and
    what the cache holds and records are passed as such."""
    plain = type(layer)._checkpointed
    args = list(args)
    slot = next((index for index, value in enumerate(args) if hasattr(value, "update_and_fetch")), None)
    cache = kwargs.get("cache") if slot is None else args[slot]
    if not getattr(cache, "gradient", True):
        return plain.__call__(layer, x, *args, **kwargs)
    held, begun = getattr(cache, "prefixes", None) or [], getattr(cache, "length", None)
    switch, key = layer.adapters_switch, None
    if layer.training and getattr(switch, "drops", False):
        key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)

    def inner(parameters: dict, x: mx.array, held: list) -> tuple:
        layer.update(parameters)
        own = cache
        if cache is not None:
            own = copy.copy(cache)
            if begun is not None:  # the cache has grown when this runs again; positions count from where it began
                own.length = begun
            if held:
                own.prefixes = held
            if slot is None:
                kwargs["cache"] = own
            else:
                args[slot] = own
        switch.dropout_key = key  # the second forward must drop what the first one did
        out = plain.__call__(layer, x, *args, **kwargs)
        switch.dropout_key = None
        keys, values = getattr(own, "keys", None), getattr(own, "values", None)
        return (out,) if keys is None else (out, keys, values)

    parameters = layer.trainable_parameters()
    out, *recorded = mx.checkpoint(inner)(parameters, x, held)
    layer.update(parameters)
    if recorded:
        cache.keys, cache.values = recorded
        if hasattr(cache, "length"):
            cache.length = cache.keys.shape[2]
    return out
