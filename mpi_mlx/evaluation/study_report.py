"""``ablation.md``, ``ablation.json`` and their figures, from whatever cells are done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpi_mlx.atomic import write_json_atomic, write_text_atomic
from mpi_mlx.evaluation.grid import VARIANTS, recipe_value, sweep_setting
from mpi_mlx.evaluation.metrics import Mean
from mpi_mlx.evaluation.report import duration
from mpi_mlx.evaluation.study import (
    FEWEST,
    CellResult,
    Difference,
    Setting,
    Summary,
    curves,
    differences,
    majority_curve,
    summarise,
)
from mpi_mlx.evaluation.study_figures import draw_curves, draw_variants
from mpi_mlx.recipe_schema import OwnData

SWEEP_TITLES = {
    "data.depth": ("Accuracy against the depth of the document", "depth of the decision tree"),
    "data.train": ("Accuracy against labelled examples", "labelled examples"),
}


def write_study(
    output: str | Path,
    results: Sequence[CellResult],
    *,
    base,
    sweeps: Mapping[str, Sequence[Any]],
    missing: int = 0,
) -> Path:
    """Writes the report of the cells in ``results`` into ``output``; returns the path of ablation.md.

    ``base``: the recipe that was varied; ``sweeps``: its swept fields and their values; ``missing``: cells
    that are still to be run.
    """
    output = Path(output)
    own = isinstance(base.data, OwnData)  # one document and one test set, whatever the seed
    summaries = summarise(results, shared=own)
    found = differences(results, shared=own)
    figures = _figures(output / "figures", results, summaries, base, sweeps)
    blocks = ["# Ablation", _facts(results, missing, len(found), own)]
    for setting in dict.fromkeys(s.setting for s in summaries):
        here = [s for s in summaries if s.setting == setting]
        blocks.append(f"## {setting_title(setting)}")
        blocks.append(study_table(here, own))
        blocks.append(difference_table([d for d in found if d.setting == setting], own))
        if setting == () and "variants" in figures:
            blocks.append(f"![Accuracy of the variants](figures/{figures['variants'].name})")
    drawn = [f"![{_sweep_titles(k)[0]}](figures/{figures[k].name})" for k in sweeps if k in figures]
    if drawn:
        blocks += ["## Curves", *drawn]
    write_text_atomic(output / "ablation.md", "\n\n".join(b for b in blocks if b) + "\n")
    write_json_atomic(
        output / "ablation.json",
        {
            "cells": [r.figures() for r in results],
            "summaries": [asdict(s) for s in summaries],
            "differences": [asdict(d) for d in found],
            "missing": missing,
        },
    )
    return output / "ablation.md"


def setting_title(setting: Setting) -> str:
    """``Depth of the decision tree: 4``; the recipe's own setting by name."""
    if not setting:
        return "The recipe's own setting"
    said = ", ".join(f"{_sweep_titles(key)[1]}: {value}" for key, value in setting)
    return said[0].upper() + said[1:]


def _facts(results: Sequence[CellResult], missing: int, compared: int, own: bool) -> str:
    documents = sorted({r.document for r in results})
    seeds, several, unit = ", ".join(map(str, documents)), len(documents) > 1, _unit(own)
    named = seeds if own else f"seeds {seeds}" if several else f"seed {seeds}"
    of = f"{len(documents)} {unit}s ({named})" if several else f"one {unit} ({named})"
    text = f"{len(results)} run{'s' if len(results) > 1 else ''} over {of}"
    text += f"; {missing} are still to be run." if missing else "."
    text += (
        " Accuracies are exact match of greedy answers on held-out examples. "
        f"Means over {unit}s with 95% intervals (Student's t, and never narrower than so many test examples allow); "
        f"differences are paired by {unit}, and fewer than {FEWEST} {unit}s give no verdict. Training time counts "
        "every stage of the chain, also those shared with other variants."
    )
    if own:
        text += " Document and examples are the same for every seed: the seeds differ in training alone."
    if compared:
        text += (
            f" {compared} comparison{'s are' if compared > 1 else ' is'} made, each at 95% and without correction for "
            "their number: of those where nothing differs one in twenty looks certain."
        )
    return text


