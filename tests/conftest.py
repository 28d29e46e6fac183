"""Makes cli/ and recipes/ importable by their installed names from a checkout that is not installed.

The figures that tests assert are those of float32, on every device: GPUs would load models in bfloat16, and CUDA
would take float32 products in TF32.
"""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"mpi_mlx": "mpi_mlx", "mpi_mlx_cli": "cli", "mpi_mlx_recipes": "recipes"}

if importlib.util.find_spec("mpi_mlx_cli") is None:
    # Not installed: a folder with links of the right names, for this process and those that tests start.
    _links = tempfile.TemporaryDirectory(prefix="mpi-mlx-packages-")
    for _name, _folder in PACKAGES.items():
        (Path(_links.name) / _name).symlink_to(ROOT / _folder)
    sys.path.insert(0, _links.name)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        part for part in (_links.name, os.environ.get("PYTHONPATH")) if part
    )

os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mpi_mlx  # noqa: E402, F401  before any test imports mlx: the BLAS that is found has to be opened first
from mpi_mlx import runtime  # noqa: E402

runtime.default_dtype = lambda: "float32"
