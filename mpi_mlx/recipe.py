"""Recipes: one YAML file is one experiment.

Everything wrong with a file is told at once, a line each, with its place:

    recipes/x.yaml:12: stages.1.learning_rte: unknown key; did you mean "learning_rate"?
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from pydantic import ValidationError

from mpi_mlx.errors import RecipeError
from mpi_mlx.recipe_errors import error_lines, mended, stands
from mpi_mlx.recipe_schema import (
    BenchmarkData,
    EvaluationSpec,
    LoggingSpec,
    LoraSpec,
    ModelSpec,
    OwnData,
    Recipe,
)
from mpi_mlx.recipe_stages import CptStage, PretrainStage, RlStage, SftStage
from mpi_mlx.recipe_yaml import Document, read_document

__all__ = [
    "BenchmarkData", "CptStage", "EvaluationSpec", "LoggingSpec", "LoraSpec", "ModelSpec", "OwnData",
    "PretrainStage", "Recipe", "RlStage", "SftStage", "load_recipe", "parse_recipe", "shipped_recipes",
]  # fmt: skip
USUAL = "recipe"  # a file of this name is called by its folder's
OF_A_RUN = ("environment.json", "progress.json", "lock")  # what a run's folder has beside its recipe.yaml


def load_recipe(path: str | Path, overrides: Sequence[str] = (), output: str | Path | None = None) -> Recipe:
    """The recipe at ``path`` (a file, a folder with a recipe.yaml, or a shipped recipe's name), resolved.

    A run's own recipe (its folder, or the recipe.yaml there) has that folder as its output, from wherever it is
    named and wherever the run was begun.

    Args:
        overrides: ``stages.1.steps=50`` or ``stages.sft.steps=50``, values as YAML. ``steps`` replaces a
            stage's ``epochs`` and the other way round. Files are relative to where one is, while the recipe's
            own are relative to the recipe.
        output: the run's folder in place of the recipe's own.

    Raises:
        RecipeError: no such file, or all that is wrong with it, a line each.

    >>> load_recipe("quickstart", ["stages.0.steps=5"]).stages[0].steps
    5
    """
    file, name = _find(str(path))
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{file}: {error.strerror or error}") from None
    document = read_document(text, str(_shown(file, path)), overrides)
    if output is not None:
        document.raw["output"] = str(output)
    elif _is_of_a_run(file) and not any(change.partition("=")[0].strip() == "output" for change in overrides):
        document.raw["output"] = str(file.parent)
    document.raw.setdefault("output", f"runs/{name}")
    recipe = _validate(document, file.absolute().parent)
    words = ["mpi-mlx", "train", str(path), *(word for change in overrides for word in ("--set", change))]
    words += [] if output is None else ["--output", str(output)]
    recipe._source, recipe._name, recipe._command = str(path), name, shlex.join(words)
    return recipe


def parse_recipe(text: str, folder: str | Path = ".", *, name: str = "recipe") -> Recipe:
    """A recipe from YAML text (JSON is YAML, too); ``folder``: what its paths are relative to."""
    return _validate(read_document(text, name), Path(folder).absolute())


def shipped_recipes() -> dict[str, Path]:
    """Names that ``load_recipe`` knows from any folder, such as ``quickstart``, and their files."""
    root = _root()
    return {_name(file.relative_to(root)): file for file in sorted(root.rglob("*.yaml"))}


def _validate(document: Document, folder: Path) -> Recipe:
    errors: list[dict] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(document.raw, context={"folder": folder})
    except ValidationError as error:
        errors = error.errors(include_url=False)
        errors += _more_errors(document.raw, errors, folder)
    if errors or document.errors or recipe is None:
        raise RecipeError("\n".join(error_lines(document, errors)))
    recipe._folder = folder
    return recipe


def _more_errors(raw: dict, errors: list[dict], folder: Path) -> list[dict]:
    """Contradictions that the schema does not come to before the ``errors`` are mended."""
    raw, gone = mended(raw, errors)
    try:
        Recipe.model_validate(raw, context={"folder": folder})
    except ValidationError as error:
        return [found for e in error.errors(include_url=False) if (found := stands(e, gone))]
    return []


def _find(path: str) -> tuple[Path, str]:
    """The file, and the recipe's name."""
    given = Path(path).expanduser()
    for file in (given, given / f"{USUAL}.yaml"):
        if file.is_file():
            name = file.resolve().parent.name if file.stem == USUAL else file.stem
            return file, name
    shipped = shipped_recipes()
    name = path.removesuffix(".yaml").strip("/")
    if name in shipped:
        return shipped[name], Path(name).name
    near = get_close_matches(name, shipped, 1) or get_close_matches(Path(name).name, shipped, 1)
    if given.is_dir():
        raise RecipeError(f"{path}: no {USUAL}.yaml in this folder")
    hint = f'did you mean "{near[0]}"?' if near else f"shipped recipes: {', '.join(shipped) or 'none'}"
    raise RecipeError(f"{path}: no such recipe; {hint}")


def _is_of_a_run(file: Path) -> bool:
    """Whether a run wrote it: no folder of one's own recipe holds the files that stand beside it."""
    return file.name == f"{USUAL}.yaml" and any((file.parent / name).is_file() for name in OF_A_RUN)


def _name(relative: Path) -> str:
    stem = relative.with_suffix("")
    return str(stem.parent if stem.name == USUAL and stem.parent != Path() else stem)


def _root() -> Path:
    """The shipped recipes: the installed package, or the folder of a checkout."""
    try:
        return Path(str(resources.files("mpi_mlx_recipes")))
    except ModuleNotFoundError:
        return Path(__file__).resolve().parent.parent / "recipes"


def _shown(file: Path, given: str | Path) -> Path:
    """As the user wrote it; a shipped file by its path from here, where it lies below."""
    if str(file) == str(given):
        return file
    try:
        return file.resolve().relative_to(Path.cwd())
    except ValueError:
        return file
