"""A stream of reports as a quickstart yields them; the made-up numbers fall and rise as real ones do."""

import math

from mpi_mlx.training import reports as r

STAGES = ((0, "cpt", 20), (1, "sft", 40), (2, "rl", 60))


def row(model, in_context, accuracy, fmt=1.0, trace=0.9, tokens=None, prefill=None):
    return {
        "model": model, "document_in_context": in_context, "accuracy": accuracy, "format_rate": fmt,
        "trace_match": trace, "n": 500, "prompt_tokens": tokens or (380.5 if in_context else 48.2),
        "prefill_seconds": prefill or (0.0912 if in_context else 0.0143), "majority": 0.214,
    }


def step(stage, number, total, loss, metrics=None, seconds=0.7):
    return r.StepReport(
        stage=stage, step=number, total_steps=total, loss=loss, learning_rate=1e-3 * (1 - number / total),
        tokens=2000, tokens_per_second=1400.0 + 10 * math.sin(number), seconds=seconds,
        memory_bytes=1_240_000_000, grad_norm=0.8, metrics=metrics or {},
    )


def rl_metrics(i, n):
    wave = 0.03 * math.sin(2.3 * i)
    plain = 0.25 + 0.6 * i / n + wave
    return {
        "reward": plain + 0.05, "reward_plain": plain,
        "reward_policy_aware": min(1.08, 0.6 + 0.4 * i / n + wave),
        "reward/exact_match": plain - 0.08, "reward/format": 0.97, "completion_length": 41.2, "finished": 1.0,
        "groups_with_signal": 0.4 + 0.3 * math.sin(i / 9), "clip_fraction": 0.012, "drift": 2e-6,
        "refill_rounds": 0.0, "entropy": 0.31, "groups_trained": 6.0,
    }


def evaluation(model, plain, carried):
    for in_context, accuracy in ((False, plain), (True, carried)):
        for done in range(0, 500, 64):
            yield r.EvaluationProgress(model, in_context, done, 500)
        yield r.EvaluationProgress(model, in_context, 500, 500)
        yield r.EvaluationRow(row(model, in_context, accuracy))


def reports(output="runs/quickstart"):
    yield r.RunStarted("quickstart", output, 8_123_456, 312_320, STAGES, "CPU, 2 threads, OpenBLAS")
    yield r.Message("the document has 412 tokens")
    yield from evaluation("base", 0.186, 0.874)
    scores = {"cpt": (0.243, 0.861), "sft": (0.512, 0.79), "rl": (0.928, 0.902)}
    for index, stage, total in STAGES:
        yield r.StageStarted(index, stage, total)
        for i in range(1, total + 1):
            loss = 0.3 + 2 * math.exp(-6 * i / total) + 0.02 * math.sin(5 * i)
            yield step(stage, i, total, loss, rl_metrics(i, total) if stage == "rl" else None)
            if stage == "sft" and i % 10 == 0:
                yield r.ValidationReport(stage, i, loss + 0.1)
        yield r.StageFinished(index, stage, 0.7 * total)
        yield from evaluation(stage, *scores[stage])
    rows = tuple(
        row(model, in_context, value)
        for model, pair in {"base": (0.186, 0.874), **scores}.items()
        for in_context, value in zip((False, True), pair, strict=True)
    )
    yield r.RunFinished(output, 342.0, rows, f"{output}/report.md")
