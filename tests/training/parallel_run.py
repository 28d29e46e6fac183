"""One rank of a data-parallel run: recipe, output, and the rank that asks to stop in the first evaluation, if any."""

import sys

from mpi_mlx.recipe import load_recipe
from mpi_mlx.training import world
from mpi_mlx.training.reports import EvaluationProgress, Interrupted, RunFinished
from mpi_mlx.training.run import request_stop, train

recipe, output, *stopper = sys.argv[1:]
for report in train(load_recipe(recipe, output=output)):
    if isinstance(report, EvaluationProgress) and report.done and stopper == [str(world.world().rank())]:
        request_stop()
assert world.world().size() == 2
assert isinstance(report, Interrupted if stopper else RunFinished), report
