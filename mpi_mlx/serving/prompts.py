"""What a request's prompt is to the engine: a function of the model, called once in the engine's thread."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpi_mlx.errors import ServingError
from mpi_mlx.models.context import context_length
from mpi_mlx.models.encoding import content_text
from mpi_mlx.serving.jobs import Job
from mpi_mlx.serving.limits import Refused

Prompt = Callable[[Any], Any]  # a model in, its Encoded out


def chat_prompt(messages: Sequence[dict], tools: Sequence[dict] | None) -> Prompt:
    """Of a conversation, up to where the answer begins."""

    def encode(model):
        check_turns(messages, model)
        return model.encode(messages, tools=tools, generation_prompt=True)

    return encode


def encode_prompt(job: Job, model, max_prompt: int | None, widest: int):
    """The Encoded of a job, which has it from now on instead of what it was made of.

    Args:
        max_prompt: tokens at most; the model's context bounds it, too.
        widest: characters of the longest token.

    Raises:
        ServingError: the prompt is too long.
    """
    if job.encoded is None:
        context = context_length(model)
        most = min(limit for limit in (context and context - 1, max_prompt, sys.maxsize) if limit)
        # no token stands for more characters than the longest has: what cannot fit is not even tokenized
        if job.characters > most * widest:
            raise ServingError(f"the prompt has {job.characters:,} characters; at most {most:,} tokens are taken")
        encoded = job.encode(model)
        if len(encoded) > most:
            raise ServingError(f"the prompt has {len(encoded):,} tokens; at most {most:,} are taken")
        job.encoded, job.encode = encoded, None
    return job.encoded


def check_turns(messages: Sequence[Mapping], model) -> None:
    """Refuses users and tools that write the template's own tokens: a text could end its turn and begin another,
    say the system's. What the system and the assistant said is the caller's own.

    Raises:
        Refused: naming the message.
    """
    for index, message in enumerate(messages):
        text = content_text(message["content"]) if message["role"] in ("user", "tool") else ""
        token = next((token for token in model.turn_tokens if token in text), None)
        if token is not None:
            said = f"a {message['role']}'s text holds {token}, with which turns begin or end; remove it"
            raise Refused(said, param=f"messages.{index}")


def text_prompt(text: str) -> Prompt:
    """Of a text to be continued as it is."""

    def encode(model):
        empty = model.encode([{"role": "user", "content": ""}])
        start = type(empty)(*(part[..., :0] for part in (empty.ids, empty.assistant, empty.visual)), (),
                            empty.position_ids[:, :0])  # fmt: skip
        kept = [token for token in model.tokenizer(text)["input_ids"] if token not in model.visual_ids]
        if not kept:
            raise Refused("prompt: it is empty", param="prompt")
        return start.concat(kept)

    return encode
