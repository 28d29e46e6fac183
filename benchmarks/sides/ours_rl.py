"""mpi-mlx: RL steps, rollouts and update, through the stage that `mpi-mlx train` runs."""

from types import SimpleNamespace

from wire import Clock, phases, preload_blas, report, settings, time_batches, wait

preload_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from mpi_mlx.documents import from_text  # noqa: E402
from mpi_mlx.models import load_model  # noqa: E402
from mpi_mlx.models.kv import recording_caches  # noqa: E402
from mpi_mlx.models.lora import attach_lora  # noqa: E402
from mpi_mlx.models.pieces import Piece, embed_pieces  # noqa: E402
from mpi_mlx.stages.rl import RolloutSource  # noqa: E402
from mpi_mlx.stages.rl_objective import RolloutObjective  # noqa: E402
from mpi_mlx.training.fit import fit  # noqa: E402
from mpi_mlx.training.optimizer import Optimizer  # noqa: E402

options = settings()


class Rewards:
    """Nearly free, and different between completions."""

    kinds = ("length",)

    def __call__(self, texts, examples):
        values = [(sum(map(ord, t)) % 97) / 97 for t in texts]
        return values, {"length": values}


def example(index, prompt):
    content = [{"type": "text", "text": prompt["text"]}]
    if prompt.get("image"):
        content.insert(0, {"type": "image", "image": prompt["image"]})
    messages = [{"role": "user", "content": content if prompt.get("image") else prompt["text"]}]
    if prompt.get("system"):
        messages.insert(0, {"role": "system", "content": prompt["system"]})
    fields = dict(id=str(index), messages=tuple(messages), tools=None, answer="", reasoning=None, meta={})
    return SimpleNamespace(**fields)


model = load_model(options["checkpoint"], dtype=options.get("dtype", "float32"))
model.eos_ids = frozenset()  # completions of full length on all sides
lora = dict(rank=8, alpha=16.0, dropout=0.0, targets="all-linear", kind="lora", projector=False)
attach_lora(model, SimpleNamespace(**lora))
spec = SimpleNamespace(
    stage="rl", algorithm="grpo", steps=10**9, prompts=len(options["prompts"]), group_size=options["group"],
    policy_aware=options.get("policy_aware", 0), policy_aware_sampler="model", importance_weight=False,
    clip_low=0.2, clip_high=0.2, dual_clip=None, kl_coef=0.0, temperature=1.0, top_p=1.0,
    max_completion_tokens=options["tokens"], updates_per_rollout=1, minibatches=1, aggregation="sequence", max_refill=0,
    refill=False, drop_constant=False, scale_advantages=True, negative_weight=1.0, overlong_buffer=0, sft_coef=0.0,
    micro_tokens=options.get("micro_tokens", 2560), learning_rate=1e-5, warmup=0.0, schedule="constant",
    min_lr_ratio=0.1, clip_norm=1.0,
)  # fmt: skip
document = from_text(options["document"]) if options.get("document") else None
examples = [example(i, p) for i, p in enumerate(options["prompts"])]
source = RolloutSource(model, examples, document, spec, Rewards(), 0)
optimizer = Optimizer("adamw")
optimizer.init(model.net.trainable_parameters())
rollout = {}


def look(batch):
    rollout.update(peak=mx.get_peak_memory(), micros=batch.micros)
    mx.reset_peak_memory()
    rows = [(len(g.prompt), len(r.completion_ids)) for m in batch.micros for g in m.groups for r in g.rollouts]
    rollout.update(tokens=sum(t for _, t in rows) / len(rows), length=sum(map(sum, rows)) / len(rows))


clocked = time_batches(source, look)


def prompts_alone() -> dict:
    """Seconds of the last batch's prompts' own forward and backward, without their completions'."""

    def loss(pairs):
        pieces = [Piece(prompt, 0, len(prompt)) for prompt, _ in pairs]
        caches = recording_caches(model.num_layers)
        embeds, positions, _ = embed_pieces(model, pieces)
        model.hidden(embeds, positions, caches)
        return sum(cache.keys.sum() + cache.values.sum() for cache in caches)

    clock = Clock()
    for micro in rollout["micros"]:
        mx.eval(nn.value_and_grad(model.net, loss)(micro.pairs))
    spent = clock.read()
    return {"prompt_seconds": spent["seconds"], "prompt_cpu_seconds": spent["cpu_seconds"]}


steps = fit(
    model.net, source, RolloutObjective(model, spec), spec, total=10**9, seed=0, optimizer=optimizer
)
while True:
    wait()
    mx.reset_peak_memory()
    clock = Clock()
    step = next(steps)
    spent = clock.read()
    same = {"tokens": rollout["tokens"], "length": rollout["length"], "drift": step.metrics["drift"]}
    peaks = {"peak": max(rollout["peak"], mx.get_peak_memory()), "update_peak": mx.get_peak_memory()}
    peaks["cache"] = mx.get_cache_memory()  # what the allocator keeps for reuse
    alone = prompts_alone() if options.get("phases") else {}
    report(**phases(spent, clocked), **alone, **same, **peaks)
