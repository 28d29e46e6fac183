"""Which base an adapter or run goes on, and a folder of it that MLX can load for a check."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from mpi_mlx.convert import families as fam
from mpi_mlx.convert.adapters import Adapter
from mpi_mlx.convert.configs import canonical_config, check_supported, mlx_config
from mpi_mlx.convert.configs import read_json as read_config
from mpi_mlx.convert.folders import find_source
from mpi_mlx.convert.report import ConversionReport
from mpi_mlx.convert.shards import open_checkpoint
from mpi_mlx.errors import ConversionError


def run_recipe(folder: Path) -> dict:
    """recipe.yaml of the run that an adapter folder belongs to, or nothing."""
    for path in (folder / "recipe.yaml", folder.parent / "recipe.yaml"):
        if path.is_file():
            try:
                recipe = yaml.safe_load(path.read_text())
            except yaml.YAMLError as e:
                raise ConversionError(f"{path} is not YAML: {' '.join(str(e).split())[:200]}") from None
            return recipe if isinstance(recipe, dict) else {}
    return {}


def base_of(folder: Path, adapter: Adapter) -> Path | None:
    """The folder of the base that an adapter was trained on, if it is known and here."""
    named = (run_recipe(folder).get("model") or {}).get("base") or adapter.base
    if not named:
        return None
    try:
        return find_source(named)
    except ConversionError:
        return None


@contextmanager
def mlx_view(folder: Path, report: ConversionReport) -> Iterator[Path | None]:
    """A folder with the same weights that MLX loads right: the folder itself if it was converted, else a
    temporary one with MLX's config and links to the files. Nothing where the tensors need renaming."""
    raw = read_config(folder / "config.json")
    checkpoint = open_checkpoint(folder)
    if "mlx_keys" in raw or "quantization" in raw or checkpoint.format == "mlx":
        yield folder
        return
    config = canonical_config(folder)
    family = check_supported(config)
    named = all(fam.disk_name(family, n) == n for n in checkpoint.tensors)
    needs_head = config["tie_word_embeddings"] and family.tied_head
    if not named or needs_head:
        report.notes.append(
            "no check in mlx: convert the base with `mpi-mlx convert to-mlx` and give that as --base"
        )
        yield None
        return
    with tempfile.TemporaryDirectory() as name:
        view = Path(name)
        (view / "config.json").write_text(json.dumps(mlx_config(config)))
        for path in folder.glob("*.safetensors*"):
            (view / path.name).symlink_to(path.resolve())
        yield view
