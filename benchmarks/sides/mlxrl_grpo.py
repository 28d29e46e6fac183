"""inductive-mlxrl: its quickest rollout (prompts prefilled once, all rows decoded as a batch) and its step.

The step in micro-batches of a group takes three quarters of the time of one batch.
"""

import random

from wire import Clock, preload_blas, report, settings, wait

preload_blas()

import mlx.core as mx  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlxrl.algo.grpo import GRPOAlgorithm  # noqa: E402
from mlxrl.policy.model import LoRAConfig, load_policy_with_lora  # noqa: E402
from mlxrl.rollout.naive import SamplingConfig  # noqa: E402
from mlxrl.rollout.optimized import generate_prefix_cached_group_rollouts  # noqa: E402
from mlxrl.train.grpo import batch_from_rollouts, optimizer_step  # noqa: E402

options = settings()
model, tokenizer, _ = load_policy_with_lora(options["checkpoint"], LoRAConfig(rank=8, scale=2.0, dropout=0.0))
tokenizer._eos_token_ids = set()  # EOS not special: completions of full length on all sides
tokenizer._tokenizer.eos_token = None
optimizer = optim.AdamW(learning_rate=1e-5)
sampling = SamplingConfig(max_tokens=options["tokens"], temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
algorithm = GRPOAlgorithm()
while True:
    wait()
    mx.reset_peak_memory()
    clock = Clock()
    completions = generate_prefix_cached_group_rollouts(
        model=model, tokenizer=tokenizer, prompts=[p["text"] for p in options["prompts"]],
        group_size=options["group"], config=sampling, seed=random.randrange(2**31),
        compile_decode_step=True, batch_groups=True,
    )  # fmt: skip
    rollout = clock.read()["seconds"]
    rewards = [(sum(map(ord, c.text)) % 97) / 97 for c in completions]
    batch = batch_from_rollouts(
        model=model, completions=completions, rewards=rewards, group_size=options["group"], pad_token_id=0,
        algorithm=algorithm, compute_reference=False,
    )  # fmt: skip
    optimizer_step(
        model=model, optimizer=optimizer, batch=batch, beta=0.0, pad_token_id=0, algorithm=algorithm,
        micro_batch_size=options["group"],
    )  # fmt: skip
    mx.synchronize()
    tokens = sum(len(c.completion_tokens) for c in completions) / len(completions)
    report(**clock.read(), rollout_seconds=rollout, tokens=tokens, peak=mx.get_peak_memory())
