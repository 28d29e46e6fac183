"""A user's own reward: a function in a Python file that the recipe names."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from mpi_mlx.data.examples import Example
from mpi_mlx.errors import RecipeError


@dataclass(frozen=True)
class UserFunction:
    """``function(completions: list[str], examples: list[dict]) -> N numbers``, checked at each call.

    A completion is the whole text, trace included (``mpi_mlx.data.split_completion`` takes it apart); an
    example is a dictionary with ``id``, ``messages``, ``reasoning``, ``answer``, ``tools`` and ``meta``.
    """

    file: Path
    name: str
    function: Callable

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
        """float32 (N,). Raises RecipeError, naming the user's file and line."""
        rows = [_as_dict(example) for example in examples]
        try:
            found = self.function(list(completions), rows)
        except Exception as error:
            raise RecipeError(f"{_where(error, self.file)} (reward {self.name}); mend it") from error
        try:
            rewards = np.asarray(found, np.float64)
        except (TypeError, ValueError):
            rewards = None
        if rewards is None or rewards.shape != (len(rows),):
            shape = type(found).__name__ if rewards is None else f"shape {rewards.shape}"
            raise RecipeError(
                f"{self._line}: reward {self.name} must return {len(rows)} numbers, one a completion, "
                f"returned {shape}"
            )
        bad = np.flatnonzero(~np.isfinite(rewards))
        if len(bad):
            raise RecipeError(
                f"{self._line}: reward {self.name} returned {rewards[bad[0]]} for example "
                f"{examples[bad[0]].id!r}; rewards must be finite"
            )
        return rewards.astype(np.float32)

    @property
    def _line(self) -> str:
        code = getattr(self.function, "__code__", None)
        return f"{self.file}:{code.co_firstlineno}" if code else str(self.file)


def load_user_function(target: str, recipe_dir: Path) -> UserFunction:
    """``rewards.py:my_reward``, the file relative to the recipe's folder. Runs that file, and no other.

    Raises:
        RecipeError: no such file or function, or the file does not import (with its own file:line).
    """
    path, colon, name = target.rpartition(":")
    if not colon or not path or not name.isidentifier():
        raise RecipeError(f"rewards: function {target!r} must be file.py:function")
    file = (recipe_dir / Path(path).expanduser()).resolve()
    if not file.is_file():
        raise RecipeError(f"rewards: no file {file}; function is relative to the recipe's folder")
    module = _import(file)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        near = get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'no functions'}"
        raise RecipeError(f"{file}: no function {name!r}; {hint}")
    return UserFunction(file, name, function)


def _import(file: Path):
    spec = importlib.util.spec_from_file_location(f"mpi_mlx_user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{file}: not a Python file; name it .py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))  # so that the file finds its neighbours
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise RecipeError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        raise RecipeError(f"{_where(error, file)} while importing it") from error
    finally:
        sys.path.remove(str(file.parent))
    return module


def _where(error: Exception, file: Path) -> str:
    """``file:line: Type: message`` of the innermost frame in the user's file."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    line = f":{frames[-1].lineno}" if frames else ""
    message = " ".join(str(error).split())
    return f"{file}{line}: {type(error).__name__}{': ' + message if message else ''}"


def _as_dict(example: Example) -> dict:
    return {
        "id": example.id,
        "messages": [dict(m) for m in example.messages],
        "reasoning": example.reasoning,
        "answer": example.answer,
        "tools": list(example.tools) if example.tools else None,
        "meta": example.meta,
    }
