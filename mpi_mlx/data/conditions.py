"""Conditions over a scene: existence, count, and relation of objects."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mpi_mlx.data.scenes import ATTRIBUTES, MARGIN, SceneArrays

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five")
RELATIONS = ("left of", "right of", "in front of", "behind")


@dataclass(frozen=True)
class Filter:
    """Some of the four attributes, in the order of ATTRIBUTES: ``(("color", "red"), ("shape", "cube"))``."""

    pairs: tuple[tuple[str, str], ...]

    def matches(self, scenes: SceneArrays) -> np.ndarray:
        """bool (N, M): which objects of each scene have all these attributes."""
        out = scenes.present
        for name, value in self.pairs:
            column = list(ATTRIBUTES).index(name)
            out = out & (scenes.attributes[:, :, column] == ATTRIBUTES[name].index(value))
        return out

    @property
    def noun(self) -> str:
        """``small metal object``, ``red cube``."""
        words = [value for _, value in self.pairs]
        return " ".join(words if self.pairs[-1][0] == "shape" else [*words, "object"])

    @property
    def plural(self) -> str:
        return self.noun + "s"


@dataclass(frozen=True)
class Condition:
    """``exists`` first; ``count``: at least ``number`` of first; ``relation``: first ``relation`` second."""

    kind: str
    first: Filter
    number: int = 1
    relation: str | None = None
    second: Filter | None = None

    def holds(self, scenes: SceneArrays) -> np.ndarray:
        """bool (N,)."""
        first = self.first.matches(scenes)
        if self.kind == "exists":
            return first.any(1)
        if self.kind == "count":
            return first.sum(1) >= self.number
        axis, sign = {"left of": (0, 1), "right of": (0, -1), "behind": (1, 1), "in front of": (1, -1)}[
            self.relation
        ]
        at = scenes.xy[:, :, axis] * sign
        apart = at[:, None, :] - at[:, :, None] > MARGIN
        return (first[:, :, None] & self.second.matches(scenes)[:, None, :] & apart).any((1, 2))

    @property
    def phrase(self) -> str:
        """What the trace asks: ``red cube``, ``two metal objects``, ``red cube left of large sphere``."""
        if self.kind == "exists":
            return self.first.noun
        if self.kind == "count":
            return f"{NUMBER_WORDS[self.number]} {self.first.plural}"
        return f"{self.first.noun} {self.relation} {self.second.noun}"

    @property
    def clause(self) -> str:
        """As a noun phrase of a sentence: ``a red cube``, ``at least two metal objects``."""
        if self.kind == "exists":
            return f"a {self.first.noun}"
        if self.kind == "count":
            return f"at least {self.phrase}"
        return f"a {self.first.noun} {self.relation} a {self.second.noun}"

    def to_dict(self) -> dict:
        out: dict = {"kind": self.kind, "first": dict(self.first.pairs)}
        if self.kind == "count":
            out["number"] = self.number
        if self.kind == "relation":
            out |= {"relation": self.relation, "second": dict(self.second.pairs)}
        return out

    @classmethod
    def from_dict(cls, raw: dict) -> Condition:
        second = Filter(tuple(raw["second"].items())) if "second" in raw else None
        return cls(
            raw["kind"], Filter(tuple(raw["first"].items())), raw.get("number", 1), raw.get("relation"), second
        )


def filters(sizes: tuple[int, ...] = (1, 2)) -> list[Filter]:
    """All filters that name ``sizes`` attributes."""
    out = []
    for size in sizes:
        for names in combinations(ATTRIBUTES, size):
            stack: list[tuple[tuple[str, str], ...]] = [()]
            for name in names:
                stack = [(*pairs, (name, value)) for pairs in stack for value in ATTRIBUTES[name]]
            out += [Filter(pairs) for pairs in stack]
    return out


def candidate(kind: str, rng: np.random.Generator, pool: list[Filter]) -> Condition:
    """A random condition of ``kind`` over the filters of ``pool``."""

    def pick() -> Filter:
        return pool[int(rng.integers(len(pool)))]

    if kind == "exists":
        return Condition("exists", pick())
    if kind == "count":
        return Condition("count", pick(), number=int(rng.integers(2, 4)))
    if kind == "relation":
        return Condition("relation", pick(), relation=RELATIONS[int(rng.integers(4))], second=pick())
    raise ValueError(f"unknown kind of condition {kind!r}: exists, count or relation")
