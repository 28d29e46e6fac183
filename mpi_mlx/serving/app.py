"""The OpenAI-compatible endpoints over an :class:`~mpi_mlx.serving.engine.Engine`."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from mpi_mlx.errors import MPIError
from mpi_mlx.rollouts.tool_calls import parse_tool_calls
from mpi_mlx.serving.engine import Busy, Engine, Job
from mpi_mlx.serving.protocol import ChatRequest, CompletionRequest, Limits, Refused, conversation, parse
from mpi_mlx.serving.session import Reply, ReplyStats

LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
_CALL = "<tool_call>"


@dataclass(frozen=True)
class ServerOptions:
    """How the endpoints behave.

    Attributes:
        defaults: model name -> (max_tokens, temperature, top_p) where a request does not say.
        api_key: wanted of every request but /health; None: none.
        loopback_only: refuse requests that name another host (DNS rebinding).
    """

    defaults: Mapping[str, tuple[int, float, float]]
    api_key: str | None = None
    loopback_only: bool = True
    limits: Limits = field(default_factory=Limits)


def build_app(engine: Engine, options: ServerOptions) -> Starlette:
    """The ASGI application."""
    server = _Server(engine, options)
    return Starlette(
        routes=[
            Route("/health", server.health),
            Route("/metrics", server.guarded(server.metrics)),
            Route("/v1/models", server.guarded(server.models)),
            Route("/v1/models/{name:path}", server.guarded(server.models)),
            Route("/v1/chat/completions", server.guarded(server.chat), methods=["POST"]),
            Route("/v1/completions", server.guarded(server.complete), methods=["POST"]),
        ],
    )


class _Server:
    def __init__(self, engine: Engine, options: ServerOptions):
        self.engine, self.options, self.started = engine, options, int(time.time())

    def guarded(self, handler):
        async def guard(request: Request) -> Response:
            try:
                self._check(request)
                return await handler(request)
            except Refused as error:
                return _error(error, error.status, error.code, error.param)
            except Busy as error:
                return _error(error, 429, "busy")
            except MPIError as error:
                return _error(error, 400)
            except ClientDisconnect:
                return Response(status_code=499)

        return guard

    def _check(self, request: Request) -> None:
        if self.options.loopback_only:
            host = request.headers.get("host", "").rsplit(":", 1)[0] or "localhost"
            if host.lower() not in LOOPBACK:
                raise Refused("this server answers to localhost only", 403)
        key = self.options.api_key
        if key is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode())
            if scheme.lower() != "bearer" or not same:
                raise Refused("a valid API key is wanted: Authorization: Bearer ...", 401, "invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        most = self.options.limits.body_bytes
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused("Content-Type is application/json", 415)
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > most:
                raise Refused(f"the body is larger than {most:,} bytes", 413)
            chunks.append(chunk)
        return b"".join(chunks)

    # ---- endpoints

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        counters = asdict(self.engine.counters) | {
            "active_requests": self.engine.active,
            "waiting_requests": self.engine.waiting,
            "prefix_cache_bytes": self.engine.prefixes.used_bytes,
            "prefix_cache_entries": len(self.engine.prefixes),
        }
        return PlainTextResponse("".join(f"mpi_mlx_{name} {value}\n" for name, value in counters.items()))

    async def models(self, request: Request) -> Response:
        made = [
            {"id": name, "object": "model", "created": self.started, "owned_by": "mpi-mlx"}
            for name in self.options.defaults
        ]
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": made})
        return JSONResponse(next((one for one in made if one["id"] == name), None) or self._unknown(name))

    def _unknown(self, name: str):
        names = ", ".join(self.options.defaults)
        raise Refused(
            f"there is no model {name[:100]!r}; there are: {names}", 404, "model_not_found", "model"
        )

    async def chat(self, request: Request) -> Response:
        body = await self._body(request)
        asked = parse(body, ChatRequest)
        messages = await asyncio.to_thread(conversation, asked, self.options.limits)
        tools = asked.tools if asked.tool_choice != "none" else None

        def encode(model):
            return model.encode(messages, tools=tools, generation_prompt=True)

        most = asked.max_completion_tokens or asked.max_tokens
        answer = _Answer(asked, "chatcmpl", bool(tools))
        return await self._run(request, asked, answer, encode, most)

    async def complete(self, request: Request) -> Response:
        asked = parse(await self._body(request), CompletionRequest)

        def encode(model):
            empty = model.encode([{"role": "user", "content": ""}])
            start = type(empty)(*(part[..., :0] for part in (empty.ids, empty.assistant, empty.visual)), (),
                                empty.position_ids[:, :0])  # fmt: skip
            ids = model.tokenizer(asked.prompt)["input_ids"]
            kept = [token for token in ids if token not in model.visual_ids]
            if not kept:
                raise Refused("prompt: it is empty", param="prompt")
            return start.concat(kept)

        return await self._run(request, asked, _Answer(asked, "cmpl", False), encode, asked.max_tokens)

    async def _run(self, request: Request, asked, answer: _Answer, encode, most: int | None) -> Response:
        if asked.model not in self.options.defaults:
            self._unknown(asked.model)
        tokens, temperature, top_p = self.options.defaults[asked.model]
        if most is not None and most > self.options.limits.tokens:
            raise Refused(f"max_tokens: at most {self.options.limits.tokens:,}", param="max_tokens")
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def emit(*event) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is closed: nobody listens
                pass

        job = Job(
            encode, emit, asked.model, most or tokens,
            temperature if asked.temperature is None else asked.temperature,
            top_p if asked.top_p is None else asked.top_p, asked.seed,
        )  # fmt: skip
        self.engine.submit(job)
        try:
            answer.begin(await self._next(request, events))
            if asked.stream:
                return StreamingResponse(
                    self._stream(request, answer, job, events),
                    media_type="text/event-stream",
                    headers={"Cache-Control": "no-store"},
                )
            while not answer.over:
                answer.take(await self._next(request, events))
            return JSONResponse(answer.whole(job.tokens))
        finally:
            if not asked.stream or answer.failed:
                self.engine.cancel(job)

    @staticmethod
    async def _next(request: Request, events: asyncio.Queue):
        while True:
            try:
                return await asyncio.wait_for(events.get(), 1.0)
            except TimeoutError:
                if await request.is_disconnected():
                    raise ClientDisconnect from None

    async def _stream(self, request, answer: _Answer, job: Job, events) -> AsyncIterator[str]:
        try:
            yield _event(answer.first())
            while not answer.over:
                for chunk in answer.take(await events.get()):
                    yield _event(chunk)
            for chunk in answer.last(job.tokens):
                yield _event(chunk)
            yield "data: [DONE]\n\n"
        except MPIError as error:
            yield _event(_body(error, None, None))
        finally:
            self.engine.cancel(job)


class _Answer:
    """What has been generated, as chunks or as a whole."""

    def __init__(self, asked, prefix: str, tools: bool):
        self.asked, self.tools, self.chat = asked, tools, prefix == "chatcmpl"
        self.id, self.created = f"{prefix}-{uuid.uuid4().hex}", int(time.time())
        self.raw, self.over, self.failed, self.reason = "", False, True, "stop"
        self.sent = {"reasoning_content": "", "content": ""}
        self.prompt_tokens = self.cached_tokens = 0

    def begin(self, event) -> None:
        """The first event. Raises what the engine raised."""
        self._raise(event)
        if event[0] == "begin":
            self.prompt_tokens, self.cached_tokens = event[1:]
        else:
            self.over, self.reason = True, "stop"
        self.failed = False

    @staticmethod
    def _raise(event) -> None:
        if event[0] == "error":
            error = event[1]
            if isinstance(error, MPIError):
                raise error
            raise Refused(f"the answer could not be made: {type(error).__name__}", 500, "internal_error")

    def take(self, event) -> list[dict]:
        """The chunks that an event gives."""
        self._raise(event)
        if event[0] == "text":
            self.raw += event[1]
        elif event[0] == "end":
            self.over, self.reason = True, "length" if event[1] == "length" else "stop"
        for stop in self.asked.stops:
            place = self.raw.find(stop)
            if place >= 0:
                self.raw, self.over, self.reason = self.raw[:place], True, "stop"
        return self._chunks()

    def _parts(self) -> dict[str, str]:
        text = self.raw
        if not self.over:  # a stop text may have begun
            held = max((_overlap(text, stop) for stop in self.asked.stops), default=0)
            text = text[: len(text) - held]
        if not self.chat:
            return {"content": text}
        reasoning, answer = Reply(text, False, ReplyStats()).parts
        if self.tools:
            answer = answer.partition(_CALL)[0].rstrip() if _CALL in answer else answer
            held = _overlap(answer, _CALL)
            answer = answer[: len(answer) - held] if held and not self.over else answer
        return {"reasoning_content": reasoning or "", "content": answer}

    def _chunks(self) -> list[dict]:
        made = []
        for name, text in self._parts().items():
            if text.startswith(self.sent.get(name, "")) and len(text) > len(self.sent[name]):
                made.append(self._chunk({name: text[len(self.sent[name]) :]}))
                self.sent[name] = text
        return made

    def _calls(self) -> list[dict]:
        answer = Reply(self.raw, False, ReplyStats()).answer
        found = parse_tool_calls(answer) if self.tools else []
        return [
            {
                "index": index,
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {
                    "name": call["name"],
                    "arguments": json.dumps(call["arguments"], ensure_ascii=False),
                },
            }
            for index, call in enumerate(call for call in found if call["name"])
        ]

    def _chunk(self, delta: dict, reason: str | None = None) -> dict:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
        if self.chat:
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._envelope(kind) | {"choices": [choice]}

    def _envelope(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model}

    def first(self) -> dict:
        return self._chunk({"role": "assistant", "content": ""})

    def last(self, tokens: int) -> list[dict]:
        """What closes a stream: tool calls, the reason, and the usage where it was asked for."""
        calls = self._calls()
        made = [self._chunk({"tool_calls": calls})] if calls else []
        made.append(self._chunk({}, "tool_calls" if calls else self.reason))
        if (self.asked.stream_options or {}).get("include_usage"):
            made.append(
                self._envelope("chat.completion.chunk") | {"choices": [], "usage": self._usage(tokens)}
            )
        return made

    def whole(self, tokens: int) -> dict:
        """The answer to a request that does not stream."""
        if not self.chat:
            choice = {"index": 0, "text": self.raw, "finish_reason": self.reason, "logprobs": None}
            return self._envelope("text_completion") | {"choices": [choice], "usage": self._usage(tokens)}
        parts, calls = self._parts(), self._calls()
        message: dict[str, Any] = {"role": "assistant", "content": parts["content"]}
        if parts["reasoning_content"]:
            message["reasoning_content"] = parts["reasoning_content"]
        if calls:
            message["tool_calls"] = calls
            message["content"] = message["content"] or None
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else self.reason}
        return self._envelope("chat.completion") | {"choices": [choice], "usage": self._usage(tokens)}

    def _usage(self, tokens: int) -> dict:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` begin ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _body(error: Exception, code: str | None, param: str | None) -> dict:
    return {"error": {"message": str(error), "type": "invalid_request_error", "code": code, "param": param}}


def _error(error: Exception, status: int, code: str | None = None, param: str | None = None) -> JSONResponse:
    return JSONResponse(_body(error, code, param), status)
