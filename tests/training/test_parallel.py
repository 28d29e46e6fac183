"""Two processes over loopback, started by mlx.launch, against one with twice the batch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_runs import STAGES, metrics, result_rows, write_recipe

from mpi_mlx.errors import CheckpointError
from mpi_mlx.recipe import load_recipe
from mpi_mlx.training.launch import Ended, launch
from mpi_mlx.training.run import train

DRIVER = Path(__file__).with_name("parallel_run.py")
# groups without signal are dropped
DAPO = dict(algorithm="dapo", refill=False, kl_coef=0.0, policy_aware_sampler="model")
STEPS = (3, 3, 3, 8)
SETTINGS = [  # a stage, what is changed in it, what is doubled, and its size in each process
    ("cpt", {}, "batch_size", 2),
    ("sft", {"accumulate": 1, "optimizer": "adamw"}, "batch_size", 2),
    ("rl", {}, "prompts", 2),
    ("rl", DAPO, "prompts", 1),
]


@pytest.fixture(scope="module")
def two_and_one(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")

    def recipe(name, scale):
        stages = [
            STAGES[s] | changes | {size: n * scale, "steps": steps}
            for (s, changes, size, n), steps in zip(SETTINGS, STEPS, strict=True)
        ]
        return write_recipe(folder / name, base, stages, lora={"rank": 2, "alpha": 4})

    many, one = recipe("many.yaml", 1), recipe("one.yaml", 2)
    scripts = Path(sys.executable).parent
    launcher = [scripts / "mlx.launch", "--backend", "ring", "-n", "2"]  # with CUDA it would want a GPU for each
    command = [*launcher, scripts / "mpi-mlx", "train", many, "--output", folder / "many"]
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    list(train(load_recipe(one, output=folder / "one")))
    return folder / "many", folder / "one"


@pytest.mark.parametrize("index", range(4), ids=["cpt", "sft", "grpo", "dapo"])
def test_same_curve_as_one_process_with_twice_the_batch(two_and_one, index):
    many, one = ([r for r in metrics(run) if r["stage_index"] == index] for run in two_and_one)
    assert len(one) == len(many) == STEPS[index] and any(r["grad_norm"] > 0 for r in one)
    for name in ("loss", "grad_norm", "tokens"):
        np.testing.assert_allclose([r[name] for r in many], [r[name] for r in one], rtol=1e-5, atol=1e-5)
    for a, b in zip(many, one, strict=True):
        assert a["metrics"].keys() == b["metrics"].keys()
        for name in a["metrics"].keys() - {"drift"}:  # rounding is what drift measures
            assert a["metrics"][name] == pytest.approx(b["metrics"][name], rel=1e-4, abs=1e-5), name


def test_a_process_may_have_nothing_to_train_on(two_and_one):
    trained = [r["metrics"]["groups_trained"] for r in metrics(two_and_one[0]) if r["stage_index"] == 3]
    assert 1 in trained  # one process had its group, the other none


def test_processes_stop_after_the_same_batch_of_answers(base, tmp_path):
    """Five examples in batches of 1: rank 0 answers three, rank 1, which is asked to stop, two."""
    data = {"benchmark": "clevr_policy", "depth": 1, "train": 5, "test": 5}
    evaluation = {"batch_size": 1, "max_completion_tokens": 2, "forgetting": False}
    recipe = write_recipe(
        tmp_path / "r.yaml", base, [STAGES["cpt"] | {"steps": 1}], data=data, evaluation=evaluation
    )
    command = [sys.executable, str(DRIVER), str(recipe), str(tmp_path / "run"), "1"]
    assert launch(command, 2) == Ended(0)
    assert not (tmp_path / "run" / "evaluation").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_another_number_of_processes_does_not_go_on(two_and_one):
    many, one = two_and_one
    assert json.loads((many / "environment.json").read_text())["processes"] == 2
    with pytest.raises(CheckpointError, match="was begun by 2 processes, and this would be one process"):
        list(train(load_recipe(many / "recipe.yaml", output=many), resume=True))


def test_a_late_process_still_finds_the_best_checkpoint(base, tmp_path):
    """Losses rise, so that the first checkpoint is the best; rank 1 is a second behind when it reads it."""
    stage = STAGES["cpt"] | {"steps": 4, "validate_every": 1, "patience": 2}
    recipe = write_recipe(tmp_path / "r.yaml", base, [stage])
    command = [sys.executable, str(DRIVER), str(recipe), str(tmp_path / "run"), "late"]
    assert launch(command, 2) == Ended(0)
    progress = json.loads((tmp_path / "run" / "progress.json").read_text())
    assert progress["stages"]["0"]["kept_step"] == 1 and progress["stages"]["0"]["of_steps"] == 3


def test_only_rank_0_writes(two_and_one):
    """Each line is there once, and so is each row of the evaluation, which the processes shared."""
    many, one = two_and_one
    order = [(r["stage_index"], r["step"]) for r in metrics(many)]
    assert order == [(i, s) for i in range(4) for s in range(1, STEPS[i] + 1)]
    assert [(r["model"], r["n"], r["prompt_tokens"]) for r in result_rows(many)] == [
        (r["model"], r["n"], r["prompt_tokens"]) for r in result_rows(one)
    ]
    assert {p.relative_to(many) for p in many.rglob("*")} == {p.relative_to(one) for p in one.rglob("*")}
