"""What the engine is asked for, and what it counts."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpi_mlx.errors import ServingError
from mpi_mlx.serving import decoding


class Busy(ServingError):
    """The queue is full, or the server is stopping."""


@dataclass(eq=False)
class Job:
    """One completion to make.

    ``encode(model)`` gives the prompt, in the engine's thread. ``emit(kind, value)`` is called there, too:
    ``("begin", prompt tokens, cached tokens, whether the prompt opens the trace)``, then ``("text", piece)`` ...,
    then ``("end", reason)``; or ``("error", exception)``. ``characters`` of the prompt's text: a hopelessly long
    one is refused unread.
    """

    encode: Callable[[Any], Any] | None  # until it was called: it holds the request's pictures
    emit: Callable[..., None]
    variant: str
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    characters: int = 0
    cancelled: bool = False
    satisfied: bool = False  # its client has all that it wants, although the model would go on
    tokens: int = 0
    encoded: Any = None  # the prompt, from then on until its row is there


@dataclass
class Counters:
    """What /metrics tells."""

    requests: int = 0
    refused: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0


@dataclass(eq=False)
class Row:
    """A job that is in the batch."""

    job: Job
    codes: np.ndarray
    next_position: int
    limit: int
    stream: decoding.TextStream
    random: np.random.Generator
    ids: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.codes) + len(self.ids)

    @property
    def stored(self) -> int:
        """Of which keys and values are known: of all but the last."""
        return self.length - 1


def wait_for_end(thread: threading.Thread) -> None:
    """Until the system's thread is gone, where that can be seen; Python before 3.13 says so earlier.

    MLX keeps compiled functions for each thread and frees them, Python objects among them, as it ends. Were the
    interpreter taken down meanwhile, the process would abort.
    """
    place, until = f"/proc/self/task/{thread.native_id}", time.monotonic() + 5
    while os.path.exists(place) and time.monotonic() < until:
        time.sleep(0.001)
