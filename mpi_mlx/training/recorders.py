"""Optional further destinations of a run's numbers: TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from mpi_mlx.atomic import write_text_atomic
from mpi_mlx.errors import RecipeError


class Recorder(Protocol):
    def record(self, prefix: str, values: Mapping[str, float], step: int) -> None:
        """Keeps ``values`` under ``prefix/name``; ``step`` counts within ``prefix``."""

    def close(self) -> None:
        """Writes what is not written yet."""


PACKAGES = {"tensorboard": ("tensorboardX", "false"), "wandb": ("wandb", "null")}  # key: package, value for none


def check_recorders(recipe) -> None:
    """Raises RecipeError when ``recipe.logging`` asks for a package that is not installed."""
    for key, (package, off) in PACKAGES.items():
        if getattr(recipe.logging, key):
            try:
                importlib.import_module(package)
            except ImportError:
                raise RecipeError(f"logging.{key}: pip install {package}, or set it to {off}") from None


class Recorders:
    """Those that ``recipe.logging`` asks for, told together. ``folder``: the run's.

    Raises:
        RecipeError: a package is missing, or Weights & Biases refuses.
    """

    def __init__(self, recipe, folder: Path):
        check_recorders(recipe)
        self.recorders: list[Recorder] = []
        if recipe.logging.tensorboard:
            self.recorders.append(_TensorBoard(folder / "tensorboard"))
        if recipe.logging.wandb:
            self.recorders.append(_WandB(recipe, folder))

    def step(self, stage_index: int, report) -> None:
        """A StepReport of the stage."""
        names = ("loss", "learning_rate", "tokens_per_second", "grad_norm")
        values = {name: getattr(report, name) for name in names} | dict(report.metrics)
        self._record(f"{stage_index + 1}-{report.stage}", values, report.step)

    def validation(self, stage_index: int, report) -> None:
        """A ValidationReport of the stage."""
        self._record(f"{stage_index + 1}-{report.stage}", {"validation_loss": report.loss}, report.step)

    def row(self, stages_done: int, row: Mapping) -> None:
        """A row of results.json; ``stages_done`` is 0 for the base."""
        where = "with" if row["document_in_context"] else "without"
        names = ("accuracy", "format_rate", "trace_match", "trace_consistent")
        values = {name: row[name] for name in names if row.get(name) is not None}
        self._record(f"evaluation-{where}-document", values, stages_done)

    def _record(self, prefix: str, values: Mapping[str, float], step: int) -> None:
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        for recorder in self.recorders:
            recorder.record(prefix, values, step)

    def close(self) -> None:
        """May be called more than once."""
        while self.recorders:
            self.recorders.pop().close()


class _TensorBoard:
    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def record(self, prefix: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{prefix}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    """One W&B run a run folder: a resumed run goes on in it (its id is kept in ``wandb-id``)."""

    def __init__(self, recipe, folder: Path):
        import wandb

        file = folder / "wandb-id"
        if not file.is_file():
            write_text_atomic(file, uuid.uuid4().hex[:8])
        identity = file.read_text(encoding="utf-8")
        try:
            self.run = wandb.init(
                project=recipe.logging.wandb, dir=str(folder), name=recipe.name, id=identity, resume="allow"
            )
        except Exception as error:  # its own types, and those of whatever it reaches the network with
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RecipeError(
                f"logging.wandb: {said[:200]}; run `wandb login`, or set WANDB_MODE=offline, then add --resume"
            ) from error

    def record(self, prefix: str, values: Mapping[str, float], step: int) -> None:
        # W&B's own step must rise over all stages; each prefix brings the one it counts by.
        self.run.log({f"{prefix}/{name}": value for name, value in values.items()} | {f"{prefix}/step": step})

    def close(self) -> None:
        self.run.finish()
