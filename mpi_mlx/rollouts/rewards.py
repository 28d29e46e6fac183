"""Rewards: what a completion earns, from checkers that need the answer, the form, or nothing but the text.

Each kind is a plain function of one completion and its example, giving 0..1; a user's own function takes the
whole batch and may give any finite number. The total of a completion is the weighted sum.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from mpi_mlx.data.completion import THINK_CLOSE, THINK_OPEN, split_completion
from mpi_mlx.data.examples import Example
from mpi_mlx.data.policy_tree import PolicyTree, check_trace, tree_of
from mpi_mlx.errors import DataError, RecipeError
from mpi_mlx.rollouts.tool_calls import tool_call_score
from mpi_mlx.rollouts.user_function import load_user_function

Batch = Callable[[Sequence[str], Sequence[Example]], np.ndarray]  # N completions -> (N,)


class RewardSet:
    """Several rewards with their weights; ``kinds`` names them, a repeated kind with a number.

    >>> rewards = build_rewards(stage.rewards, recipe_dir)
    >>> total, parts = rewards(["<think>red, so 2</think>\\nstop"], [example])  # (1,), {"exact_match": (1,)}
    """

    def __init__(self, parts: Sequence[tuple[str, float, Batch]]):
        self._parts: dict[str, tuple[float, Batch]] = {}
        for kind, weight, function in parts:
            name, number = kind, 2
            while name in self._parts:
                name, number = f"{kind}_{number}", number + 1
            self._parts[name] = (weight, function)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self._parts)

    def check(self, example: Example) -> None:
        """Raises DataError when ``example`` lacks what a built-in reward compares with."""
        for _, function in self._parts.values():
            if isinstance(function, partial):  # built in; a user's own says so when it is called
                function([""], [example])

    def __call__(
        self, completions: Sequence[str], examples: Sequence[Example]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Total (N,) and each kind's raw, unweighted rewards (N,), float32.

        Raises:
            DataError: an example lacks what a reward compares with.
            RecipeError: a user's function failed, or gave too few or too many rewards, or one not finite.
        """
        if len(completions) != len(examples):
            raise ValueError(f"{len(completions)} completions for {len(examples)} examples")
        values = {kind: function(completions, examples) for kind, (_, function) in self._parts.items()}
        total = np.zeros(len(completions), np.float64)
        for kind, (weight, _) in self._parts.items():
            total += weight * values[kind]
        return total.astype(np.float32), values


def build_rewards(specs: Sequence, recipe_dir: str | Path = ".", *, reasoning: bool = True) -> RewardSet:
    """The rewards of an ``rl`` stage (``stage.rewards``), each with ``kind``, ``weight`` and its own options.

    Args:
        recipe_dir: what a ``function``'s file is relative to.
        reasoning: whether completions should hold a trace; ``format`` asks for its tags, or for none, and
            ``trace`` pays nothing where none is wanted.

    Raises:
        RecipeError: no such kind, a pattern that does not compile, or a user's file that does not import.
    """
    return RewardSet([_build(spec, Path(recipe_dir), reasoning) for spec in specs])


def _build(spec, recipe_dir: Path, reasoning: bool) -> tuple[str, float, Batch]:
    kind = spec.kind
    name, one = kind, None
    if kind == "exact_match":
        one = exact_match
    elif kind == "format":
        one = partial(_format, reasoning=reasoning)
    elif kind == "regex":
        pattern = _compiled(spec.pattern)
        one = partial(_regex, pattern=pattern, of=getattr(spec, "of", "answer"))
    elif kind == "tool_call":
        one = partial(_tool_call, partial_credit=getattr(spec, "partial_credit", True))
    elif kind == "json":
        one = partial(_json, keys=tuple(getattr(spec, "keys", None) or ()))
    elif kind == "trace":
        one = trace if reasoning else _no_trace
    elif kind == "function":
        function = load_user_function(spec.function, recipe_dir)
        return function.name, float(spec.weight), function
    if one is None:
        raise RecipeError(f"rewards: no kind {kind!r}; use {', '.join(KINDS)}")
    return name, float(spec.weight), partial(_each, one)


