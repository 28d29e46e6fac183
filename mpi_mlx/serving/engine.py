"""Continuous batching: requests join and leave the batch between two tokens.

One thread owns the model: one of the engine's own after ``start()``, or the caller's in ``load()`` and ``work()``.
A request is encoded, its prompt forwarded from where the prefix cache ends, and
its row joins the batch; rows that have ended are taken out. Caches are mlx-lm's.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mpi_mlx.errors import MPIError
from mpi_mlx.models.context import context_length
from mpi_mlx.serving import decoding
from mpi_mlx.serving.batch import Batch
from mpi_mlx.serving.jobs import Busy, Counters, Job, Row, wait_for_end
from mpi_mlx.serving.prefixes import PrefixCache
from mpi_mlx.serving.prompts import encode_prompt
from mpi_mlx.serving.room import Room
from mpi_mlx.serving.upkeep import Upkeep
from mpi_mlx.serving.variants import Variants

log = logging.getLogger(__name__)
_SHORT = 256  # tokens of a prompt that the others hardly notice


class Engine:
    """Runs jobs until closed.

    Args:
        load: makes the base model, called in the engine's thread.
        variants: name -> adapter folder, or None for the base.
        max_rows: requests decoded together. max_queue: requests that may wait beyond those.
        row_bytes: of keys and values of those that are decoded (see :class:`Room`).
        max_prompt: longest prompt in tokens; the model's context bounds it too.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        variants: Mapping[str, Any],
        *,
        max_rows: int = 64,
        max_queue: int = 128,
        max_prompt: int | None = None,
        prefix_bytes: int = 1 << 30,
        row_bytes: int | None = None,
    ):
        self.max_rows, self.max_queue, self.max_prompt = max_rows, max_queue, max_prompt
        self.counters = Counters()
        self.prefixes = PrefixCache(prefix_bytes)
        self.model: Any = None
        self._load, self._folders, self._row_bytes = load, variants, row_bytes
        self._waiting: deque[Job] = deque()
        self._batches: list[Batch] = []
        self._condition = threading.Condition()
        self._closing = False
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="mpi-mlx-engine", daemon=True)

    @property
    def active(self) -> int:
        """Requests that are being answered."""
        return sum(len(batch.rows) for batch in self._batches)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> Engine:
        """Loads the model and works in a thread of its own; raises what loading raises."""
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def submit(self, job: Job) -> None:
        """Queues a job. Raises Busy."""
        with self._condition:
            if self._closing:
                raise Busy("the server is stopping")
            most = self.max_queue + max(0, self.max_rows - self.active)
            if len(self._waiting) >= most:
                self._drop_cancelled()
            if len(self._waiting) >= most:
                self.counters.refused += 1
                raise Busy(f"{self.active} requests are being answered, {self.waiting} waiting; try again later")
            self.counters.requests += 1
            self._waiting.append(job)
            self._condition.notify()

    def _drop_cancelled(self) -> None:
        gone = [job for job in self._waiting if job.cancelled]
        self._waiting = deque(job for job in self._waiting if not job.cancelled)
        self.counters.cancelled += len(gone)
        for job in gone:
            job.emit("end", "cancelled")

    def cancel(self, job: Job) -> None:
        """Its row leaves the batch before the next token."""
        job.cancelled = True

    def satisfy(self, job: Job) -> None:
        """So does the row of an answer that is all there; the next turn of its conversation may begin with it."""
        job.satisfied = True

    def close(self) -> None:
        """Refuses new jobs, lets it finish those it has, and waits for its own thread, if it has one."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join()
            wait_for_end(self._thread)

    def load(self) -> Engine:
        """Loads the model for :meth:`work`, to be called in the same thread."""
        self.model = self._load()
        self._variants = Variants(self.model, self._folders)
        self._upkeep = Upkeep(self.model)
        self._room = Room(self._row_bytes)
        self._draw = decoding.Draw(self.model)
        self._widest = max(map(len, self.model.tokenizer.get_vocab()))
        return self

    # ---- the thread

    def _run(self) -> None:
        try:
            self.load()
        except BaseException as error:
            self._failure, self._closing = error, True
            return
        finally:
            self._ready.set()
        self.work()

    def work(self) -> None:
        """Runs jobs until :meth:`close`, and what was asked before it."""
        while True:
            with self._condition:
                while not (self._waiting or self._batches or self._closing):
                    if not self._condition.wait(1.0 if self._upkeep.due else None):
                        self._upkeep.release()
                if self._closing and not self._waiting and not self._batches:
                    return
            try:
                self._admit()
                for batch in self._batches:
                    self._step(batch)
                self._batches = [batch for batch in self._batches if batch.rows]
                self._upkeep.worked()
            except Exception as error:  # a bug or no memory: these requests fail, the server goes on
                self._fail_all(error)

    def _fail_all(self, error: Exception) -> None:
        log.exception("%d answers failed", self.active)
        self.prefixes.clear()  # where memory ran out, it is needed; where a bug is, they are not to be trusted
        for row in (row for batch in self._batches for row in batch.rows):
            self.counters.failed += 1
            row.job.emit("error", error)
        self._batches = []

    def _take(self) -> Job | None:
        """The next job, where there is room for it."""
        with self._condition:
            if self._waiting and self._waiting[0].cancelled:
                self._drop_cancelled()
            if not self._waiting or self.active >= self.max_rows:
                return None
            return self._waiting.popleft()

    def _admit(self) -> None:
        """Prefills what may join; a single long prompt between two steps, so that the others keep writing."""
        while (job := self._take()) is not None:
            forwarded, others = 0, self.active
            try:
                forwarded = self._prefill(job)
                if forwarded is None:
                    with self._condition:
                        self._waiting.appendleft(job)
                    return
            except Exception as error:
                if not isinstance(error, MPIError):  # those say themselves what is wrong with the request
                    log.exception("an answer failed before it began")
                    self.counters.failed += 1
                job.emit("error", error)
            if others and forwarded > _SHORT:
                return

    def _prefill(self, job: Job) -> int | None:
        """Begins an answer; how many tokens it forwarded, those in the prefix cache left out. None: it must wait."""
        begin = time.perf_counter()
        encoded = encode_prompt(job, self.model, self.max_prompt, self._widest)
        context = context_length(self.model) or sys.maxsize
        limit = min(job.max_tokens, context - len(encoded))
        if not self._room.has((row for batch in self._batches for row in batch.rows), len(encoded) + limit):
            return None
        job.encoded = None
        self._variants.use(job.variant)
        codes = decoding.codes(encoded)
        caches, start = self.prefixes.fetch(job.variant, codes)
        caches = caches or decoding.new_caches(self.model)
        hidden = decoding.prefill(self.model, encoded, caches, start, stopped=lambda: job.cancelled)
        if hidden is None:
            self.counters.cancelled += 1
            job.emit("end", "cancelled")
            return 0
        self._room.measure(caches)
        self.prefixes.put(job.variant, codes, caches)
        job.emit("begin", len(encoded), start, self.model.opens_trace(encoded))
        stream = decoding.TextStream(self.model.decode)
        row = Row(job, codes, encoded.next_position, limit, stream, np.random.default_rng(job.seed))
        self._take_tokens([row], self._tokens([row], hidden))
        if row.ids and not self._ended(row):
            self._join(row, caches)
        self.counters.prompt_tokens += len(encoded)
        self.counters.cached_tokens += start
        self.counters.prefill_seconds += time.perf_counter() - begin
        return len(encoded) - start

    def _join(self, row: Row, caches) -> None:
        batch = next((batch for batch in self._batches if batch.fits(row)), None)
        if batch is None:
            batch = Batch(row.job.variant)
            self._batches.append(batch)
        batch.join(row, caches)

    def _step(self, batch: Batch) -> None:
        """One token for every row of a batch."""
        begin = time.perf_counter()
        gone = [row for row in batch.rows if row.job.cancelled or row.job.satisfied]
        for row in gone:
            if row.job.satisfied:
                self.prefixes.put(batch.variant, *batch.extract(row))
            self._finish(row, "stop" if row.job.satisfied else "cancelled")
        batch.drop(gone)
        rows = batch.rows
        if not rows:
            return
        self._variants.use(batch.variant)
        self._take_tokens(rows, self._tokens(rows, batch.forward(self.model)))
        self.counters.decode_steps += 1
        ended = [row for row in rows if self._ended(row)]
        for row in ended:  # the next turn of a conversation begins with them
            self.prefixes.put(batch.variant, *batch.extract(row))
        batch.drop(ended)
        self.counters.decode_seconds += time.perf_counter() - begin

    def _tokens(self, rows: list[Row], hidden: mx.array) -> list[int]:
        jobs = [row.job for row in rows]
        chances = [row.random.random() for row in rows]
        return self._draw(hidden, [j.temperature for j in jobs], [j.top_p for j in jobs], chances).tolist()

    def _take_tokens(self, rows: list[Row], tokens: list[int]) -> None:
        self.counters.completion_tokens += len(rows)
        for row, token in zip(rows, tokens, strict=True):
            row.ids.append(token)
            row.job.tokens = len(row.ids)
            if token in self.model.eos_ids:
                self._finish(row, "stop")
                continue
            piece = row.stream.add(token)
            if piece:
                row.job.emit("text", piece)
            if len(row.ids) >= row.limit:
                self._finish(row, "length")

    def _finish(self, row: Row, reason: str) -> None:
        rest = row.stream.close()
        if rest and reason != "cancelled":
            row.job.emit("text", rest)
        self.counters.cancelled += reason == "cancelled"
        row.job.emit("end", reason)
        row.limit = 0

    @staticmethod
    def _ended(row: Row) -> bool:
        return row.limit == 0
