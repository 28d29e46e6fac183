"""Python functions of a user's file as tools: described to the model, run only when the caller says so."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.errors import PydanticUserError

from mpi_mlx.errors import ServingError

_MODULE = "mpi_mlx_user_tools"


class Toolbox:
    """Functions by name, each with the schema of its arguments."""

    def __init__(self, functions: Mapping[str, tuple[Callable, type[BaseModel]]]):
        self._functions = dict(functions)

    def __contains__(self, name: object) -> bool:
        return name in self._functions

    def __len__(self) -> int:
        return len(self._functions)

    @property
    def names(self) -> list[str]:
        return list(self._functions)

    @property
    def descriptions(self) -> list[dict]:
        """The tools in OpenAI's form, for the chat template."""
        return [
            {
                "type": "function",
                "function": {
                    "name": name,
                    "description": _summary(function),
                    "parameters": _without_titles(schema.model_json_schema()),
                },
            }
            for name, (function, schema) in self._functions.items()
        ]

    def call(self, name: str, arguments: Mapping[str, Any]) -> str | list[dict]:
        """Runs a tool; its result as text, or as content parts where it holds images.

        What goes wrong comes back as a text that begins with ``error:``, for the model to read.
        """
        if name not in self._functions:
            return f"error: there is no tool {name!r}; there are {', '.join(self._functions)}"
        function, schema = self._functions[name]
        try:
            checked = schema.model_validate(dict(arguments))
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            return f"error: {name} cannot take these arguments: {wrong}"
        try:
            return _content(function(**{field: getattr(checked, field) for field in schema.model_fields}))
        except Exception as error:
            return f"error: {name} failed: {type(error).__name__}: {error}"


def load_tools(path: str | Path) -> Toolbox:
    """The public functions that a Python file defines. The file is run, so it must be the user's own.

    Raises:
        ServingError: it does not load, defines no function, or a parameter has no type.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ServingError(f"{path}: no such file; --tools takes a Python file with typed functions")
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise ServingError(f"{path}: not a Python file; --tools takes one with typed functions")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ServingError(f"{path}: {type(error).__name__}: {error}; mend the file") from error
    found = {
        name: (function, _schema(path, name, function))
        for name, function in vars(module).items()
        if inspect.isfunction(function) and function.__module__ == _MODULE and not name.startswith("_")
    }
    if not found:
        raise ServingError(f"{path} defines no public function; write one with typed parameters")
    return Toolbox(found)


def _schema(path: Path, name: str, function: Callable) -> type[BaseModel]:
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:
        raise ServingError(f"{path}: {name}: its types cannot be read ({error}); mend them") from None
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ServingError(
                f"{path}: {name}: {parameter} has no form a model can fill; name each parameter"
            )
        if parameter.name not in hints:
            raise ServingError(f"{path}: {name}: give {parameter.name} a type, such as {parameter.name}: str")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], default)
    try:
        made = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
        made.model_json_schema()
        return made
    except (PydanticUserError, NameError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise ServingError(
            f"{path}: {name}: a parameter's type has no JSON form ({first}); use plain types"
        ) from None


def _summary(function: Callable) -> str:
    return inspect.cleandoc(function.__doc__ or function.__name__.replace("_", " "))


def _without_titles(schema: Any, names: bool = False) -> Any:
    """The schema without pydantic's titles; ``names``: the keys are names of properties."""
    if isinstance(schema, dict):
        return {
            key: _without_titles(value, key in ("properties", "$defs") and not names)
            for key, value in schema.items()
            if names or key != "title"
        }
    return [_without_titles(value) for value in schema] if isinstance(schema, list) else schema


def _content(result: Any) -> str | list[dict]:
    from PIL import Image

    if isinstance(result, Image.Image):
        return [{"type": "image", "image": result}]
    if isinstance(result, (list, tuple)) and any(isinstance(item, Image.Image) for item in result):
        parts: list[dict] = []
        for item in result:
            made = _content(item)
            parts += made if isinstance(made, list) else [{"type": "text", "text": made}]
        return parts
    if isinstance(result, str):
        return result
    return json.dumps(result, ensure_ascii=False, default=str)
