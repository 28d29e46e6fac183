"""What has been generated for a request, in OpenAI's words: as chunks of a stream, or as a whole."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from mpi_mlx.errors import MPIError
from mpi_mlx.serving.calls import CallFormat, overlap
from mpi_mlx.serving.limits import Refused
from mpi_mlx.serving.replies import Reply, ReplyStats


class Answer:
    """One answer as it grows.

    Args:
        asked: the request.
        calls: how the model writes tool calls, where it was given tools.
    """

    def __init__(self, asked, *, chat: bool, calls: CallFormat | None = None):
        self.asked, self.chat, self.calls = asked, chat, calls
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.raw, self.over, self.failed, self.reason = "", False, True, "stop"
        self.sent = {"reasoning_content": "", "content": ""}
        self.prompt_tokens = self.cached_tokens = 0
        self.opened = False  # the template has opened the trace, which the answer then begins within

    def begin(self, event: tuple) -> None:
        """The engine's first event. Raises what the engine raised."""
        self._raise(event)
        if event[0] == "begin":
            self.prompt_tokens, self.cached_tokens, self.opened = event[1:]
        else:
            self.over, self.reason = True, "stop"
        self.failed = False

    @staticmethod
    def _raise(event: tuple) -> None:
        if event[0] == "error":
            error = event[1]
            if isinstance(error, MPIError):
                raise error
            raise Refused(f"the answer could not be made: {type(error).__name__}", 500, "internal_error")

    def take(self, events: Sequence[tuple]) -> list[dict]:
        """The chunks that the engine's next events give."""
        for event in events:
            self._raise(event)
            if self.over:
                break
            if event[0] == "text":
                self.raw += event[1]
            elif event[0] == "end":
                self.over, self.reason = True, "length" if event[1] == "length" else "stop"
        places = [(place, stop) for stop in self.asked.stops if (place := self.raw.find(stop)) >= 0]
        if places:
            self.raw, self.over, self.reason = self.raw[: min(places)[0]], True, "stop"
        return self._chunks()

    def _parts(self) -> dict[str, str]:
        text = self.raw
        if not self.over:  # a stop text may have begun
            held = max((overlap(text, stop) for stop in self.asked.stops), default=0)
            text = text[: len(text) - held]
        if not self.chat:
            return {"content": text}
        reasoning, answer = self._reply(text).parts
        if self.calls is not None and not (self.over and not self._called()):  # a call that is none is shown
            answer = self.calls.text(answer, self.over, bare=True, tools=self.asked.tools)
        return {"reasoning_content": reasoning or "", "content": answer}

    def _reply(self, text: str) -> Reply:
        return Reply(text, False, ReplyStats(), opened=self.opened, over=self.over)

    def _chunks(self) -> list[dict]:
        made = []
        for name, text in self._parts().items():
            if text.startswith(self.sent[name]) and len(text) > len(self.sent[name]):
                made.append(self._chunk({name: text[len(self.sent[name]) :]}))
                self.sent[name] = text
        return made

    def _called(self) -> list[dict]:
        if self.calls is None:
            return []
        found = self.calls.parse(self._reply(self.raw).answer, self.asked.tools)
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
        return self._envelope(chunk=True) | {"choices": [choice]}

    def _envelope(self, chunk: bool = False) -> dict:
        kind = "text_completion" if not self.chat else f"chat.completion{'.chunk' * chunk}"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model}

    def first(self) -> dict:
        """What opens a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def last(self, tokens: int) -> list[dict]:
        """What closes a stream: tool calls, the reason, and the usage where it was asked for."""
        calls = self._called()
        made = [self._chunk({"tool_calls": calls})] if calls else []
        made.append(self._chunk({}, self._reason(calls)))
        if (self.asked.stream_options or {}).get("include_usage"):
            made.append(self._envelope(chunk=True) | {"choices": [], "usage": self._usage(tokens)})
        return made

    def whole(self, tokens: int) -> dict:
        """The answer to a request that does not stream."""
        if not self.chat:
            choice = {"index": 0, "text": self.raw, "finish_reason": self.reason, "logprobs": None}
            return self._envelope() | {"choices": [choice], "usage": self._usage(tokens)}
        parts, calls = self._parts(), self._called()
        trace = parts["reasoning_content"] or None  # always there, so that clients may read it
        message: dict[str, Any] = {"role": "assistant", "content": parts["content"], "reasoning_content": trace}
        if calls:
            message["tool_calls"] = calls
            message["content"] = message["content"] or None
        choice = {"index": 0, "message": message, "finish_reason": self._reason(calls)}
        return self._envelope() | {"choices": [choice], "usage": self._usage(tokens)}

    def _reason(self, calls: list[dict]) -> str:
        return "tool_calls" if calls and self.reason == "stop" else self.reason  # one that was cut may lack calls

    def _usage(self, tokens: int) -> dict:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
