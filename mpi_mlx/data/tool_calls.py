"""Tool calls of assistant turns, in the shapes that users have them: arguments as an object or as JSON text."""

from __future__ import annotations

import json
from typing import Any

from mpi_mlx.data.json_text import half_character, parse_json
from mpi_mlx.errors import DataError

_EXPECTED = "expected objects with name and JSON arguments"


def read_calls(calls: Any) -> list[dict]:
    """The calls as ``{"type": "function", "function": {"name": str, "arguments": dict}}``, other keys kept.

    Chat templates write the arguments as JSON: a text would come out as JSON within JSON. ``{"name",
    "arguments"}`` alone is understood, too. Raises DataError with what is wrong, without its place.

    >>> read_calls([{"name": "refund", "arguments": '{"days": 3}'}])
    [{'type': 'function', 'function': {'name': 'refund', 'arguments': {'days': 3}}}]
    """
    if not isinstance(calls, list):
        raise DataError(f"{_EXPECTED} in a list")
    return [_call(call, f"tool_calls[{index}]") for index, call in enumerate(calls)]


def calls_text(calls: list[dict]) -> str:
    """Calls of :func:`read_calls` as text in the Hermes (Qwen) form."""
    said = [
        json.dumps({name: call["function"][name] for name in ("name", "arguments")}, ensure_ascii=False)
        for call in calls
    ]
    return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in said)


def _call(call: Any, where: str) -> dict:
    if not isinstance(call, dict):
        raise DataError(f"{_EXPECTED}; {where} is none")
    flat = "function" not in call
    function, where = (call, where) if flat else (call["function"], f"{where}.function")
    if not isinstance(function, dict):
        raise DataError(f"{_EXPECTED}; {where} is none")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise DataError(f"{_EXPECTED}; {where} has no name")
    arguments = _arguments(function.get("arguments"), f"{where}.arguments (of {name!r})")
    if flat:
        return {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {**call, "function": {**function, "arguments": arguments}}


def _arguments(value: Any, where: str) -> dict:
    if isinstance(value, str) and value.strip():
        text = value
        try:
            value = parse_json(text)
        except DataError as error:
            raise DataError(f"{_EXPECTED}; {where} is {error}") from None
        half = half_character(value, text)
        if half is not None:
            raise DataError(f"{_EXPECTED}; {where} {half[1]}")
    if value is None or isinstance(value, str) and not value.strip():
        return {}
    if not isinstance(value, dict):
        raise DataError(f"{_EXPECTED}; {where} is no JSON object")
    return value
