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


def after_opening(turn: str) -> str:
    """What is left to write of a turn where the prompt has opened the trace, as thinking models' templates do.

    >>> after_opening("<think>red</think>\\nstop"), after_opening("stop")
    ('red</think>\\nstop', '</think>\\nstop')
    """
    return turn.removeprefix(THINK_OPEN) if turn.startswith(THINK_OPEN) else f"{THINK_CLOSE}\n{turn}"


def with_opening(text: str) -> str:
    """The turn that a completion is the rest of: the inverse of :func:`after_opening`."""
    return text.removeprefix(THINK_CLOSE).removeprefix("\n") if text.startswith(THINK_CLOSE) else THINK_OPEN + text


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
