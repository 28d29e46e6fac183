"""JSON as users write it: read, or refused with the reason; what is no text in it is found."""

from __future__ import annotations

import json
import re
from typing import Any

from mpi_mlx.errors import DataError

_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")  # half of a character, as JSON writes it; two are a whole one
_HALF = re.compile("[\ud800-\udfff]")


def parse_json(text: str) -> Any:
    """The value. Raises DataError: ``not JSON (why)``, without its place."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError):
        raise DataError("not JSON (a number of thousands of digits, or thousands of brackets)") from None


def half_character(value: Any, text: str) -> tuple[str, str] | None:
    """(field, what) of the first text in ``value``, read from ``text``, that holds half of a character.

    JSON can say ``\\ud800`` (a lone surrogate), but no tokenizer and no file takes it.
    """
    return _find_half(value, "") if _ESCAPED.search(text) else None


def _find_half(value: Any, where: str) -> tuple[str, str] | None:
    if isinstance(value, str):
        found = _HALF.search(value)
        if found is None:
            return None
        return where, f"holds {ascii(found[0])[1:-1]}, half of a character, which is no text; write the whole one"
    inner: list[tuple[Any, str]] = []
    if isinstance(value, dict):
        inner += [(key, where) for key in value]  # a key is a text, too
        inner += [(item, f"{where}.{key}".lstrip(".")) for key, item in value.items()]
    elif isinstance(value, list):
        inner += [(item, f"{where}[{index}]") for index, item in enumerate(value)]
    return next((half for item, at in inner if (half := _find_half(item, at))), None)


def kind(value: Any, part_type: Any = None) -> str:
    """What a value is, in words: ``an object``, ``a list``, ``7``."""
    if part_type is not None:
        return f"type {part_type!r}"
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"{value!r}")
