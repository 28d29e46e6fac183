"""ClevrPolicy documents: decision trees over scenes, their wording, their traces and the traces' checker.

A tree of depth d has 2**d - 1 sections, each with one condition, and 2**d replies. The benchmark follows
ClevrPolicy (Multimodal Policy Internalization, arXiv 2510.09474, section 4).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from mpi_mlx.data.conditions import Condition, Filter, candidate, filters
from mpi_mlx.data.scenes import ATTRIBUTES, CELL_NAMES, GRID, Scene, SceneArrays, SceneObject, random_scenes
from mpi_mlx.data.vocabulary import REPLIES, SECTION_NAMES

COMMON = 16
SPLIT = (0.2, 0.8)  # each condition says yes to this share of the scenes that reach its section


@dataclass(frozen=True)
class PolicyTree:
    """A full binary tree in heap order: section i leads to 2i+1 (yes) and 2i+2 (no)."""

    depth: int
    conditions: tuple[Condition, ...]  # 2**depth - 1
    names: tuple[str, ...]  # 2**depth - 1
    replies: tuple[str, ...]  # 2**depth

    def leaves(self, scenes: SceneArrays) -> np.ndarray:
        """int (N,): index of the reply that each scene leads to."""
        at = np.zeros(len(scenes), np.int64)
        answers = np.stack([c.holds(scenes) for c in self.conditions], 1)
        for _ in range(self.depth):
            at = 2 * at + np.where(answers[np.arange(len(at)), at], 1, 2)
        return at - len(self.conditions)

    def walk(self, scene: Scene) -> tuple[list[tuple[int, bool]], int]:
        """The sections visited with their yes or no, and the index of the reply."""
        one = SceneArrays.of([scene])
        at, steps = 0, []
        while at < len(self.conditions):
            yes = bool(self.conditions[at].holds(one)[0])
            steps.append((at, yes))
            at = 2 * at + (1 if yes else 2)
        return steps, at - len(self.conditions)

    def target(self, node: int) -> str | None:
        """Name of a section, or None when ``node`` is a reply."""
        return self.names[node] if node < len(self.names) else None

    def trace(self, scene: Scene) -> str:
        """The reasoning: the scene in reading order, then the walk."""
        steps, _ = self.walk(scene)
        return f"{scene.describe()}. {self.walk_text(steps)}"

    def walk_text(self, steps: list[tuple[int, bool]]) -> str:
        """The sections visited, each in the document's words, then the reply.

        ``Falcon red cube? Falcon no Otter large sphere? Otter yes maple.``: the name stands again beside the
        yes or no, so that where they lead is found by the two words before it.
        """
        words = [
            f"{self.names[i]} {self.conditions[i].phrase}? {self.names[i]} {'yes' if yes else 'no'}" for i, yes in steps
        ]
        node, yes = steps[-1]
        return f"{' '.join(words)} {self.replies[2 * node + (1 if yes else 2) - len(self.names)]}."

    def to_dict(self) -> dict:
        return {
            "depth": self.depth,
            "conditions": [c.to_dict() for c in self.conditions],
            "names": list(self.names),
            "replies": list(self.replies),
        }

    @classmethod
    def from_dict(cls, raw: dict) -> PolicyTree:
        return cls(
            raw["depth"],
            tuple(Condition.from_dict(c) for c in raw["conditions"]),
            tuple(raw["names"]),
            tuple(raw["replies"]),
        )


def tree_of(meta: dict) -> PolicyTree | None:
    """The tree that the benchmark wrote into an example's ``meta``; None where ``tree`` is the user's own."""
    raw = meta.get("tree")
    if not isinstance(raw, dict) or raw.get("depth") not in range(1, 7):
        return None
    nothing = SceneArrays.of([])
    try:
        tree = PolicyTree.from_dict(raw)
        for condition in tree.conditions:  # fails where it is none of ours
            condition.holds(nothing)
            condition.phrase  # noqa: B018
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None
    sections = 2**tree.depth - 1
    sizes = (len(tree.conditions), len(tree.names), len(tree.replies))
    words = all(isinstance(word, str) for word in (*tree.names, *tree.replies))
    return tree if sizes == (sections, sections, sections + 1) and words and tree.to_dict() == raw else None


def random_tree(
    rng: np.random.Generator,
    depth: int,
    *,
    kinds: tuple[str, ...] = ("exists",),
    scenes: SceneArrays | None = None,
    max_objects: int = 5,
) -> PolicyTree:
    """A tree in which every condition matters: each splits the scenes that reach it (SPLIT).

    ``scenes``: the sample to judge that by (default: 6,000 random ones).
    """
    if not 1 <= depth <= 6:
        raise ValueError("depth: 1 to 6")
    if scenes is None:
        scenes = random_scenes(rng, 6000, max_objects=max_objects)
    pool = filters()
    conditions: list[Condition] = []
    reach: list[np.ndarray] = [np.arange(len(scenes))]
    for node in range(2**depth - 1):
        condition, yes = _splitting_condition(rng, kinds, pool, scenes, reach[node], conditions)
        conditions.append(condition)
        reach += [reach[node][yes], reach[node][~yes]]
    # Names come in a fixed order, as numbers of rules would: what varies is where each rule leads. Up to
    # depth 4 all replies are of the same 16: fewer words for a tiny model to match.
    names = [0, *(1 + rng.permutation(len(conditions) - 1))]
    replies = rng.permutation(max(COMMON, 2**depth))[: 2**depth]
    return PolicyTree(
        depth, tuple(conditions), tuple(SECTION_NAMES[i] for i in names), tuple(REPLIES[i] for i in replies)
    )


def _splitting_condition(rng, kinds, pool, scenes, reach, before) -> tuple[Condition, np.ndarray]:
    sub = SceneArrays(scenes.attributes[reach[:400]], scenes.xy[reach[:400]])
    best, best_gap = None, 2.0
    for _ in range(60):
        condition = candidate(kinds[int(rng.integers(len(kinds)))], rng, pool)
        if condition in before:
            continue
        share = condition.holds(sub).mean() if len(sub) else 0.5
        if SPLIT[0] <= share <= SPLIT[1]:
            best = condition
            break
        if abs(share - 0.5) < best_gap:
            best, best_gap = condition, abs(share - 0.5)
    full = SceneArrays(scenes.attributes[reach], scenes.xy[reach])
    return best, best.holds(full)


# --- wording -------------------------------------------------------------------------------------------

_COMPACT = "## {name} {phrase}? {name} yes {yes}, {name} no {no}."
_NATURAL = (
    "## {name}\nIf there is {clause}, {yes}; otherwise {no}.",
    "## {name}\nLook for {clause}. If you find it, {yes}. If not, {no}.",
    "## {name}\nDoes the picture show {clause}? Then {yes}. Else {no}.",
    "## {name}\nWithout {clause}, {no}. With it, {yes}.",
)
_GO = ("go to {}", "continue with {}", "see {}")
_REPLY = ("reply {}", "answer {}", "say {}")
_COMPACT_INTRO = (
    "# Rulebook\nStart at {start}. A section asks about the picture; a name sends you on, a word is the reply.",
    "# Reply rules\nBegin with section {start} and follow the names. The first plain word is the reply.",
)
_INTRO = (
    "# Rulebook\nLook at the picture, start at {start} and follow the sections. Reply with one word.",
    "# How to reply\nEvery picture gets one word. Begin with section {start}.",
    "# Reply rules\nStart at {start}. Each section sends you on or gives the reply.",
)


def document_text(tree: PolicyTree, rng: np.random.Generator, *, wording: str = "natural") -> str:
    """The tree as Markdown: an introduction, then one section a condition, in the order of their names.

    ``wording``: ``compact`` (a section's question is its heading, then where yes and no lead), ``natural``
    (full sentences in varied wording) or ``mixed`` (one of the two, drawn for the document).
    """
    if wording == "mixed":
        wording = ("compact", "natural")[int(rng.integers(2))]
    go, reply = _GO[int(rng.integers(len(_GO)))], _REPLY[int(rng.integers(len(_REPLY)))]

    def action(node: int) -> str:
        name = tree.target(node)
        if compact:
            return name or tree.replies[node - len(tree.names)]
        return go.format(name) if name else reply.format(tree.replies[node - len(tree.names)])

    compact = wording == "compact"
    intros = _COMPACT_INTRO if compact else _INTRO
    lines = [intros[int(rng.integers(len(intros)))].format(start=tree.names[0])]
    for i in sorted(range(len(tree.names)), key=lambda i: SECTION_NAMES.index(tree.names[i])):
        template = _COMPACT if compact else _NATURAL[int(rng.integers(len(_NATURAL)))]
        condition = tree.conditions[i]
        lines.append(
            template.format(
                name=tree.names[i], phrase=condition.phrase, clause=condition.clause,
                yes=action(2 * i + 1), no=action(2 * i + 2),
            )
        )
    return "\n\n".join(lines) + "\n"


# --- the checker ---------------------------------------------------------------------------------------

_STEP = re.compile(r"(?=(?<!\w)(\w+) ([a-z ]+)\? \1 (yes|no) (\w+))")


def parse_description(text: str) -> Scene | None:
    """The inverse of :meth:`Scene.describe`; None when the text is not a description.

    Objects of one cell (CLEVR's own pictures have them) all stand in its middle, in the text's order: the text
    does not say how they lie to each other, and no relation holds between them.
    """
    objects = []
    for part in text.split(", "):
        words = part.split()
        if len(words) != 5 or words[0] not in CELL_NAMES:
            return None
        values = dict(zip(ATTRIBUTES, words[1:], strict=True))
        if any(value not in ATTRIBUTES[name] for name, value in values.items()):
            return None
        cell = CELL_NAMES.index(words[0])
        x, y = (cell % GRID + 0.5) / GRID, (cell // GRID + 0.5) / GRID
        objects.append(SceneObject(**values, x=x, y=y))
    cells = [o.cell for o in objects]
    return Scene(tuple(objects)) if cells == sorted(cells) else None


def check_trace(reasoning: str | None, answer: str, tree: PolicyTree) -> float:
    """How true a trace is to the document and to itself, in 0..1; needs no reference trace.

    1.0: it describes a scene, then walks the document's tree from the root with the document's own
    conditions, each yes or no agreeing with the scene as described, and ends in the reply that it gives.
    Otherwise the share of right steps, halved; 0 without a description.
    """
    description, _, walk = (reasoning or "").strip().partition(". ")
    scene = parse_description(description)
    if scene is None:
        return 0.0
    steps, leaf = tree.walk(scene)
    text = tree.walk_text(steps)
    if " ".join(walk.split()) == text and answer.strip() == tree.replies[leaf]:
        return 1.0
    expected, found = _STEP.findall(text), _STEP.findall(walk)
    right = sum(a == b for a, b in zip(found, expected, strict=False))
    return 0.5 * right / max(len(found), len(expected), 1)


__all__ = [
    "Condition", "Filter", "PolicyTree", "check_trace", "document_text", "parse_description", "random_tree", "tree_of",
]
