"""ClevrPolicy over a real CLEVR folder: the generator's rulebooks, CLEVR's own pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpi_mlx.data.clevr_folder import ClevrPicture, arrays_of, read_clevr_folder
from mpi_mlx.data.clevr_policy import DEFAULT_SIZE, SPLITS, balanced_indices, build_document, make_example
from mpi_mlx.data.dataset import Dataset
from mpi_mlx.data.policy_tree import random_tree
from mpi_mlx.data.vocabulary import QUERIES
from mpi_mlx.errors import DataError

KINDS = ("exists", "count")  # the drawn layout keeps "left of" clear; CLEVR's pictures need not


def build_from_clevr(folder: str | Path, spec, *, limit: int | None = None) -> Dataset:
    """Like ``build_clevr_policy(spec)``, on the pictures of ``folder`` (CLEVR_v1.0).

    train and rl come from CLEVR's train split; validation and test from val where the folder has it, else
    from the same pictures, never the same scene. ``limit`` bounds the pictures read from each split. Raises
    DataError for conditions on relations, and when there are too few pictures.
    """
    odd = [kind for kind in spec.conditions if kind not in KINDS]
    if odd:
        raise DataError(f"conditions: {odd[0]} cannot be asked of CLEVR's pictures; use {', '.join(KINDS)}")
    learned = read_clevr_folder(folder, "train", limit=limit)
    held_out = learned
    if (Path(folder).expanduser() / "scenes" / "CLEVR_val_scenes.json").is_file():
        known = {picture.scene.key for picture in learned}
        held_out = [p for p in read_clevr_folder(folder, "val", limit=limit) if p.scene.key not in known]
    rng = np.random.default_rng([spec.seed if spec.document_seed is None else spec.document_seed, 1])
    tree = random_tree(rng, spec.depth, kinds=tuple(spec.conditions), scenes=arrays_of(learned[:6000]))
    document = build_document(tree, rng, spec, spec.image_size or DEFAULT_SIZE[spec.style])
    pools = {id(pool): _Pool(pool, tree) for pool in (learned, held_out)}
    rng = np.random.default_rng([spec.seed, 2])
    splits = {}
    for name in SPLITS:
        pool = pools[id(learned if name in ("train", "rl") else held_out)]
        count = getattr(spec, name) or 0
        indices = balanced_indices(pool.leaves, count, 2**spec.depth, rng, pool.used)
        splits[name] = tuple(
            make_example(
                tree, pool.pictures[i].scene, str(pool.pictures[i].image), f"{name}-{n:05d}",
                QUERIES[int(rng.integers(len(QUERIES)))], reasoning=name != "rl", tree_dict=tree.to_dict(),
            )
            for n, i in enumerate(indices)
        )
    if spec.rl is None:
        splits["rl"] = splits["train"]
    return Dataset(document=document, **splits)


class _Pool:
    """Pictures with the reply that each leads to, and which of them are taken."""

    def __init__(self, pictures: Sequence[ClevrPicture], tree):
        self.pictures = pictures
        self.leaves = tree.leaves(arrays_of(pictures))
        self.used = np.zeros(len(pictures), bool)
