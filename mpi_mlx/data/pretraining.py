"""Endless rows from which the embedded model learns to see, to look things up and to follow documents.

Everything is drawn anew for each step from (seed, step): random scenes, random documents, random questions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpi_mlx.data.completion import THINK_CLOSE, THINK_OPEN, completion_text
from mpi_mlx.data.conditions import Condition, Filter, filters
from mpi_mlx.data.policy_tree import COMMON, PolicyTree, document_text, random_tree
from mpi_mlx.data.scenes import ATTRIBUTES, CELL_NAMES, Scene, SceneArrays, random_scenes
from mpi_mlx.data.vocabulary import QUERIES, REPLIES, SECTION_NAMES

TASKS = ("document", "walk", "recall", "lookup", "repeat", "check", "describe", "ask")
POOL_STEPS = 20  # the pool of candidate scenes is drawn anew every so many steps
POOL_SIZE = 4000
QUESTIONS = 14  # conditions in a `check` row
WORDINGS = ("compact",)


@dataclass(frozen=True)
class Task:
    """One row: what the user says (after the picture, if any), what the assistant answers.

    ``graded``: spans (start, stop) of ``answer``'s characters whose tokens are trained; None: all of them.
    ``document``: index of the step's document that stands in the system message, or None.
    """

    kind: str
    user: str
    answer: str
    scene: Scene | None
    document: int | None = None
    graded: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class TaskBatch:
    documents: tuple[str, ...]
    tasks: tuple[Task, ...]


_FILTERS = filters()


def draw_step(
    seed: int,
    step: int,
    *,
    rows: int,
    shares: dict[str, float],
    depths: dict[int, float],
    scenes_per_document: int = 4,
    max_objects: int = 5,
) -> TaskBatch:
    """The rows of one step. ``shares``: share of each of TASKS among ``rows``; ``depths``: of documents."""
    unknown = set(shares) - set(TASKS)
    if unknown:
        raise ValueError(f"unknown tasks {sorted(unknown)}; known: {', '.join(TASKS)}")
    rng = np.random.default_rng([seed, 11, step])
    pool = random_scenes(
        np.random.default_rng([seed, 12, step // POOL_STEPS]), POOL_SIZE, max_objects=max_objects
    )
    counts = _apportion(rows, shares)
    about_documents = [kind for kind in _DOCUMENT_TASKS for _ in range(counts[kind])]
    about_documents = [about_documents[i] for i in rng.permutation(len(about_documents))]
    documents: list[str] = []
    tasks: list[Task] = []
    for start in range(0, len(about_documents), scenes_per_document):
        depth = int(rng.choice(list(depths), p=np.array(list(depths.values())) / sum(depths.values())))
        tree = random_tree(rng, depth, scenes=pool)
        documents.append(document_text(tree, rng, wording=WORDINGS[int(rng.integers(len(WORDINGS)))]))
        leaves = tree.leaves(pool)
        for kind in about_documents[start : start + scenes_per_document]:
            tasks.append(_DOCUMENT_TASKS[kind](rng, tree, pool, leaves, len(documents) - 1))
    for start in range(0, counts["lookup"], scenes_per_document):
        lines = _list_lines(rng)
        documents.append("# List\n\n" + "\n\n".join(f"## {name} {text}." for name, text in lines) + "\n")
        for _ in range(min(scenes_per_document, counts["lookup"] - start)):
            tasks.append(_lookup_task(rng, lines, len(documents) - 1))
    tasks += [_repeat_task(rng) for _ in range(counts["repeat"])]
    makers = {"check": _check_task, "describe": _describe_task, "ask": _ask_task}
    for kind, make in makers.items():
        tasks += [make(rng, pool.scene(int(rng.integers(len(pool))))) for _ in range(counts[kind])]
    return TaskBatch(tuple(documents), tuple(tasks))


def _apportion(rows: int, shares: dict[str, float]) -> dict[str, int]:
    total = sum(shares.values())
    counts = {kind: int(rows * shares.get(kind, 0.0) / total) for kind in TASKS}
    largest = max(shares, key=shares.get)
    counts[largest] += rows - sum(counts.values())
    return counts


def _document_task(rng, tree: PolicyTree, pool: SceneArrays, leaves: np.ndarray, document: int) -> Task:
    # Replies are asked for evenly, as in the benchmark; a fifth of the rows keep the natural frequencies.
    index = int(rng.integers(len(pool)))
    if rng.random() < 0.8:
        candidates = np.flatnonzero(leaves == rng.integers(2**tree.depth))
        if len(candidates):
            index = int(candidates[rng.integers(len(candidates))])
    scene = pool.scene(index)
    answer = completion_text(tree.trace(scene), tree.replies[int(leaves[index])])
    return Task("document", QUERIES[int(rng.integers(len(QUERIES)))], answer, scene, document)


def _walk_task(rng, tree: PolicyTree, pool: SceneArrays, leaves: np.ndarray, document: int) -> Task:
    """Navigation alone, no picture: each yes or no is drawn, and not trained."""
    at, steps = 0, []
    while at < len(tree.conditions):
        yes = bool(rng.integers(2))
        steps.append((at, yes))
        at = 2 * at + (1 if yes else 2)
    reply = tree.replies[at - len(tree.conditions)]
    answer = completion_text(f"nothing. {tree.walk_text(steps)}", reply)
    cuts = [m.span() for m in re.finditer(r" (yes|no)\b", answer)]
    graded = tuple(zip([0, *(stop for _, stop in cuts)], [*(start for start, _ in cuts), len(answer)], strict=True))
    return Task("walk", "Walk at random.", answer, None, document, graded)


def _recall_task(rng, tree: PolicyTree, pool: SceneArrays, leaves: np.ndarray, document: int) -> Task:
    """Looking up: some sections by name, in one short form whatever the document's wording."""
    lines = []
    for i in rng.permutation(len(tree.names))[:3]:
        yes, no = (
            tree.target(node) or tree.replies[node - len(tree.names)] for node in (2 * i + 1, 2 * i + 2)
        )
        name, phrase = tree.names[i], tree.conditions[i].phrase
        lines.append((name, f"{name} {phrase}? {name} yes {yes}, {name} no {no}."))
    asked = " ".join(name for name, _ in lines)
    return Task("recall", f"Recall {asked}.", " ".join(text for _, text in lines), None, document)


