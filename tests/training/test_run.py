"""A whole run of the three stages: what it leaves behind."""

import json
import math

import mlx.core as mx
import mlx_vlm
import numpy as np
import pytest
from PIL import Image
from small_runs import STAGES, metrics, write_recipe

from mpi_mlx.errors import CheckpointError
from mpi_mlx.evaluation.figures import load_metrics
from mpi_mlx.models import load_model
from mpi_mlx.recipe import load_recipe
from mpi_mlx.stages import build
from mpi_mlx.training import run as run_module
from mpi_mlx.training.reports import Message, RunFinished, RunStarted, StepReport, ValidationReport
from mpi_mlx.training.run import train


def test_files(whole):
    run, reports = whole
    for name in (
        "recipe.yaml", "environment.json", "progress.json", "metrics.jsonl", "report.md",
        "evaluation/results.json", "evaluation/predictions.jsonl",
        "adapter/adapters.safetensors", "adapter/adapter_config.json",
        "stages/1-cpt/adapter/adapters.safetensors", "stages/2-sft/adapter/adapters.safetensors",
        "stages/3-rl/adapter/adapters.safetensors",
    ):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    assert len(list((run / "figures").glob("*.png"))) >= 3
    hidden = [p for p in run.rglob("*") if p.name.startswith(".")]
    assert not hidden  # temporary names
    assert (run / "adapter/adapters.safetensors").read_bytes() == (
        run / "stages/3-rl/adapter/adapters.safetensors"
    ).read_bytes()
    assert isinstance(reports[0], RunStarted) and isinstance(reports[-1], RunFinished)
    assert reports[-1].report_path == str(run / "report.md")


def test_metrics(whole):
    rows = metrics(whole[0], timed=True)
    assert [(r["stage_index"], r["stage"], r["step"]) for r in rows] == [
        (i, name, step) for i, name in enumerate(STAGES) for step in (1, 2, 3, 4)
    ]
    for row in rows:
        assert row["total_steps"] == 4 and row["tokens"] > 0 and row["seconds"] > 0
        assert math.isclose(row["tokens_per_second"], row["tokens"] / row["seconds"])
        assert row["memory_bytes"] > 0 and row["grad_norm"] >= 0 and math.isfinite(row["loss"])
    assert [r.loss for r in whole[1] if isinstance(r, StepReport)] == [r["loss"] for r in rows]
    labelled = [r for r in rows if r["stage"] != "rl"]
    # cross-entropy over 364 tokens of random weights
    assert all(0.5 * math.log(364) < r["loss"] < 1.5 * math.log(364) for r in labelled)
    for row in rows[8:]:
        assert set(row["metrics"]) == {
            "reward", "reward_plain", "reward_policy_aware", "reward/regex", "reward/format", "kl", "drift",
            "clip_fraction", "completion_length", "entropy", "finished", "groups_trained", "groups_with_signal",
            "refill_rounds",
        }  # fmt: skip
        assert row["metrics"]["groups_trained"] == 2 and 0 < row["metrics"]["completion_length"] <= 6


def test_result_rows(whole):
    rows = json.loads((whole[0] / "evaluation/results.json").read_text())["rows"]
    assert [(r["model"], r["document_in_context"]) for r in rows] == [
        (name, with_document) for name in ("base", *STAGES) for with_document in (False, True)
    ]
    for row in rows:
        assert row["n"] == 2
        for name in ("accuracy", "format_rate"):
            assert isinstance(row[name], float) and 0 <= row[name] <= 1
        assert row["trace_match"] is None or 0 <= row["trace_match"] <= 1
        assert row["prompt_tokens"] > 0 and row["prefill_seconds"] > 0
    assert rows[1]["prompt_tokens"] > rows[0]["prompt_tokens"] + 50  # the document
    lines = [json.loads(x) for x in (whole[0] / "evaluation/predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * len(rows)


def test_adapter_in_plain_mlx_vlm(whole, base):
    adapter = whole[0] / "adapter"
    assert any(mx.any(v != 0).item() for k, v in mx.load(str(adapter / "adapters.safetensors")).items()
               if k.endswith("lora_b"))  # fmt: skip
    model = load_model(base, adapter=adapter)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (84, 84, 3), dtype=np.uint8))
    encoded = model.encode([{"role": "user", "content": [{"type": "image", "image": picture},
                                                          {"type": "text", "text": "how?"}]}])  # fmt: skip
    features = mx.concatenate(model.features(encoded.images))
    ours = model.head(
        model.hidden(model.embed(encoded.ids[None], features), mx.array(encoded.position_ids[:, None]))
    )
    net, _ = mlx_vlm.load(str(base), adapter_path=str(adapter))
    image = encoded.images[0]
    theirs = net(
        mx.array(encoded.ids)[None], pixel_values=mx.array(image.pixel_values),
        image_grid_thw=mx.array([image.grid]),
    ).logits  # fmt: skip
    assert mx.abs(ours - theirs).max().item() < 1e-5 * mx.abs(theirs).max().item()
    plain, _ = mlx_vlm.load(str(base))
    without = plain(
        mx.array(encoded.ids)[None], pixel_values=mx.array(image.pixel_values),
        image_grid_thw=mx.array([image.grid]),
    ).logits  # fmt: skip
    assert mx.abs(without - theirs).max().item() > 1e-2


