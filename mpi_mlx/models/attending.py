"""Caches that compute a layer's attention themselves, and the check that the model lets them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mpi_mlx.errors import ModelError


@dataclass(frozen=True)
class Window:
    """Stands for a sliding-window mask on its way through the model to `attend`."""

    size: int


class AttendingCache(ABC):
    """A cache that computes attention itself (`attend`), for layers that share a `layout`, which knows the masks."""

    gradient = True
    layout: Any  # its `attended`: by the layer last asked, whether its attention came through `attend`

    @abstractmethod
    def reach(self, length: int) -> int:
        """The most tokens that the last of `length` new ones may see."""

    @abstractmethod
    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask) -> mx.array:
        """Attention of `queries` over what they may see, `keys` and `values` of the new tokens included."""

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None):
        """None, or a token that carries a window that matters: `attend` does the masking."""
        return Window(window_size) if window_size is not None and window_size < self.reach(length) else None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if not self.layout.attended:
            raise ModelError(
                "this model's attention does not go through scaled_dot_product_attention, so prefixes cannot "
                "be shared between rows; use another base model (or was kv.route_attention not called?)"
            )
        self.layout.attended = False
        return self._store(keys, values)

    def _store(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values