def _list_lines(rng) -> list[tuple[str, str]]:
    """Names, each with one to three random words: a document without structure."""
    words = (*REPLIES[:COMMON], *(v for values in ATTRIBUTES.values() for v in values))
    names = rng.permutation(COMMON)[: int(rng.integers(3, COMMON))]
    return [
        (SECTION_NAMES[i], " ".join(words[j] for j in rng.integers(len(words), size=int(rng.integers(1, 4)))))
        for i in names
    ]


def _lookup_task(rng, lines: list[tuple[str, str]], document: int) -> Task:
    """Looking up names that stand once each, however far back."""
    chosen = [lines[i] for i in rng.permutation(len(lines))[:5]]
    asked = " ".join(name for name, _ in chosen)
    answer = " ".join(f"{name} {text}." for name, text in chosen)
    return Task("lookup", f"Recall {asked}.", answer, None, document)


def _repeat_task(rng) -> Task:
    """Copying: a row of random words. It is what makes looking things up emerge early."""
    words = (*SECTION_NAMES, *REPLIES, *(v for values in ATTRIBUTES.values() for v in values))
    text = " ".join(words[i] for i in rng.integers(len(words), size=int(rng.integers(8, 25))))
    return Task("repeat", f"Repeat {text}", f"Repeat {text}", None)


_DOCUMENT_TASKS = {"document": _document_task, "walk": _walk_task, "recall": _recall_task}


