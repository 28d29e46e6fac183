"""`mpi-mlx init` and `mpi-mlx recipes`: where to start."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

TEMPLATE = "your_policy"


def recipes_command() -> None:
    """List the recipes that come with mpi-mlx."""
    from rich.console import Console
    from rich.table import Table

    from mpi_mlx.recipe import shipped_recipes

    table = Table.grid(padding=(0, 3))
    for name in shipped_recipes():
        table.add_row(name, about(name))
    console = Console(highlight=False)
    console.print(table)
    console.print("\n[dim]run one:[/] mpi-mlx train NAME   [dim]start your own:[/] mpi-mlx init NAME")


def about(name: str) -> str:
    """What a shipped recipe says of itself."""
    from importlib.resources import files

    root = files("mpi_mlx_recipes")
    for path in (root / f"{name}.yaml", root / name / "recipe.yaml"):
        if path.is_file():
            return first_sentence(path.read_text(encoding="utf-8"))
    return ""


def first_sentence(recipe: str) -> str:
    """The comment that a recipe opens with, to its first full stop or colon."""
    said = []
    for line in recipe.splitlines():
        if not line.startswith("#") or not line.strip("# "):
            break
        said.append(line.lstrip("# ").strip())
    text = " ".join(said)
    for index, character in enumerate(text):
        if character in ".:" and text[index + 1 : index + 2] in ("", " "):
            return text[:index]
    return text


def init_command(
    name: Annotated[str, typer.Argument(help="Folder to make.")],
) -> None:
    """Start a project of your own: an illustrated document, examples and a recipe to replace."""
    from importlib.resources import as_file, files

    from mpi_mlx.errors import DataError, MPIError

    target = Path(name)
    if target.exists():
        raise DataError(f"{target}: exists already; choose another name or remove it")
    template = files("mpi_mlx_recipes") / TEMPLATE
    if not template.is_dir():
        raise MPIError(f"the template {TEMPLATE} is not part of this installation; install mpi-mlx again")
    with as_file(template) as folder:
        copy_whole(Path(folder), target)
    typer.echo(f"{target}: " + ", ".join(sorted(p.name for p in target.iterdir())))
    recipe = next(iter(sorted(target.glob("*.yaml"))), target)
    typer.echo(f"next: read {target / 'README.md'}, then mpi-mlx train {shlex.quote(str(recipe))}")


def copy_whole(source: Path, target: Path) -> None:
    """Copies a folder; ``target`` appears complete or not at all."""
    import shutil

    from mpi_mlx.atomic import replace_dir, temporary_dir

    with temporary_dir(target) as temporary:
        ignored = shutil.ignore_patterns("__pycache__", "__init__.py", "*.pyc", ".*")
        shutil.copytree(source, temporary, dirs_exist_ok=True, ignore=ignored)
        replace_dir(temporary, target)
