"""What completions of one prompt begin with in common, and which prompts to forward together.

Costs are in tokens: what a forward of padded rows computes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WIDTH_MULTIPLE = 8  # completions are padded to a multiple of this, so that few distinct shapes occur
FORWARD_TOKENS = 64  # what one more forward costs besides its tokens


def padded(width: int) -> int:
    return -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def common_stem(completions: Sequence[np.ndarray]) -> int:
    """Leading tokens that all completions share, one short of the shortest at most: each keeps a token of its own.

    >>> common_stem([np.array([5, 6, 7]), np.array([5, 6, 8, 9])])
    2
    """
    most = min((len(c) for c in completions), default=1) - 1
    rows = np.stack([c[:most] for c in completions]) if most > 0 else np.zeros((1, 0))
    differs = np.flatnonzero((rows != rows[0]).any(axis=0))
    return int(differs[0]) if len(differs) else rows.shape[1]


def split_by_stem(prompt: int, completions: Sequence[np.ndarray]) -> list[list[int]]:
    """Indices of the completions (equal ones together) that should each be forwarded as a group of its own.

    One that differs early leaves a group little that all of it begins with. Apart, each part carries the prompt's
    `prompt` tokens and a stem of its own: where they differ first, completions part by the token that they go on with,
    or the largest part leaves the others, if that costs fewer tokens; and so on within the parts.

    >>> split_by_stem(2, [np.array([1, 2, 3, 4, 5, 6]), np.array([1, 2, 3, 4, 5, 7]), np.array([8, 9])])
    [[0, 1], [2]]
    """
    same: dict[bytes, list[int]] = {}
    for i, completion in enumerate(completions):
        same.setdefault(np.asarray(completion, np.int32).tobytes(), []).append(i)
    if not same:
        return []
    copies = list(same.values())
    _, parts = _cheapest(prompt, [completions[c[0]] for c in copies], list(range(len(copies))))
    return sorted(sorted(i for k in part for i in copies[k]) for part in parts)


def _cheapest(prompt: int, completions: Sequence[np.ndarray], members: list[int]) -> tuple[int, list[list[int]]]:
    """(tokens, parts) of the cheapest way to part `members`."""
    chosen = [completions[i] for i in members]
    stem = common_stem(chosen)
    whole = (prompt + stem + sum(len(c) - stem for c in chosen), [members])
    children: dict[int, list[int]] = {}
    for i in members:
        children.setdefault(int(completions[i][stem]), []).append(i)
    if len(children) < 2:
        return whole
    largest, *others = sorted(children.values(), key=len, reverse=True)
    best = _cheapest(prompt, completions, largest)
    ways = [whole, _joined([best, *(_cheapest(prompt, completions, child) for child in others)])]
    if len(others) > 1:
        ways.append(_joined([best, _cheapest(prompt, completions, sorted(sum(others, [])))]))
    return min(ways, key=lambda way: way[0])


def _joined(ways: Sequence[tuple[int, list[list[int]]]]) -> tuple[int, list[list[int]]]:
    return sum(tokens for tokens, _ in ways), [part for _, parts in ways for part in parts]


class Shape(NamedTuple):
    """A prompt and its completions, as far as their cost goes."""

    prompt: int  # its own tokens, without what it shares with others
    rows: int  # different completions
    longest: int
    stem: int

    @staticmethod
    def of(prompt: int, completions: Sequence[np.ndarray]) -> "Shape":
        different = {np.asarray(c, np.int32).tobytes(): c for c in completions}.values()
        return Shape(prompt, len(different), max(map(len, different), default=0), common_stem(list(different)))


def stem_limit(shapes: Sequence[Shape], layers: int) -> int:
    """The longest stem to forward with its prompt when these share a forward: what is cheapest.

    A prompt carries its stem once for all rows, but prompts are padded to the longest of them, and the last of
    `layers`, of which a prompt's keys and values need no output, is computed for it whole.
    """
    choices = sorted({0, *(s.stem for s in shapes)})
    return min(choices, key=lambda limit: _cost(shapes, limit, layers))


def _cost(shapes: Sequence[Shape], limit: int, layers: int) -> float:
    before = max(s.prompt - 1 + min(s.stem, limit) for s in shapes) * len(shapes)
    after = max(s.longest - min(s.stem, limit) for s in shapes)
    return before * (1 + (limit > 0) / layers) + sum(s.rows for s in shapes) * padded(after)


def together(shapes: Sequence[Shape], most_tokens: int, each: int = 0) -> list[list[int]]:
    """Indices of the shapes that should share a forward: the least padding and the fewest forwards.

    A forward holds at most `most_tokens` of prompts, stems and rows (or one prompt with its own), what prompts share
    not counted; it costs `FORWARD_TOKENS` and `each` (what prompts share) more. Deterministic; they come by how long
    their completions are after the stem.
    """
    order = sorted(range(len(shapes)), key=lambda i: shapes[i].longest - shapes[i].stem)
    best, cut = [0.0], [0]
    for stop in range(1, len(order) + 1):
        rows = prompt = tail = 0
        found = (float("inf"), stop - 1)
        for start in range(stop - 1, -1, -1):
            shape = shapes[order[start]]
            rows, prompt = rows + shape.rows, max(prompt, shape.prompt - 1 + shape.stem)
            tail = max(tail, padded(shape.longest - shape.stem))
            if start < stop - 1 and (stop - start) * prompt + rows * tail > most_tokens:
                break
            cost = best[start] + (stop - start) * prompt + rows * tail + FORWARD_TOKENS + each
            found = min(found, (cost, start))
        best.append(found[0])
        cut.append(found[1])
    out, stop = [], len(order)
    while stop:
        out.append(order[cut[stop] : stop])
        stop = cut[stop]
    return out[::-1]
