"""`mpi-mlx train`: a recipe's stages, shown while they run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import typer


def train_command(
    recipe: Annotated[str, typer.Argument(help="A file, or a shipped recipe's name (mpi-mlx recipes).")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: stages.1.steps=50. Repeatable."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="DIR", help="Folder of the run; default: the recipe's.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show recipe, parameters, steps and memory; train nothing.")
    ] = False,
) -> None:
    """Internalize a document: run a recipe's stages, evaluate, and write the report."""
    from mpi_mlx.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or (), output=output)
    if dry_run:
        from mpi_mlx_cli.dry_run import show_plan

        show_plan(loaded)
        return
    rank = os.environ.get("MLX_RANK")
    if loaded.processes > 1 and rank is None:
        from mpi_mlx_cli.main import ERROR_FILE, say

        from mpi_mlx.training.launch import launch

        command = [sys.executable, "-m", "mpi_mlx_cli.main", *sys.argv[1:]]
        ended = launch(command, loaded.processes, error_variable=ERROR_FILE)
        if ended.code != 0 and sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # the cursor, which a killed live view leaves hidden
            sys.stdout.flush()
        if ended.error:
            say(ended.error)
        raise typer.Exit(ended.code)
    if rank is not None:
        from mpi_mlx.training.launch import end_with_launcher

        end_with_launcher()
    raise typer.Exit(follow(loaded, resume=resume, silent=rank not in (None, "0")))


def follow(recipe, *, resume: bool, silent: bool = False) -> int:
    """Trains and shows it; the exit code."""
    from mpi_mlx.training.run import train

    try:
        with view_for(silent) as view, stop_on_interrupt(view) as take_over:
            for report in train(recipe, resume=resume):
                take_over()
                view.show(report)
    except KeyboardInterrupt:
        from mpi_mlx_cli.main import say

        say(f"interrupted; go on from the last checkpoint with: {recipe.command} --resume")
        return 130
    return 130 if view.state.interrupted is not None else 0


def view_for(silent: bool = False):
    """The live view in a terminal that can show it, plain lines elsewhere."""
    from mpi_mlx_cli.plain import PlainView
    from rich.console import Console

    if silent:
        return PlainView(Console(file=open(os.devnull, "w", encoding="utf-8")))
    console = Console(highlight=False)
    if console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf"):
        from mpi_mlx_cli.live import LiveView

        return LiveView(console)
    return PlainView(console)


@contextlib.contextmanager
def stop_on_interrupt(view) -> Iterator[Callable[[], None]]:
    """The first Ctrl-C lets the trainer finish its step, the second quits, the third kills.

    Gives what to call once the trainer has begun: it brings its own handler, which tells the user nothing.
    """
    from mpi_mlx.training.run import request_stop

    def ask(*_) -> None:
        signal.signal(signal.SIGINT, quit_now)
        request_stop()
        view.stopping()

    def quit_now(*_) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    taken = False

    def take_over() -> None:
        nonlocal taken
        if not taken:
            signal.signal(signal.SIGINT, ask)
            taken = True

    def terminate(*_) -> None:  # through the views, which give the terminal back as it was
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGINT, quit_now), signal.signal(signal.SIGTERM, terminate)
    try:
        yield take_over
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
