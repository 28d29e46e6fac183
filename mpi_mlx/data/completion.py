"""How a reasoning trace and an answer become one assistant turn, and how they are told apart again."""

from __future__ import annotations

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"


def completion_text(reasoning: str | None, answer: str | None) -> str:
    """The assistant turn: ``<think>reasoning</think>\\nanswer``, or the answer alone without a trace.

    >>> completion_text("red cube, so rule 2", "stop")
    '<think>red cube, so rule 2</think>\\nstop'
    """
    answer = answer or ""
    if reasoning is None:
        return answer
    return f"{THINK_OPEN}{reasoning}{THINK_CLOSE}\n{answer}"


def split_completion(text: str) -> tuple[str | None, str]:
    """(reasoning or None, answer), both stripped: the inverse of :func:`completion_text`.

    The answer is what follows the last closing tag; the whole text when there is no tag. Models whose
    template opens the trace inside the prompt yield only the closing tag, which is enough. A trace that was
    opened and never closed (cut off) has no answer: ``(trace, "")``.
    """
    before, close, answer = text.rpartition(THINK_CLOSE)
    if close:
        return before.replace(THINK_OPEN, "", 1).strip(), answer.strip()
    lead, opened, trace = text.partition(THINK_OPEN)
    if opened and not lead.strip():
        return trace.strip(), ""
    return None, text.strip()