KINDS = ("exact_match", "format", "regex", "tool_call", "json", "trace", "function")


def _each(one: Callable[[str, Example], float], completions, examples) -> np.ndarray:
    pairs = zip(completions, examples, strict=True)
    return np.array([one(text, example) for text, example in pairs], np.float32)


# ---- kinds: (completion, example) -> 0..1


def normalise_answer(answer: str) -> str:
    """Case folded, outer blanks stripped, inner runs of blanks made one.

    >>> normalise_answer("  Go\\n Left ")
    'go left'
    """
    return " ".join(answer.casefold().split())


def exact_match(completion: str, example: Example) -> float:
    """1 when the answer (what follows the trace) equals the example's, both normalised."""
    expected = normalise_answer(_expected(example, "exact_match"))
    return float(normalise_answer(split_completion(completion)[1]) == expected)


_WITH_TRACE = re.compile(
    rf"\s*{re.escape(THINK_OPEN)}(?P<trace>.*?){re.escape(THINK_CLOSE)}(?P<answer>.*)", re.DOTALL
)


def well_formed(completion: str, *, reasoning: bool = True) -> bool:
    """One ``<think>trace</think>``, neither empty, then a non-empty answer; without reasoning: no tags."""
    if not reasoning:
        return THINK_OPEN not in completion and THINK_CLOSE not in completion and bool(completion.strip())
    match = _WITH_TRACE.fullmatch(completion)
    if match is None or completion.count(THINK_OPEN) != 1 or completion.count(THINK_CLOSE) != 1:
        return False
    return bool(match["trace"].strip()) and bool(match["answer"].strip())


def _format(completion: str, example: Example, *, reasoning: bool) -> float:
    return float(well_formed(completion, reasoning=reasoning))


def _regex(completion: str, example: Example, *, pattern: re.Pattern, of: str) -> float:
    text = split_completion(completion)[1] if of == "answer" else completion
    return float(pattern.search(text) is not None)


def _tool_call(completion: str, example: Example, *, partial_credit: bool) -> float:
    expected = _expected(example, "tool_call")
    value = tool_call_score(split_completion(completion)[1], expected)
    return value if partial_credit else float(value == 1.0)


def _json(completion: str, example: Example, *, keys: tuple[str, ...]) -> float:
    """1 when the whole answer is JSON; with ``keys`` the share of them that the object has."""
    try:
        value = json.loads(split_completion(completion)[1], parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return 0.0
    if not keys:
        return 1.0
    return sum(key in value for key in keys) / len(keys) if isinstance(value, dict) else 0.0


def trace(completion: str, example: Example) -> float:
    """How true the trace is to the document and to itself (policy_tree.check_trace); needs no gold trace."""
    tree = _tree(json.dumps(example.meta.get("tree")))
    if tree is None:
        raise DataError(
            f"example {example.id!r}: reward trace needs meta.tree, which the built-in benchmark writes; "
            "for your own documents use kind: function"
        )
    reasoning, answer = split_completion(completion)
    return float(check_trace(reasoning, answer, tree))


def _no_trace(completion: str, example: Example) -> float:
    """``trace`` of a stage with ``reasoning: false``: paid for traces, its model would end up writing them."""
    return 0.0


@lru_cache(maxsize=32)
def _tree(raw: str) -> PolicyTree | None:
    return tree_of({"tree": json.loads(raw)})


# ---- small helpers


def _expected(example: Example, kind: str) -> str:
    if example.answer is None:
        raise DataError(f"example {example.id!r} has no answer; reward {kind} compares with it")
    return example.answer


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise RecipeError(f"rewards: pattern {pattern!r} does not compile: {error}") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(name)  # NaN and Infinity are not JSON
