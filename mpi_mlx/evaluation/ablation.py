"""The ablation: every cell of a grid trained and evaluated in its own run folder, stages shared by forking.

A study can be stopped at any moment and continued: finished cells are skipped, a half-trained one goes on
from its checkpoint. A cell whose first stages are those of a finished cell takes that run's adapter and does
not train them again; what it then computes is what it would have computed on its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpi_mlx.atomic import replace_dir, temporary_dir, write_json_atomic, write_text_atomic
from mpi_mlx.errors import CheckpointError
from mpi_mlx.evaluation.both import evaluate_both
from mpi_mlx.evaluation.figures import load_metrics
from mpi_mlx.evaluation.grid import BASE, Cell, cell_recipe, fork_parent
from mpi_mlx.evaluation.results import load_predictions, load_results
from mpi_mlx.evaluation.study import CellResult
from mpi_mlx.evaluation.study_report import write_study
from mpi_mlx.training.reports import Interrupted

DONE = "cell.json"  # written last: the cell is finished


@dataclass(frozen=True)
class CellStarted:
    """``number`` of ``total``; ``shared``: stages taken from ``parent`` (a variant's name)."""

    cell: Cell
    number: int
    total: int
    parent: str | None = None
    shared: int = 0


@dataclass(frozen=True)
class CellFinished:
    """``known``: it had been finished before."""

    cell: Cell
    number: int
    total: int
    result: CellResult
    known: bool = False


@dataclass(frozen=True)
class StudyWritten:
    path: Path
    missing: int


def run_ablation(
    base,
    cells: Sequence[Cell],
    output: str | Path,
    *,
    sweeps: Mapping[str, Sequence[Any]],
    mine: Sequence[Cell] = (),
) -> Iterator:
    """Runs ``cells`` (see :func:`grid.plan`) and keeps the report in ``output`` up to date.

    Args:
        base: the recipe that is varied.
        sweeps: the swept fields, for the curves.
        mine: the cells that this process runs, all by default; the report holds whatever is finished.

    Yields:
        CellStarted, then the reports of :func:`mpi_mlx.train`, then CellFinished; StudyWritten after each
        document's last cell and at the end. Ends after an Interrupted.

    Raises:
        RecipeError: ``base`` lacks a stage that a variant needs; before anything is trained.
        CheckpointError: a cell's folder holds the run of another recipe.
    """
    output = Path(output)
    todo = list(mine or cells)
    # All of them first: a variant that the recipe cannot serve is known before hours of training.
    recipes = [cell_recipe(base, cell, str(output / cell.folder)) for cell in todo]
    for number, (cell, recipe) in enumerate(zip(todo, recipes, strict=True), 1):
        folder = output / cell.folder
        known = finished(folder, recipe)
        if known is None:
            parent = _fork(cell, cells, base, output, recipe)
            name = parent.variant.name if parent else None
            yield CellStarted(cell, number, len(todo), name, len(parent.variant.stages) if parent else 0)
            for report in _train_cell(cell, recipe, folder):
                yield report
                if isinstance(report, Interrupted):
                    return
            write_json_atomic(folder / DONE, _result(cell, folder).figures())
        yield CellFinished(cell, number, len(todo), _result(cell, folder), known is not None)
        following = todo[number] if number < len(todo) else None
        if known is None and (following is None or following.document != cell.document):
            yield study(base, cells, output, sweeps=sweeps)
    yield study(base, cells, output, sweeps=sweeps)


def study(base, cells: Sequence[Cell], output: Path, *, sweeps: Mapping[str, Sequence[Any]]) -> StudyWritten:
    """Writes the report of the cells that are finished."""
    found = [(c, output / c.folder) for c in cells]
    results = [_result(c, folder) for c, folder in found if (folder / DONE).is_file()]
    missing = len(found) - len(results)
    if not results:
        raise CheckpointError(f"{output}: no finished cell to report; run the ablation first")
    return StudyWritten(write_study(output, results, base=base, sweeps=sweeps, missing=missing), missing)


def finished(folder: Path, recipe) -> CellResult | None:
    """The cell's marker, when it is finished and of this recipe."""
    if not (folder / DONE).is_file():
        return None
    if (folder / "recipe.yaml").read_text(encoding="utf-8") != recipe.to_yaml():
        raise CheckpointError(
            f"{folder} holds a cell of another recipe; choose another --output"
        )
    return json.loads((folder / DONE).read_text(encoding="utf-8"))


def _result(cell: Cell, folder: Path) -> CellResult:
    seconds = sum(m["seconds"] for m in load_metrics(folder))
    rows, said = load_results(folder)["rows"], load_predictions(folder)
    return CellResult.from_run(cell.variant.name, cell.document, cell.setting, rows, seconds, said)


def _train_cell(cell: Cell, recipe, folder: Path) -> Iterator:
    if cell.variant.name == BASE:
        _evaluate_base(recipe, folder)
        return
    from mpi_mlx.training.run import train

    yield from train(recipe, resume=(folder / "recipe.yaml").is_file())


def _evaluate_base(recipe, folder: Path) -> None:
    from mpi_mlx.data.dataset import load_dataset
    from mpi_mlx.models import load_model

    spec = recipe.model
    model = load_model(
        spec.base, quantize=spec.quantize, max_pixels=spec.max_pixels, dtype=spec.dtype, init=spec.init,
        seed=recipe.seed,
    )
    dataset, reasoning = load_dataset(recipe.data, recipe.folder), recipe.reasoning
    evaluate_both(folder, model, dataset, label=BASE, spec=recipe.evaluation, reasoning=reasoning)
    write_text_atomic(folder / "recipe.yaml", recipe.to_yaml())


def _fork(cell: Cell, cells: Sequence[Cell], base, output: Path, recipe) -> Cell | None:
    """Starts the cell's folder from a finished cell with the same first stages; returns that cell."""
    folder = output / cell.folder
    if folder.exists():
        return None
    done = [c for c in cells if (output / c.folder / DONE).is_file()]
    parent = fork_parent(cell, done)
    if parent is not None:
        source = output / parent.folder
        finished(source, cell_recipe(base, parent, str(source)))  # raises when it is of another recipe
        fork_run(source, folder, recipe)
    return parent


def fork_run(source: Path, folder: Path, recipe) -> None:
    """A run folder for ``recipe`` that has done the stages of ``source``, and goes on from there.

    The recipe's first stages, data, model and seed must be those of ``source``.
    """
    progress = json.loads((source / "progress.json").read_text(encoding="utf-8"))
    with temporary_dir(folder) as temporary:
        shutil.copytree(source / "stages", temporary / "stages")
        shutil.copy(source / "metrics.jsonl", temporary / "metrics.jsonl")
        kept = {"stages": progress["stages"], "evaluated": []}
        (temporary / "progress.json").write_text(json.dumps(kept), encoding="utf-8")
        (temporary / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        replace_dir(temporary, folder)
