"""A reward of one's own, as a recipe names it: ``function: rewards.py:true_trace``."""

import desk

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


def true_trace(completions: list[str], examples: list[dict]) -> list[float]:
    """1 for a right reply behind a trace that leads to it: the rulebook's walk from the facts that it states, with
    service, days, value and item as the message has them; else 0.

    No labelled trace is needed. Who writes, what the trouble is and whether there is a receipt are taken as the trace
    states them: the reply tells whether they were misread.
    """
    return [float(_is_true(completion, example)) for completion, example in zip(completions, examples, strict=True)]


def _is_true(completion: str, example: dict) -> bool:
    reasoning, closed, answer = completion.partition(THINK_CLOSE)
    trace = reasoning.replace(THINK_OPEN, "", 1).strip()
    facts = desk.stated(trace)
    message = desk.in_message(_text(example["messages"][-1]["content"]))
    misread = any(message.get(name, stated) != stated for name, stated in facts.items())
    return bool(closed) and not misread and desk.walk_of(facts) == (trace, example["answer"]) == (trace, answer.strip())


def _text(content) -> str:
    """A message's text, given as such or as a list of parts."""
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
