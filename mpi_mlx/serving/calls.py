"""Tool calls in an answer, in the form of the model's family: found, and taken out of what is shown."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from mpi_mlx.rollouts.tool_calls import MALFORMED, parse_tool_calls

_START, _END = "<tool_call>", "</tool_call>"


class CallFormat:
    """How a model writes tool calls.

    Args:
        parser: a parser module as mlx-vlm has them (see :func:`mpi_mlx.models.tools.call_parser`); None for
            the Hermes form, ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, and for plain JSON
            that is the whole answer, names an offered tool and gives its arguments.
    """

    def __init__(self, parser: ModuleType | None = None):
        self.parser = parser
        self.start = parser.tool_call_start if parser else _START
        self.end = parser.tool_call_end if parser else _END
        close = re.escape(self.end) if self.end else r"\n"
        self._span = re.compile(rf"{re.escape(self.start)}(.*?)(?:{close}|\Z)", re.DOTALL)

    def parse(self, answer: str, tools: Sequence[dict] | None = None) -> list[dict]:
        """The calls as ``{"name": str, "arguments": dict}`` in order; one that cannot be read has name None."""
        if self.parser is None:
            tagged = self.start in answer
            return parse_tool_calls(answer) if tagged or _offered(answer, tools) else []
        return [call for body in self._span.findall(answer) for call in self._read(body, tools)]

    def _read(self, body: str, tools: Sequence[dict] | None) -> list[dict]:
        try:
            found = self.parser.parse_tool_call(body, tools)
            return [_checked(call) for call in (found if isinstance(found, list) else [found])]
        except Exception:  # parsers raise what their code happens to
            return [dict(MALFORMED)]

    def text(
        self, answer: str, over: bool = True, bare: bool = False, tools: Sequence[dict] | None = None
    ) -> str:
        """The answer without its calls; while it is being written, without what may become one.

        ``bare``: JSON that is the whole answer may be one, too, of ``tools`` where they are given.
        """
        shown = self._span.sub("", answer)
        if len(shown) != len(answer):
            shown = shown.rstrip()
        if bare and self.parser is None and answer.lstrip()[:1] in ("{", "["):
            calls = over and any(call["name"] for call in self.parse(answer, tools))
            return "" if calls or not over else shown
        held = 0 if over else overlap(shown, self.start)
        return shown[: len(shown) - held].rstrip() if held else shown


def _offered(answer: str, tools: Sequence[dict] | None) -> bool:
    """Whether an answer is the JSON of calls: an answer in JSON may have a "name" and be no call."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    names = None if tools is None else [_function(tool).get("name") for tool in tools]
    calls = [_function(one) for one in (value if isinstance(value, list) else [value])]
    return all(
        (names is None or call.get("name") in names) and ("arguments" in call or "parameters" in call)
        for call in calls
    )


def _function(value: Any) -> dict:
    """The description or call itself, of OpenAI's ``{"function": {...}}`` or bare; {} where it is neither."""
    value = value if isinstance(value, dict) else {}
    return value["function"] if isinstance(value.get("function"), dict) else value


def _checked(call: Any) -> dict:
    arguments = call["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict) or not isinstance(call["name"], str):
        raise ValueError("no call")
    return {"name": call["name"].strip(), "arguments": arguments}


def overlap(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` begin ``tag``.

    >>> overlap("see <tool", "<tool_call>")
    5
    """
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
