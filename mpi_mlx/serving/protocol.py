"""Requests in OpenAI's form: checked, bounded, and turned into conversations."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mpi_mlx.serving.limits import Limits, Refused
from mpi_mlx.serving.pictures import Pictures

TOOLS = 1 << 20  # characters of all descriptions
ITEMS = 1 << 14  # of a list, whatever they are
# what is not offered, and the values that ask for nothing: to ignore others would be to answer something else
NEUTRAL = {
    "logit_bias": (None, {}), "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "best_of": (None, 1),
    "suffix": (None, ""),
}  # fmt: skip
LISTS = {"messages": (dict, "an object"), "tools": (dict, "an object"), "stop": (str, "a text")}


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=False)

    model: str = Field(max_length=512)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = None
    stream: bool | None = False
    stream_options: dict | None = None
    stop: str | list[str] | None = None
    n: Literal[1] | None = None

    @property
    def stops(self) -> list[str]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]


class ChatRequest(_Request):
    messages: list[dict] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[dict] | None = Field(None, max_length=128)
    tool_choice: Literal["auto", "none"] | None = None
    response_format: dict | None = None
    logprobs: Literal[False] | None = None


class CompletionRequest(_Request):
    prompt: str
    echo: Literal[False] | None = None
    logprobs: None = None


def parse(body: bytes, kind: type[_Request]):
    """The request of a body. Raises Refused, naming the field."""
    try:
        raw = _load(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON ({str(error)[:100]})") from None
    if not isinstance(raw, dict):
        raise Refused("the body is not a JSON object")
    _check_items(raw)
    for name, values in NEUTRAL.items():
        if raw.get(name) not in values:
            raise Refused(f"{name}: it is not offered; leave it out", param=name)
    if kind is CompletionRequest and isinstance(raw.get("prompt"), list):
        if len(raw["prompt"]) != 1:
            raise Refused("prompt: one text", param="prompt")
        raw["prompt"] = raw["prompt"][0]
    try:
        request = kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"])
        raise Refused(f"{param}: {first['msg']}"[:300], param=param) from None
    stops = request.stops
    if len(stops) > 16 or any(len(text) > 256 for text in stops):
        raise Refused("stop: at most 16 texts of at most 256 characters", param="stop")
    if isinstance(request, ChatRequest) and len(json.dumps(request.tools or [])) > TOOLS:
        raise Refused(f"tools: at most {TOOLS:,} characters", param="tools")
    if isinstance(request, ChatRequest) and (request.response_format or {}).get("type", "text") != "text":
        raise Refused("response_format: only text is offered", param="response_format")
    return request


def _check_items(raw: dict) -> None:
    """Refuses the first wrong item of a list: pydantic makes an error of each, of a million in a small body too."""
    for name, (kind, said) in LISTS.items():
        items = raw.get(name)
        items = items if isinstance(items, list) else []
        if len(items) > ITEMS:
            raise Refused(f"{name}: at most {ITEMS:,} items", param=name)
        for place, item in enumerate(items):
            if not isinstance(item, kind):
                raise Refused(f"{name}.{place}: {said} is wanted", param=f"{name}.{place}")


def _load(text: bytes | str) -> Any:
    """JSON without NaN, and without lone surrogates: those are no text. Raises ValueError, RecursionError."""
    value = json.loads(text, parse_constant=_no_constant)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def characters(messages: list[dict]) -> int:
    """How much text a conversation holds."""
    count = 0
    for message in messages:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        count += sum(len(part.get("text", "")) for part in parts)
        for call in message.get("tool_calls", ()):
            count += len(json.dumps(call["function"]["arguments"], ensure_ascii=False, separators=(",", ":")))
    return count


def fetches(request: ChatRequest) -> bool:
    """Whether an image may have to come from another host."""
    for message in request.messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            source = part.get("image_url") if isinstance(part, dict) else None
            url = source.get("url") if isinstance(source, dict) else source
            if isinstance(url, str) and url[:4].lower() == "http":
                return True
    return False


def conversation(request: ChatRequest, limits: Limits, hold: Callable[[int], None] = lambda pixels: None) -> list[dict]:
    """The messages as :meth:`Model.encode` takes them, images decoded. Those as they came are let go.

    Args:
        hold: told how many pixels all images have so far, before the last of them is decoded; may raise.

    Raises Refused.
    """
    if len(request.messages) > limits.messages:
        raise Refused(f"messages: at most {limits.messages}", param="messages")
    made, pictures = [], Pictures(limits, hold)
    for index, message in enumerate(request.messages):
        where = f"messages.{index}"
        role = message.get("role")
        role = "system" if role == "developer" else role
        if role not in ("system", "user", "assistant", "tool"):
            raise Refused(f"{where}.role: system, user, assistant or tool", param=where)
        content = _content(message.get("content"), where, pictures)
        one: dict[str, Any] = {"role": role, "content": content}
        if role == "assistant" and message.get("tool_calls"):
            one["tool_calls"] = _calls(message["tool_calls"], where)
        if role == "tool":  # some templates write which call it answers
            one |= _texts(message, "tool_call_id", "name")
        made.append(one)
    request.messages = []  # the images' text is no longer needed, and the request is, to the answer's end
    return made


def _calls(calls: Any, where: str) -> list[dict]:
    made = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(f"{where}.tool_calls: each has a function with a name", param=where)
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = _load(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            raise Refused(f"{where}.tool_calls: arguments are a JSON object", param=where)
        function = {"name": function["name"], "arguments": arguments}
        made.append({"type": "function", "function": function} | _texts(call, "id"))
    return made


def _texts(value: dict, *names: str) -> dict:
    """Those of the fields that are texts."""
    return {name: value[name] for name in names if isinstance(value.get(name), str)}


def _content(content: Any, where: str, pictures: Pictures) -> str | list[dict]:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise Refused(f"{where}.content: a text, or a list of parts", param=where)
    parts = []
    for number, part in enumerate(content):
        place = f"{where}.content.{number}"
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif part.get("type") == "image_url":
            source = part.get("image_url")
            url = source.get("url") if isinstance(source, dict) else source
            if not isinstance(url, str):
                raise Refused(f"{place}.image_url: an object with a url", param=place)
            parts.append({"type": "image", "image": pictures.load(url, place)})
        else:
            raise Refused(f"{place}: a part is a text or an image_url", param=place)
    return parts
