"""Figures of an ablation: the variants side by side, and accuracy against depth or labelled examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpi_mlx.evaluation.metrics import Mean
from mpi_mlx.evaluation.study import CellResult, Curve, Summary
from mpi_mlx.evaluation.style import (
    AWARE,
    CYCLE,
    GREY,
    INK,
    MARKERS,
    PLAIN,
    figure,
    legend_below,
    percent_axis,
)


def draw_variants(summaries: Sequence[Summary], results: Sequence[CellResult], path: Path) -> Path:
    """Accuracy without the document: a bar a variant with its interval, a dot a document.

    The base's row, if any, gives the two lines to beat.
    """
    base = next((s for s in summaries if s.variant == "base"), None)
    shown = [s for s in summaries if s.variant != "base"]
    height = 1.3 + 0.36 * len(shown)
    with figure(path, size=(8.0, height), title="Accuracy without the document") as (axis,):
        for at, summary in enumerate(shown):
            _bar(axis, at, summary)
            dots = [
                r.accuracy for r in results if (r.variant, r.setting) == (summary.variant, summary.setting)
            ]
            spread = np.linspace(-0.16, 0.16, len(dots)) if len(dots) > 1 else [0.0]
            axis.plot(dots, at + np.asarray(spread), "o", color=INK, markersize=3, alpha=0.55)
        majority = np.mean([s.majority for s in summaries])
        axis.axvline(majority, color=GREY, linestyle="--", linewidth=1.4, label="most frequent answer")
        if base is not None and base.accuracy_with_document is not None:
            value = base.accuracy_with_document.value
            axis.axvline(value, color=AWARE, linestyle=":", linewidth=1.8, label="base with the document")
        axis.set_yticks(range(len(shown)), [s.title for s in shown])
        axis.invert_yaxis()
        axis.set_xlim(0, 1.12)
        axis.set_xticks(np.linspace(0, 1, 6), [f"{v:.0%}" for v in np.linspace(0, 1, 6)])
        axis.grid(axis="x")
        axis.grid(False, axis="y")
        legend_below(axis)
    return path


def _bar(axis, at: int, summary: Summary) -> None:
    mean = summary.accuracy
    color = AWARE if "policyrollout" in summary.variant else PLAIN if "+" in summary.variant else GREY
    axis.barh(at, mean.value, 0.66, color=color, alpha=0.9)
    if mean.interval is not None:
        axis.errorbar(mean.value, at, xerr=_reach([mean]), fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)
    end = min(1.0, mean.interval[1]) if mean.interval else mean.value
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
    text = f"{100 * mean.value:.1f}"
    axis.text(max(end, mean.value) + 0.015, at, text, va="center", ha="left", fontsize=10, bbox=box)


def _reach(means: Sequence[Mean]) -> np.ndarray:
    """Distances (2, N) from each mean down and up to its interval's ends, kept within 0..1."""
    ends = np.array([m.interval or (m.value, m.value) for m in means])
    values = np.array([m.value for m in means])
    return np.maximum([values - np.maximum(ends[:, 0], 0), np.minimum(ends[:, 1], 1) - values], 0)


def draw_curves(
    lines: Sequence[Curve],
    ceiling: Curve | None,
    floor: Curve | None,
    path: Path,
    *,
    title: str,
    xlabel: str,
) -> Path:
    """Accuracy without the document against ``x``, a line a variant, with 95% intervals over documents.

    The values of ``x`` stand at equal distances, the lines a little apart, so that intervals do not overlap.
    """
    places = {x: at for at, x in enumerate(sorted({x for line in lines for x in line.x}))}
    with figure(path, title=title) as (axis,):
        for number, line in enumerate(lines):
            apart = 0.035 * (number - (len(lines) - 1) / 2)
            color, marker = CYCLE[number % len(CYCLE)], MARKERS[number % len(MARKERS)]
            values = [m.value for m in line.means]
            axis.errorbar(
                [places[x] + apart for x in line.x], values, yerr=_reach(line.means), color=color,
                marker=marker, markersize=7, markeredgecolor="white", capsize=3, elinewidth=1.2,
                label=line.title, zorder=3,
            )
        for line, color, style in ((ceiling, INK, ":"), (floor, GREY, "--")):
            if line is not None:
                found = [(places[x], m.value) for x, m in zip(line.x, line.means, strict=True) if x in places]
                axis.plot(*zip(*found, strict=True), style, color=color, linewidth=1.8, label=line.title)
        axis.set_xticks(list(places.values()), [f"{x:g}" for x in places])
        axis.set_xlabel(xlabel)
        axis.set_ylabel("accuracy without the document")
        percent_axis(axis, top=1.05)
        legend_below(axis, columns=3)
    return path
