"""Between requests and the engine: what they may hold, and how events come back."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from starlette.responses import StreamingResponse

from mpi_mlx.serving.jobs import Busy


class EventStream(StreamingResponse):
    """Server-sent events; ``over()`` is called however they end, begun or not."""

    def __init__(self, chunks: AsyncIterator[str], over: Callable[[], None]):
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._over = over

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()


@dataclass
class Held:
    """What all requests hold that are being prepared."""

    limit: int
    bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Claim:
    """What one request holds in memory until its answer begins; all together have a limit. For any thread."""

    def __init__(self, held: Held):
        self._held, self._bytes, self._open = held, 0, True

    def hold(self, count: int) -> None:
        """Now ``count`` bytes, whatever it was before. Raises Busy."""
        with self._held.lock:
            if not self._open:  # a worker may come late
                return
            if self._held.bytes - self._bytes + count > self._held.limit:
                raise Busy("too much is being worked on; try again later")
            self._held.bytes += count - self._bytes
            self._bytes = count

    def release(self) -> None:
        """Nothing, for good."""
        with self._held.lock:
            self._held.bytes -= self._bytes
            self._bytes, self._open = 0, False

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *exc) -> None:
        self.release()


class Mail:
    """Brings events from the engine's thread to the loop: one wake-up for all that came meanwhile."""

    def __init__(self):
        self._events: deque = deque()
        self._lock = threading.Lock()
        self._called = False

    def post(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue, event: tuple) -> None:
        with self._lock:
            self._events.append((queue, event))
            if self._called:
                return
            self._called = True
        try:
            loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop is closed: nobody listens
            pass

    def _deliver(self) -> None:
        with self._lock:
            came, self._events, self._called = self._events, deque(), False
        for queue, event in came:
            queue.put_nowait(event)