def _unit(own: bool) -> str:
    """What the numbers of a study's cells stand for."""
    return "seed" if own else "document"


def study_table(summaries: Sequence[Summary], own: bool = False) -> str:
    """A row a variant, as Markdown. ``own``: of one's own files, so that the numbers are seeds of training."""
    lines = [
        "| variant | without the document | with it | format | trace match | trace true | n "
        f"| {_unit(own)}s | training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for s in summaries:
        cells = (
            s.title, mean_text(s.accuracy), mean_text(s.accuracy_with_document), mean_text(s.format_rate),
            mean_text(s.trace_match), mean_text(s.trace_consistent),
            str(s.examples // len(s.documents) if own else s.examples), str(len(s.documents)),
            duration(s.seconds) if s.seconds else "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    majority = sum(s.majority for s in summaries) / len(summaries)
    note = f"The most frequent answer earns {majority:.1%}. *Format*: answers without the document in the form that "
    note += "the row trains: a trace in think tags before the answer, or, after direct SFT, the answer alone."
    return "\n".join(lines) + f"\n\n{note}"


def difference_table(found: Sequence[Difference], own: bool = False) -> str:
    """Paired differences in points, as Markdown; empty without pairs."""
    if not found:
        return ""
    lines = [f"| difference | points (95%) | {_unit(own)}s | |", "|---|---|---|---|"]
    for d in found:
        low, high = (f"{100 * v:+.1f}" for v in d.mean.interval) if d.mean.interval else ("-", "-")
        verdict = ("better" if d.mean.value > 0 else "worse") if d.certain else "not told apart"
        if d.mean.n < FEWEST:
            verdict = "too few to tell"
        name = f"{VARIANTS[d.variant].title} - {VARIANTS[d.other].title}"
        lines.append(f"| {name} | {100 * d.mean.value:+.1f} ({low} to {high}) | {d.mean.n} | {verdict} |")
    return "\n".join(lines)


def mean_text(mean: Mean | None) -> str:
    """``94.0% (84.1-100.0)``, the interval kept within 0..100; ``-`` for none."""
    if mean is None:
        return "-"
    if mean.interval is None:
        return f"{mean.value:.1%}"
    low, high = max(0.0, mean.interval[0]), min(1.0, mean.interval[1])
    return f"{mean.value:.1%} ({100 * low:.1f}-{100 * high:.1f})"


def _sweep_titles(key: str) -> tuple[str, str]:
    """Title and x label of a sweep's figure."""
    return SWEEP_TITLES.get(key, (f"Accuracy against {key}", key))


def _figures(
    folder: Path,
    results: Sequence[CellResult],
    summaries: Sequence[Summary],
    base,
    sweeps: Mapping[str, Sequence[Any]],
) -> dict[str, Path]:
    drawn = {}
    table = [s for s in summaries if s.setting == ()]
    if any(s.variant != "base" for s in table):
        drawn["variants"] = draw_variants(table, results, folder / "variants.png")
    for key, values in sweeps.items():
        own = recipe_value(base, key)  # measured by the table already
        points = sorted({*values, own}) if isinstance(own, int) else sorted(values)
        settings = {value: sweep_setting(base, key, value) for value in points}
        lines, ceiling = curves(summaries, settings, tuple(VARIANTS))
        lines = [line for line in lines if len(line.x) > 1]
        ceiling = ceiling if ceiling and len(ceiling.x) > 1 else None  # of one point no line is seen
        if lines:
            title, xlabel = _sweep_titles(key)
            path = folder / f"{key.rpartition('.')[2]}.png"
            floor = majority_curve(summaries, settings)
            drawn[key] = draw_curves(lines, ceiling, floor, path, title=title, xlabel=xlabel)
    return drawn
