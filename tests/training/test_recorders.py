"""TensorBoard and Weights & Biases, by stand-ins: neither package is needed to test what they are told."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from small_runs import STAGES, metrics, result_rows, write_recipe

from mpi_mlx.errors import RecipeError
from mpi_mlx.recipe import load_recipe
from mpi_mlx.training.recorders import Recorders
from mpi_mlx.training.reports import EvaluationRow, StepReport, ValidationReport
from mpi_mlx.training.run import request_stop, train


def step(number=3, **metrics):
    return StepReport("rl", number, 5, 0.5, 1e-3, 100, 50.0, 2.0, 10**6, 0.25, metrics)


def asked_for(**logging):
    return SimpleNamespace(name="small", logging=SimpleNamespace(**{"tensorboard": False, "wandb": None} | logging))


@pytest.fixture
def tensorboard(monkeypatch):
    """What the writers were told: (folder, tag, value, step), and ("closed", folder)."""
    told = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, tag, value, step):
            told.append((self.folder, tag, value, step))

        def close(self):
            told.append(("closed", self.folder))

    module = ModuleType("tensorboardX")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    return told


@pytest.fixture
def wandb(monkeypatch):
    """The stand-in; ``told`` holds what it was told, ``problem`` is raised by init when set."""
    module = ModuleType("wandb")
    module.told, module.problem = [], None

    def init(**options):
        if module.problem is not None:
            raise module.problem
        module.told.append(("init", options))
        return SimpleNamespace(
            log=lambda values: module.told.append(("log", values)),
            finish=lambda: module.told.append(("finish",)),
        )

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_tensorboard_by_hand(tensorboard, tmp_path):
    recorders = Recorders(asked_for(tensorboard=True), tmp_path)
    recorders.step(2, step(reward=0.5, kl=float("nan")))
    recorders.validation(1, ValidationReport("sft", 4, 1.5))
    recorders.row(3, {"document_in_context": False, "accuracy": 0.75, "format_rate": 1.0, "trace_match": None})
    recorders.row(3, {"document_in_context": True, "accuracy": 0.5, "format_rate": 1.0})
    recorders.close()
    recorders.close()
    folder = str(tmp_path / "tensorboard")
    assert tensorboard == [
        *((folder, f"3-rl/{name}", value, 3) for name, value in (
            ("loss", 0.5), ("learning_rate", 1e-3), ("tokens_per_second", 50.0), ("grad_norm", 0.25), ("reward", 0.5),
        )),
        (folder, "2-sft/validation_loss", 1.5, 4),
        (folder, "evaluation-without-document/accuracy", 0.75, 3),
        (folder, "evaluation-without-document/format_rate", 1.0, 3),
        (folder, "evaluation-with-document/accuracy", 0.5, 3),
        (folder, "evaluation-with-document/format_rate", 1.0, 3),
        ("closed", folder),
    ]  # fmt: skip


def test_wandb_by_hand(wandb, tmp_path):
    recorders = Recorders(asked_for(wandb="rules"), tmp_path)
    recorders.step(0, step(reward=0.5))
    recorders.close()
    identity = (tmp_path / "wandb-id").read_text()
    options = {"project": "rules", "dir": str(tmp_path), "name": "small", "id": identity, "resume": "allow"}
    values = {"loss": 0.5, "learning_rate": 1e-3, "tokens_per_second": 50.0, "grad_norm": 0.25, "reward": 0.5}
    values["step"] = 3
    assert wandb.told == [
        ("init", options), ("log", {f"1-rl/{name}": value for name, value in values.items()}), ("finish",),
    ]  # fmt: skip
    Recorders(asked_for(wandb="rules"), tmp_path)
    assert wandb.told[-1] == ("init", options)  # goes on in the same W&B run


def test_neither_is_asked_for(tensorboard, wandb, tmp_path):
    recorders = Recorders(asked_for(), tmp_path)
    recorders.step(0, step())
    recorders.close()
    assert tensorboard == wandb.told == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "package, setting, said",
    [
        ("tensorboardX", "tensorboard=true", "tensorboard: pip install tensorboardX, or set it to false"),
        ("wandb", "wandb=rules", "wandb: pip install wandb, or set it to null"),
    ],
)
def test_a_missing_package_is_said_before_anything_is_written(
    recipe_file, tmp_path, monkeypatch, package, setting, said
):
    monkeypatch.setitem(sys.modules, package, None)  # an import of it fails
    with pytest.raises(RecipeError) as error:
        next(train(load_recipe(recipe_file, [f"logging.{setting}"], output=tmp_path / "run")))
    assert str(error.value) == f"logging.{said}"
    assert not (tmp_path / "run").exists()


def test_wandb_that_refuses_is_one_line(wandb, tmp_path):
    wandb.problem = RuntimeError("api_key not configured\nlong story")
    with pytest.raises(RecipeError, match="logging.wandb: api_key not configured; run `wandb login`, or .*--resume$"):
        Recorders(asked_for(wandb="rules"), tmp_path)


def test_a_run_records_its_steps_and_rows_and_closes_when_it_is_stopped(base, tmp_path, tensorboard, wandb):
    stage = STAGES["sft"] | {"steps": 2, "validate_every": 1}
    recipe = load_recipe(
        write_recipe(tmp_path / "r.yaml", base, [stage]),
        ["logging.tensorboard=true", "logging.wandb=rules"],
        output=tmp_path / "run",
    )
    for report in train(recipe):
        if isinstance(report, EvaluationRow) and report.row["document_in_context"]:
            request_stop()
    assert tensorboard[-1][0] == "closed" and wandb.told[-1] == ("finish",)
    list(train(recipe, resume=True))
    run = str(tmp_path / "run" / "tensorboard")
    steps = metrics(tmp_path / "run")
    told = {tag: [(at, value) for _, t, value, at in (x for x in tensorboard if x[0] == run) if t == tag] for tag in (
        "1-sft/loss", "1-sft/validation_loss", "evaluation-without-document/accuracy",
    )}  # fmt: skip
    assert told["1-sft/loss"] == [(row["step"], row["loss"]) for row in steps]
    assert [at for at, _ in told["1-sft/validation_loss"]] == [1, 2]
    plain = [row["accuracy"] for row in result_rows(tmp_path / "run") if not row["document_in_context"]]
    assert told["evaluation-without-document/accuracy"] == list(enumerate(plain)) and len(plain) == 2
    begun = [options["id"] for kind, *rest in wandb.told if kind == "init" for options in rest]
    assert len(begun) == 2 and len(set(begun)) == 1
    assert tensorboard[-1][0] == "closed" and wandb.told[-1] == ("finish",)
