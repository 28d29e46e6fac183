"""One rank of a data-parallel run: recipe, output."""

import sys

from mpi_mlx.recipe import load_recipe
from mpi_mlx.training import world
from mpi_mlx.training.run import train

recipe, output = sys.argv[1:]
for _ in train(load_recipe(recipe, output=output)):
    pass
assert world.world().size() == 2
