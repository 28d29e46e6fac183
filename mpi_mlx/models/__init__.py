"""Models: load, encode, forward, LoRA. The only folder that imports mlx-vlm or mlx-lm."""

from mpi_mlx.models.base import Model
from mpi_mlx.models.encoding import Encoded
from mpi_mlx.models.images import ImageInput
from mpi_mlx.models.loading import load_model

__all__ = ["Encoded", "ImageInput", "Model", "load_model"]
