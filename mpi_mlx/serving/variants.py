"""Several adapters of one base, switched without loading anything."""

from __future__ import annotations

import os
from collections.abc import Mapping

import mlx.nn as nn
from mlx.utils import tree_unflatten

from mpi_mlx.models.adapters import load_adapter, remove_adapters
from mpi_mlx.models.lora_layers import Held, hold_all


class Variants:
    """The named adapters of a model, on the CPU or GPU all at once; one of them (or none) is on.

    Args:
        model: a base without adapters.
        folders: name -> adapter folder, None for the base itself.
    """

    def __init__(self, model, folders: Mapping[str, str | os.PathLike | None]):
        self.model, self.current = model, None
        found: dict[str, tuple[dict[str, nn.Module], object, bool]] = {}
        plain: dict[str, nn.Module] = {}
        for name, folder in folders.items():
            layers: dict[str, nn.Module] = {}
            if folder is not None:
                load_adapter(model, folder)
                named = model.net.named_modules()
                layers = {path: layer for path, layer in named if isinstance(layer, Held)}
                plain.update({path: layer.linear for path, layer in layers.items()})
                model.net.eval()
                hold_all(layers.values(), model.dtype)  # nothing is trained here
            found[name] = (layers, model.lora_spec, model.projector_trained)
            if folder is not None:
                remove_adapters(model)
        model.net.eval()
        self._settings = {
            name: (tree_unflatten(list({**plain, **layers}.items())), spec, projector)
            for name, (layers, spec, projector) in found.items()
        }

    @property
    def names(self) -> list[str]:
        return list(self._settings)

    def use(self, name: str) -> None:
        """Puts the adapter ``name`` on, and takes off what was on before."""
        if name == self.current:
            return
        modules, spec, projector = self._settings[name]
        self.model.net.update_modules(modules)
        if projector or self.model.projector_trained:
            self.model.forget_features()
        self.model.lora_spec, self.model.projector_trained = spec, projector
        self.current = name
