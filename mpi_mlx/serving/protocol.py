"""Requests in OpenAI's form: checked, bounded, and turned into conversations."""

from __future__ import annotations

import base64
import binascii
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlparse

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mpi_mlx.errors import ServingError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class Refused(ServingError):
    """A request that is answered with a 4xx."""

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    body_bytes: int = 32 << 20
    image_pixels: int = 16 << 20
    images: int = 16
    messages: int = 1024
    tokens: int = 8192
    image_folder: Path | None = None


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=False)

    model: str = Field(max_length=512)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    stream: bool = False
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
        raw = json.loads(body, parse_constant=_no_constant)
        json.dumps(raw, ensure_ascii=False).encode()  # lone surrogates are no text
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON ({str(error)[:100]})") from None
    if not isinstance(raw, dict):
        raise Refused("the body is not a JSON object")
    try:
        request = kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"])
        raise Refused(f"{param}: {first['msg']}"[:300], param=param) from None
    stops = request.stops
    if len(stops) > 16 or any(len(text) > 256 for text in stops):
        raise Refused("stop: at most 16 texts of at most 256 characters", param="stop")
    if isinstance(request, ChatRequest) and (request.response_format or {}).get("type", "text") != "text":
        raise Refused("response_format: only text is offered", param="response_format")
    return request


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def conversation(request: ChatRequest, limits: Limits) -> list[dict]:
    """The messages as :meth:`Model.encode` takes them, images decoded. Raises Refused."""
    if len(request.messages) > limits.messages:
        raise Refused(f"messages: at most {limits.messages}", param="messages")
    made, images = [], 0
    for index, message in enumerate(request.messages):
        where = f"messages.{index}"
        role = message.get("role")
        role = "system" if role == "developer" else role
        if role not in ("system", "user", "assistant", "tool"):
            raise Refused(f"{where}.role: system, user, assistant or tool", param=where)
        content = _content(message.get("content"), where, limits)
        if isinstance(content, list):
            images += sum(part["type"] == "image" for part in content)
        if images > limits.images:
            raise Refused(f"{where}: at most {limits.images} images", param=where)
        one: dict[str, Any] = {"role": role, "content": content}
        if role == "assistant" and message.get("tool_calls"):
            one["tool_calls"] = _calls(message["tool_calls"], where)
        made.append(one)
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
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            raise Refused(f"{where}.tool_calls: arguments are a JSON object", param=where)
        made.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return made


def _content(content: Any, where: str, limits: Limits) -> str | list[dict]:
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
            parts.append({"type": "image", "image": load_picture(url, place, limits)})
        else:
            raise Refused(f"{place}: a part is a text or an image_url", param=place)
    return parts


def load_picture(url: str, where: str, limits: Limits) -> Image.Image:
    """The picture of a data URI, or of a file below the folder that the server's owner allowed."""
    if url.startswith("data:"):
        head, comma, data = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise Refused(f"{where}: a data URI is data:image/png;base64,...", param=where)
        try:
            content: Any = io.BytesIO(base64.b64decode(data, validate=True))
        except (binascii.Error, ValueError):
            raise Refused(f"{where}: the data URI is not base64", param=where) from None
    elif url.startswith("file://") and limits.image_folder is not None:
        content = _allowed_file(url, limits.image_folder, where)
    else:
        raise Refused(f"{where}: images come as data URIs only", param=where)
    try:
        with Image.open(content, formats=FORMATS) as opened:
            if opened.width * opened.height > limits.image_pixels:
                raise Refused(
                    f"{where}: {opened.width} x {opened.height} pixels; at most {limits.image_pixels:,}",
                    param=where,
                )
            return opened.convert("RGB")
    except Refused:
        raise
    except Exception:  # decoders fail in many ways
        raise Refused(f"{where}: not a picture ({', '.join(FORMATS)})", param=where) from None


def _allowed_file(url: str, folder: Path, where: str) -> Path:
    try:
        path = Path(unquote(urlparse(url).path)).resolve(strict=True)  # links followed
        inside = path.is_relative_to(folder.resolve()) and path.is_file()
    except (OSError, ValueError, RuntimeError):
        inside = False
    if not inside:
        raise Refused(f"{where}: no such picture in the allowed folder", param=where)
    return path
