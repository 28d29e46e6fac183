"""The command `mpi-mlx`: registers the commands and turns errors into one line and an exit code.

Nothing here imports mlx, transformers or pydantic, so that ``--help`` answers at once; each command imports
what it needs when it runs.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

TRAIN, DATA, USE, MACHINE = "Internalize a document", "Recipes and data", "Use the result", "This machine"

# name, panel of the help, module and what it exposes: a function, or a typer.Typer for a group
COMMANDS = (
    ("train", TRAIN, "train", "train_command"),
    ("eval", TRAIN, "eval", "eval_command"),
    ("ablation", TRAIN, "ablation", "ablation_command"),
    ("init", DATA, "projects", "init_command"),
    ("recipes", DATA, "projects", "recipes_command"),
    ("data", DATA, "data", "app"),
    ("chat", USE, "chat", "chat_command"),
    ("serve", USE, "serve", "serve_command"),
    ("convert", USE, "convert", "app"),
    ("doctor", MACHINE, "doctor", "doctor_command"),
)
ERROR_FILE = "MPI_MLX_ERROR_FILE"  # set for the processes of a data-parallel run: the launcher shows errors
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)


class _Ordered(TyperGroup):
    """Help in the order of COMMANDS, groups and commands mixed."""

    def list_commands(self, ctx) -> list[str]:
        return [name for name, *_ in COMMANDS if name in self.commands]


app = typer.Typer(
    cls=_Ordered,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mpi-mlx {version('mpi-mlx')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Teach a model its rulebook, then serve it without the rulebook.

    Start with: mpi-mlx train quickstart
    """


def _register() -> None:
    for name, panel, module, attribute in COMMANDS:
        full = f"{__package__ or 'mpi_mlx_cli'}.{module}"
        try:
            found = getattr(importlib.import_module(full), attribute)
        except ModuleNotFoundError as error:
            if error.name != full:
                raise
            found = _absent(name)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name, rich_help_panel=panel)
        else:
            app.command(name, rich_help_panel=panel)(found)


def _absent(name: str):
    def command() -> None:
        from mpi_mlx.errors import MPIError

        raise MPIError(f"mpi-mlx {name}: not part of this installation; install a newer mpi-mlx")

    command.__doc__ = "(Not part of this installation.)"
    return command


_register()


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 a bug, 2 something the user can mend, 130 interrupted."""
    try:
        app(arguments, prog_name="mpi-mlx")
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("MPI_MLX_DEBUG", "0") not in ("", "0"):
            import traceback

            traceback.print_exc()
        said, code = explain(error)
        say(said)
        sys.exit(code)


def explain(error: BaseException) -> tuple[str, int]:
    """The line to show and the exit code."""
    errors = sys.modules.get("mpi_mlx.errors")  # not imported: cannot be one of its
    if errors is not None and isinstance(error, errors.MPIError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if _is_full_disk(error):
        where = f" writing {error.filename}" if getattr(error, "filename", None) else ""
        return f"disk full{where}; free some space, then do it again (mpi-mlx train goes on with --resume)", 2
    if isinstance(error, OSError) and error.errno in UNWRITABLE and error.filename:
        return f"{error.filename}: {error.strerror}; choose another path or change its permissions", 2
    said = " ".join(str(error).split())
    return (
        f"unexpected {type(error).__name__}: {said} (this is a bug: please report it with the output of "
        "MPI_MLX_DEBUG=1 and mpi-mlx doctor)",
        1,
    )


def _is_full_disk(error: BaseException) -> bool:
    """mlx has no errno: it says how many bytes of an open file it could not write."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("[write] Unable to write")
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def say(said: str) -> None:
    """``error: ...`` on stderr, red where that is a terminal, never wrapped; each line is an error.

    In a rank of a data-parallel run the launcher does it.
    """
    path = os.environ.get(ERROR_FILE)
    if path:
        with open(path, "w", encoding="utf-8") as file:
            file.write(said)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    for line in said.splitlines():
        console.print(Text.assemble(("error: ", "bold red"), (line, "red")), soft_wrap=True)


if __name__ == "__main__":
    main()
