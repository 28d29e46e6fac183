"""Optional further destinations of a run's metrics: TensorBoard, Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mpi_mlx.errors import RecipeError


class Recorder(Protocol):
    def step(self, stage_index: int, report) -> None: ...

    def close(self) -> None: ...


def recorders(recipe, folder: Path) -> list[Recorder]:
    """Those that ``recipe.logging`` asks for.

    Raises:
        RecipeError: the package is not installed.
    """
    out: list[Recorder] = []
    if recipe.logging.tensorboard:
        out.append(_TensorBoard(folder / "tensorboard"))
    if recipe.logging.wandb:
        out.append(_WandB(recipe, folder))
    return out


def _values(report) -> dict[str, float]:
    names = ("loss", "learning_rate", "tokens_per_second", "grad_norm")
    return {name: getattr(report, name) for name in names} | report.metrics


class _TensorBoard:
    def __init__(self, folder: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise RecipeError("logging.tensorboard: pip install tensorboardX, or set it to false") from None
        self.writer = SummaryWriter(str(folder))

    def step(self, stage_index: int, report) -> None:
        for name, value in _values(report).items():
            self.writer.add_scalar(f"{stage_index + 1}-{report.stage}/{name}", value, report.step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, recipe, folder: Path):
        try:
            import wandb
        except ImportError:
            raise RecipeError("logging.wandb: pip install wandb, or leave it out") from None
        self.run = wandb.init(project=recipe.logging.wandb, dir=str(folder), name=recipe.name)

    def step(self, stage_index: int, report) -> None:
        prefix = f"{stage_index + 1}-{report.stage}"
        values = {f"{prefix}/{name}": value for name, value in _values(report).items()}
        self.run.log(values | {f"{prefix}/step": report.step})

    def close(self) -> None:
        self.run.finish()
