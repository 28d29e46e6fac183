"""What a request's prompt is to the engine: a function of the model, called once in the engine's thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mpi_mlx.serving.limits import Refused

Prompt = Callable[[Any], Any]  # a model in, its Encoded out


def chat_prompt(messages: Sequence[dict], tools: Sequence[dict] | None) -> Prompt:
    """Of a conversation, up to where the answer begins."""
    return lambda model: model.encode(messages, tools=tools, generation_prompt=True)


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
