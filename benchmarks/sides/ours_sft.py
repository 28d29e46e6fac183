"""mpi-mlx: supervised epochs through the stage that `mpi-mlx train` runs."""

from types import SimpleNamespace

from wire import Clock, preload_blas, report, settings, wait

preload_blas()

import mlx.core as mx  # noqa: E402

from mpi_mlx.models import load_model  # noqa: E402
from mpi_mlx.models.lora import attach_lora  # noqa: E402
from mpi_mlx.stages.supervised import SupervisedObjective, SupervisedSource  # noqa: E402
from mpi_mlx.training.fit import fit  # noqa: E402
from mpi_mlx.training.optimizer import Optimizer  # noqa: E402

options = settings()


def example(index, row):
    content = row["query"]
    if row.get("image"):
        content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": row["query"]}]
    messages = ({"role": "user", "content": content},)
    return SimpleNamespace(id=str(index), messages=messages, tools=None, answer=row["answer"], reasoning=None)


model = load_model(options["checkpoint"], dtype=options.get("dtype", "float32"))
lora = dict(rank=8, alpha=16.0, dropout=0.0, targets="all-linear", kind="lora", projector=False)
attach_lora(model, SimpleNamespace(**lora))
rows, epochs, batch = options["rows"], options["epochs"], options["batch"]
spec = SimpleNamespace(
    stage="sft", batch_size=batch, accumulate=1, steps=None, epochs=10**6, document_fraction=0.0,
    reasoning=False, max_tokens=None, learning_rate=1e-5, warmup=0.0, schedule="constant", min_lr_ratio=0.1,
    clip_norm=1.0,
)  # fmt: skip
source = SupervisedSource(model, [example(i, r) for i, r in enumerate(rows)], None, spec, 0)
optimizer = Optimizer("adamw")
optimizer.init(model.net.trainable_parameters())
drawing, trained = source.batch, []


def counted(step):
    batch = drawing(step)
    trained.append(batch.count)  # tokens that have a weight; the prompts' have none
    return batch


source.batch = counted
steps = fit(model.net, source, SupervisedObjective(model), spec, total=10**9, seed=0, optimizer=optimizer)
while True:
    wait()
    model.forget_features()  # the images are encoded in every measurement
    mx.reset_peak_memory()
    trained.clear()
    clock = Clock()
    for _ in range(epochs * len(rows) // batch):
        next(steps)
    report(**clock.read(), tokens=int(sum(trained)), peak=mx.get_peak_memory())
