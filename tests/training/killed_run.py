"""Trains a recipe and kills itself after the report of one step: recipe, output, stage, step."""

import os
import signal
import sys
from pathlib import Path

from mpi_mlx.recipe import load_recipe
from mpi_mlx.training.reports import StepReport
from mpi_mlx.training.run import train

recipe, output, stage, step = sys.argv[1:]
begun = Path(output, "recipe.yaml").exists()
for report in train(load_recipe(recipe, output=output), resume=begun):
    if isinstance(report, StepReport) and (report.stage, report.step) == (stage, int(step)):
        os.kill(os.getpid(), signal.SIGKILL)