def questions(rng, scene: Scene, count: int) -> list[tuple[Condition, bool]]:
    """Existence conditions with their truth: a third true of an object, a third near misses, a third random."""
    arrays = SceneArrays.of([scene])
    out = []
    for _ in range(count):
        kind = rng.integers(3)
        chosen = _FILTERS[int(rng.integers(len(_FILTERS)))]
        if kind < 2:
            o = scene.objects[int(rng.integers(len(scene.objects)))]
            pairs = [(name, getattr(o, name)) for name, _ in chosen.pairs]
            if kind == 1:
                at = int(rng.integers(len(pairs)))
                values = ATTRIBUTES[pairs[at][0]]
                pairs[at] = (pairs[at][0], values[int(rng.integers(len(values)))])
            chosen = Filter(tuple(pairs))
        condition = Condition("exists", chosen)
        out.append((condition, bool(condition.holds(arrays)[0])))
    return out


def _check_task(rng, scene: Scene) -> Task:
    """The description, then many conditions of which only the yes or no is trained."""
    described = rng.random() < 0.7
    text = f"{THINK_OPEN}{scene.describe()}." if described else THINK_OPEN
    graded = [(0, len(text))] if described else []
    for condition, truth in questions(rng, scene, QUESTIONS):
        name = SECTION_NAMES[int(rng.integers(COMMON))]
        text += f" {name} {condition.phrase}? {name}"
        start = len(text)
        text += f" {'yes' if truth else 'no'}"
        graded.append((start, len(text)))
    text += "."
    return Task("check", "Check some conditions.", f"{text}{THINK_CLOSE}\ndone", scene, graded=tuple(graded))


def _describe_task(rng, scene: Scene) -> Task:
    return Task("describe", "Describe the picture.", f"{scene.describe()}.", scene)


def _ask_task(rng, scene: Scene) -> Task:
    """One plain question on existence, a place, or an attribute of the only object of a kind."""
    kind = rng.integers(3)
    if kind == 0:
        ((condition, truth),) = questions(rng, scene, 1)
        return Task("ask", f"Is there {condition.clause}?", "yes" if truth else "no", scene)
    if kind == 1:
        cell = int(rng.integers(9))
        if rng.random() < 0.7:
            cell = scene.objects[int(rng.integers(len(scene.objects)))].cell
        found = [o.describe() for o in scene.objects if o.cell == cell]
        return Task("ask", f"What is at {CELL_NAMES[cell]}?", found[0] if found else "nothing", scene)
    return _attribute_question(rng, scene)


def _attribute_question(rng, scene: Scene) -> Task:
    wanted = list(ATTRIBUTES)[int(rng.integers(4))]
    for index in rng.permutation(len(scene.objects)):
        o = scene.objects[index]
        others = [(name, getattr(o, name)) for name in ATTRIBUTES if name != wanted]
        chosen = Filter(tuple(sorted(
            (others[i] for i in rng.permutation(3)[:2]), key=lambda pair: list(ATTRIBUTES).index(pair[0])
        )))
        if sum(all(getattr(x, n) == v for n, v in chosen.pairs) for x in scene.objects) == 1:
            return Task("ask", f"Which {wanted} has the {chosen.noun}?", getattr(o, wanted), scene)
    o = scene.objects[0]
    return Task("ask", f"Which {wanted} is at {CELL_NAMES[o.cell]}?", getattr(o, wanted), scene)


def cell_labels(scenes: Sequence[Scene]) -> np.ndarray:
    """int8 (N, 9, 5): present (0 or 1), then the index of each attribute's value (-1 where empty)."""
    out = np.full((len(scenes), len(CELL_NAMES), 1 + len(ATTRIBUTES)), -1, np.int8)
    out[:, :, 0] = 0
    for n, scene in enumerate(scenes):
        for o in scene.objects:
            values = [vs.index(getattr(o, name)) for name, vs in ATTRIBUTES.items()]
            out[n, o.cell] = [1, *values]
    return out
