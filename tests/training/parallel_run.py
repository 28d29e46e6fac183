"""One rank of a data-parallel run: recipe, output, and what is to happen, if anything.

A number: that rank asks to stop in the first evaluation. "late": validation losses rise, and rank 1 sleeps before it
reads the best checkpoint.
"""

import itertools
import sys
import time

from mpi_mlx.recipe import load_recipe
from mpi_mlx.training import run, world
from mpi_mlx.training.reports import EvaluationProgress, Interrupted, RunFinished
from mpi_mlx.training.run import request_stop, train

recipe, output, *stopper = sys.argv[1:]
if stopper == ["late"]:
    stopper, losses, load = [], itertools.count(1.0), run.ckpt.load_parameters
    run.validation = lambda *_: next(losses)

    def late(*given):
        time.sleep(world.world().rank())
        load(*given)

    run.ckpt.load_parameters = late
for report in train(load_recipe(recipe, output=output)):
    if isinstance(report, EvaluationProgress) and report.done and stopper == [str(world.world().rank())]:
        request_stop()
assert world.world().size() == 2
assert isinstance(report, Interrupted if stopper else RunFinished), report
