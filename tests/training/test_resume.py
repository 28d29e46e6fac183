"""A run that was stopped anywhere and continued equals the run that never was, to the bit."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mpi_mlx_cli import main as cli
from PIL import Image
from small_runs import STAGES, adapters, metrics, result_rows, write_recipe

from mpi_mlx.models import load_model
from mpi_mlx.recipe import load_recipe
from mpi_mlx.runtime import on_cpu
from mpi_mlx.training.folder import RunFolder
from mpi_mlx.training.reports import (
    EvaluationProgress,
    EvaluationRow,
    Interrupted,
    RunFinished,
    StageFinished,
    StageStarted,
    StepReport,
)
from mpi_mlx.training.run import request_stop, train

pytestmark = pytest.mark.skipif(not on_cpu(), reason="the same to the bit is promised on CPU alone")

DRIVER = Path(__file__).with_name("killed_run.py")


@pytest.fixture(scope="module")
def killed(recipe_file, tmp_path_factory):
    """Killed in each stage a step after its checkpoint, a process each, and then finished."""
    folder = tmp_path_factory.mktemp("runs") / "killed"
    for index, stage in enumerate(STAGES):
        ended = subprocess.run([sys.executable, DRIVER, recipe_file, folder, stage, "3"], capture_output=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
        last = metrics(folder)[-1]
        assert (last["stage_index"], last["step"]) == (index, 3)
        kept = [p.name for p in (folder / "stages").rglob("step-*")]
        assert kept == ["step-000002"]  # what step 3 did is lost
    reports = list(train(load_recipe(recipe_file, output=folder), resume=True))
    starts = [(r.stage, r.start_step) for r in reports if isinstance(r, StageStarted)]
    assert starts == [("rl", 2)] and isinstance(reports[-1], RunFinished)
    return folder


@pytest.mark.parametrize("index, stage", list(enumerate(STAGES)))
def test_killed_and_continued_has_the_same_metrics(whole, killed, index, stage):
    expected = [row for row in metrics(whole[0]) if row["stage_index"] == index]
    assert len(expected) == 4 and len({row["loss"] for row in expected}) == 4
    assert [row for row in metrics(killed) if row["stage_index"] == index] == expected


def test_killed_and_continued_has_the_same_adapters_and_results(whole, killed):
    expected = adapters(whole[0])
    assert len(expected) == 4 and len(set(expected.values())) == 3  # each stage's, and the last one's again
    assert adapters(killed) == expected
    assert result_rows(killed) == result_rows(whole[0])
    assert not list(killed.rglob("step-*"))  # no checkpoint outlives its stage


def test_features_do_not_depend_on_the_images_that_come_with_them(base):
    """A resumed run meets its images in other company."""
    model = load_model(base)
    pixels = np.random.default_rng(0).integers(0, 255, (4, 84, 84, 3), dtype=np.uint8)
    images = [model.image(Image.fromarray(p)) for p in pixels]
    together = [np.array(f) for f in model.features(images)]
    for image, expected in zip(images, together, strict=True):
        model.forget_features()
        np.testing.assert_array_equal(np.array(model.features([image])[0]), expected)
    assert not np.array_equal(together[0], together[1])


def test_killed_after_a_stage_and_before_its_evaluation(base, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", base, ["cpt"]), output=tmp_path / "run")
    run = train(recipe)
    for report in run:
        if isinstance(report, StageFinished):
            break
    run.close()
    assert {row["model"] for row in result_rows(tmp_path / "run")} == {"base"}
    reports = list(train(recipe, resume=True))
    rows = [r.row for r in reports if isinstance(r, EvaluationRow)]
    assert [(r["model"], r["document_in_context"]) for r in rows] == [("cpt", False), ("cpt", True)]
    assert not [r for r in reports if isinstance(r, StepReport)]
    assert [r["model"] for r in result_rows(tmp_path / "run")] == ["base", "base", "cpt", "cpt"]


def test_stopped_in_the_last_step_of_a_validated_stage(base, tmp_path):
    stage = STAGES["sft"] | {"steps": 2}
    file = write_recipe(tmp_path / "r.yaml", base, [stage], evaluation={"after": []})
    undisturbed = load_recipe(file, output=tmp_path / "undisturbed")
    list(train(undisturbed))
    recipe, reports = load_recipe(file, output=tmp_path / "run"), []
    for report in train(recipe):
        reports.append(report)
        if isinstance(report, StepReport) and report.step == 2:
            request_stop()
    assert isinstance(reports[-1], Interrupted)
    assert isinstance(list(train(recipe, resume=True))[-1], RunFinished)
    assert adapters(tmp_path / "run") == adapters(tmp_path / "undisturbed")


@pytest.mark.parametrize("label, in_context", [("base", False), ("base", True), ("cpt", True)])
def test_stopped_between_batches_of_answers(base, tmp_path, label, in_context):
    """Only the evaluation that was stopped is done again, and nothing else differs."""
    changes = dict(
        data={"benchmark": "clevr_policy", "depth": 1, "train": 5, "rl": 2, "validation": 2, "test": 5},
    )
    file = write_recipe(tmp_path / "r.yaml", base, [STAGES["cpt"] | {"steps": 1}], **changes)
    undisturbed, recipe = (load_recipe(file, output=tmp_path / name) for name in ("undisturbed", "run"))
    list(train(undisturbed))
    order = [(name, carried) for name in ("base", "cpt") for carried in (False, True)]
    before = order[: order.index((label, in_context))]

    reports = []
    for report in train(recipe):
        reports.append(report)
        if isinstance(report, EvaluationProgress) and report.done == 2:
            if (report.label, report.document_in_context) == (label, in_context):
                request_stop()
    assert isinstance(reports[-1], Interrupted) and reports[-1].resume_command.endswith(" --resume")
    assert reports[-2] == EvaluationProgress(label, in_context, 2, 5)
    if before:
        assert [(r["model"], r["document_in_context"]) for r in result_rows(tmp_path / "run")] == before
    else:
        assert not (tmp_path / "run" / "evaluation").exists()

    again = list(train(recipe, resume=True))
    assert isinstance(again[-1], RunFinished)
    rows = [r.row for r in again if isinstance(r, EvaluationRow)]
    assert [(r["model"], r["document_in_context"]) for r in rows] == order[len(before) :]
    assert [r.done for r in again if isinstance(r, EvaluationProgress)] == [0, 2, 4, 5] * len(rows)
    assert len([r for r in again if isinstance(r, StepReport)]) == (label == "base")
    assert result_rows(tmp_path / "run") == result_rows(tmp_path / "undisturbed")
    assert adapters(tmp_path / "run") == adapters(tmp_path / "undisturbed")


def test_stopped_in_the_last_batch_of_answers(base, tmp_path):
    """The answers are kept: before a stage the run ends there, and after the last one it finishes."""
    recipe = load_recipe(
        write_recipe(tmp_path / "r.yaml", base, [STAGES["cpt"] | {"steps": 1}]), output=tmp_path / "run"
    )

    def stopped_after(label, resume):
        reports = []
        for report in train(recipe, resume=resume):
            reports.append(report)
            if isinstance(report, EvaluationRow) and report.row["model"] == label:
                if report.row["document_in_context"]:
                    request_stop()
        return reports

    first = stopped_after("base", False)
    assert isinstance(first[-1], Interrupted) and not [r for r in first if isinstance(r, StageStarted)]
    assert len(result_rows(tmp_path / "run")) == 2
    second = stopped_after("cpt", True)
    assert isinstance(second[-1], RunFinished)
    assert len([r for r in second if isinstance(r, EvaluationRow)]) == 2


def test_interrupt_ends_the_step_saves_and_says_how_to_go_on(base, tmp_path, monkeypatch, capsys):
    file = write_recipe(tmp_path / "r.yaml", base, ["cpt"], evaluation={"after": []})
    append = RunFolder.append_metrics

    def interrupted(folder, row):
        append(folder, row)
        if row["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", *map(str, arguments)])
        return ended.value.code, capsys.readouterr().out

    options = ("--set", "stages.0.steps=3")
    assert run(file, *options, "--output", tmp_path / "undisturbed")[0] == 0
    monkeypatch.setattr(RunFolder, "append_metrics", interrupted)
    code, out = run(file, *options, "--output", tmp_path / "run")
    assert code == 130
    assert [p.name for p in (tmp_path / "run").rglob("step-*")] == ["step-000001"]
    monkeypatch.setattr(RunFolder, "append_metrics", append)
    command = shlex.split(out.partition("go on with: ")[2])
    assert command[:2] == ["mpi-mlx", "train"] and command[-1] == "--resume"
    assert run(*command[2:])[0] == 0  # as it was printed, overrides included
    assert adapters(tmp_path / "run") == adapters(tmp_path / "undisturbed")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "undisturbed")
