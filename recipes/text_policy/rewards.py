"""A reward of one's own, as a recipe names it: ``function: rewards.py:true_trace``."""

import desk

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


def true_trace(completions: list[str], examples: list[dict]) -> list[float]:
    """1 for a trace that states all facts and judges them as the rulebook does, takes the rule that follows from
    them and ends in the reply that it gives; half for facts with another rule or reply; else 0.

    It compares with no labelled trace, and never sees the case: misread facts cost the answer, not this.
    """
    return [_one(completion) for completion in completions]


def _one(completion: str) -> float:
    reasoning, _, answer = completion.partition(THINK_CLOSE)
    read = desk.read_trace(reasoning.replace(THINK_OPEN, "", 1).strip())
    if read is None:
        return 0.0
    case, rule = read
    return 1.0 if desk.walk(case) == (rule.strip(), answer.strip()) else 0.5
