"""Tool calls in an answer: found, and compared with those expected."""

from __future__ import annotations

import json
import re
from typing import Any

_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
MALFORMED = {"name": None, "arguments": {}}  # equals no call


def parse_tool_calls(text: str) -> list[dict]:
    """The calls of an answer as ``{"name": str, "arguments": dict}``, in order.

    Understands the Hermes form that Qwen writes, ``<tool_call>{"name": ..., "arguments": {...}}``
    ``</tool_call>``, and a plain JSON object or list of objects that is the whole answer (``parameters`` for
    ``arguments``, OpenAI's ``{"function": {...}}`` and arguments given as a JSON text are read too). A tagged
    call that does not parse counts as a malformed call, with name None.
    """
    tagged = _TAGGED.findall(text)
    if tagged:
        return [_call(_load(body)) or dict(MALFORMED) for body in tagged]
    value = _load(text)
    calls = [_call(v) for v in (value if isinstance(value, list) else [value])]
    return [c for c in calls if c is not None] if any(calls) else []


def tool_call_score(answer: str, expected: str) -> float:
    """How well the calls of ``answer`` agree with those of ``expected``, in 0..1.

    Calls are compared in order. A pair earns nothing when the names differ; the right name earns 0.5, and the
    share of arguments (of all that either call names) with equal values the other 0.5. The sum is divided by
    the larger number of calls, so that missing and superfluous calls both cost. Without expected calls the
    score is 1 for an answer that makes none.

    >>> tool_call_score('{"name": "f", "arguments": {"x": 1}}', '{"name": "f", "arguments": {"x": 2}}')
    0.5
    """
    wanted, found = parse_tool_calls(expected), parse_tool_calls(answer)
    if not wanted:
        return float(not found)
    scores = [_pair(w, f) for w, f in zip(wanted, found, strict=False)]
    return sum(scores) / max(len(wanted), len(found))


def _pair(wanted: dict, found: dict) -> float:
    if wanted["name"] is None or wanted["name"] != found["name"]:
        return 0.0
    keys = wanted["arguments"].keys() | found["arguments"].keys()
    if not keys:
        return 1.0
    both = wanted["arguments"].keys() & found["arguments"].keys()
    same = sum(_equal(wanted["arguments"][k], found["arguments"][k]) for k in both)
    return 0.5 + 0.5 * same / len(keys)


def _equal(a: Any, b: Any) -> bool:
    """Equal as JSON: true is not 1, 1 is 1.0, texts without their outer blanks."""
    if isinstance(a, str) and isinstance(b, str):
        return a.strip() == b.strip()
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def _load(text: str) -> Any:
    try:
        return json.loads(text.strip())
    except (ValueError, RecursionError):
        return None


def _call(value: Any) -> dict | None:
    """One call from parsed JSON, or None when it is not one."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _load(arguments)
    if not isinstance(arguments, dict):
        return None
    return {"name": value["name"], "arguments": arguments}
