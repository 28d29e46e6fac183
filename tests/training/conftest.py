from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from small_runs import write_base, write_recipe

from mpi_mlx.models import load_model
from mpi_mlx.models.lora import attach_lora
from mpi_mlx.recipe import load_recipe
from mpi_mlx.training.run import train


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def recipe_file(base, tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe") / "small.yaml", base)


@pytest.fixture(scope="session")
def whole(recipe_file, tmp_path_factory):
    """The folder of a run of all three stages that nothing disturbed, and its reports."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, list(train(load_recipe(recipe_file, output=folder)))


@pytest.fixture(scope="module")
def model(base):
    """The base with adapters that do something."""
    model = load_model(base)
    spec = SimpleNamespace(rank=2, alpha=4, dropout=0.0, targets="all-linear", kind="lora", projector=False)
    attach_lora(model, spec)
    mx.random.seed(1)
    model.net.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.net.trainable_parameters()))
    return model
