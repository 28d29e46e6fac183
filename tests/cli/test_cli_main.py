import errno
import os
import subprocess
import sys
import types

import pytest
from mpi_mlx_cli import main as cli

from mpi_mlx.errors import DataError, RecipeError


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


def raising(monkeypatch, error):
    """`mpi-mlx recipes`, whose only call into the library raises ``error``."""
    module = types.ModuleType("mpi_mlx.recipe")

    def shipped_recipes():
        raise error

    module.shipped_recipes = shipped_recipes
    monkeypatch.setitem(sys.modules, "mpi_mlx.recipe", module)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nfrom mpi_mlx_cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "print('LOADED', [m for m in ('mlx', 'mlx.core', 'transformers', 'pydantic', 'numpy', 'mlx_vlm') "
        "if m in sys.modules])"
    )
    result = python("-c", script)
    assert result.returncode == 0, result.stderr
    assert "LOADED []" in result.stdout
    for name, *_ in cli.COMMANDS:
        assert f" {name} " in result.stdout


@pytest.mark.parametrize("name", [name for name, *_ in cli.COMMANDS])
def test_every_command_has_help(capsys, name):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0 and "Usage: mpi-mlx" in out


def test_an_error_of_the_users_is_one_line_and_code_2(monkeypatch, capsys):
    raising(monkeypatch, RecipeError("r.yaml:3: stages.0.stepz is unknown; did you mean steps?"))
    code, out, err = run(capsys, "recipes")
    assert (code, out) == (2, "")
    assert err == "error: r.yaml:3: stages.0.stepz is unknown; did you mean steps?\n"


def test_several_errors_are_a_line_each(monkeypatch, capsys):
    raising(monkeypatch, RecipeError("r.yaml:1: a\nr.yaml:4: b"))
    assert run(capsys, "recipes")[2] == "error: r.yaml:1: a\nerror: r.yaml:4: b\n"


def test_a_long_error_is_not_wrapped_nor_read_as_markup(monkeypatch, capsys):
    text = "[bold]odd[/] name " + "x" * 300
    raising(monkeypatch, DataError(text))
    assert run(capsys, "recipes")[2] == f"error: {text}\n"


def test_debug_shows_the_traceback_too(monkeypatch, capsys):
    monkeypatch.setenv("MPI_MLX_DEBUG", "1")
    raising(monkeypatch, RecipeError("bad"))
    code, _, err = run(capsys, "recipes")
    assert code == 2 and "Traceback" in err and err.endswith("error: bad\n")


def test_a_full_disk(monkeypatch, capsys):
    raising(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "runs/a/x.safetensors"))
    code, _, err = run(capsys, "recipes")
    assert code == 2 and err.startswith("error: disk full writing runs/a/x.safetensors;")
    assert err.count("\n") == 1


def test_a_full_disk_in_mlx_own_words(monkeypatch, capsys, tmp_path):
    """A limit on file sizes stands for the disk: mlx is told by the system that it cannot write on."""
    code = (
        "import resource, sys, mlx.core as mx\n"
        "from mpi_mlx_cli.main import explain\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    mx.save_safetensors(sys.argv[1], {'a': mx.zeros((100, 100))})\n"
        "except Exception as error:\n    print(*explain(error))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.safetensors")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert said.stdout.startswith("disk full; ") and said.stdout.endswith(" 2\n") and "--resume" in said.stdout
    raising(monkeypatch, RuntimeError("[write] Something else"))
    assert run(capsys, "recipes")[0] == 1


def test_a_folder_that_cannot_be_written(monkeypatch, capsys):
    raising(monkeypatch, PermissionError(errno.EACCES, "Permission denied", "/runs"))
    code, _, err = run(capsys, "recipes")
    assert code == 2 and err.startswith("error: /runs: Permission denied;")


def test_a_bug_asks_to_be_reported(monkeypatch, capsys):
    raising(monkeypatch, ZeroDivisionError("division\nby zero"))
    code, _, err = run(capsys, "recipes")
    assert code == 1 and err.count("\n") == 1
    assert "unexpected ZeroDivisionError: division by zero" in err and "MPI_MLX_DEBUG=1" in err


def test_unknown_command_and_option_are_code_2(capsys):
    assert run(capsys, "trian")[0] == 2
    assert run(capsys, "train", "x", "--nope")[0] == 2


def test_a_rank_leaves_its_error_to_the_launcher(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(cli.ERROR_FILE, str(tmp_path / "error"))
    raising(monkeypatch, RecipeError("bad"))
    code, out, err = run(capsys, "recipes")
    assert (code, out, err) == (2, "", "")
    assert (tmp_path / "error").read_text() == "bad"


def test_a_command_whose_module_is_missing_says_so(capsys):
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command("absent")(cli._absent("absent"))
    result = CliRunner().invoke(app, [])
    assert "mpi-mlx absent: not part of this installation" in str(result.exception)
