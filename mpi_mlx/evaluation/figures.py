"""Figures of a run: loss, reward by source, accuracy by stage, prompt cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpi_mlx.evaluation.results import find_row, load_results, results_path
from mpi_mlx.evaluation.style import (
    AWARE,
    BLUE,
    GREEN,
    GREY,
    INK,
    PLAIN,
    VERMILION,
    draw_smoothed,
    figure,
    legend_below,
    percent_axis,
)

STAGE_TITLES = {
    "base": "base",
    "pretrain": "pretraining",
    "cpt": "VM-CPT",
    "sft": "SFT",
    "rl": "RL",
}


def stage_title(name: str) -> str:
    """``sft`` -> ``SFT``; names of one's own stay as they are."""
    return STAGE_TITLES.get(name, name)


def load_metrics(run: str | Path) -> list[dict]:
    """The steps of metrics.jsonl, one flat dictionary each; a half-written last line is left out."""
    path = Path(run) / "metrics.jsonl"
    rows: list[dict] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows.append({**row.get("metrics", {}), **row})
    return rows


def draw_run_figures(run: str | Path) -> dict[str, Path]:
    """All figures that the run has data for, under ``figures/``: name -> PNG."""
    run = Path(run)
    folder = run / "figures"
    drawn = {}
    metrics = load_metrics(run)
    if any(np.isfinite(m.get("loss", np.nan)) for m in metrics):
        drawn["loss"] = draw_loss(metrics, folder / "loss.png")
    if any("reward_plain" in m for m in metrics):
        drawn["reward"] = draw_reward(metrics, folder / "reward.png")
    rows = load_results(run)["rows"] if results_path(run).is_file() else []
    if rows:
        drawn["accuracy"] = draw_accuracy(rows, folder / "accuracy.png")
    if prompt_cost(rows) is not None:
        drawn["prompt_cost"] = draw_prompt_cost(rows, folder / "prompt_cost.png")
    return drawn


def by_stage(metrics: Sequence[dict]) -> list[tuple[str, list[dict]]]:
    """(stage, its steps in order), in the order of the recipe."""
    stages: dict[int, list[dict]] = {}
    for row in metrics:
        stages.setdefault(row["stage_index"], []).append(row)
    return [(rows[0]["stage"], rows) for _, rows in sorted(stages.items())]


def draw_loss(metrics: Sequence[dict], path: Path) -> Path:
    """A panel a stage; held-out loss as dots where the stage measured it. RL's is the surrogate, and what it has
    held out is the share of wrong answers, on an axis of its own."""
    stages = by_stage(metrics)
    width = max(8.0, 3.6 * len(stages))
    with figure(path, columns=len(stages), size=(width, 4.0), title="Loss of each stage") as axes:
        for axis, (stage, rows) in zip(axes, stages, strict=True):
            color = VERMILION if stage == "rl" else BLUE
            steps = [r["step"] for r in rows]
            draw_smoothed(axis, steps, [r["loss"] for r in rows], color, "train")
            held = [(r["step"], r["validation_loss"]) for r in rows if r.get("validation_loss") is not None]
            if held:
                _draw_validation(axis, held, own_axis=stage == "rl")
            axis.set_title(stage_title(stage))
            axis.set_xlabel("step")
            axis.set_xlim(min(steps), max(max(steps), min(steps) + 1))
            axis.set_ylabel("surrogate loss" if stage == "rl" else "loss per trained token")
            if stage != "rl":
                axis.set_ylim(bottom=0)
    return path


def _draw_validation(axis, held: Sequence[tuple[int, float]], *, own_axis: bool) -> None:
    steps, losses = zip(*held, strict=True)
    style = {"color": GREEN, "linewidth": 1.4, "label": "validation", "clip_on": False}
    if own_axis:
        axis = axis.twinx()
        axis.set_ylabel("wrong answers, validation", color=GREEN)
        axis.grid(False)
        percent_axis(axis)
    axis.plot(steps, losses, "o--", **style)
    if not own_axis:
        axis.legend()


def draw_reward(metrics: Sequence[dict], path: Path) -> Path:
    """Mean reward of the completions drawn without and with the document in context, a panel an RL stage."""
    stages = [(s, rows) for s, rows in by_stage(metrics) if any("reward_plain" in r for r in rows)]
    title = "Reward of completions, by what the model saw when it wrote them"
    with figure(path, columns=len(stages), title=title, sharey=True) as axes:
        for axis, (_, rows) in zip(axes, stages, strict=True):
            for name, color, label in (
                ("reward_plain", PLAIN, "without the document"),
                ("reward_policy_aware", AWARE, "with the document (policy-aware)"),
            ):
                found = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
                if found:
                    draw_smoothed(axis, *zip(*found, strict=True), color, label)
            axis.set_xlabel("RL step")
            axis.margins(x=0.01)
        axes[0].set_ylabel("mean reward")
        legend_below(axes[0])
    return path


