"""LoRA on a model: which linears, with what scale, and how many parameters that makes."""

import difflib
import math
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mpi_mlx.errors import ModelError
from mpi_mlx.models.base import Model
from mpi_mlx.models.lora_layers import LINEARS, DoRALinear, LoRALinear

KINDS = ("lora", "rslora", "dora")


def lora_scale(rank: int, alpha: float, kind: str = "lora") -> float:
    """alpha / rank; alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732).

    >>> lora_scale(16, 32), lora_scale(16, 32, "rslora")
    (2.0, 8.0)
    """
    return alpha / math.sqrt(rank) if kind == "rslora" else alpha / rank


def attach_lora(model: Model, spec: Any, key: mx.array | None = None) -> list[str]:
    """Freezes the model and puts adapters on the linears that ``spec`` names.

    Args:
        spec: rank, alpha, dropout, targets ("all-linear", or a list of suffixes such as ``q_proj`` and
            qualified names), kind ("lora", "rslora", "dora"), projector (adapt the projector's linears too).
        key: of the init; the same key gives the same adapters on every machine. Default ``mx.random.key(0)``.

    Returns:
        The adapted modules' names.

    Raises:
        ModelError: a target matches nothing, or the model has adapters already.
    """
    if model.has_adapters:
        raise ModelError("the model has adapters already; load the base again")
    if spec.kind not in KINDS:
        raise ModelError(f"lora.kind is one of {', '.join(KINDS)}, not {spec.kind!r}")
    names = resolve_targets(model, spec.targets, getattr(spec, "projector", False))
    put_layers(
        model,
        names,
        spec.rank,
        lora_scale(spec.rank, spec.alpha, spec.kind),
        spec.dropout,
        spec.kind == "dora",
        mx.random.key(0) if key is None else key,
    )
    model.lora_spec = spec
    return names


def put_layers(
    model: Model, names: list[str], rank: int, scale: float, dropout: float, dora: bool, key: mx.array
) -> None:
    """Replaces the named linears by adapted ones; everything else is frozen."""
    model.net.freeze()
    modules = linears(model)
    kind = DoRALinear if dora else LoRALinear
    keys = mx.random.split(key, len(names))
    ordered = sorted(names)
    layers = {
        name: kind(modules[name], rank, scale, dropout, keys[index], model.adapters)
        for index, name in enumerate(ordered)
    }
    model.net.update_modules(tree_unflatten(list(layers.items())))
    for layer in layers.values():
        layer.train(model.net.training)
    mx.eval(model.net.trainable_parameters())
    path = model.parts.projector_path
    model.projector_trained = bool(path) and any(_within(name, path) for name in names)
    model.forget_features()


def linears(model: Model) -> dict[str, Any]:
    """Qualified name -> linear, for all of the model's plain or quantized linears."""
    return {name: module for name, module in model.net.named_modules() if isinstance(module, LINEARS)}


def resolve_targets(model: Model, targets: str | list[str], projector: bool = False) -> list[str]:
    """The qualified names of the linears to adapt, in the order of the network.

    "all-linear" and suffixes look at the decoder's layers; a qualified name may be anywhere but in the frozen
    vision tower, whose features are kept.

    Raises:
        ModelError: a target matches nothing; the message lists what exists.
    """
    available = linears(model)
    path = model.parts.projector_path
    text = [name for name in available if name.startswith(model.parts.text_path)]
    merger = [name for name in available if path and _within(name, path)]
    chosen: set[str] = set()
    if targets == "all-linear":
        chosen.update(text)
    else:
        for target in [targets] if isinstance(targets, str) else targets:
            if target in available:
                if target not in text and target not in merger and not _is_head(target):
                    raise ModelError(
                        f"LoRA target {target!r} is in the vision tower, which stays frozen; "
                        "adapt decoder layers, or the projector with lora.projector: true"
                    )
                found = [target]
            else:
                found = [name for name in text if name.endswith("." + target)]
            if not found:
                raise ModelError(_no_match(target, text + merger))
            chosen.update(found)
    if projector:
        if not merger:
            raise ModelError(f"lora.projector: {model.family} has no projector with linear layers")
        chosen.update(merger)
    return [name for name in available if name in chosen]


def _within(name: str, path: str) -> bool:
    return name == path or name.startswith(path + ".")


def _is_head(name: str) -> bool:
    return name.rsplit(".", 1)[-1] == "lm_head"


def _no_match(target: str, names: list[str]) -> str:
    suffixes = list(
        dict.fromkeys(name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit())
    )
    close = difflib.get_close_matches(target, suffixes + names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return (
        f"LoRA target {target!r} matches no linear layer{hint} suffixes: {', '.join(suffixes)}; "
        f"or a full name such as {names[0]}"
    )


def trainable_parameters(model: Model) -> dict[str, mx.array]:
    """Name -> array of what training changes (after :func:`attach_lora`: the adapters)."""
    return dict(tree_flatten(model.net.trainable_parameters()))
