"""`mpi-mlx train` around a trainer that only says what a real one would."""

import os
import signal
import sys
import types

import fake_run
import pytest
from mpi_mlx_cli import main as cli

from mpi_mlx.errors import RecipeError
from mpi_mlx.training import reports as r


@pytest.fixture
def library(monkeypatch):
    """Stands in for mpi_mlx.recipe and mpi_mlx.training.run; records the calls."""
    seen = types.SimpleNamespace(loaded=None, resume=None, stop=False, reports=fake_run.reports, processes=1)
    recipe = types.ModuleType("mpi_mlx.recipe")
    run = types.ModuleType("mpi_mlx.training.run")

    def load_recipe(path, overrides=(), output=None):
        if path == "missing.yaml":
            raise RecipeError("missing.yaml: no such file")
        seen.loaded = (path, tuple(overrides), output)
        return types.SimpleNamespace(processes=seen.processes, command=f"mpi-mlx train {path}")

    def train(_, *, resume=False):
        seen.resume = resume
        yield from seen.reports()

    def request_stop():
        seen.stop = True

    recipe.load_recipe, run.train, run.request_stop = load_recipe, train, request_stop
    monkeypatch.setitem(sys.modules, "mpi_mlx.recipe", recipe)
    monkeypatch.setitem(sys.modules, "mpi_mlx.training.run", run)
    monkeypatch.delenv("MLX_RANK", raising=False)
    return seen


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *arguments])
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_options_reach_the_library(library, capsys):
    code, out, err = run(
        capsys, "quickstart", "--set", "seed=3", "--set", "stages.1.steps=5", "--output", "o", "--resume"
    )
    assert (code, err) == (0, "")
    assert library.loaded == ("quickstart", ("seed=3", "stages.1.steps=5"), "o") and library.resume is True
    assert "done in 5:42" in out


def test_a_bad_recipe_is_code_2(library, capsys):
    assert run(capsys, "missing.yaml") == (2, "", "error: missing.yaml: no such file\n")


def test_one_interrupt_asks_for_a_stop_and_the_run_says_how_to_go_on(library, capsys):
    def reports():
        whole = fake_run.reports()
        yield next(whole)
        yield r.StageStarted(0, "cpt", 20)
        os.kill(os.getpid(), signal.SIGINT)
        yield fake_run.step("cpt", 1, 20, 2.0)
        assert library.stop
        yield r.Interrupted("runs/quickstart", "mpi-mlx train quickstart --resume")

    library.reports = reports
    before = signal.getsignal(signal.SIGINT)
    code, out, _ = run(capsys, "quickstart")
    assert code == 130 and "go on with: mpi-mlx train quickstart --resume" in out
    assert "stopping after this step" in out
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_quits(library, capsys):
    def reports():
        yield next(fake_run.reports())
        yield r.StageStarted(0, "cpt", 20)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        yield fake_run.step("cpt", 1, 20, 2.0)

    library.reports = reports
    code, out, err = run(capsys, "quickstart")
    assert code == 130 and "cpt 1/20" not in out and "mpi-mlx train quickstart --resume" in err


def test_several_processes_are_started_as_ranks(library, capsys, monkeypatch):
    from mpi_mlx.training import launch

    def fake_launch(command, processes, *, error_variable):
        assert processes == 2 and command[1:3] == ["-m", "mpi_mlx_cli.main"]
        return launch.Ended(2, "no such data")

    library.processes = 2
    monkeypatch.setattr(launch, "launch", fake_launch)
    assert run(capsys, "quickstart") == (2, "", "error: no such data\n")
    assert library.resume is None  # nothing is trained here


def test_ranks_other_than_the_first_are_silent(library, capsys, monkeypatch):
    monkeypatch.setenv("MLX_RANK", "1")
    assert run(capsys, "quickstart") == (0, "", "")


def test_a_disk_that_fills_up_while_training(library, capsys):
    def reports():
        yield next(fake_run.reports())
        raise OSError(28, "No space left on device")

    library.reports = reports
    code, _, err = run(capsys, "quickstart")
    assert code == 2 and err.startswith("error: disk full") and "--resume" in err
