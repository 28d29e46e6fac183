"""The end of a run: how each model did without the document and with it, and where to look next."""

from __future__ import annotations

import shlex
from pathlib import Path

from mpi_mlx_cli.state import clock
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

TITLES = {"base": "base", "cpt": "+ cpt", "sft": "+ sft", "rl": "+ rl"}


def by_model(rows: list[dict]) -> dict[str, dict[bool, dict]]:
    """model -> {document in context: row}; a later row of the same model and mode replaces an earlier one."""
    out: dict[str, dict[bool, dict]] = {}
    for row in rows:
        out.setdefault(row["model"], {})[bool(row["document_in_context"])] = row
    return out


def result_table(rows: list[dict], title: str | None = None) -> Table:
    """A line a model: without the document, and with it in the prompt."""
    table = Table(
        title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("\nmodel", no_wrap=True)
    for heading, style in (
        ("accuracy\nwithout", "bold green"),
        ("format\nwithout", ""),
        ("trace\nwithout", ""),
        ("accuracy\nwith", "cyan"),
        ("prompt tokens\nw/o · with", ""),
        ("prefill ms\nw/o · with", ""),
    ):
        table.add_column(heading, justify="right", style=style, no_wrap=True)
    for model, modes in by_model(rows).items():
        plain, carried = modes.get(False), modes.get(True)
        table.add_row(
            TITLES.get(model, model),
            _share(plain, "accuracy"), _share(plain, "format_rate"), _share(plain, "trace_match"),
            _share(carried, "accuracy"),
            _pair(plain, carried, "prompt_tokens", lambda v: f"{v:,.0f}"),
            _pair(plain, carried, "prefill_seconds", lambda v: f"{1000 * v:.1f}"),
        )
    notes = ["without, with: the document in the prompt"]
    if rows:
        notes[0] += f"; {rows[0].get('n', 0):,} held-out examples"
        majority = max((row.get("majority") or 0.0) for row in rows)
        if majority:
            notes.append(f"the most frequent answer alone would earn {majority:.1%}")
    table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


def _share(row: dict | None, key: str) -> str:
    value = None if row is None else row.get(key)
    return "-" if value is None else f"{value:.1%}"


def _pair(plain: dict | None, carried: dict | None, key: str, form) -> str:
    values = [None if row is None else row.get(key) for row in (plain, carried)]
    return " · ".join("-" if value is None else form(value) for value in values)


def show_end(console: Console, finished) -> None:
    """The table, the files, the next command."""
    rows = list(finished.rows)
    if rows:
        console.print()
        console.print(result_table(rows))
        console.print()
    places = Table.grid(padding=(0, 2))
    places.add_column(style="dim")
    places.add_column(no_wrap=True, overflow="ignore")
    if finished.report_path:
        places.add_row("report", finished.report_path)
        places.add_row("figures", f"{finished.output}/figures")
    kind = "model" if Path(finished.output, "model").is_dir() else "adapter"
    places.add_row(kind, f"{finished.output}/{kind}")
    places.add_row("next", Text(f"mpi-mlx chat {shlex.quote(finished.output)}", "bold"))
    console.print(places, soft_wrap=True)
    console.print(Text(f"done in {clock(finished.seconds)}", "dim"))


def show_interrupted(console: Console, interrupted) -> None:
    console.print(f"stopped; what was done is kept in {interrupted.output}", soft_wrap=True)
    console.print(Text.assemble("go on with: ", (interrupted.resume_command, "bold")), soft_wrap=True)
