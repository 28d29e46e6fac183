"""A run's folder: what it belongs to, how far it has come, and its metrics."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mpi_mlx.atomic import atomic_write, write_json_atomic
from mpi_mlx.errors import CheckpointError
from mpi_mlx.training import world

PACKAGES = ("mpi-mlx", "mlx", "mlx-lm", "mlx-vlm", "transformers", "numpy")


class RunFolder:
    """``recipe.yaml``, ``environment.json``, ``metrics.jsonl``, ``progress.json``, ``stages/``, ``adapter/`` ...

    ``document``: whose name and hash the environment records; the files may have changed when they are read.

    Raises:
        CheckpointError: the folder holds another recipe's run, or a run and ``resume`` is off, or none and
            ``resume`` is on.
    """

    def __init__(self, path: Path, recipe, *, resume: bool, writes: bool = True, document=None):
        self.path, self.writes = path, writes
        recipe_file = path / "recipe.yaml"
        text = recipe.to_yaml()
        if recipe_file.exists():
            if recipe_file.read_text(encoding="utf-8") != text:
                raise CheckpointError(
                    f"{path} holds the run of another recipe; choose another --output, or delete that folder"
                )
            if not resume:
                raise CheckpointError(f"{path} already holds this run; add --resume, or choose another --output")
        elif path.exists() and any(path.iterdir()):
            raise CheckpointError(f"{path} is not empty and holds no run; choose another --output")
        self.progress: dict = {"stages": {}, "evaluated": []}
        if resume and (path / "progress.json").exists():
            self.progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        world.barrier()  # every process has looked before one writes
        if writes:
            path.mkdir(parents=True, exist_ok=True)
            with atomic_write(recipe_file) as temporary:
                temporary.write_text(text, encoding="utf-8")
            facts = environment()
            if document is not None:
                facts["document"] = {"name": document.name, "sha256": document.sha256}
            write_json_atomic(path / "environment.json", facts)

    def stage(self, index: int, name: str) -> Path:
        """``stages/1-cpt`` for index 0."""
        return self.path / "stages" / f"{index + 1}-{name}"

    def mark(self, **changes) -> None:
        """Updates and writes the progress."""
        self.progress.update(changes)
        if self.writes:
            write_json_atomic(self.path / "progress.json", self.progress)

    def mark_stage(self, index: int, **facts) -> None:
        self.progress["stages"].setdefault(str(index), {}).update(facts)
        self.mark()

    def stage_done(self, index: int) -> bool:
        return self.progress["stages"].get(str(index), {}).get("done", False)

    # ---- metrics.jsonl

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def truncate_metrics(self, stage_index: int, step: int) -> None:
        """Drops lines after ``step`` of a stage (they will be written again) and a half-written last line."""
        if not self.writes or not self.metrics_path.exists():
            return
        kept = []
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if (row["stage_index"], row["step"]) <= (stage_index, step):
                kept.append(line + "\n")
        with atomic_write(self.metrics_path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def append_metrics(self, row: dict) -> None:
        if self.writes:
            with open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def environment() -> dict:
    """Versions and machine, for whoever reads the run later."""
    from mpi_mlx import runtime

    def found(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "packages": {name: found(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "device": runtime.device_summary(),
    }
