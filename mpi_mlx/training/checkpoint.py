"""Checkpoints: trained parameters, optimizer state and the source's position, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mpi_mlx.atomic import replace_dir, temporary_dir
from mpi_mlx.errors import CheckpointError
from mpi_mlx.training.optimizer import Optimizer

KEEP = 2  # the newest ones; the best is kept besides


def save_checkpoint(folder: Path, module: nn.Module, optimizer: Optimizer, state: dict) -> None:
    """Writes ``folder`` (parameters.safetensors, optimizer.safetensors, state.json) in one rename."""
    with temporary_dir(folder) as temporary:
        parameters = dict(tree_flatten(module.trainable_parameters()))
        mx.save_safetensors(str(temporary / "parameters.safetensors"), parameters)
        mx.save_safetensors(str(temporary / "optimizer.safetensors"), optimizer.state)
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        replace_dir(temporary, folder)


def load_checkpoint(folder: Path, module: nn.Module, optimizer: Optimizer) -> dict:
    """Puts parameters and optimizer state back; returns the state.

    Raises:
        CheckpointError: files are missing or do not fit the module.
    """
    state = read_state(folder)
    load_parameters(folder, module)
    try:
        optimizer.load_state(mx.load(str(folder / "optimizer.safetensors")))
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder}/optimizer.safetensors cannot be read ({error}); delete {folder}") from None
    return state


def load_parameters(folder: Path, module: nn.Module) -> None:
    """The checkpoint's trained parameters alone, every one of them accounted for."""
    try:
        saved = mx.load(str(folder / "parameters.safetensors"))
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder}/parameters.safetensors cannot be read ({error}); delete {folder}") from None
    wanted = dict(tree_flatten(module.trainable_parameters()))
    odd = [k for k in wanted if k not in saved or saved[k].shape != wanted[k].shape]
    odd += [k for k in saved if k not in wanted]
    if odd:
        raise CheckpointError(
            f"{folder}: {len(odd)} tensors do not fit this recipe's model, first {odd[0]!r}; use another output"
        )
    module.update(tree_unflatten(list(saved.items())))


def read_state(folder: Path) -> dict:
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/state.json cannot be read ({error}); delete {folder}") from None


def checkpoint_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints under ``root``, oldest first."""
    found = [(int(p.name.removeprefix("step-")), p) for p in root.glob("step-*") if (p / "state.json").exists()]
    return sorted(found)


def prune(root: Path, best: int | None = None) -> None:
    """Deletes all but the newest KEEP checkpoints and the best one."""
    for step, folder in checkpoints(root)[:-KEEP]:
        if step != best:
            shutil.rmtree(folder)
