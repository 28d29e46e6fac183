"""Putting the document in front of a conversation."""

from __future__ import annotations

from collections.abc import Sequence

from mpi_mlx.documents.load import PolicyDocument

SEPARATOR = "\n\n"


def place_document(messages: Sequence[dict], document: PolicyDocument | None) -> list[dict]:
    """The messages with the document at the start of a leading system message.

    An existing system text follows the document after a blank line. The content is one string when neither
    holds an image (text-only chat templates want that), else a list of parts. ``messages`` is left as it
    is; without a document the result is a plain copy.
    """
    if document is None:
        return list(messages)
    parts = list(document.parts)
    rest = list(messages)
    if rest and rest[0]["role"] == "system":
        own = rest.pop(0).get("content") or []
        own = [{"type": "text", "text": own}] if isinstance(own, str) else list(own)
        if own:
            parts += [{"type": "text", "text": SEPARATOR}, *own]
    if all(part["type"] == "text" for part in parts):
        return [{"role": "system", "content": "".join(part["text"] for part in parts)}, *rest]
    return [{"role": "system", "content": parts}, *rest]
