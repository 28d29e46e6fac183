"""Conversations to token ids, with the trained tokens marked.

The chat template is rendered once with every assistant turn replaced by a sentinel. The text around the
sentinels is the template's, the turns' text is the data's own, and the tokenizer never merges across the
border: so the ids of a prompt and of its completion, encoded apart, are the ids of the whole conversation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from mpi_mlx.errors import DataError, ModelError
from mpi_mlx.models.images import ByteLRU, ImageInput
from mpi_mlx.models.tools import describe_tools, supports_tools

_SENTINEL = "{}turn{}\u2403"


@dataclass(frozen=True, eq=False)
class Encoded:
    """One tokenized conversation.

    Attributes:
        ids: int32 (T,).
        assistant: bool (T,), True at assistant turns' tokens, each turn's end-of-turn token included.
        visual: bool (T,), True at image placeholder tokens.
        images: the images in reading order.
        position_ids: int32 (3, T) for multimodal rotary families, else (1, T).
    """

    ids: np.ndarray
    assistant: np.ndarray
    visual: np.ndarray
    images: tuple[ImageInput, ...]
    position_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def next_position(self) -> int:
        """The rotary position of the token after the last."""
        return int(self.position_ids.max()) + 1 if len(self.ids) else 0

    def concat(self, completion_ids: Sequence[int] | np.ndarray) -> "Encoded":
        """This conversation followed by a sampled or encoded assistant turn (T' text tokens)."""
        tail = np.asarray(completion_ids, dtype=np.int32)
        positions = self.next_position + np.arange(len(tail), dtype=np.int32)
        return replace(
            self,
            ids=np.concatenate([self.ids, tail]),
            assistant=np.concatenate([self.assistant, np.ones(len(tail), dtype=bool)]),
            visual=np.concatenate([self.visual, np.zeros(len(tail), dtype=bool)]),
            position_ids=np.concatenate(
                [self.position_ids, np.broadcast_to(positions, (len(self.position_ids), len(tail)))], axis=1
            ),
        )


def content_text(content: Any) -> str:
    """The text of a message's content (a string, or a list of text parts)."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if part.get("type", "text") == "text")


class ChatEncoder:
    """Renders conversations with a model's own chat template and tokenizes them.

    Args:
        tokenizer: a transformers tokenizer.
        template: the chat template (Jinja).
        name: the model's name, for errors.
        image_token: the placeholder that the template writes for an image, None for text-only models.
        list_content: whether the template wants every content as a list of parts.
    """

    def __init__(self, tokenizer: Any, template: str, name: str, image_token: str | None, list_content: bool):
        self.tokenizer = tokenizer
        self.template = template
        self.name = name
        self.image_token = image_token
        self.list_content = list_content
        self.known: ByteLRU[np.ndarray] = ByteLRU(64 << 20)
        self.end_of_turn = self._find_end_of_turn()
        self.turn_tokens = self._find_turn_tokens()

    def segments(
        self, messages: Sequence[Mapping], tools: Sequence[Mapping] | None, generation_prompt: bool
    ) -> list[tuple[str, bool]]:
        """The conversation's text as (text, is an assistant turn) pieces in order.

        A last assistant turn ends with its end-of-turn token, so that it equals a sampled completion.
        """
        messages = list(messages)
        if not messages:
            raise DataError("a conversation has no messages")
        if tools and not supports_tools(self.template):
            messages, tools = describe_tools(messages, tools), None
        elif not supports_tools(self.template):
            messages = describe_tools(messages, None)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        last = messages[-1] if turns and turns[-1] == len(messages) - 1 and not generation_prompt else None
        if last is not None and not last.get("tool_calls"):
            sentinel = _sentinels((messages, tools))
            if len(messages) > 1:
                head = self.segments_of(messages[:-1], tools, True)
            else:
                text = self.render([dict(last, content=sentinel(0))], tools, False)
                head = [(text.partition(sentinel(0))[0], False)]
            return head + [(content_text(last.get("content")) + self.end_of_turn, True)]
        pieces = self.segments_of(messages, tools, generation_prompt)
        if last is not None:  # what the template writes after the last end of turn is not trained on
            pieces = pieces[:-1] if not pieces[-1][1] else pieces
        return pieces

    def segments_of(
        self, messages: list[Mapping], tools: Any, generation_prompt: bool
    ) -> list[tuple[str, bool]]:
        """Renders all messages by the template and cuts out the assistant turns."""
        turns, masked, sentinel = [], [], _sentinels((messages, tools))
        for message in messages:
            if message["role"] == "assistant":
                masked.append(dict(message, content=sentinel(len(turns))))
                turns.append(message)
            else:
                masked.append(message)
        rest = self.render(masked, tools, generation_prompt)
        pieces: list[tuple[str, bool]] = []
        for index, turn in enumerate(turns):
            before, found, rest = rest.partition(sentinel(index))
            after, ended, tail = rest.partition(self.end_of_turn)
            if not found or not ended:
                raise ModelError(f"{self.name}: the chat template drops or reorders assistant turns")
            text = content_text(turn.get("content"))
            if (
                not text or not after.strip()
            ):  # a template's own space there would split turns from completions
                after = after.lstrip()
            pieces += [(before, False), (text + after + self.end_of_turn, True)]
            rest = tail
        return [piece for piece in pieces + [(rest, False)] if piece[0]]

    def render(self, messages: Sequence[Mapping], tools: Any, generation_prompt: bool) -> str:
        """The chat template's text, image placeholders not yet expanded."""
        shaped = [dict(message, content=self._shape(message)) for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                shaped,
                chat_template=self.template,
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise DataError(f"the chat template of {self.name} refuses this conversation: {error}") from error

    def _shape(self, message: Mapping) -> Any:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            if any(part.get("type") == "image" for part in content):
                if self.image_token is None:
                    raise ModelError(
                        f"{self.name} is a text-only model and reads no images; "
                        "choose a vision-language base or remove the images"
                    )
                if message["role"] == "assistant":
                    raise DataError("an assistant turn holds an image; only text can be trained on")
            if self.image_token is None or message["role"] == "assistant" and not self.list_content:
                return content_text(content)
            return [
                {"type": "image"}
                if part.get("type") == "image"
                else {"type": "text", "text": part.get("text", "")}
                for part in content
            ]
        text = content_text(content)
        return [{"type": "text", "text": text}] if self.list_content else text

    def token_ids(self, text: str) -> np.ndarray:
        """A piece of text as int32 (T,), read-only; the pieces last used are remembered."""
        ids = self.known.get(text)
        if ids is None:
            ids = np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
            ids.flags.writeable = False
            self.known.put(text, ids, ids.nbytes + 4 * len(text) + 256)
        return ids

    def _find_end_of_turn(self) -> str:
        """The special token that the template writes after an assistant turn, else the eos token."""
        marker = _sentinels(())(0)
        text = self.render(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}], None, False
        )
        after = text.partition(marker)[2].strip()
        special = sorted(self.tokenizer.all_special_tokens, key=len, reverse=True)
        special += sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        for token in special:
            if token and after.startswith(token):
                return token
        if self.tokenizer.eos_token:
            return self.tokenizer.eos_token
        raise ModelError(f"{self.name}: neither the chat template nor the tokenizer marks the end of a turn")

    def _find_turn_tokens(self) -> tuple[str, ...]:
        """The special tokens with which the template begins and ends turns."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        special = {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        text = self.render([{"role": "user", "content": "a"}], None, True)
        special -= {self.tokenizer.bos_token}  # it begins no turn, and <s> is HTML
        return tuple(sorted({self.end_of_turn} | {token for token in special if token in text}))


def _sentinels(texts: Any) -> Callable[[int], str]:
    """What stands for an assistant turn, by its number.

    Its first character occurs in none of ``texts``: neither one of them nor several side by side can hold it.
    """
    first = "\u2402"
    if any(first in text for text in _strings(texts)):
        used = set().union(*_strings(texts))
        first = next(letter for letter in map(chr, range(0xF0000, 0x110000)) if letter not in used)  # private use
    return partial(_SENTINEL.format, first)


def _strings(value: Any) -> Iterator[str]:
    """All texts in nested mappings and sequences."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(list(value.items()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def message_images(messages: Sequence[Mapping]) -> list[Any]:
    """The image sources of a conversation in reading order."""
    return [
        part["image"]
        for message in messages
        if isinstance(message.get("content"), (list, tuple))
        for part in message["content"]
        if part.get("type") == "image"
    ]
