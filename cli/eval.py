"""`mpi-mlx eval`: the evaluation of a finished run once more, on the same or on other examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def eval_command(
    run: Annotated[Path, typer.Argument(help="Output folder of mpi-mlx train.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: data.seed=9 for other scenes."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Folder for results and report; default: RUN/repeat."),
    ] = None,
) -> None:
    """Evaluate a run's base and final model again, without the document and with it in context."""
    from mpi_mlx_cli.results import result_table
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mpi_mlx.evaluation.both import repeat_evaluation

    console = Console(highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[tuple[str, bool], object] = {}

        def show(model: str, in_context: bool, done: int, total: int) -> None:
            key = (model, in_context)
            if key not in tasks:
                text = f"{model} {'with' if in_context else 'without'} the document"
                tasks[key] = bars.add_task(text, total=total)
            bars.update(tasks[key], completed=done)

        rows, report = repeat_evaluation(run, overrides or (), output=output, progress=show)
    console.print(result_table(rows))
    console.print(f"report  {report}", soft_wrap=True)
