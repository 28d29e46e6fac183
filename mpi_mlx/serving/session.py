"""A conversation with a model whose keys and values are kept from turn to turn."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mpi_mlx.atomic import atomic_write
from mpi_mlx.documents import PolicyDocument, place_document
from mpi_mlx.errors import ServingError
from mpi_mlx.models.context import context_length
from mpi_mlx.serving import decoding
from mpi_mlx.serving.calls import CallFormat
from mpi_mlx.serving.prompts import check_turns
from mpi_mlx.serving.replies import Reply, ReplyStats
from mpi_mlx.serving.target import MAX_TOKENS


class ChatSession:
    """Questions in, pieces of answers out.

    >>> session = ChatSession(model, document=document)          # doctest: +SKIP
    >>> print("".join(session.ask("May I return a used kettle?")), session.reply.stats)  # doctest: +SKIP

    Keys and values of the conversation stay in memory, with the document in context and without apart from
    each other: a turn forwards only what is new. The ids an answer was sampled as are the ids it is
    remembered as.

    Args:
        model: a :class:`~mpi_mlx.models.base.Model`.
        document: the rulebook, put in context where ``in_context`` is True.
        system: text of a system message.
        tools: function descriptions in OpenAI's form.
        max_tokens: longest answer.
        temperature, top_p: of sampling; 0 takes the likeliest token.

    Attributes:
        messages: the conversation, without the document.
        calls: how the model writes tool calls.
        reply: the last answer.
    """

    def __init__(
        self,
        model,
        *,
        document: PolicyDocument | None = None,
        in_context: bool = False,
        system: str | None = None,
        tools: Sequence[Mapping] | None = None,
        max_tokens: int = MAX_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ):
        self.model, self.document, self.tools = model, document, tools
        self.max_tokens, self.temperature, self.top_p = max_tokens, temperature, top_p
        self.system = system
        self.calls = CallFormat(model.call_parser)
        self.in_context = False
        self.reply: Reply | None = None
        self.pending: list[Any] = []
        self._draw = decoding.Draw(model)
        self._widest = max(map(len, model.tokenizer.get_vocab()))  # characters of the longest token
        self._random = np.random.default_rng(seed)
        self._kept: dict[bool, tuple[np.ndarray, list]] = {}
        self._stop = False
        self.reset()
        self.use_document(in_context)

    # ---- the conversation

    def reset(self) -> None:
        """Begins anew; a document stays in memory."""
        self.messages: list[dict] = []
        self._turns: list[np.ndarray | None] = []  # ids of each assistant turn
        self.pending.clear()
        self.reply = None
        if self.system:
            self.messages.append({"role": "system", "content": self.system})

    def use_document(self, in_context: bool) -> None:
        """From the next answer on, with the document in context or without.

        Raises:
            ServingError: there is no document.
        """
        if in_context and self.document is None:
            raise ServingError("there is no document to put in context; start with --document PATH")
        self.in_context = in_context

    def attach(self, image: Any) -> None:
        """Shows an image (a path or a PIL image) with the next question; the vision tower sees it now.

        Raises:
            DataError, ModelError: it cannot be read, or the model is text-only.
        """
        self.model.features([self.model.image(image)])
        self.pending.append(image)

    def ask(self, text: str) -> Iterator[str]:
        """The answer to a question, in pieces. Nothing is remembered of a question that raises.

        Raises:
            DataError, ModelError, ServingError: the model cannot take the conversation; it may be too long.
        """
        limit = context_length(self.model)
        if limit is not None and len(text) > limit * self._widest:  # not even tokenized, which would take long
            raise ServingError(f"the question has {len(text):,} characters, the model takes {limit:,} tokens")
        content: Any = text
        if self.pending:
            content = [{"type": "image", "image": image} for image in self.pending]
            content.append({"type": "text", "text": text})
        yield from self._answer({"role": "user", "content": content})

    def give_results(self, results: Sequence[tuple[str, Any]]) -> Iterator[str]:
        """The answer after tools have run: (tool's name, text or content parts) for each call, in order."""
        messages = [{"role": "tool", "name": name, "content": content} for name, content in results]
        yield from self._answer(*messages)

    def again(self, in_context: bool) -> Iterator[str]:
        """The last question answered once more, with the document in context or without; not remembered.

        ``reply`` is the new answer afterwards.
        """
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ServingError("there is no question to answer again; ask one first")
        yield from self._generate(self._encode(self.messages[:-1], in_context), in_context)

    def stop(self) -> None:
        """Ends the answer that is being generated, from a signal handler or another thread."""
        self._stop = True

    def save(self, path: str | Path) -> None:
        """Writes the conversation: ``.json`` as messages, anything else as Markdown."""
        path = Path(path).expanduser()
        if path.suffix == ".json":
            text = json.dumps({"messages": _plain(self.messages)}, ensure_ascii=False, indent=2) + "\n"
        else:
            text = "\n".join(_markdown(message) for message in _plain(self.messages))
        with atomic_write(path) as temporary:
            Path(temporary).write_text(text, encoding="utf-8")

    # ---- generation

    def _answer(self, *new: dict) -> Iterator[str]:
        messages = [*self.messages, *new]
        encoded = self._encode(messages, self.in_context)  # may raise: then nothing has changed
        yield from self._generate(encoded, self.in_context)
        if not len(self.reply.ids):
            return  # stopped before it began: as if not asked
        self.messages = [*messages, {"role": "assistant", "content": self.reply.text}]
        self._turns.append(_closed(self.reply.ids, self.model))
        self.pending.clear()

    def _encode(self, messages: Sequence[Mapping], in_context: bool):
        check_turns(messages, self.model)
        placed = place_document(messages, self.document if in_context else None)
        encoded = self.model.encode(placed, tools=self.tools, generation_prompt=True)
        turns = sum(message["role"] == "assistant" for message in messages)
        encoded = as_sampled(encoded, self._turns[:turns])
        limit = context_length(self.model)
        if limit is not None and len(encoded) >= limit:
            raise ServingError(
                f"the conversation has {len(encoded):,} tokens, the model takes {limit:,}; begin a new one"
            )
        return encoded

    def _generate(self, encoded, in_context: bool) -> Iterator[str]:
        self._stop = False
        begin = time.perf_counter()
        wanted = decoding.codes(encoded)
        # taken out while it is written to: an exception leaves nothing half-written behind
        kept, caches = self._kept.pop(in_context, (wanted[:0], decoding.new_caches(self.model)))
        start = decoding.shared_length(kept, wanted)
        decoding.trim(caches, start)
        stats = ReplyStats(len(encoded), start)
        self.reply = Reply("", in_context, stats)
        self.reply.opened = self.model.opens_trace(encoded)
        hidden = decoding.prefill(self.model, encoded, caches, start, stopped=lambda: self._stop)
        ids: list[int] = []
        if hidden is not None:
            yield from self._decode(encoded, hidden, caches, ids, begin)
        else:
            stats.ended = "interrupted"
        stats.seconds = time.perf_counter() - begin
        self.reply.over = True
        known = min(caches[0].offset, len(encoded) + len(ids))
        decoding.trim(caches, known)
        self._kept[in_context] = np.concatenate([wanted, np.array(ids, np.int64)])[:known], caches

    def _decode(self, encoded, hidden, caches, ids: list[int], begin: float) -> Iterator[str]:
        """Draws tokens into ``ids``. A step is launched before the one before it is looked at."""
        reply, stats = self.reply, self.reply.stats
        room = (context_length(self.model) or len(encoded) + self.max_tokens) - len(encoded)
        limit = min(self.max_tokens, room)
        stream = decoding.TextStream(self.model.decode)
        drawn = self._next(hidden)
        stats.ended = "length"
        while len(ids) < limit:
            following = None
            if len(ids) + 1 < limit:
                position = np.array([encoded.next_position + len(ids)])
                following = self._next(decoding.forward_token(self.model, drawn, position, caches))
            token = int(drawn.item())
            ids.append(token)
            stats.completion_tokens = len(ids)
            if len(ids) == 1:
                stats.first_token_seconds = time.perf_counter() - begin
            reply.ids = np.array(ids, np.int32)
            if token in self.model.eos_ids:
                stats.ended = "stop"
                break
            piece = stream.add(token)
            reply.text += piece
            if piece:
                yield piece
            if self._stop:
                stats.ended = "interrupted"
                break
            drawn = following
        piece = stream.close()
        reply.text += piece
        if piece:
            yield piece

    def _next(self, hidden: mx.array) -> mx.array:
        drawn = self._draw(hidden, [self.temperature], [self.top_p], [self._random.random()])
        mx.async_eval(drawn)
        return drawn


def as_sampled(encoded, turns: Sequence[np.ndarray | None]):
    """A conversation whose assistant turns have the ids that they were sampled as.

    A text may be written by other ids than the tokenizer's; with the sampled ones, keys and values fit.
    Turn i of ``encoded`` becomes ``turns[i]``, where that is not None.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.assistant.astype(np.int8), [0]])))
    runs = list(zip(edges[0::2].tolist(), edges[1::2].tolist(), strict=True))
    if len(runs) != len(turns):
        return encoded
    for (start, stop), ids in reversed(list(zip(runs, turns, strict=True))):
        if ids is None or np.array_equal(ids, encoded.ids[start:stop]):
            continue
        head = replace(
            encoded,
            ids=encoded.ids[:start],
            assistant=encoded.assistant[:start],
            visual=encoded.visual[:start],
            position_ids=encoded.position_ids[:, :start],
        ).concat(ids)
        shift = head.next_position - (int(encoded.position_ids[:, :stop].max()) + 1)
        encoded = replace(
            head,
            ids=np.concatenate([head.ids, encoded.ids[stop:]]),
            assistant=np.concatenate([head.assistant, encoded.assistant[stop:]]),
            visual=np.concatenate([head.visual, encoded.visual[stop:]]),
            position_ids=np.concatenate([head.position_ids, encoded.position_ids[:, stop:] + shift], axis=1),
        )
    return encoded


def _closed(ids: np.ndarray, model) -> np.ndarray:
    """A sampled turn as it stands in the history: ended by the end-of-turn token."""
    own = ids[:-1] if len(ids) and int(ids[-1]) in model.eos_ids else ids
    return np.append(own, model.end_of_turn_id).astype(np.int32)


def _plain(messages: Sequence[Mapping]) -> list[dict]:
    def content(value):
        if isinstance(value, str):
            return value
        return [dict(p, image=str(p["image"])) if p.get("type") == "image" else dict(p) for p in value]

    return [dict(message, content=content(message.get("content") or "")) for message in messages]


def _markdown(message: Mapping) -> str:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    body = "\n\n".join(f"![]({p['image']})" if p["type"] == "image" else p["text"] for p in parts)
    return f"## {message['role']}\n\n{body}\n"
