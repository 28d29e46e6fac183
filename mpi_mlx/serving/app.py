"""The OpenAI-compatible endpoints over an :class:`~mpi_mlx.serving.engine.Engine`."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mpi_mlx.errors import MPIError
from mpi_mlx.serving.answers import Answer
from mpi_mlx.serving.calls import CallFormat
from mpi_mlx.serving.engine import Engine
from mpi_mlx.serving.jobs import Busy, Job
from mpi_mlx.serving.limits import Limits, Refused
from mpi_mlx.serving.prompts import Prompt, chat_prompt, text_prompt
from mpi_mlx.serving.protocol import ChatRequest, CompletionRequest, characters, conversation, fetches, parse
from mpi_mlx.serving.traffic import Claim, EventStream, Held, Mail

LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")


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
    app = Starlette(
        routes=[
            Route("/health", server.health),
            Route("/metrics", server.guarded(server.metrics)),
            Route("/v1/models", server.guarded(server.models)),
            Route("/v1/models/{name:path}", server.guarded(server.models)),
            Route("/v1/chat/completions", server.guarded(server.chat), methods=["POST"]),
            Route("/v1/completions", server.guarded(server.complete), methods=["POST"]),
        ],
        exception_handlers={HTTPException: _no_route},
    )
    app.router.redirect_slashes = False  # it would send clients to whatever host they name
    return app


class _Server:
    def __init__(self, engine: Engine, options: ServerOptions):
        self.engine, self.options, self.started = engine, options, int(time.time())
        self.held = Held(options.limits.held_bytes)
        self._workers = ThreadPoolExecutor(8, "mpi-mlx-requests")
        self._fetchers = ThreadPoolExecutor(8, "mpi-mlx-images")  # hosts may be slow; texts do not wait for them
        self._mail = Mail()

    def guarded(self, handler):
        async def guard(request: Request) -> Response:
            try:
                self._check(request)
                return await handler(request)
            except MPIError as error:
                return _error(self._said(error), *_kind(error))
            except ClientDisconnect:
                return Response(status_code=499)

        return guard

    def _said(self, error: MPIError) -> str:
        """What is wrong, without where the model lies."""
        return str(error).replace(str(self.engine.model.base), "the model")

    def _check(self, request: Request) -> None:
        if self.options.loopback_only:
            host = request.headers.get("host", "") or "localhost"
            end = host.find("]") + 1 or (host.find(":") if host.count(":") == 1 else len(host))
            if host[:end].lower() not in LOOPBACK:
                raise Refused("this server answers to localhost only", 403)
        key = self.options.api_key
        if key is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode("latin-1", "replace"), key.encode())
            if scheme.lower() != "bearer" or not same:
                raise Refused("a valid API key is wanted: Authorization: Bearer ...", 401, "invalid_api_key")

    async def _body(self, request: Request, claim: Claim) -> bytes:
        limits = self.options.limits
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused("Content-Type is application/json", 415)
        chunks, size = [], 0
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > limits.body_bytes:
                        raise Refused(f"the body is larger than {limits.body_bytes:,} bytes", 413)
                    claim.hold(size)
                    chunks.append(chunk)
        except TimeoutError:
            raise Refused(f"the body did not come within {limits.body_seconds:.0f} s", 408) from None
        return b"".join(chunks)

    # ---- endpoints

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        counters = asdict(self.engine.counters) | {
            "active_requests": self.engine.active,
            "waiting_requests": self.engine.waiting,
            "held_bytes": self.held.bytes,
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
        raise Refused(f"there is no model {name[:100]!r}; there are: {names}", 404, "model_not_found", "model")

    async def chat(self, request: Request) -> Response:
        with Claim(self.held) as claim:
            asked, size = await self._parsed(request, claim, ChatRequest)
            limits = self.options.limits
            tools = asked.tools if asked.tool_choice != "none" else None

            def prepare() -> tuple[Prompt, int]:
                messages = conversation(asked, limits, lambda pixels: claim.hold(size + 3 * pixels))
                return chat_prompt(messages, tools), characters(messages)

            pool = self._fetchers if limits.remote_images is not None and fetches(asked) else self._workers
            loop = asyncio.get_running_loop()
            most = asked.max_completion_tokens or asked.max_tokens
            # only the job knows the pictures, and it forgets them as soon as they are encoded
            job, events = self._job(asked, most, *await loop.run_in_executor(pool, prepare))
            calls = CallFormat(self.engine.model.call_parser) if tools else None
            return await self._run(request, Answer(asked, chat=True, calls=calls), job, events, claim)

    async def complete(self, request: Request) -> Response:
        with Claim(self.held) as claim:
            asked, _ = await self._parsed(request, claim, CompletionRequest)
            job, events = self._job(asked, asked.max_tokens, text_prompt(asked.prompt), len(asked.prompt))
            return await self._run(request, Answer(asked, chat=False), job, events, claim)

    async def _parsed(self, request: Request, claim: Claim, kind):
        """The request, of a model that is there, and its bytes. Large ones take a while: the loop does not wait."""
        body = await self._body(request, claim)
        asked = await asyncio.get_running_loop().run_in_executor(self._workers, parse, body, kind)
        if asked.model not in self.options.defaults:
            self._unknown(asked.model)
        return asked, len(body)

    def _job(self, asked, most: int | None, prompt: Prompt, characters: int) -> tuple[Job, asyncio.Queue]:
        """What the engine is to do, and where its events come in."""
        tokens, temperature, top_p = self.options.defaults[asked.model]
        if most is not None and most > self.options.limits.tokens:
            raise Refused(f"max_tokens: at most {self.options.limits.tokens:,}", param="max_tokens")
        seed = None if asked.seed is None else asked.seed % 2**63
        loop, events = asyncio.get_running_loop(), asyncio.Queue()
        job = Job(
            prompt, lambda *event: self._mail.post(loop, events, event), asked.model, most or tokens,
            temperature if asked.temperature is None else asked.temperature,
            top_p if asked.top_p is None else asked.top_p, seed, characters,
        )  # fmt: skip
        return job, events

    async def _run(
        self, request: Request, answer: Answer, job: Job, events: asyncio.Queue, claim: Claim
    ) -> Response:
        asked = answer.asked
        self.engine.submit(job)
        try:
            coming = self._events(request, events)
            answer.begin(await anext(coming))
            claim.release()
            if asked.stream:
                return EventStream(self._chunks(answer, job, events), lambda: self._leave(answer, job))
            while not answer.over:
                answer.take([await anext(coming)])
            return JSONResponse(answer.whole(job.tokens))
        finally:
            if not asked.stream or answer.failed:
                self._leave(answer, job)

    def _leave(self, answer: Answer, job: Job) -> None:
        """The model need not go on: the client is gone, or a stop text has come."""
        if answer.over:
            self.engine.satisfy(job)
        else:
            self.engine.cancel(job)

    @staticmethod
    async def _events(request: Request, events: asyncio.Queue) -> AsyncIterator[tuple]:
        """What the engine tells, for as long as the client is there. Raises ClientDisconnect."""
        looked = time.monotonic()
        while True:
            event = None
            try:
                event = events.get_nowait() if events.qsize() else await asyncio.wait_for(events.get(), 0.5)
            except TimeoutError:
                pass
            if time.monotonic() - looked > 0.5:
                if await request.is_disconnected():
                    raise ClientDisconnect
                looked = time.monotonic()
            if event is not None:
                yield event

    async def _chunks(self, answer: Answer, job: Job, events: asyncio.Queue) -> AsyncIterator[str]:
        try:
            yield _event(answer.first())
            while not answer.over:
                came = [await events.get()]
                while not events.empty():  # where the client or the loop is slower than the model
                    came.append(events.get_nowait())
                for chunk in answer.take(came):
                    yield _event(chunk)
            for chunk in answer.last(job.tokens):
                yield _event(chunk)
            yield "data: [DONE]\n\n"
        except MPIError as error:
            yield _event(_body(self._said(error), *_kind(error)))


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _kind(error: MPIError) -> tuple[int, str | None, str | None]:
    """An error's status, code and field."""
    if isinstance(error, Refused):
        return error.status, error.code, error.param
    return (429, "busy", None) if isinstance(error, Busy) else (400, None, None)


def _body(said: str, status: int, code: str | None = None, param: str | None = None) -> dict:
    kind = {429: "rate_limit_error"}.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": said, "type": kind, "code": code, "param": param}}


def _error(said: str, status: int, code: str | None = None, param: str | None = None) -> JSONResponse:
    return JSONResponse(_body(said, status, code, param), status)


async def _no_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    said = f"{request.method} {request.url.path[:100]}: {getattr(error, 'detail', 'not found')}"
    return JSONResponse(_body(said, status), status, headers=getattr(error, "headers", None))
