"""``report.md``: what a run did and how well, for a reader who was not there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from PIL import Image

from mpi_mlx.atomic import atomic_write, write_text_atomic
from mpi_mlx.data.completion import completion_text
from mpi_mlx.data.examples import Example
from mpi_mlx.documents.images import open_image
from mpi_mlx.evaluation.figures import by_stage, draw_run_figures, load_metrics, stage_title
from mpi_mlx.evaluation.forgetting import forgetting
from mpi_mlx.evaluation.headline import caveats, final_row, headline
from mpi_mlx.evaluation.results import load_predictions, load_results, results_path

SHOWN = 3  # predictions of each kind
PICTURE = 168  # pixels that a small picture is enlarged to

FIGURES = {
    "accuracy": "Accuracy by stage, with 95% intervals.",
    "prompt_cost": "What carrying the document costs in each query.",
    "reward": "Reward of completions sampled without and with the document in context.",
    "loss": "Loss of each stage.",
}


def write_report(run: str | Path, examples: Sequence[Example] = (), *, recipe: str | None = None) -> Path:
    """Draws the figures and writes ``report.md``, in one rename; returns its path.

    ``examples``: the evaluated ones, for the pictures beside their predictions. The report holds what the run
    has so far, so it may be written after each stage. ``recipe``: what was run, as YAML; by default the
    folder's ``recipe.yaml``.
    """
    run = Path(run)
    if recipe is None and (run / "recipe.yaml").is_file():
        recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    results = load_results(run) if results_path(run).is_file() else {"rows": []}
    figures = draw_run_figures(run)
    metrics = load_metrics(run)
    blocks = [
        f"# {run.resolve().name}",
        *_summary(run, results, (yaml.safe_load(recipe or "") or {}).get("stages") or ()),
        results_table(results["rows"]),
        *(f"![{FIGURES[name]}]({figures[name].relative_to(run)})" for name in FIGURES if name in figures),
        *_stages(metrics, results),
        *_predictions(run, results["rows"], examples),
        *_details(run, recipe),
    ]
    text = "\n\n".join(block for block in blocks if block) + "\n"
    write_text_atomic(run / "report.md", text)
    return run / "report.md"


def _summary(run: Path, results: dict, stages: Sequence[dict]) -> list[str]:
    if not results["rows"]:
        return ["Not evaluated yet."]
    warnings = caveats(results["rows"], forgetting(results.get("perplexity", {})), stages)
    return [headline(results["rows"], load_predictions(run)), "\n".join(f"> {w}" for w in warnings)]


def results_table(rows: Sequence[dict]) -> str:
    """The rows as a Markdown table."""
    if not rows:
        return ""
    head = (
        "| model | document | accuracy (95%) | format | trace match | trace true | prompt tokens | prefill |",
        "|---|---|---|---|---|---|---|---|",
    )
    lines = []
    for row in rows:
        interval = row.get("accuracy_ci")
        spread = f" ({100 * interval[0]:.1f}-{100 * interval[1]:.1f})" if interval else ""
        cells = (
            stage_title(row["model"]),
            "in context" if row["document_in_context"] else "-",
            f"{row['accuracy']:.1%}{spread}",
            share_text(row.get("format_rate")),
            share_text(row.get("trace_match")),
            share_text(row.get("trace_consistent")),
            f"{row['prompt_tokens']:,.0f}",
            f"{1000 * row['prefill_seconds']:.1f} ms",
        )
        lines.append(f"| {' | '.join(cells)} |")
    n, majority = max(r["n"] for r in rows), max(r.get("majority") or 0.0 for r in rows)
    note = f"n = {n} held-out examples, greedy; always giving the most frequent answer earns {majority:.1%}. "
    note += "*Trace match*: the whole trace equals the reference. *Trace true*: it walks the document as the "
    note += "document says, agrees with the scene that it describes, and ends in the answer given."
    return "\n".join([*head, *lines]) + "\n\n" + note


def share_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _stages(metrics: Sequence[dict], results: dict) -> list[str]:
    if not metrics:
        return []
    lines = [
        "| stage | steps | time | tokens/s | loss, first to last | reward, first to last |",
        "|---|---|---|---|---|---|",
    ]
    total = 0.0
    for stage, rows in by_stage(metrics):
        seconds = sum(r.get("seconds", 0.0) for r in rows)
        total += seconds
        speed = sum(r.get("tokens", 0) for r in rows) / max(seconds, 1e-9)
        lines.append(
            f"| {stage_title(stage)} | {len(rows)} | {duration(seconds)} | {speed:,.0f} "
            f"| {_first_to_last(rows, 'loss')} | {_first_to_last(rows, 'reward_plain')} |"
        )
    note = f"Training took {duration(total)}"
    asked = sum(r.get("seconds", 0.0) for r in results["rows"])
    note += f", the evaluations {duration(asked)}." if asked else "."
    lost = forgetting(results.get("perplexity", {}))
    if lost:
        before, after = lost["perplexity_before"], lost["perplexity_after"]
        note += f" Perplexity on unrelated text: {before:.2f} before, {after:.2f} after"
        note += f" ({lost['rise']:+.1%})."
    for label, kept in results.get("kept", {}).items():
        note += f" By its validation loss, {kept['validation_loss']:.4g}, {label} kept step {kept['kept_step']}"
        note += f" of {kept['of_steps']}."
    return ["## Stages", "\n".join(lines), note]


def _first_to_last(rows: Sequence[dict], name: str) -> str:
    """Means over the first and the last tenth of the steps."""
    values = [r[name] for r in rows if r.get(name) is not None]
    if not values:
        return "-"
    tenth = max(1, len(values) // 10)
    first, last = values[:tenth], values[-tenth:]
    return f"{sum(first) / tenth:.3f} to {sum(last) / tenth:.3f}"


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 05 s``, ``1 h 20 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _predictions(run: Path, rows: Sequence[dict], examples: Sequence[Example]) -> list[str]:
    final = final_row(rows)
    if final is None:
        return []
    said = [
        p for p in load_predictions(run) if p["model"] == final["model"] and not p["document_in_context"]
    ]
    known = {e.id: e for e in examples}
    blocks = []
    for title, correct in (("Right", True), ("Wrong", False)):
        chosen = [p for p in said if p["correct"] is correct][:SHOWN]
        if chosen:
            blocks.append(f"### {title}")
            blocks += [_prediction(run, p, known.get(p["id"])) for p in chosen]
    if not blocks:
        return []
    return [f"## What {stage_title(final['model'])} answers without the document", *blocks]


def _prediction(run: Path, prediction: dict, example: Example | None) -> str:
    parts = []
    if example is not None:
        for number, picture in enumerate(example.images[:2]):
            file = _save_picture(run, picture, f"{_safe(prediction['id'])}-{number}.png")
            parts.append(f'<img src="{file}" width="{PICTURE}" alt="{prediction["id"]}">')
        parts.append(f"**{prediction['id']}**: {example.query}")
    else:
        parts.append(f"**{prediction['id']}**")
    parts.append(_fenced(prediction["completion"] or "(nothing)"))
    if not prediction["correct"]:
        trace = example.reasoning if example is not None else None
        parts += ["Expected:", _fenced(completion_text(trace, prediction["expected"]))]
    return "\n\n".join(parts)


def _save_picture(run: Path, picture, name: str) -> str:
    """Saves a picture under figures/examples, small ones enlarged; returns the relative path."""
    image = open_image(picture)
    if image.width < PICTURE:
        factor = -(-PICTURE // image.width)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    file = run / "figures" / "examples" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        image.save(temporary, format="PNG")
    return file.relative_to(run).as_posix()


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _fenced(text: str, language: str = "text") -> str:
    """A code block that the text cannot close."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _details(run: Path, recipe: str | None) -> list[str]:
    out = []
    if recipe is not None:
        out += ["## Recipe", _fenced(recipe.rstrip(), "yaml")]
    environment = run / "environment.json"
    if environment.is_file():
        found = json.loads(environment.read_text(encoding="utf-8"))
        out += ["## Environment", _fenced(json.dumps(found, indent=1), "json")]
    return out
