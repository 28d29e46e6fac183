import pytest
from small_runs import write_base, write_recipe

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
