"""Looking a dataset over before training on it: counts, lengths, answers, and what may go wrong."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpi_mlx.data.completion import THINK_CLOSE, THINK_OPEN
from mpi_mlx.data.dataset import Dataset, load_dataset, load_dataset_folder
from mpi_mlx.data.examples import Example, load_examples
from mpi_mlx.data.scenes import scene_of
from mpi_mlx.documents.images import ImageRef, pixels
from mpi_mlx.errors import DataError


@dataclass(frozen=True)
class SplitFacts:
    """What one split holds. Characters are means over its examples."""

    name: str
    examples: int
    images: int
    with_reasoning: int
    with_answer: int
    query_characters: float
    reasoning_characters: float
    answers: tuple[tuple[str, int], ...]  # most frequent first

    @property
    def majority(self) -> float:
        """Share of the most frequent answer: what a model that ignores the query earns."""
        return self.answers[0][1] / self.with_answer if self.answers else 0.0


@dataclass(frozen=True)
class CheckReport:
    """The facts of each split, and sentences about what is probably not meant."""

    splits: tuple[SplitFacts, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """What a path turned out to hold; ``recipe`` when it is one."""

    dataset: Dataset
    recipe: object | None = None


def read_source(path: str | Path, *, thorough: bool = True) -> Source:
    """A recipe (or a folder with one), a folder of JSONL files, or one. Raises DataError or RecipeError."""
    path = Path(path).expanduser()
    if path.is_dir() and not (path / "recipe.yaml").is_file():
        return Source(load_dataset_folder(path, thorough=thorough))
    if path.suffix in (".jsonl", ".json"):
        return Source(Dataset(None, tuple(load_examples(path, thorough=thorough))))
    if not path.exists() and path.suffix not in ("", ".yaml", ".yml"):
        raise DataError(f"{path}: no such dataset; give a dataset folder, a JSONL or a recipe")
    from mpi_mlx.recipe import load_recipe

    recipe = load_recipe(path)
    if recipe.data is None:
        raise DataError(f"{path}: the recipe has no data; its stages make their own")
    return Source(load_dataset(recipe.data, recipe.folder, thorough=thorough), recipe)


def check_dataset(dataset: Dataset, *, whole: bool = True) -> CheckReport:
    """Facts and warnings; the files themselves were checked when they were read.

    ``whole``: this is all there is, so that a missing document is worth a warning.
    """
    splits = {name: rows for name, rows in dataset.splits.items() if rows}
    if splits.get("rl") == dataset.train:
        splits.pop("rl", None)
    facts = tuple(_facts(name, rows) for name, rows in splits.items())
    origin = None if dataset.document is None else dataset.document.origin
    warnings = [] if origin is None else list(origin.warnings)
    warnings += _overlaps(splits)
    for found in facts:
        warnings += _split_warnings(found, splits[found.name])
    if whole and dataset.document is None:
        warnings.append("no document: only sft without it, and rl without policy-aware rollouts, can run")
    return CheckReport(facts, tuple(warnings))


def _facts(name: str, rows: Sequence[Example]) -> SplitFacts:
    answers = Counter(e.answer for e in rows if e.answer is not None)
    return SplitFacts(
        name=name,
        examples=len(rows),
        images=sum(len(e.images) for e in rows),
        with_reasoning=sum(e.reasoning is not None for e in rows),
        with_answer=sum(answers.values()),
        query_characters=sum(len(e.query) for e in rows) / len(rows),
        reasoning_characters=sum(len(e.reasoning or "") for e in rows) / len(rows),
        answers=tuple(sorted(answers.items(), key=lambda item: (-item[1], item[0]))),
    )


def _split_warnings(found: SplitFacts, rows: Sequence[Example]) -> list[str]:
    out = []
    if found.name == "train" and not found.with_reasoning:
        out.append("train: no example has reasoning; set reasoning: false in the sft stage")
    elif found.name == "train" and found.with_reasoning < found.examples:
        lacking = found.examples - found.with_reasoning
        out.append(f"train: {lacking} of {found.examples} examples have no reasoning")
    if found.name != "rl" and found.examples >= 10 and found.majority > 0.9:
        out.append(f"{found.name}: {found.majority:.0%} of the answers are {found.answers[0][0][:40]!r}")
    if found.with_answer < found.examples and found.name == "rl":
        lacking = found.examples - found.with_answer
        out.append(f"rl: {lacking} of {found.examples} examples have no answer to check completions by")
    tagged = [e.id for e in rows if any(t in (e.answer or "") for t in (THINK_OPEN, THINK_CLOSE))]
    if tagged:
        out.append(f"{found.name}: the answer of {tagged[0]!r} holds a trace; move it to 'reasoning'")
    return out


def _overlaps(splits: dict[str, Sequence[Example]]) -> list[str]:
    """Held-out examples that training also shows."""
    out = []
    cache: dict[ImageRef, str] = {}
    keys = {name: [_content(e, cache) for e in rows] for name, rows in splits.items()}
    for held in ("validation", "test"):
        for learned in ("train", "rl"):
            both = set(keys.get(held, ())) & set(keys.get(learned, ()))
            if both:
                same = [e.id for e, key in zip(splits[held], keys[held], strict=True) if key in both]
                share = f"{len(same)} of {len(keys[held])}"
                out.append(f"{held}: {share} examples are also in {learned} (first {same[0]!r})")
    return out


def _content(example: Example, cache: dict) -> str:
    """Equal for examples that ask the same: by scene where one is recorded, else by images and texts."""
    scene = scene_of(example.meta)
    if scene is not None:
        return scene.key
    digest = hashlib.sha256()
    for message in example.messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            said = part["text"] if part["type"] == "text" else _image_key(part["image"], cache)
            digest.update(f"{message['role']} {part['type']} {len(said)} {said}\n".encode())
    return digest.hexdigest()


def _image_key(image: ImageRef, cache: dict) -> str:
    if hasattr(image, "key"):
        return image.key
    if not isinstance(image, (str, Path)):
        return hashlib.sha256(pixels(image)).hexdigest()
    if image not in cache:
        cache[image] = hashlib.sha256(Path(image).read_bytes()).hexdigest()
    return cache[image]
