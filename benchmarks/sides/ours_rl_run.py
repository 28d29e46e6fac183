"""mpi-mlx: RL steps of a run's agent, as it was before its rl stage, on the run's own prompts."""

from pathlib import Path

from wire import Clock, preload_blas, report, settings, wait

preload_blas()

import mlx.core as mx  # noqa: E402

from mpi_mlx.models.adapters import load_adapter  # noqa: E402
from mpi_mlx.recipe import load_recipe  # noqa: E402
from mpi_mlx.training.fit import fit  # noqa: E402
from mpi_mlx.training.optimizer import Optimizer  # noqa: E402
from mpi_mlx.training.prepare import prepare  # noqa: E402

options = settings()
run = Path(options["run"])
index = [spec.stage for spec in load_recipe(run / "recipe.yaml").stages].index("rl")
overrides = [f"stages.{index}.{key}={value}" for key, value in options["stage"].items()]
ready = prepare(load_recipe(run / "recipe.yaml", overrides), survey=False)
(before,) = (run / "stages").glob(f"{index}-*")  # stages are counted from 1
load_adapter(ready.model, before / "adapter")
stage = ready.stages[index]
optimizer = Optimizer("adamw")
optimizer.init(ready.model.net.trainable_parameters())
drawing, rollout = stage.source.batch, {}


def timed(step):
    clock = Clock()
    batch = drawing(step)
    rollout.update(clock.read())
    return batch


stage.source.batch = timed
spec = ready.stages[index].source.spec
steps = fit(stage.module, stage.source, stage.objective, spec, total=stage.steps, seed=0, optimizer=optimizer)
while True:
    wait()
    mx.reset_peak_memory()
    clock = Clock()
    step = next(steps)
    spent = clock.read()
    phases = {f"rollout_{key}": rollout[key] for key in spent}
    phases |= {f"update_{key}": spent[key] - rollout[key] for key in spent}
    report(**spent, **phases, tokens=step.metrics["completion_length"], peak=mx.get_peak_memory())
