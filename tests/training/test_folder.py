"""A run's folder: found again from anywhere, gone on with only where the numbers stay, by one process at a time."""

import json
import multiprocessing
import os
import shlex

import pytest
import yaml
from mpi_mlx_cli import main as cli
from PIL import Image
from small_runs import STAGES, adapters, metrics, result_rows, write_recipe

from mpi_mlx.errors import CheckpointError
from mpi_mlx.recipe import load_recipe
from mpi_mlx.training import checkpoint
from mpi_mlx.training import folder as folder_module
from mpi_mlx.training.folder import RunFolder
from mpi_mlx.training.reports import EvaluationRow, Interrupted, Message, RunFinished, StageStarted, StepReport
from mpi_mlx.training.run import request_stop, train

SFT = dict(stage="sft", steps=2, batch_size=1)
RL = STAGES["rl"] | {"steps": 1, "policy_aware": 0, "rewards": [{"kind": "function", "function": "rewards.py:ones"}]}


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *map(str, arguments)])
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def stopped(recipe, stage="sft", step=1, **options):
    """A run that was asked to stop in a step."""
    reports = []
    for report in train(recipe, **options):
        reports.append(report)
        if isinstance(report, StepReport) and (report.stage, report.step) == (stage, step):
            request_stop()
    assert isinstance(reports[-1], Interrupted)
    return reports


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def project(tmp_path, base):
    """One's own document, pictures, rows and reward, beside a recipe of sft and rl."""
    Image.new("RGB", (56, 56), (200, 10, 10)).save(tmp_path / "picture.png")
    content = [{"type": "image", "image": "picture.png"}, {"type": "text", "text": "colour?"}]
    rows = [{"id": i, "messages": [{"role": "user", "content": content}], "answer": "red"} for i in "ab"]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "document.md").write_text("# Colours\n\nSay red.\n")
    (tmp_path / "rewards.py").write_text("def ones(completions, examples):\n    return [1.0] * len(completions)\n")
    data = {"document": "document.md", "train": "train.jsonl", "test": "test.jsonl"}
    return write_recipe(tmp_path / "r.yaml", base, [SFT, RL], data=data, lora={"rank": 2}, evaluation={"after": []})


# ---- where it is


def test_a_run_is_gone_on_with_from_another_folder(base, tmp_path, monkeypatch, capsys):
    file = write_recipe(tmp_path / "r.yaml", base, [SFT], evaluation={"after": []}, output="runs/a b")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    stopped(load_recipe(file))
    run = tmp_path / "runs" / "a b"
    recorded = (run / "recipe.yaml").read_text()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_recipe(run).output == load_recipe(run / "recipe.yaml").output == str(run)
    assert load_recipe(run, output="b").output == load_recipe(run, ["output=b"]).output == "b"
    code, out, err = command(capsys, "../runs/a b", "--resume")
    assert (code, err) == (0, "") and "2 steps, from step 1" in out
    assert f"mpi-mlx chat {shlex.quote('../runs/a b')}" in out
    assert not list((tmp_path / "elsewhere").iterdir())
    assert [row["step"] for row in metrics(run)] == [1, 2]
    assert (run / "recipe.yaml").read_text() == recorded


def test_no_run_to_go_on_with(base, tmp_path, monkeypatch, capsys):
    file = write_recipe(tmp_path / "r.yaml", base, [SFT], evaluation={"after": []})
    monkeypatch.chdir(tmp_path)
    code, _, err = command(capsys, file, "--resume")
    assert code == 2 and err.count("\n") == 1 and f"{tmp_path / 'runs' / 'r'} holds no run to go on with" in err
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


