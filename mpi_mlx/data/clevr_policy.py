"""ClevrPolicy: a random rulebook over CLEVR-like scenes, with labelled, checkable and held-out examples.

Splits never share a scene (same cells and attributes), and within a split every reply is asked for about
equally often, so that the majority answer earns about 2**-depth.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mpi_mlx.data.conditions import Condition
from mpi_mlx.data.dataset import Dataset
from mpi_mlx.data.examples import Example
from mpi_mlx.data.policy_tree import PolicyTree, document_text, random_tree
from mpi_mlx.data.scenes import GRID, Scene, SceneArrays, SceneObject, random_scenes
from mpi_mlx.data.vocabulary import QUERIES
from mpi_mlx.documents import PolicyDocument
from mpi_mlx.errors import DataError

DEFAULT_SIZE = {"flat": 84, "clevr": 448}
# In the order in which scenes are given out: more labelled examples leave the test as it is.
SPLITS = ("test", "validation", "rl", "train")
BANK = 50_000  # scenes drawn at least: rare replies need many, to be as frequent as the others


@dataclass(frozen=True)
class SceneImage:
    """A picture drawn from its scene when it is first needed."""

    scene: Scene
    style: str = "flat"
    size: int = 84
    seed: int = 0

    @property
    def key(self) -> str:
        """Names the picture's content."""
        raw = f"{self.scene.to_dict()}|{self.style}|{self.size}|{self.seed}"
        return hashlib.sha256(raw.encode()).hexdigest()

    def open(self) -> Image.Image:
        """The RGB picture."""
        if self.style == "flat":
            from mpi_mlx.data.render_flat import render_flat

            return render_flat(self.scene, self.size)
        from mpi_mlx.data.render_clevr import render_clevr

        return render_clevr(self.scene, self.size, self.seed)


def balanced_indices(
    leaves: np.ndarray, count: int, replies: int, rng: np.random.Generator, used: np.ndarray
) -> np.ndarray:
    """``count`` indices of scenes not yet ``used`` (bool (N,), updated), each reply as often as it can be.

    Raises:
        DataError: fewer than ``count`` scenes are left.
    """
    free = [rng.permutation(np.flatnonzero((leaves == leaf) & ~used)).tolist() for leaf in range(replies)]
    if sum(map(len, free)) < count:
        left = sum(map(len, free))
        raise DataError(f"data: only {left} distinct scenes are left for {count} examples; ask for fewer")
    chosen: list[int] = []
    while len(chosen) < count:
        order = rng.permutation([leaf for leaf in range(replies) if free[leaf]])
        chosen += [free[leaf].pop() for leaf in order[: count - len(chosen)]]
    chosen = rng.permutation(chosen).astype(np.int64)
    used[chosen] = True
    return chosen


def distinct(scenes: SceneArrays) -> SceneArrays:
    """The scenes without repetitions of content (the first of each is kept)."""
    cells = np.floor(scenes.xy * GRID).astype(np.int8)
    content = np.concatenate([scenes.attributes, cells], -1).reshape(len(scenes), -1)
    _, first = np.unique(content, axis=0, return_index=True)
    first.sort()
    return SceneArrays(scenes.attributes[first], scenes.xy[first])


def make_example(
    tree: PolicyTree, scene: Scene, image: object, identity: str, query: str, *, reasoning: bool, tree_dict: dict
) -> Example:
    """One question about ``scene`` under ``tree``; ``reasoning=False`` leaves the trace out."""
    _, leaf = tree.walk(scene)
    content = [{"type": "image", "image": image}, {"type": "text", "text": query}]
    return Example(
        id=identity,
        messages=({"role": "user", "content": content},),
        reasoning=tree.trace(scene) if reasoning else None,
        answer=tree.replies[leaf],
        tools=None,
        meta={"scene": scene.to_dict(), "leaf": leaf, "tree": tree_dict},
    )


def build_clevr_policy(spec) -> Dataset:
    """The document and its four splits. ``spec``: the recipe's ``data`` block (see recipe.BenchmarkData).

    The document depends on ``document_seed`` (default: ``seed``) alone; the scenes on ``seed``.
    """
    document_seed = spec.seed if spec.document_seed is None else spec.document_seed
    kinds = tuple(spec.conditions)
    rng = np.random.default_rng([document_seed, 1])
    tree = random_tree(rng, spec.depth, kinds=kinds, max_objects=spec.max_objects)
    size = spec.image_size or DEFAULT_SIZE[spec.style]
    document = build_document(tree, rng, spec, size)
    counts = {"train": spec.train, "validation": spec.validation, "test": spec.test, "rl": spec.rl or 0}
    size_of_bank = max(BANK, 4 * sum(counts.values()) + 20_000)
    bank = distinct(random_scenes(np.random.default_rng([spec.seed, 2]), size_of_bank, max_objects=spec.max_objects))
    leaves, used = tree.leaves(bank), np.zeros(len(bank), bool)
    tree_dict = tree.to_dict()
    splits: dict[str, tuple[Example, ...]] = {}
    for number, name in enumerate(SPLITS):
        rows, rng = [], np.random.default_rng([spec.seed, 3, number])
        for i, index in enumerate(balanced_indices(leaves, counts[name], 2**spec.depth, rng, used)):
            scene = bank.scene(index)
            query = QUERIES[int(rng.integers(len(QUERIES)))]
            image = SceneImage(scene, spec.style, size, seed=spec.seed)
            rows.append(
                make_example(
                    tree, scene, image, f"{name}-{i:05d}", query, reasoning=name != "rl", tree_dict=tree_dict
                )
            )
        splits[name] = tuple(rows)
    if spec.rl is None:
        splits["rl"] = splits["train"]
    return Dataset(document=document, **splits)


def build_document(tree: PolicyTree, rng: np.random.Generator, spec, size: int) -> PolicyDocument:
    """The document's text; with ``modality: multimodal`` its existence conditions are shown, not told."""
    text = document_text(tree, rng, wording=spec.wording)
    name = f"clevr-policy-depth{tree.depth}"
    if spec.modality == "text":
        return PolicyDocument.from_text(text, name)
    parts: list[dict] = []
    for block in text.split("\n\n"):
        condition = next(
            (c for n, c in zip(tree.names, tree.conditions, strict=True) if block.startswith(f"## {n}\n")), None
        )
        if condition is None or condition.kind != "exists":
            parts.append({"type": "text", "text": block + "\n\n"})
            continue
        shown = " and ".join(attribute for attribute, _ in condition.first.pairs)
        before, after = block.split(condition.clause, 1)
        parts.append({"type": "text", "text": f"{before}an object of the same {shown} as in this picture: "})
        parts.append({"type": "image", "image": demonstration(condition, rng, spec.style, size)})
        parts.append({"type": "text", "text": f"{after}\n\n"})
    return PolicyDocument.from_parts(parts, name)


def demonstration(condition: Condition, rng: np.random.Generator, style: str, size: int) -> Image.Image:
    """A picture of one object in the middle that fulfils an existence condition."""
    one = random_scenes(rng, 1, min_objects=1, max_objects=1).scene(0).objects[0]
    values = {n: getattr(one, n) for n in ("size", "color", "material", "shape")} | dict(condition.first.pairs)
    scene = Scene((SceneObject(**values, x=0.5, y=0.5),))
    return SceneImage(scene, style, size).open()
