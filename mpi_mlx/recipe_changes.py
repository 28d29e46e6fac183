"""What a recipe changes in a run that was begun with another, and whether the run may go on with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import yaml

from mpi_mlx.errors import RecipeError
from mpi_mlx.recipe import Recipe, parse_recipe
from mpi_mlx.recipe_yaml import Keys, read_document

# Of a stage that has begun: how its steps are cut up and kept, not what they compute (dropout aside).
ONLY_MEMORY = ("micro_tokens", "gradient_checkpointing", "save_every")
LATER = ("logging", "evaluation")  # no stage computes with them


def recipe_changes(before: str, after: Recipe, name: str = "recipe") -> dict[Keys, tuple[Any, Any]]:
    """Path -> (value of the recipe text ``before``, value of ``after``) of all that differs, the output aside.

    A key that an earlier version did not write counts as its default. ``name``: of ``before``, in errors.

    Raises:
        RecipeError: ``before`` is not YAML.
    """
    try:
        known = parse_recipe(before, after.folder, name=name).model_dump(mode="json")
    except RecipeError:  # of a version with other keys
        known = read_document(before, name).raw
    found = dict(_differences(known, after.model_dump(mode="json"), ()))
    found.pop(("output",), None)  # the folder is where it is found, whatever it was called from there
    return found


def refused(changes: dict[Keys, tuple[Any, Any]], begun: Callable[[int], bool]) -> dict[Keys, tuple[Any, Any]]:
    """Those ``changes`` that would change numbers of what is done; ``begun``: whether a stage (by index) is."""

    def harmless(path: Keys) -> bool:
        if path[0] in LATER:
            return True
        if path[0] != "stages" or len(path) < 3 or path[2] == "stage":
            return False
        return path[2] in ONLY_MEMORY or not begun(path[1])

    return {path: values for path, values in changes.items() if not harmless(path)}


def regrades(changes: dict[Keys, tuple[Any, Any]]) -> bool:
    """Whether rows of an evaluation before and after ``changes`` would not be of the same measure."""
    same = ("after", "batch_size", "with_document", "forgetting")
    return any((path[0] == "evaluation" and path[-1] not in same) or path[-1] == "reasoning" for path in changes)


def told(changes: dict[Keys, tuple[Any, Any]]) -> str:
    """``stages.2.micro_tokens 64 (was 8192), ...``"""
    said = [f"{'.'.join(map(str, path))} {_text(new)} (was {_text(old)})" for path, (old, new) in changes.items()]
    return ", ".join(said)


def _text(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()


def _differences(before: Any, after: Any, path: Keys) -> Iterator[tuple[Keys, tuple[Any, Any]]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys((*after, *before)):
            yield from _differences(before.get(key), after.get(key), (*path, key))
    elif path == ("stages",) and len(before or ()) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _differences(one, other, (*path, index))
    elif before != after:
        yield path, (before, after)
