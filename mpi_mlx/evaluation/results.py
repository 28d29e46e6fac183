"""``evaluation/results.json`` and ``predictions.jsonl`` of a run: written as evaluations come."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpi_mlx.atomic import write_json_atomic, write_text_atomic
from mpi_mlx.errors import CheckpointError


def results_path(run: str | Path) -> Path:
    return Path(run) / "evaluation" / "results.json"


def predictions_path(run: str | Path) -> Path:
    return Path(run) / "evaluation" / "predictions.jsonl"


def load_results(run: str | Path) -> dict:
    """``{"rows": [...], ...}``. Raises CheckpointError when the run has none, or a broken file."""
    path = results_path(run)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; evaluate the run first (mpi-mlx eval {shlex.quote(str(run))})")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(results["rows"], list):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: not a results file; delete it and evaluate again") from None
    return results


def load_predictions(run: str | Path) -> list[dict]:
    """All lines of predictions.jsonl; none when there is no such file."""
    path = predictions_path(run)
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def record(
    run: str | Path, row: dict, predictions: Sequence[dict], *, anew: bool = False, **facts: Any
) -> dict:
    """Adds a row with its predictions, in place of an earlier one of the same model and mode.

    ``anew``: in place of all that the files hold, which may be of other examples.

    ``facts`` are kept beside ``rows`` (``forgetting=...``). Both files are replaced in one rename each, so
    that a run stopped here and continued records the row once. Returns the results.
    """
    run = Path(run)
    results = load_results(run) if results_path(run).is_file() and not anew else {"rows": []}
    kept = [] if anew else [p for p in load_predictions(run) if _key(p) != _key(row)]
    lines = [json.dumps(p, ensure_ascii=False) + "\n" for p in [*kept, *predictions]]
    write_text_atomic(predictions_path(run), "".join(lines))
    rows, at = list(results["rows"]), [_key(r) for r in results["rows"]]
    if _key(row) in at:
        rows[at.index(_key(row))] = row
    else:
        rows.append(row)
    results = {**results, **facts, "rows": rows}
    write_json_atomic(results_path(run), results)
    return results


def record_facts(run: str | Path, **facts: Any) -> dict:
    """Adds facts beside the rows."""
    results = load_results(run) if results_path(run).is_file() else {"rows": []}
    results = {**results, **facts}
    write_json_atomic(results_path(run), results)
    return results


def find_row(rows: Sequence[dict], model: str, document_in_context: bool) -> dict | None:
    """The row of a model in a mode, or None."""
    return next((r for r in rows if _key(r) == (model, document_in_context)), None)


def _key(row: dict) -> tuple[str, bool]:
    return row["model"], row["document_in_context"]