def draw_accuracy(rows: Sequence[dict], path: Path) -> Path:
    """Bars for each stage without and with the document, with 95% intervals and the two lines to beat."""
    models = list(dict.fromkeys(r["model"] for r in rows))
    with figure(path, title="Accuracy on held-out examples") as (axis,):
        for offset, in_context, color, label in (
            (-0.2, False, PLAIN, "without the document"),
            (0.2, True, AWARE, "document in context"),
        ):
            found = [(at, find_row(rows, m, in_context)) for at, m in enumerate(models)]
            found = [(at, r) for at, r in found if r is not None]
            if found:
                _bars(axis, found, offset, color, label)
        _lines_to_beat(axis, rows, len(models))
        axis.set_xticks(range(len(models)), [stage_title(m) for m in models])
        axis.tick_params(axis="x", labelsize=12)
        axis.set_xlim(-0.55, len(models) - 0.45)
        percent_axis(axis, top=1.1)
        n = max(r["n"] for r in rows)
        axis.set_ylabel(f"exact match, n = {n}")
        legend_below(axis)
    return path


def _bars(axis, found: list[tuple[int, dict]], offset: float, color: str, label: str) -> None:
    places = np.array([at + offset for at, _ in found])
    heights = np.array([r["accuracy"] for _, r in found])
    ends = np.array([r.get("accuracy_ci") or (r["accuracy"],) * 2 for _, r in found])
    reach = np.maximum([heights - ends[:, 0], ends[:, 1] - heights], 0)
    axis.bar(places, heights, 0.38, color=color, label=label)
    axis.errorbar(places, heights, reach, fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)
    for place, height, end in zip(places, heights, ends[:, 1], strict=True):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        text = f"{100 * height:.1f}"
        axis.text(place, max(height, end) + 0.02, text, ha="center", va="bottom", fontsize=10, bbox=box)


def _lines_to_beat(axis, rows: Sequence[dict], models: int) -> None:
    majority = max((r.get("majority") or 0.0 for r in rows), default=0.0)
    behind = {"zorder": 0.9}
    if majority:
        label = "most frequent answer"
        axis.axhline(majority, color=GREY, linestyle="--", linewidth=1.4, label=label, **behind)
    base = find_row(rows, "base", True)
    if base is not None and models > 1:
        label = "base with the document"
        axis.axhline(base["accuracy"], color=AWARE, linestyle=":", linewidth=1.8, label=label, **behind)


def prompt_cost(rows: Sequence[dict]) -> tuple[dict, dict] | None:
    """(with, without): the rows whose prompts are compared: the first with the document, the last without."""
    carried = [r for r in rows if r["document_in_context"]]
    bare = [r for r in rows if not r["document_in_context"]]
    return (carried[0], bare[-1]) if carried and bare else None


def draw_prompt_cost(rows: Sequence[dict], path: Path) -> Path:
    """Tokens of the prompt and time to prefill it, with the document in context and without it."""
    carried, bare = prompt_cost(rows)
    panels = (
        ("Prompt length", "tokens", [r["prompt_tokens"] for r in (carried, bare)], "{:,.0f}"),
        ("Prefill, one prompt", "ms", [1000 * r["prefill_seconds"] for r in (carried, bare)], "{:,.1f} ms"),
    )
    with figure(path, columns=2, size=(8.0, 3.4), title="What a query costs before the first token") as axes:
        for axis, (title, unit, values, form) in zip(axes, panels, strict=True):
            axis.barh([1, 0], values, 0.55, color=[AWARE, PLAIN])
            for at, value in zip((1, 0), values, strict=True):
                axis.text(value, at, " " + form.format(value), va="center", ha="left", fontsize=11)
            change = values[1] / values[0] - 1 if values[0] else 0.0
            axis.set_title(f"{title}: {change:+.0%}")
            axis.set_yticks([1, 0], ["document\nin context", "internalized"] if axis is axes[0] else ["", ""])
            axis.set_xlim(0, 1.28 * max(values))
            axis.set_xlabel(unit)
            axis.grid(axis="x")
            axis.grid(False, axis="y")
    return path
