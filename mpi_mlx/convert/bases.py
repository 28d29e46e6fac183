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
from mpi_mlx.convert.checks import fits
from mpi_mlx.convert.configs import canonical_config, check_supported, mlx_config
from mpi_mlx.convert.configs import read_json as read_config
from mpi_mlx.convert.folders import check_disk, find_source
from mpi_mlx.convert.report import ConversionReport
from mpi_mlx.convert.shards import open_checkpoint
from mpi_mlx.convert.torch_side import torch_is_here
from mpi_mlx.convert.weights import float32_bytes, read_layout, write_folder, written_bytes
from mpi_mlx.errors import ConversionError, DeviceError, MPIError


def run_of(folder: Path) -> Path | None:
    """The run that an adapter folder belongs to: ``RUN/adapter`` or ``RUN/stages/2-sft/adapter``."""
    folder = folder.absolute()
    places = [folder]
    if folder.name == "adapter":
        places += [folder.parent] + ([folder.parents[2]] if folder.parent.parent.name == "stages" else [])
    # a folder with a recipe alone is a project, whose recipe may name another base
    return next((p for p in places if all((p / n).is_file() for n in ("recipe.yaml", "environment.json"))), None)


def run_recipe(folder: Path) -> dict:
    """recipe.yaml of the run that an adapter folder belongs to, or nothing."""
    run = run_of(folder)
    if run is None:
        return {}
    try:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    except yaml.YAMLError as e:
        raise ConversionError(f"{run / 'recipe.yaml'} is not YAML: {' '.join(str(e).split())[:200]}") from None
    return recipe if isinstance(recipe, dict) else {}


def stages_of(folder: Path, recipe: dict) -> list[str]:
    """The stages that an adapter has been through: all of the run's, or those up to the one it is from."""
    names = [s.get("stage", "?") for s in recipe.get("stages") or []]
    place = folder.absolute().parent
    number = place.name.partition("-")[0]
    return names[: int(number)] if place.parent.name == "stages" and number.isdigit() else names


def document_of(folder: Path, recipe: dict) -> dict | None:
    """Name and sha256 of the policy document that a run was trained on: as the run recorded it, else as its
    recipe's data give it today."""
    run = run_of(folder)
    if run is None:
        return None
    try:
        found = json.loads((run / "environment.json").read_text()).get("document")
    except (OSError, ValueError, AttributeError):
        found = None
    if isinstance(found, dict) and found.get("sha256"):
        return found
    return _document_today(run, recipe)


def _document_today(run: Path, recipe: dict) -> dict | None:
    from mpi_mlx.data.dataset import load_dataset
    from mpi_mlx.recipe import load_recipe

    if not recipe.get("data"):
        return None
    try:
        data = load_recipe(run / "recipe.yaml").data
        # the document without the examples
        few = {"train": 0 if hasattr(data, "benchmark") else None, "rl": None}
        few |= {"validation": few["train"], "test": few["train"]}
        document = load_dataset(data.model_copy(update=few), run).document
    except MPIError:  # files that are gone since: the card then names no document
        return None
    return None if document is None else {"name": document.name, "sha256": document.sha256}


def base_of(folder: Path, adapter: Adapter) -> Path | None:
    """The folder of the base that an adapter was trained on, if it is known and here."""
    named = (run_recipe(folder).get("model") or {}).get("base") or adapter.base
    if not named:
        return None
    try:
        return find_source(named)
    except ConversionError:
        return None


def limit_of(folder: Path, adapter: Adapter) -> int | None:
    """The limit on images' pixels that an adapter was trained with, as it or its run's recipe has it."""
    return adapter.max_pixels or (run_recipe(folder).get("model") or {}).get("max_pixels")


@contextmanager
def view(folder: Path, library: str, report: ConversionReport, beside: Path) -> Iterator[Path | None]:
    """A folder of the same weights that ``library`` ("mlx" or "torch") loads right.

    The folder itself where it is in that layout; else a temporary one: links to the files and a config for
    MLX, or, where tensors need another name or order, a conversion in ``beside``. None where memory or disk
    cannot hold that, or torch is not installed.
    """
    raw = read_config(folder / "config.json")
    checkpoint = open_checkpoint(folder)
    saved_by_mlx = "quantization" in raw or checkpoint.format == "mlx"
    if library == "torch" and not torch_is_here():
        yield None
        return
    if "mlx_keys" in raw and not saved_by_mlx or saved_by_mlx == (library == "mlx"):
        yield folder
        return
    with tempfile.TemporaryDirectory(dir=beside, prefix=".view-") as name:
        made = Path(name)
        config = canonical_config(folder)
        family = check_supported(config)
        named = all(fam.disk_name(family, n) == n for n in checkpoint.tensors)
        if saved_by_mlx or not named or config["tie_word_embeddings"] and family.tied_head:
            yield _converted(folder, made, report)
            return
        (made / "config.json").write_text(json.dumps(mlx_config(config)))
        for path in checkpoint.files:  # not what else lies there
            (made / path.name).symlink_to(path.resolve())
        yield made


def _converted(folder: Path, made: Path, report: ConversionReport) -> Path | None:
    _, layout = read_layout(folder)
    if not fits(float32_bytes(layout)):
        return None  # there will be no check
    try:
        check_disk(made, written_bytes(layout))
    except DeviceError:
        report.notes.append(f"the disk cannot hold {folder} in the other side's layout, so that side is not run")
        return None
    write_folder(layout, folder, made, made, dtype=None)
    return made
