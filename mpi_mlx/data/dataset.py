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


def load_dataset(spec, recipe_dir: str | Path = ".", *, thorough: bool = False) -> Dataset:
    """The dataset that a recipe's ``data`` block names; its paths are relative to ``recipe_dir``.

    Without ``rl`` the training examples serve as prompts. ``thorough`` decodes every image. Raises one
    DataError for all that is missing or broken in any of the files.
    """
    if getattr(spec, "benchmark", None):  # imported here: the builders need Dataset
        if getattr(spec, "clevr_root", None):
            from mpi_mlx.data.clevr_photos import build_from_clevr

            root, limit = Path(recipe_dir) / spec.clevr_root, getattr(spec, "clevr_limit", None)
            return build_from_clevr(root, spec, limit=limit)
        from mpi_mlx.data.clevr_policy import build_clevr_policy

        return build_clevr_policy(spec)
    folder = Path(recipe_dir)
    named = {name: getattr(spec, name, None) for name in SPLITS}
    files = {name: folder / value for name, value in named.items() if value is not None}
    return _read(None if spec.document is None else folder / spec.document, files, thorough)


def load_dataset_folder(folder: str | Path, *, thorough: bool = False) -> Dataset:
    """A folder as ``mpi-mlx data clevr-policy`` writes it: ``document/``, ``train.jsonl`` and so on."""
    folder = Path(folder)
    if not (folder / "train.jsonl").is_file():
        raise DataError(f"{folder}: no train.jsonl in it; a dataset folder holds document/ and train.jsonl")
    documents = [folder / name for name in DOCUMENTS if (folder / name).exists()]
    files = {name: folder / f"{name}.jsonl" for name in SPLITS if (folder / f"{name}.jsonl").is_file()}
    return _read(documents[0] if documents else None, files, thorough)


def _read(document: Path | None, files: dict[str, Path], thorough: bool) -> Dataset:
    errors: list[str] = []
    splits: dict[str, tuple[Example, ...]] = {}
    found = None
    try:
        found = None if document is None else load_document(document)
    except DataError as error:
        errors.append(str(error))
    for name, path in files.items():
        require = () if name == "rl" else ("answer",)  # a reward may need no answer
        try:
            splits[name] = tuple(load_examples(path, require=require, thorough=thorough))
        except DataError as error:
            errors.append(str(error))
    if errors:
        raise DataError("\n".join(errors))
    splits.setdefault("train", ())
    splits.setdefault("rl", splits["train"])
    return Dataset(found, **splits)
