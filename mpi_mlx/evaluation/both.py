"""A model in both modes, without the document and with it in context, recorded in a run's folder."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from mpi_mlx.data.dataset import Dataset
from mpi_mlx.data.examples import Example
from mpi_mlx.errors import CheckpointError, DataError
from mpi_mlx.evaluation.evaluate import evaluate
from mpi_mlx.evaluation.report import write_report
from mpi_mlx.evaluation.results import record

Progress = Callable[[str, bool, int, int], None]  # (model, document in context, answered, of how many)


def evaluate_both(
    run: str | Path,
    model,
    dataset: Dataset,
    *,
    label: str,
    spec,
    reasoning: bool = True,
    progress: Progress | None = None,
    anew: bool = False,
) -> list[dict]:
    """The rows of ``model`` on the test split, recorded in ``run``: without the document, then with it.

    The second is left out when the dataset has no document or ``spec.with_document`` is off. ``anew``: in place
    of all that ``run`` has recorded. See :func:`evaluate` for the other arguments and what is raised.
    """
    modes = [None]
    if dataset.document is not None and getattr(spec, "with_document", True):
        modes.append(dataset.document)
    rows = []
    for document in modes:
        told = None
        if progress is not None:
            def told(done, total, in_context=document is not None):
                progress(label, in_context, done, total)

        row, predictions = evaluate(
            model, dataset.test, document, label=label, spec=spec, reasoning=reasoning, progress=told
        )
        record(run, row, predictions, anew=anew and not rows)
        rows.append(row)
    return rows


def repeat_evaluation(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[dict], Path]:
    """Evaluates a finished run's base and final model again; returns the rows and the report's path.

    ``overrides``: changes to its recipe, such as ``data.seed=9`` (other scenes under the same document) or
    ``evaluation.samples=50``.
    Results, predictions and report go to ``output`` (default ``RUN/repeat``), in place of an earlier repeat's, whose
    examples may have been others; the run's own stay.

    Raises:
        CheckpointError: the folder is not a finished run, or ``output`` is a run's own.
        DataError: the recipe has no test examples.
    """
    from mpi_mlx.data.dataset import load_dataset
    from mpi_mlx.models import load_model
    from mpi_mlx.recipe import BenchmarkData, load_recipe

    run = Path(run)
    if not (run / "recipe.yaml").is_file():
        raise CheckpointError(f"{run}: not a run (no recipe.yaml); give the output folder of mpi-mlx train")
    recipe = load_recipe(str(run / "recipe.yaml"))
    if isinstance(recipe.data, BenchmarkData) and recipe.data.document_seed is None:
        # The model has learned this document; another seed is to draw other scenes for it.
        overrides = [f"data.document_seed={recipe.data.seed}", *overrides]
    recipe = load_recipe(str(run / "recipe.yaml"), overrides)
    whole = run / "model" if (run / "model" / "config.json").is_file() else None
    if whole is None and not (run / "adapter").is_dir():
        again = f"mpi-mlx train {shlex.quote(str(run))} --resume"
        raise CheckpointError(f"{run}: no adapter or model yet; finish it with {again}")
    output = run / "repeat" if output is None else Path(output)
    if (output / "recipe.yaml").is_file():
        raise CheckpointError(f"{output}: holds a run, whose own results would be lost; choose another --output")
    dataset = load_dataset(recipe.data, recipe.folder)
    if not dataset.test:
        raise DataError(f"{run}: the recipe has no test examples; set data.test")
    spec = recipe.model
    weights = dict(max_pixels=spec.max_pixels, dtype=spec.dtype)
    model = load_model(
        spec.base, quantize=spec.quantize, init=spec.init, seed=recipe.seed, **weights,
        adapter=None if whole else run / "adapter",
    )
    options = {"spec": recipe.evaluation, "progress": progress}
    with model.adapters_disabled():
        rows = evaluate_both(output, model, dataset, label="base", reasoning=recipe.reasoning, anew=True, **options)
    if whole:
        model = load_model(str(whole), **weights)
    last = recipe.labels[-1]
    rows += evaluate_both(output, model, dataset, label=last, reasoning=recipe.reasoning, **options)
    return rows, write_report(output, evaluated(dataset, recipe.evaluation), recipe=recipe.to_yaml())


def evaluated(dataset: Dataset, spec) -> tuple[Example, ...]:
    """The test examples that an evaluation asks."""
    return dataset.test[: spec.samples]
