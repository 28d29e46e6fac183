"""Tools for chat templates that know none (Qwen2-VL's and Qwen2.5-VL's among them).

The text is the one that Qwen2.5's own template writes (the Hermes format): tools in the system message,
calls in ``<tool_call>`` tags, results as a user turn in ``<tool_response>`` tags.
"""

import json
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

_HEADER = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_FOOTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def supports_tools(template: str) -> bool:
    """Whether a chat template reads ``tools`` and ``tool_calls`` by itself."""
    return "tools" in template and "tool_calls" in template


def call_parser(template: str) -> ModuleType | None:
    """mlx-vlm's parser of the tool calls that a chat template asks for: a module with ``tool_call_start``,
    ``tool_call_end`` ("" where a call ends with its line) and ``parse_tool_call(text, tools)``.

    None for the Hermes form, which is also what templates without tools are given, and for forms unknown.
    """
    if not supports_tools(template):
        return None
    from mlx_vlm.tools import _infer_tool_parser, load_tool_module

    name = _infer_tool_parser(template)
    return None if name in (None, "json_tools") else load_tool_module(name)


def describe_tools(messages: Sequence[Mapping], tools: Sequence[Mapping] | None) -> list[dict]:
    """The same conversation without ``tools``, ``tool_calls`` and tool messages: all of them as text."""
    result = [_plain(message) for message in messages]
    if not tools:
        return result
    text = _HEADER + "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools) + _FOOTER
    if result and result[0]["role"] == "system":
        content = result[0]["content"]
        result[0] = dict(
            result[0],
            content=content + text
            if isinstance(content, str)
            else [*content, {"type": "text", "text": text}],
        )
        return result
    return [{"role": "system", "content": "You are a helpful assistant." + text}, *result]


def tool_call_text(calls: Sequence[Mapping]) -> str:
    """Tool calls as Hermes text.

    >>> tool_call_text([{"function": {"name": "f", "arguments": {"a": 1}}}])
    '<tool_call>\\n{"name": "f", "arguments": {"a": 1}}\\n</tool_call>'
    """
    texts = []
    for call in calls:
        function = call.get("function", call)
        arguments: Any = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}")
        body = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
        texts.append(f"<tool_call>\n{body}\n</tool_call>")
    return "\n".join(texts)


def _plain(message: Mapping) -> dict:
    if message["role"] == "tool":
        content = message.get("content") or ""
        if isinstance(content, str):
            return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
        return {
            "role": "user",
            "content": [
                {"type": "text", "text": "<tool_response>\n"},
                *content,
                {"type": "text", "text": "\n</tool_response>"},
            ],
        }
    if not message.get("tool_calls"):
        return dict(message)
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    joined = content + ("\n" if content else "") + tool_call_text(message["tool_calls"])
    return {"role": "assistant", "content": joined}