def test_stopping_early_keeps_the_best(base, tmp_path, monkeypatch):
    """Scripted validations, a step each: the second is best, and two without progress end the stage."""
    losses = iter([3.0, 2.0, 2.5, 2.25, 0.0])
    monkeypatch.setattr(run_module, "validation", lambda *_: next(losses))
    stage = STAGES["sft"] | {"steps": 9, "validate_every": 1, "patience": 2}
    recipe = load_recipe(
        write_recipe(tmp_path / "r.yaml", base, [stage], evaluation={"after": []}), output=tmp_path / "run"
    )
    reports, kept = [], {}
    for report in train(recipe):
        reports.append(report)
        for folder in (tmp_path / "run").rglob("step-*"):
            if folder.name not in kept and (folder / "state.json").is_file():
                kept[folder.name] = mx.load(str(folder / "parameters.safetensors"))
    assert [r.loss for r in reports if isinstance(r, ValidationReport)] == [3.0, 2.0, 2.5, 2.25]
    assert len(metrics(tmp_path / "run")) == 4  # not nine
    assert "no better since step 2" in next(r.text for r in reports if isinstance(r, Message) and "better" in r.text)
    best, final = kept["step-000002"], mx.load(str(tmp_path / "run/adapter/adapters.safetensors"))
    assert len(best) == len(final) > 0
    for ours, theirs in zip(sorted(best), sorted(final), strict=True):
        assert ours.endswith(theirs) or theirs.endswith(ours)
        assert mx.array_equal(best[ours], final[theirs]).item(), ours
    assert any(not mx.array_equal(kept["step-000001"][name], best[name]).item() for name in best)


def validated(base, folder, monkeypatch, found, **changes):
    """The reports of an sft run of as many steps as ``found`` has losses, and the step whose adapter is kept."""
    losses = iter(found)
    monkeypatch.setattr(run_module, "validation", lambda *_: next(losses))
    stage = STAGES["sft"] | {"steps": len(found), "validate_every": 1, "save_every": 1} | changes
    folder.mkdir()
    file = write_recipe(folder / "r.yaml", base, [stage])
    reports, seen = [], {}
    for report in train(load_recipe(file, output=folder / "run")):
        reports.append(report)
        if isinstance(report, StepReport):
            now = (folder / "run").rglob("step-*/parameters.safetensors")
            seen |= {p.parent.name: mx.load(str(p)) for p in now}
    final = mx.load(str(folder / "run/adapter/adapters.safetensors"))
    same = [n for n, p in seen.items() if all(mx.array_equal(v, _ends(p, k)).item() for k, v in final.items())]
    return reports, same


def _ends(parameters, name):
    return next(v for k, v in parameters.items() if k.endswith(name) or name.endswith(k))


def test_validation_alone_only_looks(base, tmp_path, monkeypatch):
    """As in TRL, where load_best_model_at_end has to be asked for: the result is the last step's."""
    reports, same = validated(base, tmp_path / "a", monkeypatch, [1.0, 2.0, 3.0])
    assert not same and not [r for r in reports if isinstance(r, Message) and "kept" in r.text]
    results = json.loads((tmp_path / "a/run/evaluation/results.json").read_text())
    assert "kept" not in results
    seen = [row.get("validation_loss") for row in load_metrics(tmp_path / "a/run")]
    assert seen == [1.0, 2.0, 3.0]
    reports, same = validated(base, tmp_path / "b", monkeypatch, [1.0, 2.0, 3.0], patience=3)
    assert same == ["step-000001"]
    said = "sft: kept the weights of step 1 of 3, whose validation loss 1 is lowest"
    assert [r.text for r in reports if isinstance(r, Message) and "kept" in r.text] == [said]
    results = json.loads((tmp_path / "b/run/evaluation/results.json").read_text())
    assert results["kept"] == {"sft": {"kept_step": 1, "of_steps": 3, "validation_loss": 1.0}}
    assert "sft kept step 1 of 3" in (tmp_path / "b/run/report.md").read_text()


def test_of_validations_alike_the_last_is_kept_and_none_is_progress(base, tmp_path, monkeypatch):
    reports, same = validated(base, tmp_path / "a", monkeypatch, [1.0, 0.5, 0.5, 0.7, 0.1], patience=2)
    assert same == ["step-000003"]
    assert [r.text for r in reports if isinstance(r, Message) and "better" in r.text] == [
        "sft: no better since step 2; stopping early"
    ]
    assert [r.loss for r in reports if isinstance(r, ValidationReport)] == [1.0, 0.5, 0.5, 0.7]


def test_validation_in_rl_answers_without_dropout(base, tmp_path, monkeypatch):
    training = []

    def evaluate(model, *_, **__):
        training.append(model.net.training)
        return {"accuracy": 0.25}, []

    monkeypatch.setattr(build, "evaluate", evaluate)
    stage = STAGES["rl"] | {"steps": 1, "validate_every": 1}
    recipe = load_recipe(
        write_recipe(tmp_path / "r.yaml", base, [stage], evaluation={"after": []}), output=tmp_path / "run"
    )
    assert [r.loss for r in train(recipe) if isinstance(r, ValidationReport)] == [0.75]
    assert training == [False]


def test_folders_that_are_taken(whole, recipe_file, tmp_path):
    run, _ = whole
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match="already holds this run; add --resume"):
        next(train(load_recipe(recipe_file, output=run)))
    with pytest.raises(CheckpointError, match="holds the run of another recipe"):
        next(train(load_recipe(recipe_file, ["seed=4"], output=run), resume=True))
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty and holds no run"):
        next(train(load_recipe(recipe_file, output=tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
