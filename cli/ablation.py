"""`mpi-mlx ablation`: a recipe's stages taken apart, over documents; one table, and where each stage pays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def ablation_command(
    recipe: Annotated[str, typer.Argument(help="A recipe with stages cpt, sft and rl.")] = "quickstart",
    documents: Annotated[
        str,
        typer.Option(help="Seeds, each a document and its scenes (your own files: a training): 1001-1005 or 3,8,9."),
    ] = "1001-1005",
    variants: Annotated[
        str | None, typer.Option(help="Rows of the table, by name; default: all. --list names them.")
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="Depths of the document to compare: 2,3,4,5.")
    ] = None,
    labelled: Annotated[
        str | None, typer.Option(help="Numbers of labelled examples to compare: 8,20,100,300.")
    ] = None,
    curves: Annotated[
        str | None, typer.Option(help="Variants along --depths and --labelled; default: five of them.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe. Repeatable.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder of the study.")] = Path(
        "runs/ablation"
    ),
    part: Annotated[
        str, typer.Option(metavar="I/N", help="Every N-th document: several processes share a folder.")
    ] = "1/1",
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the report of the cells that are finished.")
    ] = False,
    list_variants: Annotated[bool, typer.Option("--list", help="Name the variants and stop.")] = False,
) -> None:
    """Train and evaluate every variant on every document, and compare them. Go on by the same command."""
    from rich.console import Console

    from mpi_mlx.evaluation.ablation import run_ablation, study
    from mpi_mlx.evaluation.grid import CURVES, TABLE, VARIANTS, choose_variants, part_of, plan
    from mpi_mlx.recipe import load_recipe

    console = Console(highlight=False)
    if list_variants:
        for variant in VARIANTS.values():
            console.print(f"{variant.name:34} {variant.title}{'  (in the table)' * (variant.name in TABLE)}")
        return
    base = load_recipe(recipe, overrides or ())
    found = {"data.depth": depths, "data.train": labelled}
    sweeps = {key: numbers(text, key) for key, text in found.items() if text}
    rows = choose_variants(variants.split(",") if variants else TABLE)
    along = choose_variants(curves.split(",") if curves else CURVES)
    cells = plan(base, rows, numbers(documents, "--documents"), sweeps, along)
    if report_only:
        written = study(base, cells, output, sweeps=sweeps)
    else:
        mine = list(part_of(cells, *_part(part)))
        written = _follow(run_ablation(base, cells, output, sweeps=sweeps, mine=mine), console)
    if written is None:
        raise typer.Exit(130)
    tables = written.path.read_text(encoding="utf-8").partition("\n![")[0]
    console.print(tables, soft_wrap=True, markup=False)
    console.print(f"report  {written.path}", soft_wrap=True)


def _follow(reports, console):
    """Shows the cells as they come; the last report written, or None when the study was interrupted."""
    from mpi_mlx_cli.train import stop_on_interrupt, view_for

    from mpi_mlx.evaluation.ablation import CellFinished, CellStarted, StudyWritten
    from mpi_mlx.training import reports as r

    written, view = None, view_for(silent=True)
    with stop_on_interrupt(view):
        with console.status("") as status:
            for report in reports:
                match report:
                    case CellStarted():
                        status.update(_started(report))
                        line = _started(report)
                    case CellFinished():
                        console.print(_finished(report), soft_wrap=True, markup=False)
                    case StudyWritten():
                        written = report
                    case r.StepReport():
                        status.update(f"{line}  {report.stage} {report.step}/{report.total_steps}")
                    case r.EvaluationProgress():
                        status.update(f"{line}  evaluation {report.done}/{report.total}")
                    case r.Interrupted():
                        console.print("stopped; the same command goes on from there")
                        return None
    return written


def _started(report) -> str:
    cell = report.cell
    shared = f", {report.shared} stage(s) from {report.parent}" if report.parent else ""
    return f"{report.number}/{report.total} {cell.folder}{shared}"


def _finished(report) -> str:
    found = report.result
    said = f"{report.number}/{report.total} {report.cell.folder}: {found.accuracy:.1%} without the document"
    if found.accuracy_with_document is not None:
        said += f", {found.accuracy_with_document:.1%} with it"
    if found.trace_match is not None:
        said += f", trace {found.trace_match:.1%}"
    return said + (" (known)" if report.known else "")


def numbers(text: str, name: str) -> list[int]:
    """``1001-1003,7`` -> [1001, 1002, 1003, 7]. Raises typer.BadParameter."""
    out: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.strip().partition("-")
            out += range(int(first), int(last or first) + 1)
    except ValueError:
        said = f"{text!r}: numbers and ranges such as 1001-1005 or 3,8,9"
        raise typer.BadParameter(said, param_hint=name) from None
    if not out:
        raise typer.BadParameter(f"{text!r} names no number", param_hint=name)
    return list(dict.fromkeys(out))


def _part(text: str) -> tuple[int, int]:
    try:
        part, parts = map(int, text.split("/"))
    except ValueError:
        part, parts = 0, 0
    if not 1 <= part <= parts:
        raise typer.BadParameter(f"{text!r}: I/N with 1 <= I <= N, such as 1/2", param_hint="--part")
    return part, parts
