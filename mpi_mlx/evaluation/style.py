"""How figures look: one palette that colour-blind readers can tell apart, one size that fits a slide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mpi_mlx.atomic import atomic_write

# Okabe and Ito (2008): distinct under the common colour deficiencies.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, INK, GREY = "#CC79A7", "#56B4E9", "#222222", "#8A8A8A"
CYCLE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, INK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # series stay apart in greyscale too
PLAIN, AWARE = BLUE, ORANGE  # without and with the document, everywhere
SIZE = (8.0, 4.5)  # inches; 16:9
DPI = 200

RC = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
}


@contextmanager
def figure(
    path: str | Path,
    *,
    columns: int = 1,
    size: tuple[float, float] = SIZE,
    title: str | None = None,
    **options,
) -> Iterator[Sequence]:
    """``columns`` axes to draw on; the PNG is written when the block ends, in one rename.

    ``title`` stands above all axes. ``options`` go to matplotlib's ``subplots``.
    """
    with mpl.rc_context(RC):
        drawing = Figure(figsize=size, dpi=DPI)
        drawing.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
        FigureCanvasAgg(drawing)
        axes = drawing.subplots(1, columns, squeeze=False, **options)[0]
        if title:
            drawing.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK)
        yield axes
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(path)) as temporary:
            drawing.savefig(temporary, format="png", facecolor="white")


def smooth(values: Sequence[float], window: int | None = None) -> np.ndarray:
    """Centred running mean (N,) over a window (default: a tenth of the series) that shrinks at the ends.

    >>> smooth([0, 3, 6, 0], 3)      # [1.5, 3, 3, 3]
    """
    found = np.asarray(values, np.float64)
    window = max(1, len(found) // 10) if window is None else window
    reach = window // 2
    sums = np.concatenate([[0.0], np.cumsum(found)])
    low = np.maximum(np.arange(len(found)) - reach, 0)
    high = np.minimum(np.arange(len(found)) + reach + 1, len(found))
    return (sums[high] - sums[low]) / (high - low)


def draw_smoothed(axis, steps: Sequence[float], values: Sequence[float], color: str, label: str) -> None:
    """The series faintly, its running mean boldly, named at its end by the legend."""
    axis.plot(steps, values, color=color, alpha=0.22, linewidth=1.0)
    axis.plot(steps, smooth(values), color=color, label=label)


def percent_axis(axis, *, top: float = 1.0) -> None:
    """A y axis of shares from 0 to 100%, with a little room for labels above."""
    axis.set_ylim(0, top)
    axis.set_yticks(np.linspace(0, 1, 6), [f"{v:.0%}" for v in np.linspace(0, 1, 6)])


def legend_below(axis, columns: int = 4) -> None:
    """A legend under the figure, where it never covers data."""
    entries = list(zip(*axis.get_legend_handles_labels(), strict=True))
    entries.sort(key=lambda entry: isinstance(entry[0], Line2D))  # bars before lines
    axis.figure.legend(
        *zip(*entries, strict=True), loc="outside lower center", ncols=columns, fontsize=10,
        columnspacing=1.2, handlelength=1.5, handletextpad=0.5,
    )
