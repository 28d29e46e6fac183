"""`mpi-mlx eval`: the evaluation of a finished run once more, on the same or on other examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def eval_command(
    run: Annotated[Path, typer.Argument(help="Output folder of mpi-mlx train.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change the recipe: data.seed=9 asks about other scenes."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for results and report (default RUN/repeat).")
    ] = None,
) -> None:
    """Evaluate a run's base and final model again, without the document and with it in context."""
    from mpi_mlx.evaluation.both import repeat_evaluation

    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[tuple[str, bool], int] = {}

        def show(model: str, in_context: bool, done: int, total: int) -> None:
            key = (model, in_context)
            if key not in tasks:
                text = f"{model} with the document" if in_context else model
                tasks[key] = bars.add_task(text, total=total)
            bars.update(tasks[key], completed=done)

        rows, report = repeat_evaluation(run, overrides or (), output=output, progress=show)
    console.print(results_table(rows))
    console.print(f"Report: {report}")


def results_table(rows: list[dict]) -> Table:
    """The rows of results.json as a table for the terminal."""
    table = Table(title="Held-out examples", title_justify="left")
    for name, justify in (
        ("model", "left"), ("document", "left"), ("accuracy (95%)", "right"), ("format", "right"),
        ("trace match", "right"), ("prompt tokens", "right"), ("prefill", "right"),
    ):
        table.add_column(name, justify=justify)
    for row in rows:
        low, high = row.get("accuracy_ci") or (row["accuracy"], row["accuracy"])
        table.add_row(
            row["model"],
            "in context" if row["document_in_context"] else "-",
            f"{row['accuracy']:.1%} ({100 * low:.1f}-{100 * high:.1f})",
            _share(row["format_rate"]),
            _share(row["trace_match"]),
            f"{row['prompt_tokens']:,.0f}",
            f"{1000 * row['prefill_seconds']:.1f} ms",
            style=None if row["document_in_context"] else "bold",
        )
    if rows:
        majority = max(r.get("majority") or 0.0 for r in rows)
        table.caption = f"n = {rows[0]['n']}; the most frequent answer earns {majority:.1%}"
        table.caption_justify = "left"
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
