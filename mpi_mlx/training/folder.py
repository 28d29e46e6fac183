"""A run's folder: what it belongs to, how far it has come, and its metrics."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from mpi_mlx.atomic import atomic_write, write_json_atomic, write_text_atomic
from mpi_mlx.errors import CheckpointError
from mpi_mlx.recipe_changes import recipe_changes, refused, told
from mpi_mlx.training import world
from mpi_mlx.training.checkpoint import checkpoints
from mpi_mlx.training.inputs import changed, document_name, input_hashes, not_yet_read
from mpi_mlx.training.lock import LOCK, FolderLock

PACKAGES = ("mpi-mlx", "mlx", "mlx-lm", "mlx-vlm", "transformers", "numpy")


class RunFolder:
    """``recipe.yaml``, ``environment.json``, ``metrics.jsonl``, ``progress.json``, ``stages/``, ``adapter/`` ...

    Nothing is written before :meth:`begin`; a folder with a run is locked at once, as it will be written to.

    Attributes:
        goes_on: whether it holds the run already.
        changes: what the recipe changes in the run so far, without changing a number of it.

    Raises:
        CheckpointError: the folder holds another recipe's run, or a run and ``resume`` is off, or none and
            ``resume`` is on; or another process trains in it.
    """

    def __init__(self, path: Path, recipe, *, resume: bool, writes: bool = True):
        self.path, self.recipe, self.writes = path, recipe, writes
        self.progress: dict = {"stages": {}, "evaluated": []}
        self.changes: dict = {}
        self._lock: FolderLock | None = None
        self.goes_on = self._recipe_file.exists()
        if not self.goes_on:
            if resume:
                raise CheckpointError(
                    f"{path.absolute()} holds no run to go on with; give the run's folder "
                    "(mpi-mlx train RUN --resume) or its --output, or begin one without --resume"
                )
            if path.exists() and any(not _left_over(found.name) for found in path.iterdir()):
                raise CheckpointError(f"{path} is not empty and holds no run; choose another --output")
            return
        if writes:
            self._lock = FolderLock(path)
        try:
            self._go_on(resume)
        except BaseException:
            self.close()
            raise

    def _go_on(self, resume: bool) -> None:
        self.progress |= self._read("progress.json")
        text = self._recipe_file.read_text(encoding="utf-8")
        self.changes = recipe_changes(text, self.recipe, str(self._recipe_file))
        wrong = refused(self.changes, self._stage_begun)
        if wrong:
            raise CheckpointError(
                f"{self.path} holds the run of another recipe: here {told(wrong)}; go on with its own "
                f"(mpi-mlx train {shlex.quote(str(self.path))} --resume), or choose another --output"
            )
        self._same_processes()
        if not resume:
            raise CheckpointError(f"{self.path} already holds this run; add --resume, or choose another --output")
        if self._lock is not None:
            self._lock.sign()

    def _same_processes(self) -> None:
        """Steps, and who draws what, depend on how many processes train."""
        before, now = self._read("environment.json").get("processes"), world.world().size()
        if before is not None and before != now:
            raise CheckpointError(
                f"{self.path} was begun by {_processes(before)}, and this would be {_processes(now)}; go on with "
                f"{before} (mlx.launch -n {before}, or without it where the recipe says `processes`), or train into "
                "another --output"
            )

    def begin(self, dataset=None) -> None:
        """Writes what the run is made of, or looks whether that is as it was when the run began.

        Raises:
            CheckpointError: a file that the run reads has changed since, or another process began meanwhile.
        """
        world.barrier()  # every process has looked before one writes
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = FolderLock(self.path)
            if self._recipe_file.exists():
                raise CheckpointError(f"{self.path} already holds a run by now; choose another --output")
            self._lock.sign()
        facts = self._facts(dataset)
        if not self.goes_on or self.changes:
            recipe = self.recipe
            if self.goes_on:  # under the name that it was begun with
                named = yaml.safe_load(self._recipe_file.read_text(encoding="utf-8")).get("output", recipe.output)
                recipe = recipe.model_copy(update={"output": named})
            write_text_atomic(self._recipe_file, recipe.to_yaml())
        write_json_atomic(self.path / "environment.json", facts)

    def _facts(self, dataset) -> dict:
        """The environment of now, and the inputs of the run's beginning (of now, where it recorded none)."""
        before = self._read("environment.json") if self.goes_on else {}
        known, now = before.get("inputs"), input_hashes(self.recipe, dataset)
        if known is None:  # of an earlier version, which kept the document's alone
            known = {document_name(self.recipe): before["document"]["sha256"]} if "document" in before else {}
        late = not_yet_read(self.recipe, self._stage_begun)  # such may be mended
        known = {name: value for name, value in known.items() if name not in late}
        different = changed(known, now)
        if different:
            raise CheckpointError(
                f"{' and '.join(different)}: changed since the run in {self.path} began; put back what it was, "
                "or train anew into another --output"
            )
        facts = environment() | {"processes": world.world().size()}
        document = None if dataset is None else dataset.document
        if document is not None:
            facts["document"] = {"name": document.name, "sha256": document.sha256}
        return facts | {"inputs": now | known}

    def _read(self, name: str) -> dict:
        """What the run keeps in a file; empty where it has none yet. Raises CheckpointError for a broken one."""
        file = self.path / name
        try:
            found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except ValueError as error:
            raise CheckpointError(f"{file} is broken ({error}); restore it, or train into another --output") from None
        if not isinstance(found, dict):
            raise CheckpointError(f"{file} holds no object; restore it, or train into another --output")
        return found

    def close(self) -> None:
        """Lets other processes train here."""
        if self._lock is not None:
            self._lock.release()

    @property
    def _recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    def _stage_begun(self, index: int) -> bool:
        """Whether anything of it would be kept."""
        name = self.recipe.stages[index].stage
        return self.stage_done(index) or bool(checkpoints(self.stage(index, name) / "checkpoints"))

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


def _processes(count: int) -> str:
    return "one process" if count == 1 else f"{count} processes"


def _left_over(name: str) -> bool:
    """Of a run that was killed before it had written a thing."""
    return name == LOCK or name.startswith(".recipe-")


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
