"""results.json and predictions.jsonl."""

import pytest

from mpi_mlx.errors import CheckpointError
from mpi_mlx.evaluation.results import (
    find_row,
    load_predictions,
    load_results,
    predictions_path,
    record,
    record_facts,
    results_path,
)


def row(model, in_context, accuracy):
    return {"model": model, "document_in_context": in_context, "accuracy": accuracy}


def predictions(model, in_context, *ids):
    return [{"id": i, "model": model, "document_in_context": in_context, "answer": "é"} for i in ids]


def test_a_row_recorded_again_takes_the_place_of_the_first(tmp_path):
    record(tmp_path, row("base", False, 0.1), predictions("base", False, "a", "b"))
    record(tmp_path, row("base", True, 0.9), predictions("base", True, "a"))
    record(tmp_path, row("base", False, 0.2), predictions("base", False, "c"), seconds=3)
    results = load_results(tmp_path)
    assert [r["accuracy"] for r in results["rows"]] == [0.2, 0.9] and results["seconds"] == 3
    assert [p["id"] for p in load_predictions(tmp_path)] == ["a", "c"]
    assert find_row(results["rows"], "base", True)["accuracy"] == 0.9
    assert find_row(results["rows"], "rl", True) is None
    assert record_facts(tmp_path, forgetting={"rise": 0.0})["rows"] == results["rows"]
    assert sorted(p.name for p in results_path(tmp_path).parent.iterdir()) == [
        "predictions.jsonl", "results.json"
    ]
    assert "é" in predictions_path(tmp_path).read_text(encoding="utf-8")


def test_no_results_and_broken_ones_are_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="evaluate the run first"):
        load_results(tmp_path)
    assert load_predictions(tmp_path) == []
    results_path(tmp_path).parent.mkdir()
    for text in ("{", "[]", '{"rows": 1}'):
        results_path(tmp_path).write_text(text)
        with pytest.raises(CheckpointError, match="not a results file"):
            load_results(tmp_path)
