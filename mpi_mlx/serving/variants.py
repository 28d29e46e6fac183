"""Several adapters of one base, switched without loading anything."""

from __future__ import annotations

import os
from collections.abc import Mapping

from mlx.utils import tree_unflatten

from mpi_mlx.models.adapters import load_adapter, remove_adapters
from mpi_mlx.models.lora_layers import DoRALinear, LoRALinear


class Variants:
    """The named adapters of a model, on the CPU or GPU all at once; one of them (or none) is on.

    Args:
        model: a base without adapters.
        folders: name -> adapter folder, None for the base itself.
    """

    def __init__(self, model, folders: Mapping[str, str | os.PathLike | None]):
        self.model, self.current = model, None
        self._layers: dict[str, tuple[list, object, bool]] = {}
        self._plain: dict[str, object] = {}
        for name, folder in folders.items():
            layers: list = []
            if folder is not None:
                load_adapter(model, folder)
                found = model.net.named_modules()
                layers = [
                    (path, layer) for path, layer in found if isinstance(layer, (LoRALinear, DoRALinear))
                ]
                self._plain.update({path: layer.linear for path, layer in layers})
            self._layers[name] = (layers, model.lora_spec, model.projector_trained)
            if folder is not None:
                remove_adapters(model)

    @property
    def names(self) -> list[str]:
        return list(self._layers)

    def use(self, name: str) -> None:
        """Puts the adapter ``name`` on, and takes off what was on before."""
        if name == self.current:
            return
        layers, spec, projector = self._layers[name]
        chosen = {**self._plain, **dict(layers)}
        self.model.net.update_modules(tree_unflatten(list(chosen.items())))
        if projector or self.model.projector_trained:
            self.model.forget_features()
        self.model.lora_spec, self.model.projector_trained = spec, projector
        self.model.net.eval()
        self.current = name
