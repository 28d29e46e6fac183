"""mpi-mlx: teach a model its rulebook, then serve it without the rulebook.

Multimodal Policy Internalization (arXiv 2510.09474) as LoRA training on MLX. Importing this package opens a
BLAS on Linux and imports no mlx; the names below are imported when they are first used.

    from mpi_mlx import load_recipe, train
    for report in train(load_recipe("quickstart")):
        print(report)
"""

import importlib

from mpi_mlx.allocator import keep_freed_memory
from mpi_mlx.runtime import preload_blas

__version__ = "0.1.0"

keep_freed_memory()
preload_blas()

_LAZY = {
    "load_recipe": "mpi_mlx.recipe",
    "train": "mpi_mlx.training.run",
    "load_model": "mpi_mlx.models",
    "load_document": "mpi_mlx.documents",
    "load_dataset": "mpi_mlx.data.dataset",
    "evaluate": "mpi_mlx.evaluation.evaluate",
    "MPIError": "mpi_mlx.errors",
}
__all__ = [*_LAZY, "__version__"]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'mpi_mlx' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