def test_home_is_meant_by_a_tilde(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write_recipe(tmp_path / "r.yaml", base, [SFT], output="~/runs/x", model={"base": "~/model"})
    (tmp_path / "model").mkdir()
    recipe = load_recipe(file)
    assert recipe.output == str(tmp_path / "runs" / "x") and recipe.model.base == str(tmp_path / "model")
    assert load_recipe(file, output="~/y").output == str(tmp_path / "y")
    (tmp_path / "other").mkdir()
    assert load_recipe(file, ["model.base=~/other"]).model.base == str(tmp_path / "other")
    assert load_recipe(file, ["output=~no-such-user/x"]).output == "~no-such-user/x"


# ---- what it is made of


@pytest.mark.parametrize("name", ["document.md", "train.jsonl", "test.jsonl", "picture.png"])
def test_inputs_that_changed(project, tmp_path, capsys, name):
    run = tmp_path / "run"
    stopped(load_recipe(project, output=run))
    file = tmp_path / name
    before = file.read_bytes()
    if name == "picture.png":
        Image.new("RGB", (56, 56), (10, 200, 10)).save(file)
        name = f"a picture of {tmp_path / 'train.jsonl'}"
    else:
        file.write_bytes(before.replace(b"red", b"blue"))
    kept = files(run)
    code, _, err = command(capsys, project, "--output", run, "--resume")
    assert code == 2 and err.count("\n") == 1 and "changed since the run in" in err and "--output" in err
    assert name in err and not [n for n in ("document.md", "rewards.py") if n in err and n != name]
    assert {p: b for p, b in files(run).items() if p.name != "lock"} == {
        p: b for p, b in kept.items() if p.name != "lock"
    }
    file.write_bytes(before)
    assert command(capsys, project, "--output", run, "--resume")[0] == 0


def test_a_reward_may_be_mended_until_a_stage_has_begun_with_it(project, tmp_path, capsys):
    """It fails in rl's first step: the finished sft is not lost over that."""
    rewards, run = tmp_path / "rewards.py", tmp_path / "run"
    good = rewards.read_text()
    rewards.write_text(good.replace("[1.0] * len(completions)", "completions['x']"))
    steps = ("--set", "stages.rl.steps=2", "--set", "stages.rl.save_every=1")
    code, _, err = command(capsys, project, "--output", run, *steps)
    assert code == 2 and "rewards.py" in err
    rewards.write_text(good)
    recipe = load_recipe(project, ["stages.rl.steps=2", "stages.rl.save_every=1"], output=run)
    stopped(recipe, "rl", 1, resume=True)
    rewards.write_text(good.replace("1.0", "2.0"))
    code, _, err = command(capsys, project, "--output", run, *steps, "--resume")
    assert code == 2 and "rewards.py: changed since the run in" in err
    rewards.write_text(good)
    assert command(capsys, project, "--output", run, *steps, "--resume")[0] == 0


def test_a_run_that_recorded_no_inputs_goes_on_and_has_them_from_then(project, tmp_path, capsys):
    run = tmp_path / "run"
    stopped(load_recipe(project, output=run))
    facts = json.loads((run / "environment.json").read_text())
    recorded = facts.pop("inputs")
    assert len(recorded) == 6  # document, two files and their pictures, reward
    (run / "environment.json").write_text(json.dumps(facts))
    text = (tmp_path / "document.md").read_text()
    (tmp_path / "document.md").write_text(text.replace("red", "blue"))
    code, _, err = command(capsys, project, "--output", run, "--resume")
    assert code == 2 and "the document" in err and "changed since" in err  # which was recorded before inputs were
    (tmp_path / "document.md").write_text(text)
    rows = tmp_path / "train.jsonl"
    rows.write_text(rows.read_text().replace('"red"', '"blue"'))
    assert command(capsys, project, "--output", run, "--resume")[0] == 0
    now = json.loads((run / "environment.json").read_text())["inputs"]
    assert [name for name in now if now[name] != recorded[name]] == [str(rows)]


@pytest.mark.parametrize("name", ["progress.json", "environment.json"])
def test_a_truncated_file_of_the_run(base, tmp_path, capsys, name):
    file, run = write_recipe(tmp_path / "r.yaml", base, [SFT], evaluation={"after": []}), tmp_path / "run"
    stopped(load_recipe(file, output=run))
    whole = (run / name).read_text()
    (run / name).write_text(whole[: len(whole) // 2])
    kept = {p: b for p, b in files(run).items() if p.name != "lock"}
    code, _, err = command(capsys, run, "--resume")
    assert code == 2 and err.count("\n") == 1 and f"{run / name} is broken" in err and "restore it" in err
    assert {p: b for p, b in files(run).items() if p.name != "lock"} == kept
    (run / name).write_text(whole)
    assert command(capsys, run, "--resume")[0] == 0


# ---- what of the recipe may change


def test_an_evaluation_that_is_added_is_made_up_for(base, tmp_path):
    """Of a stage whose successor is done, too; rows of another measure do not stand beside the new ones."""
    stages = [SFT, {**SFT, "steps": 1}]
    run, options = tmp_path / "run", {"batch_size": 2, "max_completion_tokens": 4, "forgetting": False}
    file = write_recipe(tmp_path / "r.yaml", base, stages, evaluation={**options, "after": ["base", "sft2"]})
    list(train(load_recipe(file, output=run)))
    before = result_rows(run)
    reports = list(train(load_recipe(file, ["evaluation.after=[base,sft1,sft2]"], output=run), resume=True))
    rows = result_rows(run)
    assert [r for r in rows if r["model"] != "sft1"] == before and len(rows) == len(before) + 2
    assert sum(isinstance(r, EvaluationRow) for r in reports) == 2
    list(train(load_recipe(file, ["evaluation.samples=1"], output=run), resume=True))
    rows = result_rows(run)
    assert {r["model"] for r in rows} == {"base", "sft2"} and {r["n"] for r in rows} == {1}


def test_changes_that_change_no_numbers_are_taken_and_told(project, tmp_path, capsys):
    run = tmp_path / "run"
    stopped(load_recipe(project, output=run))
    plain = tmp_path / "plain"
    list(train(load_recipe(project, ["stages.rl.steps=2"], output=plain)))
    changes = [
        "stages.sft.save_every=7", "stages.sft.gradient_checkpointing=true", "evaluation.batch_size=3",
        "logging.tensorboard=false", "stages.rl.steps=2", "stages.rl.micro_tokens=64",
    ]  # fmt: skip
    code, out, err = command(capsys, run, "--resume", *(word for c in changes for word in ("--set", c)))
    assert (code, err) == (0, "")
    line = next(line for line in out.splitlines() if "changed recipe" in line)
    for part in ("stages.0.save_every 7 (was 50)", "stages.1.steps 2 (was 1)", "stages.1.micro_tokens 64 (was 8192)"):
        assert part in line
    assert "tensorboard" not in line and "output" not in line
    recorded = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recorded["stages"][1]["micro_tokens"] == 64 and recorded["stages"][0]["save_every"] == 7
    assert recorded["output"] == str(run)
    assert [row["step"] for row in metrics(run)] == [1, 2, 1, 2]
    for ours, theirs in zip(metrics(run), metrics(plain), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-6)
    assert command(capsys, run, "--resume")[1].count("changed recipe") == 0  # it is the run's own by now


@pytest.mark.parametrize(
    "change", ["seed=4", "stages.0.learning_rate=0.5", "lora.rank=1", "data.test=null", "stages.1.stage=sft"]
)
def test_changes_that_would_change_numbers_are_refused(project, tmp_path, change):
    run = tmp_path / "a run"
    stopped(load_recipe(project, output=run))
    overrides = [change]
    if change == "stages.1.stage=sft":
        overrides = ["stages.1={stage: sft, steps: 1}"]
    kept = files(run)
    with pytest.raises(CheckpointError, match="the run of another recipe") as error:
        next(train(load_recipe(project, overrides, output=run), resume=True))
    said = str(error.value)
    assert change.partition("=")[0] in said and f"mpi-mlx train '{run}' --resume" in said and "delete" not in said
    assert files(run) == kept
    assert isinstance(list(train(load_recipe(run), resume=True))[-1], RunFinished)


def test_a_stage_that_kept_nothing_has_not_begun(base, tmp_path):
    """Another rate for the only stage: refused after a checkpoint, taken where the stage will begin anew."""
    file = write_recipe(tmp_path / "r.yaml", base, [SFT], evaluation={"after": []})
    for report in train(load_recipe(file, output=tmp_path / "run")):
        if isinstance(report, StageStarted):
            break
    recipe = load_recipe(file, ["stages.0.learning_rate=0.5"], output=tmp_path / "run")
    reports = stopped(recipe, resume=True)
    assert [r for r in reports if isinstance(r, Message) and "learning_rate 0.5 (was" in r.text]
    with pytest.raises(CheckpointError, match="stages.0.learning_rate"):
        next(train(load_recipe(file, output=tmp_path / "run"), resume=True))


# ---- who writes it


def _hold(run, ready, done):
    folder = RunFolder(run, load_recipe(run), resume=True)
    ready.set()
    done.wait(60)
    folder.close()


def test_one_training_a_folder(base, tmp_path, capsys):
    file = write_recipe(tmp_path / "r.yaml", base, [SFT], evaluation={"after": []})
    run = tmp_path / "run"
    stopped(load_recipe(file, output=run))
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(run, ready, done))
    other.start()
    try:
        assert ready.wait(60)
        kept = files(run)
        code, _, err = command(capsys, run, "--resume")
        assert code == 2 and err.count("\n") == 1 and f"{run} is being trained by process {other.pid};" in err
        assert files(run) == kept
    finally:
        other.kill()  # as it may be: the lock goes with it
        other.join()
    assert command(capsys, run, "--resume")[0] == 0
    assert (run / "lock").read_text() == f"{os.getpid()}\n"
    assert len(adapters(run)) == 2


def test_two_that_begin_at_once(base, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", base, [SFT]), output=tmp_path / "run")
    first, second = (RunFolder(tmp_path / "run", recipe, resume=False) for _ in range(2))
    first.begin()
    with pytest.raises(CheckpointError, match="is being trained by process"):
        second.begin()
    first.close()
    with pytest.raises(CheckpointError, match="already holds a run"):
        RunFolder.begin(second)


@pytest.mark.parametrize("name", ["recipe", "environment"])
def test_a_disk_that_is_full_at_the_start(base, tmp_path, monkeypatch, name):
    """What little was written is no obstacle afterwards."""
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", base, [SFT], evaluation={"after": []}))
    recipe = recipe.model_copy(update={"output": str(tmp_path / "run")})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(folder_module, "write_text_atomic" if name == "recipe" else "write_json_atomic", full)
        list(train(recipe))
    if name == "environment":
        recipe = load_recipe(tmp_path / "run")
        assert recipe.output == str(tmp_path / "run")
    assert isinstance(list(train(recipe, resume=name == "environment"))[-1], RunFinished)


def test_a_disk_that_fills_up_in_a_checkpoint(base, tmp_path, capsys, monkeypatch):
    file = write_recipe(tmp_path / "r.yaml", base, [SFT | {"steps": 3, "save_every": 1}], evaluation={"after": []})
    write, run = checkpoint.mx.save_safetensors, tmp_path / "run"

    def full(path, tensors, *_):
        if "optimizer" in path and list(run.rglob("step-000001")):
            raise RuntimeError("[write] Unable to write 1902944 bytes to file.")
        write(path, tensors, *_)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.mx, "save_safetensors", full)
        code, _, err = command(capsys, file, "--output", run)
    assert code == 2 and err.startswith("error: disk full; free some space") and err.count("\n") == 1
    assert [p.name for p in (run / "stages" / "1-sft" / "checkpoints").iterdir()] == ["step-000001"]
    code, out, _ = command(capsys, file, "--output", run, "--resume")
    assert code == 0 and "3 steps, from step 1" in out
