"""mpi-mlx: RL steps of a run's agent, as it was before its rl stage, on the run's own prompts.

With a `length`, a system message lengthens each of them to about so many tokens: the rulebook's own text, from
another place on for each prompt, so that prompts share nothing.
"""

from dataclasses import replace
from pathlib import Path

from wire import Clock, phases, preload_blas, report, settings, time_batches, wait

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
source = stage.source


def lengthened(number, example):
    words = source.document.text.split()
    begin, tokenizer = 37 * number % len(words), ready.model.tokenizer
    ids = tokenizer.encode(" ".join(words[begin:] + words[:begin]), add_special_tokens=False)
    missing = options["length"] - len(ready.model.encode(example.messages, generation_prompt=True))
    text = tokenizer.decode((ids * (missing // len(ids) + 1))[:missing])
    return replace(example, messages=({"role": "system", "content": text}, *example.messages))


if options.get("length"):
    source.examples = [lengthened(n, e) for n, e in enumerate(source.examples[: options["examples"]])]
seen = {}
clocked = time_batches(source, lambda batch: seen.update(groups=[g for m in batch.micros for g in m.groups]))
optimizer = Optimizer("adamw")
optimizer.init(ready.model.net.trainable_parameters())
steps = fit(stage.module, source, stage.objective, source.spec, total=stage.steps, seed=0, optimizer=optimizer)
while True:
    wait()
    mx.reset_peak_memory()
    clock = Clock()
    step = next(steps)
    taken = phases(clock.read(), clocked)
    lengths = [len(g.prompt) for g in seen["groups"]]
    prompt = sum(lengths) / len(lengths)
    report(**taken, prompt=prompt, tokens=step.metrics["completion_length"], peak=mx.get_peak_memory())
