"""A reward of your own. The recipe names it as ``rewards.py:looked_at_everything``."""

from __future__ import annotations

PARTS = (
    ("box dented", "box intact"),
    ("tape open", "tape sealed"),
    ("label present", "label missing"),
)


def looked_at_everything(completions: list[str], examples: list[dict]) -> list[float]:
    """The share of the parcel's three parts that the reasoning names, each in exactly one of its states.

    A reward function gets a batch. ``completions`` are the model's texts as it wrote them, reasoning
    included: ``<think>reasoning</think>\\nanswer``. ``examples`` are the lines of your JSONL they answer, as
    dictionaries with ``id``, ``messages``, ``reasoning``, ``answer``, ``tools`` and ``meta`` (put whatever
    your checker needs into ``meta``). It returns one finite number a completion.
    """
    rewards = []
    for completion in completions:
        reasoning = completion.partition("</think>")[0]
        named = [sum(state in reasoning for state in states) == 1 for states in PARTS]
        rewards.append(sum(named) / len(PARTS))
    return rewards
