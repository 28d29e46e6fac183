"""All that can go wrong before a run begins: data, model, adapters and stages, made and checked."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mpi_mlx import runtime
from mpi_mlx.data.dataset import Dataset, load_dataset
from mpi_mlx.evaluation.evaluate import check_evaluation
from mpi_mlx.models import load_model
from mpi_mlx.models.base import Model
from mpi_mlx.models.full import train_all_weights
from mpi_mlx.models.lora import attach_lora
from mpi_mlx.stages.build import Prepared, prepare_stages
from mpi_mlx.stages.pretrain import zero_residual_outputs
from mpi_mlx.training.recorders import check_recorders


@dataclass(frozen=True)
class Ready:
    """A recipe that can be trained. ``dataset`` is None when it only pretrains."""

    dataset: Dataset | None
    model: Model
    stages: list[Prepared]


def is_pretraining(recipe) -> bool:
    """Whether a stage makes a model from generated rows."""
    return any(spec.stage == "pretrain" for spec in recipe.stages)


def trains_whole_model(recipe) -> bool:
    """Whether the model's own weights are trained, and saved as a model instead of an adapter."""
    return recipe.lora is None or is_pretraining(recipe)


def prepare(recipe, *, survey: bool = True) -> Ready:
    """Loads what ``recipe`` names and checks what its stages need; nothing is written or trained.

    ``survey``: encode every labelled row and prompt once, which a run that goes on need not do again.

    Raises:
        MPIError: a bad recipe, dataset or model.
    """
    runtime.configure()
    dataset = None if recipe.data is None else load_dataset(recipe.data, recipe.folder)
    spec = recipe.model
    model = load_model(
        spec.base, quantize=spec.quantize, max_pixels=spec.max_pixels, dtype=spec.dtype, init=spec.init,
        seed=recipe.seed,
    )
    if is_pretraining(recipe):
        if spec.init == "random":
            zero_residual_outputs(model.net)
    elif recipe.lora is None:
        train_all_weights(model)
    else:
        attach_lora(model, recipe.lora, mx.random.key(recipe.seed))
    check_recorders(recipe)
    stages = prepare_stages(model, recipe, dataset, survey=survey)
    if dataset is not None and recipe.evaluation.after:
        check_evaluation(model, dataset.test, dataset.document, recipe.evaluation)
    return Ready(dataset, model, stages)
