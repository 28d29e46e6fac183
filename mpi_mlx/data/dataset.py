"""A document with its examples, from a benchmark's generator or from one's own files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpi_mlx.data.examples import Example, load_examples
from mpi_mlx.documents import PolicyDocument, load_document
from mpi_mlx.errors import DataError

DOCUMENTS = ("document", "document.md", "policy", "policy.md")  # where a dataset folder keeps its own
SPLITS = ("train", "rl", "validation", "test")


@dataclass(frozen=True)
class Dataset:
    """``train``: labelled (cpt, sft). ``rl``: answers to check, perhaps no traces. The rest is held out."""

    document: PolicyDocument | None
    train: tuple[Example, ...]
    rl: tuple[Example, ...] = ()
    validation: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()

    @property
    def splits(self) -> dict[str, tuple[Example, ...]]:
        """The splits by name, in a fixed order."""
        return {name: getattr(self, name) for name in SPLITS}


def load_dataset(spec, recipe_dir: str | Path = ".") -> Dataset:
    """The dataset that a recipe's ``data`` block names; its paths are relative to ``recipe_dir``.

    Without ``rl`` the training examples serve. Raises DataError for what is missing or broken.
    """
    if getattr(spec, "benchmark", None):
        from mpi_mlx.data.clevr_policy import build_clevr_policy  # it needs Dataset from here

        return build_clevr_policy(spec)
    folder = Path(recipe_dir)
    document = None if spec.document is None else load_document(folder / spec.document)
    train = load_examples(folder / spec.train, require=("answer",))
    splits = {"rl": tuple(train)}
    for name in SPLITS[1:]:
        value = getattr(spec, name, None)
        if value is not None:
            require = () if name == "rl" else ("answer",)
            splits[name] = tuple(load_examples(folder / value, require=require))
    return Dataset(document, tuple(train), **splits)


def load_dataset_folder(folder: str | Path) -> Dataset:
    """A folder as ``mpi-mlx data clevr-policy`` writes it: ``document/``, ``train.jsonl`` and so on."""
    folder = Path(folder)
    if not (folder / "train.jsonl").is_file():
        raise DataError(f"{folder}: no train.jsonl in it; a dataset folder holds document/ and train.jsonl")
    splits = {}
    for name in SPLITS:
        if (folder / f"{name}.jsonl").is_file():
            splits[name] = tuple(load_examples(folder / f"{name}.jsonl"))
    splits.setdefault("rl", splits["train"])
    documents = [folder / name for name in DOCUMENTS if (folder / name).exists()]
    return Dataset(load_document(documents[0]) if documents else None, **splits)
