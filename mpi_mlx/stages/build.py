"""A stage of a recipe as what ``fit`` takes: the module to train, the source of batches, the objective."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn

from mpi_mlx.data.dataset import Dataset
from mpi_mlx.errors import RecipeError
from mpi_mlx.evaluation.evaluate import evaluate
from mpi_mlx.rollouts.rewards import build_rewards
from mpi_mlx.stages.pretrain import pretrain_stage
from mpi_mlx.stages.rl import RolloutSource
from mpi_mlx.stages.rl_objective import RolloutObjective
from mpi_mlx.stages.supervised import SupervisedObjective, SupervisedSource, validation_loss
from mpi_mlx.stages.survey import Survey, check_survey
from mpi_mlx.training import world

VALIDATION_ANSWERS = 64  # rl: examples answered for one validation


@dataclass(frozen=True)
class Prepared:
    """What ``fit`` takes for a stage, its steps, and what it is fed (None: nothing, or not looked at)."""

    module: nn.Module
    source: object
    objective: object
    steps: int
    labelled: Survey | None = None
    prompts: Survey | None = None


def stage_seed(recipe, index: int) -> int:
    """The seed of stage ``index``; stages of one recipe draw apart."""
    return recipe.seed * 100 + index


def build_stage(model, spec, dataset: Dataset | None, seed: int, folder: Path) -> tuple[nn.Module, object, object]:
    """(module, source, objective). Nothing has been computed yet, but every setting has been checked.

    Raises:
        DataError, RecipeError: the data or the settings do not serve this stage.
    """
    if spec.stage == "pretrain":
        return pretrain_stage(model, spec, seed)
    if spec.stage == "rl":
        rewards = build_rewards(spec.rewards, folder, reasoning=spec.reasoning)
        source = RolloutSource(
            model, dataset.rl or dataset.train, dataset.document, spec, rewards, seed, dataset.train
        )
        return model.net, source, RolloutObjective(model, spec)
    source = SupervisedSource(model, dataset.train, dataset.document, spec, seed)
    return model.net, source, SupervisedObjective(model)


def prepare_stages(model, recipe, dataset: Dataset | None, *, survey: bool = True) -> list[Prepared]:
    """Every stage of ``recipe``, built, and its rows and prompts looked at (``survey``): nothing is trained yet.

    Raises:
        RecipeError, DataError: whatever can be known now to go wrong later.
    """
    out = []
    for index, spec in enumerate(recipe.stages):
        if spec.stage != "pretrain" and dataset is None:
            raise RecipeError(f"stages.{index}: stage {spec.stage} needs a data block")
        module, source, objective = build_stage(model, spec, dataset, stage_seed(recipe, index), recipe.folder)
        steps = stage_steps(spec, dataset)
        found: dict[str, Survey] = {}
        if survey and isinstance(source, RolloutSource):
            found["prompts"] = source.survey(steps)
            check_survey(model, spec, found["prompts"], completion=spec.max_completion_tokens)
        labelled = source if isinstance(source, SupervisedSource) else getattr(source, "labelled", None)
        if survey and labelled is not None:
            found["labelled"] = labelled.survey(steps * getattr(spec, "minibatches", 1))
            check_survey(model, spec, found["labelled"])
        out.append(Prepared(module, source, objective, steps, **found))
    return out


def stage_steps(spec, dataset: Dataset | None) -> int:
    """Steps of a stage: as given, or what ``epochs`` take (the last batch may reach into the next epoch)."""
    if spec.steps is not None:
        return spec.steps
    per_step = spec.batch_size * spec.accumulate * world.world().size()
    return max(1, -(-int(spec.epochs * len(dataset.train)) // per_step))


def validation(model, spec, dataset: Dataset | None) -> float | None:
    """What early stopping watches, lower is better: the loss, in ``rl`` the share of wrong answers."""
    if dataset is None or not dataset.validation:
        return None
    if spec.stage != "rl":
        return validation_loss(model, dataset.validation, dataset.document, spec)

    class Settings:
        batch_size, max_completion_tokens, samples = 64, spec.max_completion_tokens, VALIDATION_ANSWERS

    model.net.eval()  # no dropout
    row, _ = evaluate(model, dataset.validation, None, label="validation", spec=Settings, reasoning=spec.reasoning)
    model.net.train()
    return 1.0 - row["accuracy"]
